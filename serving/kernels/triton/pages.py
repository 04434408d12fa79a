"""Copies pages between the KV pool and one contiguous buffer; see `serving.kernels.pages`. Bound: the device copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 4096


def copy_pages(pool_NB: Tensor, page_ids_N: Tensor, first_byte: int, buffer_NB: Tensor, *, into_pool: bool) -> None:
    """`pool_NB` uint8 [pages, bytes a page], `buffer_NB` uint8 [N, bytes]: each page's bytes from `first_byte` on, either way."""
    num_pages, num_bytes = buffer_NB.shape
    assert pool_NB.stride(1) == 1, "bytes of a page must lie side by side"
    assert buffer_NB.is_contiguous(), "a contiguous buffer"
    # The widest unit that divides every address: 16-byte accesses of what the compiler sees as 4-byte words.
    unit = torch.int32 if all(x % 4 == 0 for x in (first_byte, num_bytes, pool_NB.stride(0))) else torch.uint8
    pool, buffer = pool_NB.view(unit), buffer_NB.view(unit)
    size = unit.itemsize
    if num_pages and num_bytes:
        _copy_kernel[(triton.cdiv(num_bytes // size, _WORDS), num_pages)](
            pool,
            page_ids_N,
            buffer,
            pool.stride(0),
            first_byte // size,
            num_bytes // size,
            WORDS=_WORDS,
            INTO_POOL=into_pool,
            num_warps=8,
        )


@triton.jit
def _copy_kernel(
    pool_ptr,
    page_ids_ptr,
    buffer_ptr,
    page_stride,
    first_word,
    num_words,
    WORDS: tl.constexpr,
    INTO_POOL: tl.constexpr,
):
    page = tl.load(page_ids_ptr + tl.program_id(1)).to(tl.int64)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < num_words
    in_pool = pool_ptr + page * page_stride + first_word + word
    in_buffer = buffer_ptr + tl.program_id(1).to(tl.int64) * num_words + word
    if INTO_POOL:
        tl.store(in_pool, tl.load(in_buffer, mask=inside), mask=inside)
    else:
        tl.store(in_buffer, tl.load(in_pool, mask=inside), mask=inside)
