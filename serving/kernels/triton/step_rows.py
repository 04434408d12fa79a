"""A decode step's rows by their slots in one launch; see `serving.kernels.step_rows`. Bound: the launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAGE_TOKENS = tl.constexpr(64)
_MOST_COLUMNS = 1024


def step_rows(
    page_table_SP: Tensor, last_token_S: Tensor, slots_B: Tensor, positions_B: Tensor, row_ids_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_pages = len(slots_B), page_table_SP.shape[1]
    assert page_table_SP.stride(1) == last_token_S.stride(0) == 1
    assert slots_B.stride(0) == positions_B.stride(0) == row_ids_B.stride(0) == 1
    page_table_BP = page_table_SP.new_empty(num_rows, num_pages)
    token_ids_B = last_token_S.new_empty(num_rows)
    context_lens_B = last_token_S.new_empty(num_rows, dtype=torch.int32)
    block = min(_MOST_COLUMNS, triton.next_power_of_2(num_pages))
    step_rows_kernel[(num_rows, triton.cdiv(num_pages, block))](
        page_table_SP, last_token_S, slots_B, positions_B, row_ids_B, page_table_BP, token_ids_B, context_lens_B,
        num_pages, page_table_SP.stride(0), BLOCK=block, num_warps=1 if block <= 256 else 4,
    )  # fmt: skip
    return page_table_BP, token_ids_B, context_lens_B


@triton.jit
def step_rows_kernel(
    table_ptr,
    last_token_ptr,
    slots_ptr,
    positions_ptr,
    row_ids_ptr,
    row_table_ptr,
    token_ids_ptr,
    lens_ptr,
    num_pages,
    table_stride,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row's page table."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    position = tl.load(positions_ptr + row)
    page = (tl.load(row_ids_ptr + row) // PAGE_TOKENS).to(row_table_ptr.dtype.element_ty)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_own = column == position // PAGE_TOKENS
    table = table_ptr + slot * table_stride + column
    pages = tl.load(table, mask=(column < num_pages) & ~is_own, other=0)
    tl.store(table, page, mask=is_own)
    tl.store(row_table_ptr + row * num_pages + column, tl.where(is_own, page, pages), mask=column < num_pages)
    if tl.program_id(1) == 0:
        tl.store(token_ids_ptr + row, tl.load(last_token_ptr + slot))
        tl.store(lens_ptr + row, (position + 1).to(tl.int32))
