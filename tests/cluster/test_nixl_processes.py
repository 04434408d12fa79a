"""NIXL across two processes: pages arrive, an idle agent sleeps, a killed target is an error and not a hang."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection

import pytest
import torch

from kvcache.layout import PageLayout
from kvcache.pool import KVPool
from kvcache.transfer.base import Completed
from kvcache.transfer.nixl import NixlSource, NixlTarget

LAYOUT = PageLayout(num_layers=3, num_mtp_layers=1, row_width=24, element_bytes=4)
NUM_PAGES = 12


def numbered_pool(*, sign: int = 1) -> KVPool:
    """Every value different, so that a byte in the wrong place shows."""
    pool = KVPool(LAYOUT, NUM_PAGES, torch.float32)
    pool.tensor.copy_(sign * torch.arange(1, pool.tensor.numel() + 1).view(pool.tensor.shape))
    return pool


def settle(source: NixlSource, timeout_s: float = 10.0) -> list[Completed]:
    completed: list[Completed] = []
    end_s = time.monotonic() + timeout_s
    while source.num_open:
        assert time.monotonic() < end_s, f"open after {timeout_s} s: {source.num_open}"
        completed += source.poll()
        time.sleep(0.001)
    return completed


def _target_process(pipe: Connection) -> None:
    """Owns the target; answers every notification with what it holds. Ends on the first message."""
    torch.set_num_threads(1)
    pool = numbered_pool(sign=-1)
    target = NixlTarget("decode-far", pool)
    pipe.send(target.agent)
    while not pipe.poll(0.001):
        for notice in target.notifications():
            pipe.send((notice, pool.tensor[[7, 8, 1]].numpy()))
    target.close()


Far = tuple[NixlSource, KVPool, Connection, multiprocessing.process.BaseProcess]


@pytest.fixture
def far() -> Iterator[Callable[[], Far]]:
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:

        def start() -> Far:
            ours = numbered_pool()
            pipe, other = context.Pipe()
            process = context.Process(target=_target_process, args=(other,), daemon=True)
            process.start()
            stack.callback(process.join, 10)
            stack.callback(process.kill)
            source = NixlSource("prefill-near", ours)
            stack.callback(source.close)
            return source, ours, pipe, process

        yield start


def test_pages_cross_processes_and_a_killed_target_is_an_error_not_a_hang(far: Callable[[], Far]) -> None:
    source, ours, pipe, process = far()
    peer = source.connect(pipe.recv())
    source.write(peer, [3, 4, 5], [7, 8, 1], b"far")
    assert settle(source)[0].error is None
    assert pipe.poll(10)
    notice, held = pipe.recv()
    assert notice == b"far"
    assert torch.equal(torch.from_numpy(held), ours.tensor[[3, 4, 5]])

    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(1.0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.02, "an idle agent uses the CPU"

    process.kill()
    process.join(10)
    handles = [source.write(peer, [page], [page], b"ghost") for page in range(3)]
    completed = settle(source)
    assert sorted(done.handle for done in completed) == handles
    assert any(done.error is not None for done in completed)
