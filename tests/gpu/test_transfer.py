"""Pages from GPU to GPU: two processes, each seeing one GPU, as workers do. With one GPU both use it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch

from kvcache.layout import PageLayout
from kvcache.pool import KVPool
from kvcache.transfer.manifest import page_checksums, weighted_sum
from kvcache.transfer.nixl import NixlSource, NixlTarget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

LAYOUT = PageLayout(num_layers=27, num_mtp_layers=0, row_width=576, element_bytes=2)
NUM_PAGES = 80


def numbered_pool(seed: int) -> KVPool:
    pool = KVPool(LAYOUT, NUM_PAGES, torch.bfloat16, "cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=generator, device="cuda"))
    torch.cuda.synchronize()
    return pool


def _target_process(pipe: Connection, gpu: int) -> None:
    """Answers each notification with the sums of all pages; ends on the first message."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    pool = numbered_pool(2)
    target = NixlTarget("decode-far", pool)
    pipe.send(target.agent)
    while not pipe.poll(0.0005):
        for notice in target.notifications():
            pipe.send((notice, page_checksums(pool, {page: (page, 64) for page in range(NUM_PAGES)})))
    target.close()


@pytest.fixture
def far() -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_target_process, args=(other, torch.cuda.device_count() - 1), daemon=True)
    process.start()
    yield pipe
    pipe.send(None)
    process.join(10)
    process.kill()


def test_pages_arrive_on_the_other_gpu_whole_and_no_other_is_touched(far: Connection) -> None:
    ours, theirs = numbered_pool(1), numbered_pool(2)
    sums = page_checksums(ours, {page: (page, 64) for page in range(NUM_PAGES)})
    expected = page_checksums(theirs, {page: (page, 64) for page in range(NUM_PAGES)})
    source = NixlSource("prefill-near", ours)
    assert far.poll(60), "the target does not come up"
    peer = source.connect(far.recv())
    sources = [3, 4, 5, *range(79, 40, -2)]
    targets = [7, 8, 1, *range(20, 40)]
    source.write(peer, sources, targets, b"far")
    end_s = time.monotonic() + 20
    completed = []
    while source.num_open and time.monotonic() < end_s:
        completed += source.poll()
    assert [done.error for done in completed] == [None]
    assert far.poll(20)
    notice, held = far.recv()
    assert notice == b"far"
    assert held != expected, "nothing was written"
    for ours_id, theirs_id in zip(sources, targets, strict=True):
        expected[theirs_id] = sums[ours_id]
    assert held == expected
    source.close()


def test_the_sum_of_a_page_is_the_same_on_gpu_and_cpu_and_sees_one_bit() -> None:
    pool = numbered_pool(3)
    before = page_checksums(pool, {0: (5, 64), 1: (6, 17)})
    bytes_N = pool.page(6)[:, :17].contiguous().view(torch.uint8).flatten().cpu()
    assert before[1] == int(weighted_sum(bytes_N)) & (1 << 63) - 1
    pool.tensor[5, 26, 63, 575:].view(torch.uint8)[1] ^= 1
    pool.tensor[6, :, 17:] = torch.nan
    torch.cuda.synchronize()
    after = page_checksums(pool, {0: (5, 64), 1: (6, 17)})
    assert after[0] != before[0]
    assert after[1] == before[1]
