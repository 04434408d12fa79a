"""What a decode step knows of its rows by their slots: pages, last token, length. One launch where it is captured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from serving.kernels.rows import PAGE_TOKENS


class StepRows(NamedTuple):
    """`page_table_BP` in the dtype of the slots' table, `token_ids_B` int64, `context_lens_B` int: with the row's own token."""

    page_table_BP: Tensor
    token_ids_B: Tensor
    context_lens_B: Tensor


def step_rows(
    page_table_SP: Tensor, last_token_S: Tensor, slots_B: Tensor, positions_B: Tensor, row_ids_B: Tensor
) -> StepRows:
    """Notes the page of each row's token in its slot's page table, then picks what the step reads of the slot.

    int64 [B] each, `last_token_S` [S]; the row of position p is `page * 64 + p % 64`. Rows of one slot must be equal.
    """
    if page_table_SP.is_cuda:
        from serving.kernels.triton import step_rows as device

        return StepRows(*device.step_rows(page_table_SP, last_token_S, slots_B, positions_B, row_ids_B))
    return step_rows_reference(page_table_SP, last_token_S, slots_B, positions_B, row_ids_B)


def step_rows_reference(
    page_table_SP: Tensor, last_token_S: Tensor, slots_B: Tensor, positions_B: Tensor, row_ids_B: Tensor
) -> StepRows:
    pages_B = (row_ids_B // PAGE_TOKENS).to(page_table_SP.dtype)
    page_table_SP.index_put_((slots_B, positions_B // PAGE_TOKENS), pages_B)
    return StepRows(page_table_SP[slots_B], last_token_S[slots_B], (positions_B + 1).to(torch.int32))
