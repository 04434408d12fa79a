"""Checksums of pages: what changes them and what does not, and the kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.page_sums import page_sums, page_sums_reference

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton.page_sums import page_sums as device_sums

PAGES = [(4, 64), (0, 17), (4, 1), (2, 63)]


def pool_of(row_bytes: int) -> Tensor:
    """5 pages of 3 layers; every bit pattern may stand in it."""
    generator = torch.Generator().manual_seed(row_bytes)
    return torch.randint(0, 256, (5, 3, 64, row_bytes), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("dtype", "row_bytes"), [(torch.bfloat16, 1152), (torch.uint8, 656), (torch.float32, 24)])
def test_the_kernel_sums_up_what_the_reference_does(dtype: torch.dtype, row_bytes: int) -> None:
    bytes_of = pool_of(row_bytes)
    pool = bytes_of.view(dtype)
    want = page_sums_reference(pool, PAGES)
    assert torch.equal(page_sums(pool, PAGES), want)
    assert torch.equal(device_sums(pool, PAGES), want)
    bytes_of[1] += 1
    bytes_of[0, :, 17:] += 1
    assert torch.equal(device_sums(pool, PAGES), want)
    bytes_of[0, 2, 16, -1] += 1
    changed = device_sums(pool, PAGES)
    assert (changed != want).tolist() == [False, True, False, False]


def test_every_changed_byte_and_every_swap_changes_a_sum() -> None:
    pool = pool_of(20)[:1]

    def summed(changed: Tensor) -> int:
        return int(page_sums(changed, [(0, 64)]))

    whole = summed(pool)
    assert whole == summed(pool.clone())
    for place in (0, 1, 2047, 3839):
        for difference in (1, 128, 255):
            other = pool.clone()
            other.view(-1)[place] += difference
            assert summed(other) != whole
    assert summed(pool.flip(0, 1, 2, 3)) != whole
    assert summed(pool.roll(1, dims=1)) != whole
    assert summed(pool.roll(1, dims=2)) != whole
