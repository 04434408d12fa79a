"""Whole pages of a range of layers, between the KV pool and one contiguous buffer: what a hand-off sends in one piece.

The pool is `[num_pages + 1, num_layers, 64, row]` of any dtype, pages any distance apart, a page's layers side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_pages(kv_pool: Tensor, page_ids_N: Tensor, first_layer: int, num_layers: int, out: Tensor) -> None:
    """`out` [N, num_layers, 64, row], contiguous, = layers `[first_layer, first_layer + num_layers)` of the pages (int64 or int32 ids)."""
    _check(kv_pool, page_ids_N, first_layer, num_layers, out)
    if kv_pool.is_cuda:
        _copy(kv_pool, page_ids_N, first_layer, out, into_pool=False)
    else:
        gather_pages_reference(kv_pool, page_ids_N, first_layer, num_layers, out)


def scatter_pages(kv_pool: Tensor, page_ids_N: Tensor, first_layer: int, num_layers: int, source: Tensor) -> None:
    """The way back: the pages' layers = `source` [N, num_layers, 64, row], contiguous. A page named twice holds either."""
    _check(kv_pool, page_ids_N, first_layer, num_layers, source)
    if kv_pool.is_cuda:
        _copy(kv_pool, page_ids_N, first_layer, source, into_pool=True)
    else:
        scatter_pages_reference(kv_pool, page_ids_N, first_layer, num_layers, source)


def gather_pages_reference(kv_pool: Tensor, page_ids_N: Tensor, first_layer: int, num_layers: int, out: Tensor) -> None:
    out.copy_(kv_pool[:, first_layer : first_layer + num_layers].index_select(0, page_ids_N))


def scatter_pages_reference(
    kv_pool: Tensor, page_ids_N: Tensor, first_layer: int, num_layers: int, source: Tensor
) -> None:
    kv_pool[:, first_layer : first_layer + num_layers].index_copy_(0, page_ids_N.to(torch.int64), source)


def _check(kv_pool: Tensor, page_ids_N: Tensor, first_layer: int, num_layers: int, buffer: Tensor) -> None:
    assert 0 <= first_layer <= kv_pool.shape[1] - num_layers, "layers outside the pool"
    assert buffer.dtype == kv_pool.dtype, "a buffer of the pool's dtype"
    assert buffer.is_contiguous(), "a contiguous buffer"
    assert buffer.shape == (page_ids_N.shape[0], num_layers, *kv_pool.shape[2:]), "one entry a page and layer"


def _copy(kv_pool: Tensor, page_ids_N: Tensor, first_layer: int, buffer: Tensor, *, into_pool: bool) -> None:
    from serving.kernels.triton.pages import copy_pages

    assert kv_pool[0].is_contiguous(), "layers of a page must lie side by side"
    layer_bytes = kv_pool.stride(1) * kv_pool.element_size()
    copy_pages(
        kv_pool.view(torch.uint8).flatten(1),
        page_ids_N,
        first_layer * layer_bytes,
        buffer.view(torch.uint8).flatten(1),
        into_pool=into_pool,
    )
