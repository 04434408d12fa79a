"""What both sides sum up: valid rows of every layer, and nothing else."""

from __future__ import annotations

import zlib

import torch

from kvcache.layout import PageLayout
from kvcache.pool import KVPool
from kvcache.transfer.manifest import page_checksums

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
