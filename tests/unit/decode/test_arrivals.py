"""Credits in line while a running sequence wants a page: what is promised, kept, and taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from decode.arrivals import Arrivals
from kvcache.layout import PageLayout
from kvcache.manager import KVManager
from kvcache.pool import KVPool
from kvcache.transfer.local import LocalFabric
from kvcache.transfer.notices import Notices
from kvcache.transfer.ranks import PageRanks
from serving.core.config import TransferTable
from serving.core.messages import KVBind
from serving.mailbox import Mailbox
from serving.metrics import Metrics
from tests.scheduler_factory import create_sequence

NUM_PAGES = 6


class Line:
    """Jobs q0, q1, q2 in line, two pages each, which is all of the pool."""

    def __init__(self, mailbox: Mailbox[bytes], metrics: Metrics) -> None:
        layout = PageLayout(num_layers=1, num_mtp_layers=0, row_width=4, element_bytes=4)
        pool = KVPool(layout, NUM_PAGES, torch.float32, torch.device("cpu"))
        self.manager = KVManager(NUM_PAGES, prefix_cache=False)
        self.arrivals = Arrivals(
            mailbox,
            PageRanks(mailbox, notices=Notices(LocalFabric().target("decode", pool))),
            self.manager,
            pool,
            metrics,
            TransferTable(),
            identity="id",
            hidden_bytes=0,
            vocab_size=128,
        )
        for number in range(3):
            self.arrivals.offer(create_sequence(f"q{number}", range(2, 72)), "router-0", 2)
        self.arrivals.grant(0.0, may_promise=True)

    def count(self, state: str) -> int:
        return self.manager.counts()[state]

    def bind(self, job_id: str) -> None:
        self.arrivals.bind("prefill-0", 1, KVBind(job_id=job_id, identity="id"), 0.0)


@pytest.fixture
def line() -> Iterator[Line]:
    metrics = Metrics("worker", worker="decode-0")
    mailbox: Mailbox[bytes] = Mailbox(
        worker_id="decode-0", incarnation=1, host="127.0.0.1", secret=b"t" * 32, heartbeat_s=0.2, metrics=metrics
    )
    mailbox.start()
    with closing(mailbox):
        yield Line(mailbox, metrics)


def test_a_credit_that_nobody_has_bound_goes_back_to_a_sequence_that_stalls_the_last_in_line_first(line: Line) -> None:
    assert line.count("reserved") == 6
    for _ in range(2):  # the second time there is a page already
        line.arrivals.grant(0.0, may_promise=False)
        assert (line.count("reserved"), line.count("free")) == (4, 2)
    for job_id in ("q0", "q1", "q2"):
        line.bind(job_id)
    line.arrivals.grant(0.0, may_promise=False)
    assert line.count("exposed") == 4, "the first two have kept theirs"
    assert line.arrivals.num_waiting == 3, "the last has kept its place"
    line.arrivals.grant(0.0, may_promise=True)
    assert line.count("exposed") == 6


def test_who_holds_a_credit_gets_pages_while_others_stall_and_these_are_not_taken_back(line: Line) -> None:
    for job_id in ("q0", "q1", "q2"):
        line.bind(job_id)
    for _ in range(2):
        line.arrivals.grant(0.0, may_promise=False)
        assert line.count("exposed") == 6
    line.arrivals.expire(60.0)
    assert line.arrivals.outcomes() == []
    line.manager.check()
