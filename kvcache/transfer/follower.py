"""A follower's part in moving pages: writes its own pages as its leader orders, and passes on what is announced of writes into its pool.

    PagesReady -> (PagesWrite -> waits until its pages are computed -> written -> PagesWritten
                   | a write arrives -> PagesArrived | PagesCheck -> PagesSums)*

A mailbox with its I/O thread, and a thread that takes what comes there: the rank's main thread is in the unit's rounds. Believes its
leader alone. That a leader or a rank is gone is the unit's business, so silence of the leader means nothing here.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from kvcache.pool import KVPool
from kvcache.transfer.base import PageSource, PageTarget
from kvcache.transfer.manifest import page_checksums
from kvcache.transfer.notices import Notices
from kvcache.transfer.traffic import Traffic
from kvcache.transfer.writes import WriteDone, Writes
from serving.core.messages import (
    PagesArrived,
    PagesCheck,
    PagesPart,
    PagesReady,
    PagesSums,
    PagesWatch,
    PagesWrite,
    PagesWritten,
    PeerAddress,
)
from serving.core.spec import WorkerSpec
from serving.mailbox import Driven, Mailbox, PeerGone, Received
from serving.metrics import Metrics


class PageFollower:
    """Of TP rank `tp_rank` of `leader`'s group. `target` None: nobody writes into its pool."""

    def __init__(
        self,
        spec: WorkerSpec,
        leader: PeerAddress,
        *,
        tp_rank: int,
        pool: KVPool,
        source: PageSource,
        target: PageTarget | None,
        failed: Callable[[], None],
    ) -> None:
        """`failed` is called, from a thread of its own, when pages can be moved no more; `close` then raises why. Raises StartupError."""
        self._log = logging.getLogger(f"baton.{spec.worker_id}")
        self._leader = leader
        self._tp_rank = tp_rank
        self._pool = pool
        self._agent = b"" if target is None else target.agent
        self._failed = failed
        self._writes = Writes(source)
        self._notices = None if target is None else Notices(target)
        self._mailbox: Mailbox[WriteDone | bytes] = Mailbox(
            worker_id=spec.worker_id,
            incarnation=spec.incarnation,
            host=spec.host,
            secret=spec.secret,
            heartbeat_s=spec.config.telemetry.heartbeat_s,
            metrics=Metrics("worker", worker=spec.worker_id),
            driver=Traffic(self._writes, self._notices),
            peer_timeout_s=math.inf,
        )
        self._num_computed = 0
        self._waiting: deque[PagesWrite] = deque()
        self._failure: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"pages-{spec.worker_id}", daemon=True)

    def start(self) -> None:
        self._mailbox.start()
        self._mailbox.connect(self._leader)
        self._mailbox.post(self._leader.worker_id, PagesReady(rank=self._tp_rank, agent=self._agent))
        self._thread.start()

    def computed(self, number: int) -> None:
        """The unit's rounds up to `number` are computed here: from the thread that computes them."""
        self._num_computed = number
        if self._waiting:
            self._mailbox.wake()

    def close(self) -> None:
        """Raises what has made it fail."""
        self._closing = True
        self._mailbox.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._mailbox.close()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._closing:
                for event in self._mailbox.get(None):
                    self._take(event)
                self._submit()
        except BaseException as error:
            self._log.exception("no page is moved any more")
            self._failure = error
            self._failed()

    def _take(self, event: Received | PeerGone | Driven[WriteDone | bytes]) -> None:
        if isinstance(event, Driven):
            self._report(event.item)
        elif isinstance(event, Received) and event.sender == self._leader.worker_id:
            self._obey(event.message)
        else:
            self._log.warning("dropped: %s", event)

    def _report(self, item: WriteDone | bytes) -> None:
        if isinstance(item, bytes):
            self._mailbox.post(self._leader.worker_id, PagesArrived(notice=item))
        else:
            written = PagesWritten(order_id=item.order.order_id, error=item.error)
            self._mailbox.post(self._leader.worker_id, written)

    def _obey(self, message: Any) -> None:
        match message:
            case PagesWrite():
                self._waiting.append(message)
            case PagesWatch() if self._notices is not None:
                notices, num_jobs, num_due = self._notices, message.num_jobs, message.num_due
                self._mailbox.call(lambda: notices.watch(num_jobs, num_due))
            case PagesCheck():
                sums = page_checksums(self._pool, message.rows)
                self._mailbox.post(self._leader.worker_id, PagesSums(job_id=message.job_id, checksums=sums))
            case PagesPart():
                worker_id = message.worker_id
                self._mailbox.call(lambda: self._writes.part(worker_id))
            case _:
                self._log.warning("a follower has no use for %s; dropped", type(message).__name__)

    def _submit(self) -> None:
        """In order: rounds only rise."""
        while self._waiting and self._waiting[0].after_round <= self._num_computed:
            order = self._waiting.popleft().order
            self._mailbox.call(partial(self._writes.submit, order))
