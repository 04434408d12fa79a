"""Gather and scatter of pages on the device, in a pool whose offsets pass 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from serving.kernels.pages import gather_pages, gather_pages_reference, scatter_pages
from tests.gpu.graphs import replayed

pytestmark = pytest.mark.gpu


def test_a_range_of_layers_leaves_its_pages_and_comes_back() -> None:
    torch.manual_seed(0)
    pool = torch.zeros(1000, 61, 64, 576, device="cuda", dtype=torch.bfloat16)
    ids = torch.randperm(1000, device="cuda")[:20]
    ids[0] = 999
    assert pool[999].data_ptr() - pool.data_ptr() > 2 * 2**31
    source = torch.randn(20, 7, 64, 576, device="cuda").to(torch.bfloat16)
    replayed(lambda: scatter_pages(pool, ids, 54, 7, source))
    assert int((pool != 0).any(-1).sum()) == 20 * 7 * 64
    got, want, eager = (torch.empty_like(source) for _ in range(3))
    replayed(lambda: gather_pages(pool, ids, 54, 7, got))
    gather_pages_reference(pool, ids, 54, 7, want)
    gather_pages(pool, ids, 54, 7, eager)
    assert torch.equal(got, source)
    assert torch.equal(want, source)
    assert torch.equal(eager, source)
    gather_pages(pool, ids.flip(0), 54, 7, got)
    assert not torch.equal(got, source)
    pool.zero_()
    scatter_pages(pool, ids, 54, 7, source)
    assert int((pool != 0).any(-1).sum()) == 20 * 7 * 64
    gather_pages(pool, ids, 54, 7, got)
    assert torch.equal(got, source)
