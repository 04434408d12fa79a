"""The workers as this router sees them: who there is, who can be given work, and what has been given that they have not counted yet.

    unheard --first message--> alive --2 s of silence--> silent --a message--> alive
       any --roster: dead, gone, or another address--> out of the view

One `Worker` is one life of one process: a restart makes a new object, so whoever holds the old one holds a dead one.
Pure: time is an argument, messages come in decoded. Must not know sockets, requests or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from serving.core.messages import Heartbeat, PeerAddress, Roster, WorkerInfo, WorkerState

SILENCE_S = 2.0
"""A peer that has said nothing for so long is dead."""

_SETTLE_S = 0.05
_UNCHANGED_S = 0.3
_STUCK_STEPS = 5.0


class Ledger:
    """Amounts sent to a worker that its last WorkerState cannot contain yet, by job. The unit is the owner's: pages or tokens' worth."""

    def __init__(self) -> None:
        self._spent: dict[str, tuple[int, float]] = {}
        self.total = 0

    def __len__(self) -> int:
        """Jobs."""
        return len(self._spent)

    def spend(self, job_id: str, amount: int, now_s: float) -> None:
        self._spent[job_id] = (amount, now_s)
        self.total += amount

    def drop(self, job_id: str) -> None:
        """The job is over, or the worker has counted it."""
        self.total -= self._spent.pop(job_id, (0, 0.0))[0]

    def absorb(self, sent_before_s: float) -> None:
        """A state has arrived that counts everything sent before this moment."""
        for job_id in [job_id for job_id, (_, sent_s) in self._spent.items() if sent_s <= sent_before_s]:
            self.drop(job_id)


@dataclass(eq=False)
class Worker:
    """One worker in one life. `moved_s` is when its progress last changed, `heard_s` when it last said anything."""

    address: PeerAddress
    role: str
    roster_state: str
    since_s: float
    state: WorkerState | None = None
    heard_s: float | None = None
    silent: bool = False
    progress: int = -1
    step_budget_s: float = 0.0
    moved_s: float = 0.0
    pages: Ledger = field(default_factory=Ledger)
    work: Ledger = field(default_factory=Ledger)

    @property
    def worker_id(self) -> str:
        return self.address.worker_id

    @property
    def usable(self) -> bool:
        """May be given new work."""
        state = self.state
        if state is None or self.silent or self.roster_state in ("draining", "dead"):
            return False
        return state.ready and not state.draining

    @property
    def credit_pages(self) -> int:
        """Pages that may still be promised; below zero never means anything but zero."""
        return 0 if self.state is None else self.state.credit_pages - self.pages.total

    @property
    def waiting_work(self) -> int:
        """Tokens to prefill, with what they attend to, in tokens' worth."""
        return 0 if self.state is None else self.state.waiting_work + self.work.total

    @property
    def pair_cost(self) -> float:
        """What attending one token to another costs it."""
        return 0.0 if self.state is None else self.state.pair_cost

    @property
    def promised_pages(self) -> int:
        return self.num_pages - self.credit_pages

    @property
    def num_requests(self) -> int:
        """That hold its pages or wait for some."""
        return 0 if self.state is None else self.state.num_running + self.state.num_waiting + len(self.pages)

    @property
    def num_pages(self) -> int:
        return 0 if self.state is None else self.state.num_pages

    def stuck(self, now_s: float) -> bool:
        """A step is in flight and has taken five times what was announced, at least 2 s. Its heart still beats."""
        in_flight = self.step_budget_s > 0.0 and self.heard_s is not None
        return in_flight and now_s - self.moved_s > max(SILENCE_S, _STUCK_STEPS * self.step_budget_s)

    def hear(self, message: object, now_s: float) -> None:
        """Anything at all proves life; state and heartbeat say more."""
        self.heard_s, self.silent = now_s, False
        if isinstance(message, WorkerState):
            self.state = message
            self._counted(now_s - _SETTLE_S - 2.0 * message.step_s)
        elif isinstance(message, Heartbeat):
            if message.progress != self.progress or message.step_budget_s != self.step_budget_s:
                self.moved_s = now_s
            self.progress, self.step_budget_s = message.progress, message.step_budget_s

    def settle(self, now_s: float) -> None:
        """A state is sent only when it changes: what went out a while ago without one following is in the last one."""
        if self.state is not None and not self.silent:
            self._counted(now_s - _UNCHANGED_S - 3.0 * self.state.step_s)

    def _counted(self, sent_before_s: float) -> None:
        self.pages.absorb(sent_before_s)
        self.work.absorb(sent_before_s)


@dataclass(frozen=True)
class RosterChange:
    """Lives that appeared and lives that ended."""

    joined: list[Worker]
    left: list[Worker]


class View:
    """All living workers by id."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def apply(self, roster: Roster, now_s: float) -> RosterChange:
        """Take over what the supervisor says. A worker without an endpoint yet, or that leads no DP group, is not in the view."""
        listed = {info.address.worker_id: info for info in roster.workers if _reachable(info)}
        left = [worker for worker in self if not _same_life(worker, listed.get(worker.worker_id))]
        for worker in left:
            del self._workers[worker.worker_id]
            worker.roster_state = "dead"
        joined = []
        for worker_id, info in listed.items():
            if worker_id in self._workers:
                self._workers[worker_id].roster_state = info.state
            else:
                joined.append(Worker(info.address, info.role, info.state, now_s))
                self._workers[worker_id] = joined[-1]
        return RosterChange(joined, left)

    def silence_due_s(self) -> float:
        """When the first of those that are heard will count as silent if it says nothing more; infinite where none is heard."""
        heard_s = (worker.heard_s for worker in self if not worker.silent)
        return min((s for s in heard_s if s is not None), default=math.inf) + SILENCE_S

    def newly_silent(self, now_s: float) -> list[Worker]:
        """Workers that were heard once and have been silent for 2 s; each is named once per silence."""
        lost = [
            worker
            for worker in self
            if not worker.silent and worker.heard_s is not None and now_s - worker.heard_s > SILENCE_S
        ]
        for worker in lost:
            worker.silent = True
        return lost


def _reachable(info: WorkerInfo) -> bool:
    return info.leads and info.state != "dead" and bool(info.address.endpoint)


def _same_life(worker: Worker, info: WorkerInfo | None) -> bool:
    return info is not None and info.address == worker.address
