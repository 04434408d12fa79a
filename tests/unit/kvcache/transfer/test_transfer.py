"""What both backends promise: whole pages, to the right place, one notification, every write reported once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec
import pytest
import torch

from kvcache.layout import PageLayout
from kvcache.pool import KVPool
from kvcache.transfer.base import Completed, PageSource, PageTarget, runs
from kvcache.transfer.local import LocalFabric
from kvcache.transfer.nixl import AgentInfo, NixlSource, NixlTarget
from serving.core.errors import PeerError

LAYOUT = PageLayout(num_layers=3, num_mtp_layers=1, row_width=24, element_bytes=4)
NUM_PAGES = 12


@dataclass
class Pair:
    source: PageSource
    target: PageTarget
    ours: KVPool
    theirs: KVPool


def numbered_pool(layout: PageLayout = LAYOUT, *, sign: int = 1) -> KVPool:
    """Every value different, so that a byte in the wrong place shows."""
    pool = KVPool(layout, NUM_PAGES, torch.float32)
    pool.tensor.copy_(sign * torch.arange(1, pool.tensor.numel() + 1).view(pool.tensor.shape))
    return pool


@pytest.fixture(params=["local", "nixl"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    ours, theirs = numbered_pool(), numbered_pool(sign=-1)
    with ExitStack() as stack:
        source: PageSource
        target: PageTarget
        if request.param == "local":
            fabric = LocalFabric()
            source, target = fabric.source(ours), fabric.target("decode", theirs)
        else:
            source, target = NixlSource("prefill-test", ours), NixlTarget("decode-test", theirs)
        stack.callback(target.close)
        stack.callback(source.close)
        yield Pair(source, target, ours, theirs)


def settle(
    source: PageSource, target: PageTarget | None, *, timeout_s: float = 10.0
) -> tuple[list[Completed], list[bytes]]:
    """Polls both sides until nothing is open and, with a target, as many notifications are there as writes succeeded."""
    completed: list[Completed] = []
    notices: list[bytes] = []
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        completed += source.poll()
        notices += target.notifications() if target is not None else []
        num_good = sum(done.error is None for done in completed)
        if source.num_open == 0 and (target is None or len(notices) >= num_good):
            return completed, notices
        time.sleep(0.001)
    raise AssertionError(f"open after {timeout_s} s: {source.num_open}, {completed}, {notices}")


def test_pages_arrive_whole_and_nothing_else_is_touched(pair: Pair) -> None:
    before = pair.theirs.tensor.clone()
    peer = pair.source.connect(pair.target.agent)
    handle = pair.source.write(peer, [3, 4, 5, 9], [7, 8, 1, 2], b"notice")
    assert settle(pair.source, pair.target) == ([Completed(handle)], [b"notice"])
    expected = before
    for ours, theirs in zip([3, 4, 5, 9], [7, 8, 1, 2], strict=True):
        expected[theirs] = pair.ours.tensor[ours]
    assert torch.equal(pair.theirs.tensor, expected)


def test_the_comparison_notices_one_wrong_value(pair: Pair) -> None:
    peer = pair.source.connect(pair.target.agent)
    pair.source.write(peer, [3], [7], b"notice")
    settle(pair.source, pair.target)
    pair.ours.tensor[3, 1, 17, 5] += 1
    assert not torch.equal(pair.theirs.tensor[7], pair.ours.tensor[3])


def test_every_write_is_reported_once_and_every_notification_comes_once(pair: Pair) -> None:
    peer = pair.source.connect(pair.target.agent)
    handles = [pair.source.write(peer, [page], [page], f"{page}".encode()) for page in range(NUM_PAGES)]
    assert pair.source.num_open == NUM_PAGES
    completed, notices = settle(pair.source, pair.target)
    assert sorted(done.handle for done in completed) == sorted(handles)
    assert sorted(notices) == sorted(f"{page}".encode() for page in range(NUM_PAGES))
    assert pair.source.poll() == []
    assert pair.target.notifications() == []
    assert torch.equal(pair.theirs.tensor[:NUM_PAGES], pair.ours.tensor[:NUM_PAGES])


def test_connecting_twice_is_one_connection(pair: Pair) -> None:
    assert pair.source.connect(pair.target.agent) == pair.source.connect(pair.target.agent)


def test_a_page_that_the_target_does_not_have_is_a_failed_write_and_the_source_goes_on(pair: Pair) -> None:
    peer = pair.source.connect(pair.target.agent)
    bad = pair.source.write(peer, [0], [NUM_PAGES], b"bad")
    good = pair.source.write(peer, [1], [1], b"good")
    completed, notices = settle(pair.source, pair.target)
    errors = {done.handle: done.error for done in completed}
    assert errors[bad] is not None
    assert errors[good] is None
    assert notices == [b"good"]


def test_a_peer_that_was_parted_from_cannot_be_written(pair: Pair) -> None:
    peer = pair.source.connect(pair.target.agent)
    pair.source.disconnect(peer)
    if isinstance(pair.source, NixlSource):
        pair.source.write(peer, [0], [0], b"")
        completed, _ = settle(pair.source, None)
        assert completed[0].error is not None
    assert pair.source.connect(pair.target.agent) == peer


def test_pools_of_other_page_sizes_do_not_pair() -> None:
    other = PageLayout(num_layers=2, num_mtp_layers=1, row_width=24, element_bytes=4)
    fabric = LocalFabric()
    fabric.target("decode", numbered_pool(other))
    with pytest.raises(PeerError, match="same model"):
        fabric.source(numbered_pool()).connect(b"decode")
    source, target = NixlSource("prefill-other", numbered_pool()), NixlTarget("decode-other", numbered_pool(other))
    with pytest.raises(PeerError, match="bytes"):
        source.connect(target.agent)
    source.close()
    target.close()


def test_a_pool_on_a_gpu_and_one_in_memory_do_not_pair() -> None:
    source, target = NixlSource("prefill-here", numbered_pool()), NixlTarget("decode-there", numbered_pool())
    info = msgspec.msgpack.decode(target.agent, type=AgentInfo)
    there = msgspec.msgpack.encode(msgspec.structs.replace(info, memory="VRAM"))
    with pytest.raises(PeerError, match=r"in VRAM, ours in DRAM; .* same model\.device"):
        source.connect(there)
    assert source.connect(target.agent)
    source.close()
    target.close()


@pytest.mark.parametrize("agent", [b"", b"somebody", b"\x81\xa1a\x01"])
def test_an_agent_that_is_none_is_a_peer_error(pair: Pair, agent: bytes) -> None:
    with pytest.raises(PeerError):
        pair.source.connect(agent)


def test_adjacent_pages_become_one_descriptor() -> None:
    assert list(runs([3, 4, 5, 9, 10], [7, 8, 1, 2, 3])) == [(3, 7, 2), (5, 1, 1), (9, 2, 2)]
    assert list(runs([], [])) == []


def test_a_write_that_nixl_does_not_release_is_held_back_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = NixlSource("prefill-test", numbered_pool()), NixlTarget("decode-test", numbered_pool())
    agent = source._agent.nixl
    release, num_left = agent.release_xfer_handle, 5

    def reluctant(handle: object) -> None:
        nonlocal num_left
        if num_left:
            num_left -= 1
            raise RuntimeError("still posted")
        release(handle)

    monkeypatch.setattr(agent, "release_xfer_handle", reluctant)
    handle = source.write(source.connect(target.agent), [0], [0], b"notice")
    assert settle(source, target) == ([Completed(handle)], [b"notice"])
    assert num_left == 0
    attempts = [record.getMessage() for record in caplog.records if record.name == "baton.nixl"]
    assert ["still posted" in text for text in attempts] == [True, True, True, False]  # 1, 2, 4, released
    assert "after 6 attempts" in attempts[-1]
    source.close()
    target.close()


def test_a_target_outlives_errors_of_its_peers_but_not_an_agent_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    target = NixlTarget("decode-test", numbered_pool())
    agent = target._agent.nixl
    working = agent.get_new_notifs

    def broken() -> None:
        raise RuntimeError("no progress")

    def errors(num: int) -> None:
        monkeypatch.setattr(agent, "get_new_notifs", broken)
        for _ in range(num):
            assert target.notifications() == []

    errors(999)
    monkeypatch.setattr(agent, "get_new_notifs", working)
    assert target.notifications() == []
    errors(999)  # they began anew
    with pytest.raises(RuntimeError, match="no progress"):
        target.notifications()
    target.close()
