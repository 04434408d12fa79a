"""Checksums of pages where they lie, a launch a page: see `serving.kernels.page_sums`.

A hand-off waits for them on the host, so what counts is launches: in torch's operations a page takes three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.page_sums import STRIDE

_BLOCK = 4096


def page_sums(kv_pool: Tensor, pages: Sequence[tuple[int, int]]) -> Tensor:
    _, num_layers, num_rows_of_page, width = kv_pool.shape
    row_bytes = width * kv_pool.element_size()
    assert kv_pool.is_contiguous(), "rows of a layer must lie side by side"
    assert row_bytes % 4 == 0, "rows of whole 32-bit words"
    words = kv_pool.view(torch.int32)
    sums_N = torch.zeros(len(pages), dtype=torch.int64, device=kv_pool.device)
    for place, (page_id, num_rows) in enumerate(pages):
        _sum_kernel[(num_layers, triton.cdiv(num_rows * row_bytes // 4, _BLOCK))](
            words,
            sums_N,
            page_id,
            num_rows,
            place,
            num_layers,
            num_rows_of_page,
            ROW_WORDS=row_bytes // 4,
            WEIGHT=STRIDE,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return sums_N


@triton.jit(do_not_specialize=["page_id", "num_rows", "place"])
def _sum_kernel(
    words_ptr,
    sums_ptr,
    page_id,
    num_rows,
    place,
    num_layers,
    num_rows_of_page,
    ROW_WORDS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = (page_id.to(tl.int64) * num_layers + layer) * num_rows_of_page * ROW_WORDS
    value = tl.load(words_ptr + begin + word, mask=word < num_rows * ROW_WORDS, other=0).to(tl.int64)
    weight = (layer * num_rows * ROW_WORDS + word) * WEIGHT | 1
    # Integers: the sum is the same in any order.
    tl.atomic_add(sums_ptr + place, tl.sum(value * weight, axis=0), sem="relaxed")
