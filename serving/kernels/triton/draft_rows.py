"""A step with drafts: what it picks of its slots and what it leaves there; see `serving.kernels.draft_rows`. Bound: the launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAGE_TOKENS = tl.constexpr(64)
_MOST_COLUMNS = 1024


def opened(
    page_table_SP: Tensor,
    positions_S: Tensor,
    last_token_S: Tensor,
    hidden_SD: Tensor,
    slots_B: Tensor,
    known_B: Tensor,
    page_places_B: Tensor,
    page_ids_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_pages, width = len(slots_B), page_table_SP.shape[1], hidden_SD.shape[1]
    assert page_table_SP.stride(1) == hidden_SD.stride(1) == positions_S.stride(0) == last_token_S.stride(0) == 1
    assert all(x.stride(0) == 1 for x in (slots_B, known_B, page_places_B, page_ids_B))
    outs = (
        page_table_SP.new_empty(num_rows, num_pages),
        torch.empty_like(slots_B),
        torch.empty_like(slots_B),
        hidden_SD.new_empty(num_rows, width),
    )
    block = min(_MOST_COLUMNS, triton.next_power_of_2(max(num_pages, width)))
    opened_kernel[(num_rows, triton.cdiv(max(num_pages, width), block))](
        page_table_SP, positions_S, last_token_S, hidden_SD, slots_B, known_B, page_places_B, page_ids_B, *outs,
        num_pages, width, page_table_SP.stride(0), hidden_SD.stride(0), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return outs


@triton.jit
def opened_kernel(
    table_ptr,
    positions_ptr,
    last_token_ptr,
    hidden_ptr,
    slots_ptr,
    known_ptr,
    places_ptr,
    page_ids_ptr,
    row_table_ptr,
    row_positions_ptr,
    row_tokens_ptr,
    row_hidden_ptr,
    num_pages,
    width,
    table_stride,
    hidden_stride,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row's page table and hidden state."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    page = tl.load(page_ids_ptr + row).to(row_table_ptr.dtype.element_ty)
    is_new = column == tl.load(places_ptr + row)
    table = table_ptr + slot * table_stride + column
    pages = tl.load(table, mask=(column < num_pages) & ~is_new, other=0)
    tl.store(table, page, mask=is_new)
    tl.store(row_table_ptr + row * num_pages + column, tl.where(is_new, page, pages), mask=column < num_pages)
    hidden = tl.load(hidden_ptr + slot * hidden_stride + column, mask=column < width, other=0.0)
    tl.store(row_hidden_ptr + row * width + column, hidden, mask=column < width)
    if tl.program_id(1) == 0:
        known = tl.load(known_ptr + row)
        tl.store(row_positions_ptr + row, tl.where(known >= 0, known, tl.load(positions_ptr + slot)))
        tl.store(row_tokens_ptr + row, tl.load(last_token_ptr + slot))


def placed(
    page_table_BP: Tensor, positions_B: Tensor, *, first: int, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = len(positions_B)
    assert page_table_BP.stride(1) == positions_B.stride(0) == 1
    positions_N, before_N, row_ids_N = (positions_B.new_empty(num_rows * num_tokens) for _ in range(3))
    context_lens_B = positions_B.new_empty(num_rows, dtype=torch.int32)
    placed_kernel[(num_rows,)](
        page_table_BP, positions_B, positions_N, before_N, row_ids_N, context_lens_B, page_table_BP.stride(0),
        FIRST=first, TOKENS=num_tokens, BLOCK=triton.next_power_of_2(num_tokens), num_warps=1,
    )  # fmt: skip
    return positions_N, before_N, row_ids_N, context_lens_B


@triton.jit
def placed_kernel(
    table_ptr,
    positions_ptr,
    out_positions_ptr,
    before_ptr,
    row_ids_ptr,
    lens_ptr,
    table_stride,
    FIRST: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tokens of one row."""
    row = tl.program_id(0)
    begin = tl.load(positions_ptr + row) + FIRST
    token = tl.arange(0, BLOCK)
    mask = token < TOKENS
    position = begin + token
    page = tl.load(table_ptr + row * table_stride + position // PAGE_TOKENS, mask=mask, other=0).to(tl.int64)
    at = row * TOKENS + token
    tl.store(out_positions_ptr + at, position, mask=mask)
    tl.store(before_ptr + at, position - 1, mask=mask)
    tl.store(row_ids_ptr + at, page * PAGE_TOKENS + position % PAGE_TOKENS, mask=mask)
    tl.store(lens_ptr + row, (begin + TOKENS).to(tl.int32))


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
    num_rows, num_tokens, width = hidden_BTD.shape
    assert hidden_BTD.is_contiguous()
    assert tokens_BT.is_contiguous()
    assert hidden_SD.stride(1) == last_token_S.stride(0) == positions_S.stride(0) == 1
    assert slots_B.stride(0) == positions_B.stride(0) == 1
    outcome_BX = tokens_BT.new_empty(num_rows, num_tokens + 1)
    block = min(_MOST_COLUMNS, triton.next_power_of_2(width))
    accepted_kernel[(num_rows, triton.cdiv(width, block))](
        last_token_S, hidden_SD, positions_S, slots_B, positions_B, hidden_BTD, tokens_BT, drafts_BK, outcome_BX,
        width, hidden_SD.stride(0), drafts_BK.stride(0), drafts_BK.stride(1),
        TOKENS=num_tokens, COLUMNS=triton.next_power_of_2(num_tokens + 1), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return outcome_BX


@triton.jit
def accepted_kernel(
    last_token_ptr,
    hidden_ptr,
    positions_ptr,
    slots_ptr,
    row_positions_ptr,
    row_hidden_ptr,
    tokens_ptr,
    drafts_ptr,
    outcome_ptr,
    width,
    hidden_stride,
    draft_row_stride,
    draft_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of the hidden state that one row's slot goes on with."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    token = tl.arange(0, COLUMNS)
    drawn = tl.load(tokens_ptr + row * TOKENS + token, mask=token < TOKENS, other=0)
    drafts = drafts_ptr + row * draft_row_stride + token * draft_stride
    draft = tl.load(drafts, mask=token < TOKENS - 1, other=0)
    # The first that differs; the token behind the last draft differs from none.
    count = tl.min(tl.where((token < TOKENS - 1) & (draft == drawn), TOKENS - 1, tl.minimum(token, TOKENS - 1)), axis=0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    hidden = tl.load(row_hidden_ptr + (row * TOKENS + count) * width + column, mask=column < width, other=0.0)
    tl.store(hidden_ptr + slot * hidden_stride + column, hidden, mask=column < width)
    if tl.program_id(1) == 0:
        tl.store(last_token_ptr + slot, tl.sum(tl.where(token == count, drawn, 0), axis=0))
        tl.store(positions_ptr + slot, tl.load(row_positions_ptr + row) + count + 1)
        outcome = tl.where(token == TOKENS, count.to(tl.int64), drawn)
        tl.store(outcome_ptr + row * (TOKENS + 1) + token, outcome, mask=token <= TOKENS)
