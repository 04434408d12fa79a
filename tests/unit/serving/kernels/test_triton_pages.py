"""Gather and scatter of pages: the CPU form, and the kernel in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from serving.kernels.pages import gather_pages, scatter_pages

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import pages as device

PAGES, LAYERS, ROW = 6, 4, 10
IDS = torch.tensor([4, 0, 3])


def pool_of(dtype: torch.dtype) -> Tensor:
    return torch.arange(PAGES * LAYERS * 64 * ROW).remainder(251).reshape(PAGES, LAYERS, 64, ROW).to(dtype)


def copy(pool: Tensor, buffer: Tensor, first_layer: int, *, into_pool: bool) -> None:
    layer_bytes = pool.stride(1) * pool.element_size()
    flat = pool.view(torch.uint8).flatten(1), buffer.view(torch.uint8).flatten(1)
    device.copy_pages(flat[0], IDS, first_layer * layer_bytes, flat[1], into_pool=into_pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_range_of_layers_leaves_its_pages_and_comes_back(dtype: torch.dtype) -> None:
    pool = pool_of(dtype)
    got, want = (torch.empty(3, 2, 64, ROW, dtype=dtype) for _ in range(2))
    gather_pages(pool, IDS, 1, 2, want)
    assert torch.equal(want, torch.stack([pool[page, 1:3] for page in IDS.tolist()]))
    copy(pool, got, 1, into_pool=False)
    assert torch.equal(got, want)

    by_kernel, by_torch = pool.clone(), pool.clone()
    copy(by_kernel, got + 1, 2, into_pool=True)
    scatter_pages(by_torch, IDS, 2, 2, got + 1)
    assert torch.equal(by_kernel, by_torch)
    assert torch.equal(by_kernel[IDS, 2:], got + 1)
    assert torch.equal(by_kernel[:, :2], pool[:, :2])
    assert torch.equal(by_kernel[[1, 2, 5]], pool[[1, 2, 5]])


def test_pages_nobody_named_may_hold_anything() -> None:
    pool = pool_of(torch.float32)
    pool[[1, 2, 5]] = math.nan
    out = torch.empty(3, LAYERS, 64, ROW)
    copy(pool, out, 0, into_pool=False)
    assert out.isfinite().all()
