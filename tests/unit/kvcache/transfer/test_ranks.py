"""A leader and its follower move pages between pools: over real sockets, at the leader's word."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from kvcache.layout import PageLayout
from kvcache.pool import KVPool
from kvcache.transfer.follower import PageFollower
from kvcache.transfer.local import LocalFabric
from kvcache.transfer.manifest import page_checksums
from kvcache.transfer.notices import COPY, Notices
from kvcache.transfer.ranks import PageRanks
from kvcache.transfer.traffic import Traffic
from kvcache.transfer.writes import WriteDone, Writes
from serving.core.errors import PeerError
from serving.core.messages import PagesArrived, PagesReady, PagesSums, PagesWritten, WriteOrder
from serving.mailbox import Driven, Mailbox, Received
from serving.metrics import Metrics
from tests.wire_client import SECRET, create_config, create_spec

LAYOUT = PageLayout(num_layers=2, num_mtp_layers=0, row_width=4, element_bytes=4)


class Group:
    """Ranks 0 and 1 with a pool each, and one more pool elsewhere."""

    def __init__(self, stack: ExitStack) -> None:
        self.fabric = LocalFabric()
        self.pools = [KVPool(LAYOUT, 8, torch.float32) for _ in range(3)]
        for number, pool in enumerate(self.pools):
            pool.tensor.fill_(float(number))
        self.elsewhere = self.fabric.target("elsewhere", self.pools[2])
        notices = Notices(self.fabric.target("rank 0", self.pools[0]))
        writes = Writes(self.fabric.source(self.pools[0]))
        self.mailbox: Mailbox[WriteDone | bytes] = Mailbox(
            worker_id="unit.0",
            incarnation=1,
            host="127.0.0.1",
            secret=SECRET,
            heartbeat_s=0.2,
            metrics=Metrics("worker", worker="unit.0"),
            driver=Traffic(writes, notices),
        )
        self.mailbox.start()
        stack.callback(self.mailbox.close)
        self.num_rounds = 0
        self.ranks = PageRanks(self.mailbox, writes=writes, notices=notices, tp=2, rounds=lambda: self.num_rounds)
        self.failures: list[str] = []
        self.follower = PageFollower(
            create_spec("unit.1", "decode", create_config()),
            self.mailbox.address,
            tp_rank=1,
            pool=self.pools[1],
            source=self.fabric.source(self.pools[1]),
            target=self.fabric.target("rank 1", self.pools[1]),
            failed=lambda: self.failures.append("failed"),
        )
        stack.callback(self.follower.close)
        self.done: list[WriteDone] = []
        self.notices: list[tuple[int, bytes]] = []
        self.sums: list[tuple[int, PagesSums]] = []
        self.refused: list[str] = []

    def order(self, rank: int, source: list[int], target: list[int], **fields: Any) -> WriteOrder:
        defaults: dict[str, Any] = {
            "job_id": "j",
            "number": 0,
            "rank": rank,
            "worker_id": "decode-0",
            "agent": self.elsewhere.agent,
            "source_page_ids": source,
            "target_page_ids": target,
            "num_tokens": 64,
            "notice": b"notice",
        }
        return WriteOrder(**(defaults | fields))

    def turn(self) -> None:
        """As a step loop does."""
        for event in self.mailbox.get(0.01):
            try:
                self._take(event)
            except PeerError as error:
                self.refused.append(str(error))

    def wait(self, until: Callable[[], bool], timeout_s: float = 5.0) -> None:
        end_s = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end_s, (self.done, self.notices, self.refused)
            self.turn()

    def _take(self, event: object) -> None:
        if isinstance(event, Driven):
            if isinstance(event.item, bytes):
                self.notices.append((0, event.item))
            else:
                self.done.append(event.item)
        elif isinstance(event, Received):
            match event.message:
                case PagesReady():
                    self.ranks.ready(event.sender, event.message)
                case PagesWritten():
                    self.done.append(self.ranks.written(event.sender, event.message))
                case PagesArrived():
                    self.notices.append((self.ranks.rank_of(event.sender), event.message.notice))
                case PagesSums():
                    self.sums.append((self.ranks.rank_of(event.sender), event.message))


@pytest.fixture
def group() -> Iterator[Group]:
    with ExitStack() as stack:
        yield Group(stack)


def values(pool: KVPool, page_ids: list[int]) -> list[float]:
    return [float(pool.page(page_id).mean()) for page_id in page_ids]


def test_each_rank_writes_its_own_pages_and_what_was_ordered_before_it_was_heard_of_is_not_lost(group: Group) -> None:
    group.ranks.write(group.order(0, [0], [4]))
    group.ranks.write(group.order(1, [1], [5]))
    group.wait(lambda: len(group.done) == 1)
    assert not group.ranks.complete
    group.follower.start()
    group.wait(lambda: len(group.done) == 2)
    assert group.ranks.complete
    assert values(group.pools[2], [4, 5]) == [0.0, 1.0]
    assert [done.error for done in group.done] == [None, None]
    assert [done.order.rank for done in group.done] == [0, 1]


def test_a_follower_writes_no_page_before_it_has_computed_it(group: Group) -> None:
    group.follower.start()
    group.num_rounds = 3
    group.ranks.write(group.order(1, [1], [5]))
    for _ in range(20):
        group.turn()
    group.follower.computed(2)
    for _ in range(20):
        group.turn()
    assert values(group.pools[2], [5]) == [2.0], "written too early"
    group.pools[1].page(1).fill_(7.0)
    group.follower.computed(3)
    group.wait(lambda: len(group.done) == 1)
    assert values(group.pools[2], [5]) == [7.0]


def test_what_is_written_into_a_followers_pool_is_known_to_the_leader_and_copies_are_not_taken_for_it(
    group: Group,
) -> None:
    group.follower.start()
    group.wait(lambda: group.ranks.complete)
    group.ranks.watch(1, 0)
    source = group.fabric.source(group.pools[2])
    for rank, agent in enumerate(group.ranks.agents):
        source.write(source.connect(agent), [0], [6 + rank], f"for {rank}".encode())
    group.wait(lambda: len(group.notices) == 2)
    assert sorted(group.notices) == [(0, b"for 0"), (1, b"for 1")]
    group.ranks.write(group.order(1, [7], [7], agent=group.ranks.agents[0], notice=COPY))
    group.wait(lambda: len(group.done) == 1)
    assert values(group.pools[0], [6, 7]) == [2.0, 2.0]
    for _ in range(20):
        group.turn()
    assert len(group.notices) == 2


def test_an_order_that_cannot_be_carried_out_comes_back_with_the_reason(group: Group) -> None:
    group.follower.start()
    group.ranks.write(group.order(1, [1], [5], agent=b"nobody"))
    group.wait(lambda: len(group.done) == 1)
    assert "nobody" in str(group.done[0].error)
    assert group.failures == []


def test_a_follower_sums_up_its_own_pages(group: Group) -> None:
    group.follower.start()
    rows = {0: (3, 64), 1: (5, 7)}
    assert group.ranks.check("j", {}) == set()
    assert group.ranks.check("j", rows) == {1}
    group.wait(lambda: len(group.sums) == 1)
    assert group.sums == [(1, PagesSums(job_id="j", checksums=page_checksums(group.pools[1], rows)))]
    assert group.sums[0][1].checksums != page_checksums(group.pools[0], rows)


def test_a_stranger_is_no_rank_of_the_group(group: Group) -> None:
    group.follower.start()
    group.wait(lambda: group.ranks.complete)
    group.ranks.write(group.order(1, [1], [5]))
    with pytest.raises(PeerError, match="not"):
        group.ranks.ready("unit.7", PagesReady(rank=1, agent=b""))
    with pytest.raises(PeerError, match="not"):
        group.ranks.ready("unit.7", PagesReady(rank=2, agent=b""))
    with pytest.raises(PeerError, match="no order"):
        group.ranks.written("unit.7", PagesWritten(order_id=1))
    with pytest.raises(PeerError, match="no rank"):
        group.ranks.rank_of("unit.7")
    group.wait(lambda: len(group.done) == 1)
