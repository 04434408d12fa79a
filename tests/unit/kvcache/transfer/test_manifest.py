"""What both sides sum up: valid rows of every layer, and nothing else."""

from __future__ import annotations

import zlib

import torch

from kvcache.layout import PageLayout
from kvcache.pool import KVPool
from kvcache.transfer.manifest import page_checksums, weighted_sum

LAYOUT = PageLayout(num_layers=2, num_mtp_layers=1, row_width=6, element_bytes=4)


def random_pool() -> KVPool:
    pool = KVPool(LAYOUT, 3, torch.float32)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(0)))
    return pool


def test_a_checksum_covers_the_valid_rows_of_every_layer_and_no_other() -> None:
    pool = random_pool()
    pages = {7: (1, 64), 8: (2, 5)}
    before = page_checksums(pool, pages)
    assert before[8] == zlib.crc32(pool.page(2)[:, :5].contiguous().numpy().tobytes())
    pool.tensor[2, :, 5:] = torch.nan
    assert page_checksums(pool, pages) == before
    for layer in range(LAYOUT.num_planes):
        pool.tensor[2, layer, 4, 5] += 1
        changed = page_checksums(pool, pages)
        assert changed[7] == before[7]
        assert changed[8] != before[8]
        before = changed


def test_every_changed_byte_and_every_swap_changes_the_sum_that_gpus_take() -> None:
    bytes_N = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def summed(values_N: torch.Tensor) -> int:
        return int(weighted_sum(values_N)) & (1 << 63) - 1

    whole = summed(bytes_N)
    assert whole == summed(bytes_N.clone())
    for place in (0, 1, 2047, 4999):
        for difference in (1, 128, 255):
            other = bytes_N.clone()
            other[place] = (int(other[place]) + difference) % 256
            assert summed(other) != whole
    assert summed(bytes_N.flip(0)) != whole
    assert summed(torch.cat([bytes_N[2500:], bytes_N[:2500]])) != whole
