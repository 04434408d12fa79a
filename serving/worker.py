"""What the three workers have in common: an engine and its pages, a mailbox, and the life of the step loop.

    running --Drain, nothing left to do, on no rank of the unit--> gone
       |  stop: after the turn under way, or the unit's round
       |  an exception of our own: every job is failed loudly, then it is raised

A worker says what a turn does, when nothing is left and how it is. Knows no scheduler and no hand-off.
"""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import msgspec

from kvcache.audit import Audit
from kvcache.manager import KVManager
from kvcache.transfer.notices import Notices
from kvcache.transfer.ranks import PageRanks
from kvcache.transfer.writes import Writes
from serving.core.errors import PeerError, StaleError
from serving.core.messages import AnyMessage, Attach, Drain, MetricsQuery, WorkerState
from serving.core.spec import WorkerSpec
from serving.engine.build import Engine
from serving.engine.drafting import Drafting
from serving.engine.unit import Alone, Leader, Unit
from serving.mailbox import Driver, Mailbox
from serving.metrics import Metrics
from serving.model.work import pair_cost
from serving.reporter import Reporter
from serving.watched import WatchedExecutor


class Job(Protocol):
    """What a worker remembers of a job; `router` hears how it ends."""

    @property
    def router(self) -> str: ...


J = TypeVar("J", bound=Job)
T = TypeVar("T")


class Worker(ABC, Generic[J, T]):
    """J: what is remembered of a job, by its id in `_jobs`. T: what the mailbox's driver reports. `_moved`: the last turn changed something."""

    def __init__(
        self,
        spec: WorkerSpec,
        engine: Engine,
        *,
        manager: KVManager | None = None,
        driver: Driver[T] | None = None,
        run_ahead: bool | None = None,
    ) -> None:
        """`manager` None: one for all pages of the engine. `run_ahead` None: as configured, except on a CPU, where it would only delay tokens.

        Raises StartupError.
        """
        config = spec.config
        self._log = logging.getLogger(f"baton.{spec.worker_id}")
        self._role = spec.role
        self._unit_name = spec.unit or spec.worker_id
        self._engine = engine
        self._pair_cost = pair_cost(engine.model_config)
        self._metrics = Metrics("worker", worker=spec.worker_id)
        self._mailbox: Mailbox[T] = Mailbox(
            worker_id=spec.worker_id,
            incarnation=spec.incarnation,
            host=spec.host,
            secret=spec.secret,
            heartbeat_s=config.telemetry.heartbeat_s,
            metrics=self._metrics,
            driver=driver,
        )
        self.address = self._mailbox.address
        self._manager = manager or KVManager(engine.pool.num_pages, prefix_cache=config.kv.prefix_cache)
        self._audit = Audit(self._manager)
        self._reporter = Reporter(self._mailbox, self._metrics, self._state)
        self._unit = _unit_of(engine)
        self._unit.tell(self._mailbox.wake)
        self._executor = WatchedExecutor(self._unit.executor, self._reporter)
        on_cpu = not engine.pool.tensor.is_cuda
        self._run_ahead = config.engine.run_ahead and not on_cpu if run_ahead is None else run_ahead
        self._drafting = Drafting(engine.draft_tokens, engine.runner.step_s) if engine.draft_tokens else None
        self._jobs: dict[str, J] = {}
        self._moved = False
        self._draining = self._stopping = False

    def run(self) -> None:
        """Blocks until drained or stopped, and with it all ranks of its unit. An exception is our bug, or RanksMissing: every job is
        failed loudly before it is raised."""
        self._mailbox.start()
        try:
            while not self._unit.turned(stopping=self._stopping, drained=self._draining and self._is_empty()):
                self._turn()
        except BaseException:
            self._log.exception("the worker stops")
            self._fail_all("the worker has failed")
            raise
        finally:
            self._unit.close()
            self._mailbox.close()

    def stop(self) -> None:
        """From any thread: `run` returns after the turn under way, whatever is unfinished."""
        self._stopping = True
        self._mailbox.wake()

    def pages(self) -> dict[str, int]:
        """Pages by state; for tests, and exact only while nothing runs."""
        return self._manager.counts()

    def metric(self, name: str, **labels: str) -> float:
        return self._metrics.value(name, **labels)

    @abstractmethod
    def _turn(self) -> None:
        """Waits for messages if there is nothing else to do, and does what there is."""

    @abstractmethod
    def _is_empty(self) -> bool:
        """No job is left, nor anything of one that has ended."""

    @abstractmethod
    def _state(self, step_s: float) -> WorkerState:
        """How the worker is now; `step_s`: what a step takes."""

    def _patience_s(self, *due_s: float | None) -> float | None:
        """How long to wait for a message: not at all after a turn that changed something or while the unit runs steps, None if nothing
        else can happen.

        `due_s`: when there will be something to do besides the reporter's work; None: not before something happens.
        """
        if self._moved or self._unit.awake:
            return 0.0
        due = [moment_s for moment_s in (self._reporter.due_s(), *due_s) if moment_s is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    @contextlib.contextmanager
    def _bearing_with(self, peer: str) -> Iterator[None]:
        """What a peer says wrongly, or too late, is counted and dropped."""
        try:
            yield
        except PeerError as error:
            stale = isinstance(error, StaleError)
            self._metrics.add("baton_kv_stale_total" if stale else "baton_frames_refused_total")
            self._log.warning("%s: %s", peer, error)

    def _on_any(self, sender: str, message: AnyMessage) -> None:
        """What every worker may be told. Raises PeerError for anything else."""
        match message:
            case Attach():
                self._reporter.attach(sender)
            case MetricsQuery():
                if self._engine.balancing is not None:
                    self._engine.balancing.report(self._metrics, unit=self._unit_name)
                self._reporter.answer(sender, message)
            case Drain():
                self._draining = True
            case _:
                raise PeerError(f"a worker of role {self._role} has no use for {type(message).__name__}; dropped")

    def _page_ranks(self, *, writes: Writes | None = None, notices: Notices | None = None) -> PageRanks:
        """The TP ranks of this one's DP group as movers of pages. Its followers, which wait for this, hear where their leader is."""
        lockstep = self._engine.lockstep
        if lockstep is None or lockstep.tp == 1:
            return PageRanks(self._mailbox, writes=writes, notices=notices)
        lockstep.announce(msgspec.msgpack.encode(self.address))
        return PageRanks(self._mailbox, writes=writes, notices=notices, tp=lockstep.tp, rounds=lambda: lockstep.number)

    def _count_drafts(self) -> None:
        if self._drafting is not None:
            num_drafted, num_accepted = self._drafting.take_counts()
            self._metrics.add("baton_spec_draft_tokens_total", num_drafted)
            self._metrics.add("baton_spec_accepted_tokens_total", num_accepted)

    def _jobs_of(self, router: str) -> list[str]:
        return [job_id for job_id, job in self._jobs.items() if job.router == router]

    def _fail(self, job_id: str, reason: str, *, retryable: bool = False, overloaded: bool = False) -> None:
        job = self._jobs.pop(job_id)
        self._log.warning("job %s: %s", job_id, reason)
        self._reporter.fail(job.router, job_id, reason, retryable=retryable, overloaded=overloaded)

    def _fail_all(self, reason: str) -> None:
        for job_id in list(self._jobs):
            self._fail(job_id, reason, retryable=True)


def _unit_of(engine: Engine) -> Unit:
    if engine.lockstep is None:
        return Alone(engine.runner)
    return Leader(engine.runner, engine.lockstep)
