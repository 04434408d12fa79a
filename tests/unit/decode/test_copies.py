"""A decode group of two TP ranks: a page has arrived when both have it, and is free when neither is being written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from decode.arrivals import ArrivalFailed, Arrivals, Arrived
from kvcache.layout import PageLayout
from kvcache.manager import KVManager
from kvcache.pool import KVPool
from kvcache.transfer.local import LocalFabric
from kvcache.transfer.manifest import WriteNotice, encode_notice, page_checksums, rows_of_page
from kvcache.transfer.notices import COPY, Notices
from kvcache.transfer.ranks import PageRanks
from kvcache.transfer.writes import WriteDone
from serving.core.config import TransferTable
from serving.core.errors import PeerError, StaleError
from serving.core.messages import KVBind, KVReady, PagesReady, PagesSums, WriteOrder
from serving.mailbox import Mailbox
from serving.metrics import Metrics
from tests.scheduler_factory import create_sequence

LAYOUT = PageLayout(num_layers=1, num_mtp_layers=0, row_width=4, element_bytes=4)
NUM_TOKENS = 200  # four pages, ids 0 to 3: the owners take turns
EPOCHS = [1, 1, 1, 1]


class NotedRanks(PageRanks):
    """Keeps what it is told to write."""

    orders: list[WriteOrder]

    def write(self, order: WriteOrder) -> None:
        self.orders.append(order)


class Group:
    """One job, exposed to prefill-0."""

    def __init__(self, mailbox: Mailbox[Any], metrics: Metrics, checksum: str) -> None:
        pool = KVPool(LAYOUT, 8, torch.float32)
        self.sums = page_checksums(pool, {index: (index, rows_of_page(index, NUM_TOKENS)) for index in range(4)})
        self.metrics = metrics
        self.manager = KVManager(8, prefix_cache=False)
        self.ranks = NotedRanks(mailbox, notices=Notices(LocalFabric().target("rank 0", pool)), tp=2)
        self.ranks.orders = []
        self.arrivals = Arrivals(
            mailbox,
            self.ranks,
            self.manager,
            pool,
            metrics,
            TransferTable(checksum=checksum),
            identity="id",
            hidden_bytes=0,
            vocab_size=128,
        )
        self.arrivals.offer(create_sequence("j", range(NUM_TOKENS)), "router-0", 4)
        self.arrivals.bind("prefill-0", 1, KVBind(job_id="j", identity="id"), 0.0)

    def expose(self) -> None:
        self.ranks.ready("unit.1", PagesReady(rank=1, agent=b"rank 1"))
        self.arrivals.grant(0.0, may_promise=True)

    def notice(self, rank: int, pages: list[int], number: int, **fields: Any) -> None:
        defaults = {"epochs": [1] * len(pages), "num_bytes": len(pages) * LAYOUT.page_bytes}
        notice = WriteNotice(job_id="j", number=number, pages=pages, **(defaults | fields))
        self.arrivals.notice(rank, encode_notice(notice), 1.0)

    def ready(self) -> None:
        ready = KVReady(
            job_id="j",
            epochs=EPOCHS,
            num_tokens=NUM_TOKENS,
            num_writes=2,
            num_bytes=4 * LAYOUT.page_bytes,
            checksums=self.sums,
            first_token=7,
            hidden=b"",
        )
        self.arrivals.ready("prefill-0", 1, ready, 1.0)

    def copied(self, index: int, error: str | None = None) -> None:
        self.arrivals.copied(WriteDone(self.ranks.orders[index], error), 2.0)

    def count(self, state: str) -> int:
        self.manager.check()
        return self.manager.counts()[state]


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    """`request.param`: transfer.checksum, off unless it is given."""
    metrics = Metrics("worker", worker="decode-0")
    mailbox: Mailbox[Any] = Mailbox(
        worker_id="unit.0", incarnation=1, host="127.0.0.1", secret=b"t" * 32, heartbeat_s=0.2, metrics=metrics
    )
    mailbox.start()
    with closing(mailbox):
        yield Group(mailbox, metrics, getattr(request, "param", "off"))


def test_no_page_is_exposed_before_every_rank_is_there_or_while_one_may_compute_on_it(group: Group) -> None:
    group.arrivals.grant(0.0, may_promise=True)
    assert group.count("reserved") == 4
    group.ranks.ready("unit.1", PagesReady(rank=1, agent=b"rank 1"))
    group.arrivals.grant(0.0, may_promise=True, may_expose=False)
    assert group.count("reserved") == 4
    group.arrivals.grant(0.0, may_promise=True)
    assert group.count("exposed") == 4


def test_each_owner_copies_to_the_other_and_the_job_arrives_when_both_have_all(group: Group) -> None:
    group.expose()
    group.notice(0, [0, 2], 0)
    group.notice(1, [1, 3], 1)
    group.ready()
    assert [(o.rank, o.source_page_ids, o.target_page_ids, o.notice) for o in group.ranks.orders] == [
        (0, [0, 2], [0, 2], COPY),
        (1, [1, 3], [1, 3], COPY),
    ]
    assert [order.agent for order in group.ranks.orders] == group.ranks.agents[::-1]
    group.copied(0)
    assert group.arrivals.outcomes() == []
    group.copied(1)
    (arrived,) = group.arrivals.outcomes()
    assert isinstance(arrived, Arrived)
    assert group.count("owned") == 4
    assert group.metrics.value("baton_kv_handoff_bytes_total", kind="peer") == 4 * LAYOUT.page_bytes


def test_a_page_that_comes_to_a_rank_that_does_not_own_it_is_refused(group: Group) -> None:
    group.expose()
    with pytest.raises(PeerError, match="does not own"):
        group.notice(1, [0, 2], 0)
    group.notice(0, [0, 2], 0)
    for pages in ([0, 2], [9], [-1]):  # a second time; beyond the ticket
        with pytest.raises(StaleError):
            group.notice(0, pages, 0)
    assert len(group.ranks.orders) == 1


@pytest.mark.parametrize("proof", ["closed", "gone"])
def test_pages_of_a_job_that_is_over_wait_for_our_own_copies_too(group: Group, proof: str) -> None:
    group.expose()
    group.notice(0, [0, 2], 0)
    group.arrivals.abort("j", 2.0)
    assert group.count("draining") == 4
    if proof == "closed":
        group.arrivals.closed("prefill-0", 1, "j")
    else:
        group.arrivals.writer_gone("prefill-0", 1, proven=True, reason="it has ended", now_s=2.0)
    assert group.count("draining") == 4
    assert group.arrivals.num_closing == 1
    assert group.arrivals.due_s() is None, "nobody is left to ask"
    with pytest.raises(StaleError):
        group.notice(1, [1, 3], 1)
    group.copied(0)
    assert group.count("free") == 8
    assert group.arrivals.num_closing == 0


def test_copies_that_end_first_leave_the_pages_to_the_writers_word(group: Group) -> None:
    group.expose()
    group.notice(0, [0, 2], 0)
    group.arrivals.abort("j", 2.0)
    group.copied(0)
    assert group.count("draining") == 4
    group.arrivals.closed("prefill-0", 1, "j")
    assert group.count("free") == 8


def test_a_write_too_many_is_refused_but_not_while_it_is_copied(group: Group) -> None:
    group.expose()
    group.notice(0, [0, 2], 0)
    group.notice(1, [1, 3], 1)
    group.notice(0, [0], 2)
    group.ready()
    group.copied(0)
    group.copied(1)
    assert group.arrivals.outcomes() == []
    assert group.count("exposed") == 4
    group.copied(2)
    (failed,) = group.arrivals.outcomes()
    assert isinstance(failed, ArrivalFailed)
    assert "3 writes, 2 announced" in failed.reason


@pytest.mark.parametrize("group", ["all"], indirect=True)
@pytest.mark.parametrize("is_right", [True, False])
def test_every_rank_sums_up_what_it_has(group: Group, is_right: bool) -> None:
    group.expose()
    group.notice(0, [0, 2], 0)
    group.notice(1, [1, 3], 1)
    group.ready()
    group.copied(0)
    group.copied(1)
    assert group.arrivals.outcomes() == [], "the other rank was not asked"
    with pytest.raises(StaleError, match="has all its pages"):
        group.notice(0, [0], 2)
    sums = group.sums if is_right else group.sums | {2: 1}
    group.arrivals.checked(1, PagesSums(job_id="j", checksums=sums), 2.0)
    (outcome,) = group.arrivals.outcomes()
    assert isinstance(outcome, Arrived if is_right else ArrivalFailed)
    assert group.count("owned" if is_right else "draining") == 4
    assert group.metrics.value("baton_kv_handoff_failures_total", reason="manifest") == (not is_right)
    group.arrivals.checked(1, PagesSums(job_id="j", checksums={}), 2.0)
    assert group.arrivals.outcomes() == []


def test_a_copy_that_fails_ends_the_job(group: Group) -> None:
    group.expose()
    group.notice(0, [0, 2], 0)
    group.copied(0, "the pool is closed")
    (failed,) = group.arrivals.outcomes()
    assert isinstance(failed, ArrivalFailed)
    assert "the pool is closed" in failed.reason
    assert group.count("draining") == 4
    assert group.metrics.value("baton_kv_handoff_bytes_total", kind="peer") == 0
