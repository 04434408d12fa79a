"""A checksum of a page's rows that a GPU can take where the page lies: a weighted sum of its 32-bit words, which every changed byte changes.

The pool is `[num_pages + 1, num_layers, 64, row]`, contiguous, of any dtype whose rows are whole 32-bit words.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

STRIDE = 0x9E3779B97F4A7C15 >> 1
"""Word i of the rows, layer by layer, weighs `i * STRIDE | 1`, odd and its own."""


def page_sums(kv_pool: Tensor, pages: Sequence[tuple[int, int]]) -> Tensor:
    """int64 [N], modulo 2^64 with a sign: of (page id, number of rows) each the sum over the first rows of every layer."""
    if not kv_pool.is_cuda:
        return page_sums_reference(kv_pool, pages)
    from serving.kernels.triton.page_sums import page_sums as device

    return device(kv_pool, pages)


def page_sums_reference(kv_pool: Tensor, pages: Sequence[tuple[int, int]]) -> Tensor:
    return torch.stack([_weighted_sum(kv_pool[page_id, :, :num_rows]) for page_id, num_rows in pages])


def _weighted_sum(rows: Tensor) -> Tensor:
    words_W = rows.contiguous().view(torch.uint8).flatten().view(torch.int32)
    num_words = words_W.shape[0]
    weights_W = _weights(1 << (num_words - 1).bit_length(), rows.device)[:num_words]
    return (words_W * weights_W).sum()


@functools.cache
def _weights(num_words: int, device: torch.device) -> Tensor:
    """int64 [W]. Kept: to make them takes more launches than to use them. Powers of two, so that there are few."""
    return torch.arange(num_words, dtype=torch.int64, device=device) * STRIDE | 1
