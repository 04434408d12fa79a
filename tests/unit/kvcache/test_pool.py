"""The tensor behind the pages."""

import resource
import sys

import pytest
import torch

from kvcache.layout import PageLayout
from kvcache.manager import KVManager
from kvcache.pool import KVPool

LAYOUT = PageLayout(num_layers=2, num_mtp_layers=1, row_width=8, element_bytes=4)


def test_a_page_is_one_piece_of_memory() -> None:
    pool = KVPool(LAYOUT, 3, torch.float32)
    assert pool.tensor.shape == (4, 3, 64, 8)
    assert pool.tensor.is_contiguous()
    assert pool.page(2).data_ptr() == pool.address(2) == pool.base_address + 2 * LAYOUT.page_bytes
    assert pool.num_bytes == 4 * LAYOUT.page_bytes
    assert not pool.tensor.any()


def test_the_scratch_page_is_never_handed_out() -> None:
    pool, manager = KVPool(LAYOUT, 3, torch.float32), KVManager(3)
    allocation = manager.acquire([], 3 * 64)
    assert allocation is not None
    assert pool.scratch_page_id not in allocation.page_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_poison_is_not_a_number_in_every_type(dtype: torch.dtype) -> None:
    layout = PageLayout(num_layers=2, num_mtp_layers=1, row_width=8, element_bytes=dtype.itemsize)
    pool = KVPool(layout, 2, dtype)
    pool.poison(1)
    assert pool.page(1).float().isnan().all()
    assert not pool.page(0).float().isnan().any()
    pool.poison_all()
    assert pool.page(0).float().isnan().all()
    assert not pool.page(pool.scratch_page_id).float().isnan().any()


def test_a_page_given_up_is_poisoned() -> None:
    pool = KVPool(LAYOUT, 2, torch.float32)
    manager = KVManager(2, on_free=pool.poison)
    allocation = manager.acquire([], 64)
    assert allocation is not None
    assert not pool.page(allocation.page_ids[0]).isnan().any()
    manager.release(allocation.page_ids)
    assert pool.page(allocation.page_ids[0]).isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux")
def test_pages_that_nobody_wrote_cost_no_memory() -> None:
    layout = PageLayout(num_layers=61, num_mtp_layers=1, row_width=576, element_bytes=2)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pool = KVPool(layout, 500, torch.bfloat16)
    after_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert pool.num_bytes > 2 * 2**30
    assert (after_kib - before_kib) * 1024 < 2**26
