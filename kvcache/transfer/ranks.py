"""The TP ranks of a DP group as movers of pages, seen from their leader: rank 0 is its own I/O thread, the others are told by messages.

    order -> submitted here, or PagesWrite -> WriteDone        a write of another unit -> the notification, here or as PagesArrived

Apart from the unit's rounds: pages travel while steps are computed. A follower does one thing at a time as it is told; which pages may
be read and written is decided here alone. Owned by the leader's step loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvcache.transfer.notices import Notices
from kvcache.transfer.writes import WriteDone, Writes
from serving.core.errors import PeerError
from serving.core.messages import (
    Message,
    PagesCheck,
    PagesPart,
    PagesReady,
    PagesWatch,
    PagesWrite,
    PagesWritten,
    WriteOrder,
)
from serving.mailbox import Mailbox


@dataclass(slots=True)
class _Follower:
    """`name` empty: not heard of yet, and `untold` waits for it."""

    name: str = ""
    agent: bytes = b""
    untold: deque[Any] = field(default_factory=deque)


class PageRanks:
    """`writes` and `notices` are rank 0's own; a follower has what its leader has.

    `rounds`: how many of the unit's the leader has come to the end of; a follower has computed all steps before the last of them.
    """

    def __init__(
        self,
        mailbox: Mailbox[Any],
        *,
        writes: Writes | None = None,
        notices: Notices | None = None,
        tp: int = 1,
        rounds: Callable[[], int] = lambda: 0,
    ) -> None:
        self.tp = tp
        self._mailbox = mailbox
        self._writes = writes
        self._notices = notices
        self.rounds = rounds
        self._followers = [_Follower() for _ in range(tp - 1)]
        self._orders: dict[int, WriteOrder] = {}
        self._num_orders = 0

    @property
    def complete(self) -> bool:
        """Every follower has been heard of."""
        return all(follower.name for follower in self._followers)

    @property
    def agents(self) -> list[bytes]:
        """Of the pools that others may write, by TP rank; to be asked for once they are complete."""
        assert self._notices is not None
        assert self.complete
        return [self._notices.agent, *(follower.agent for follower in self._followers)]

    @property
    def hurries(self) -> bool:
        """Whether `num_due` matters to `watch`."""
        return self._notices is not None and self._notices.hurries

    def ready(self, sender: str, message: PagesReady) -> None:
        """A follower can be told something. Raises PeerError if it is none of ours."""
        if not 0 < message.rank < self.tp or self._followers[message.rank - 1].name:
            raise PeerError(f"{sender} says it is TP rank {message.rank} of {self.tp} here, and it is not; dropped")
        follower = self._followers[message.rank - 1]
        follower.name, follower.agent = sender, message.agent
        while follower.untold:
            self._mailbox.post(sender, follower.untold.popleft())

    def write(self, order: WriteOrder) -> None:
        """A WriteDone follows, from the mailbox's driver or by `written`. What is written has been computed by rank 0."""
        if order.rank:
            self._num_orders += 1
            order = msgspec.structs.replace(order, order_id=self._num_orders)
            self._orders[order.order_id] = order
            self._tell(order.rank, PagesWrite(order=order, after_round=self.rounds()))
            return
        writes = self._writes
        assert writes is not None
        self._mailbox.call(lambda: writes.submit(order))

    def written(self, sender: str, message: PagesWritten) -> WriteDone:
        """Raises PeerError."""
        order = self._orders.get(message.order_id)
        if order is None or self._followers[order.rank - 1].name != sender:
            raise PeerError(f"{sender} has no order {message.order_id} of ours; dropped")
        del self._orders[message.order_id]
        return WriteDone(order, message.error)

    def rank_of(self, sender: str) -> int:
        """Of a follower that speaks of pages in its pool. Raises PeerError."""
        for rank, follower in enumerate(self._followers, start=1):
            if follower.name == sender:
                return rank
        raise PeerError(f"{sender} is no rank of this group; dropped")

    def check(self, job_id: str, rows: dict[int, tuple[int, int]]) -> set[int]:
        """The followers that sum up these pages and answer with PagesSums."""
        if rows:
            self._tell_all(PagesCheck(job_id=job_id, rows=rows))
        return set(range(1, self.tp)) if rows else set()

    def watch(self, num_jobs: int, num_due: int) -> None:
        """As `Notices.watch`, on every rank."""
        notices = self._notices
        assert notices is not None
        self._mailbox.call(lambda: notices.watch(num_jobs, num_due))
        self._tell_all(PagesWatch(num_jobs=num_jobs, num_due=num_due))

    def part(self, worker_id: str) -> None:
        """As `Writes.part`, on every rank."""
        writes = self._writes
        assert writes is not None
        self._mailbox.call(lambda: writes.part(worker_id))
        self._tell_all(PagesPart(worker_id=worker_id))

    def _tell_all(self, message: Message) -> None:
        for rank in range(1, self.tp):
            self._tell(rank, message)

    def _tell(self, rank: int, message: Any) -> None:
        follower = self._followers[rank - 1]
        if follower.name:
            self._mailbox.post(follower.name, message)
        else:
            follower.untold.append(message)
