"""What a step with drafts keeps and picks of its slots, each part in one launch on a GPU.

    opened      a slot's page table, position, last token and hidden state, with the new page noted
    placed      positions, pages' rows and lengths of the next tokens of each row
    accepted    the drafts that were drawn, and what the slot goes on with

B rows, T tokens of each, S slots, P pages, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from serving.kernels.rows import PAGE_TOKENS


class Opened(NamedTuple):
    """[B, P] in the table's dtype, int64 [B], int64 [B], [B, D]."""

    page_table_BP: Tensor
    positions_B: Tensor
    token_B: Tensor
    hidden_BD: Tensor


class Placed(NamedTuple):
    """int64 [B * T] each, those of a row side by side, and the length with all T, int32 or int64 [B]."""

    positions_N: Tensor
    before_N: Tensor
    row_ids_N: Tensor
    context_lens_B: Tensor


def opened(
    page_table_SP: Tensor,
    positions_S: Tensor,
    last_token_S: Tensor,
    hidden_SD: Tensor,
    slots_B: Tensor,
    known_B: Tensor,
    page_places_B: Tensor,
    page_ids_B: Tensor,
) -> Opened:
    """The page table gets `page_ids_B` at `page_places_B` first. `known_B`: the position where it is known, else negative: the slot's.

    int64 [B] each; rows of one slot must be equal.
    """
    if page_table_SP.is_cuda:
        from serving.kernels.triton import draft_rows as device

        slots = page_table_SP, positions_S, last_token_S, hidden_SD
        return Opened(*device.opened(*slots, slots_B, known_B, page_places_B, page_ids_B))
    return opened_reference(
        page_table_SP, positions_S, last_token_S, hidden_SD, slots_B, known_B, page_places_B, page_ids_B
    )


def opened_reference(
    page_table_SP: Tensor,
    positions_S: Tensor,
    last_token_S: Tensor,
    hidden_SD: Tensor,
    slots_B: Tensor,
    known_B: Tensor,
    page_places_B: Tensor,
    page_ids_B: Tensor,
) -> Opened:
    page_table_SP.index_put_((slots_B, page_places_B), page_ids_B.to(page_table_SP.dtype))
    return Opened(
        page_table_SP.index_select(0, slots_B),
        torch.where(known_B >= 0, known_B, positions_S.index_select(0, slots_B)),
        last_token_S.index_select(0, slots_B),
        hidden_SD.index_select(0, slots_B),
    )


def placed(page_table_BP: Tensor, positions_B: Tensor, *, first: int, num_tokens: int) -> Placed:
    """Of the tokens `first` to `first + num_tokens` places after `positions_B`. `before_N`: a position less."""
    if page_table_BP.is_cuda:
        from serving.kernels.triton import draft_rows as device

        return Placed(*device.placed(page_table_BP, positions_B, first=first, num_tokens=num_tokens))
    return placed_reference(page_table_BP, positions_B, first=first, num_tokens=num_tokens)


def placed_reference(page_table_BP: Tensor, positions_B: Tensor, *, first: int, num_tokens: int) -> Placed:
    positions_BT = positions_B[:, None] + first + torch.arange(num_tokens, device=positions_B.device)
    pages_BT = page_table_BP.gather(1, positions_BT // PAGE_TOKENS).to(torch.int64)
    row_ids_BT = pages_BT * PAGE_TOKENS + positions_BT % PAGE_TOKENS
    positions_N = positions_BT.flatten()
    return Placed(positions_N, positions_N - 1, row_ids_BT.flatten(), positions_B + first + num_tokens)


def num_accepted(tokens_BT: Tensor, drafts_BK: Tensor) -> Tensor:
    """int64 [B]: how many drafts stand before the first that is not the token drawn for its position."""
    return (tokens_BT[:, :-1] == drafts_BK).cumprod(dim=1).sum(dim=1)


def accepted(
    last_token_S: Tensor,
    hidden_SD: Tensor,
    positions_S: Tensor,
    slots_B: Tensor,
    positions_B: Tensor,
    hidden_BTD: Tensor,
    tokens_BT: Tensor,
    drafts_BK: Tensor,
) -> Tensor:
    """int64 [B, T + 1]: the tokens drawn, and `num_accepted` of the drafts.

    The slots go on with the last token that counts, its hidden state, and the position behind it. K = T - 1.
    """
    state = last_token_S, hidden_SD, positions_S
    if last_token_S.is_cuda:
        from serving.kernels.triton import draft_rows as device

        return device.accepted(*state, slots_B, positions_B, hidden_BTD, tokens_BT, drafts_BK)
    return accepted_reference(*state, slots_B, positions_B, hidden_BTD, tokens_BT, drafts_BK)


def accepted_reference(
    last_token_S: Tensor,
    hidden_SD: Tensor,
    positions_S: Tensor,
    slots_B: Tensor,
    positions_B: Tensor,
    hidden_BTD: Tensor,
    tokens_BT: Tensor,
    drafts_BK: Tensor,
) -> Tensor:
    accepted_B = num_accepted(tokens_BT, drafts_BK)
    chosen_B1 = accepted_B[:, None]
    hidden_BD = hidden_BTD.gather(1, chosen_B1[:, :, None].expand(-1, 1, hidden_BTD.shape[2]))[:, 0]
    last_token_S.index_copy_(0, slots_B, tokens_BT.gather(1, chosen_B1)[:, 0])
    hidden_SD.index_copy_(0, slots_B, hidden_BD)
    positions_S.index_copy_(0, slots_B, positions_B + accepted_B + 1)
    return torch.cat((tokens_BT, chosen_B1), dim=1)
