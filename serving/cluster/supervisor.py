"""The owner of the units: starts every rank, knows how each is, restarts the dead, drains the living, and tells all who are attached.

    starting -> ready -> draining -> (gone)          starting | ready -> dead -> starting, in the next incarnation

A new incarnation starts only when the process of the one before has ended for certain. A rank that has never been ready is not restarted:
what is wrong with it will be wrong again, and whoever starts the cluster wants to hear of it. It knows ranks, not requests.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serving.cluster.directory import directory_mailbox
from serving.cluster.placement import RankPlan, UnitPlan
from serving.cluster.process import wait_for_end
from serving.cluster.rank import Rank, RankEvent
from serving.cluster.ray_head import NAMESPACE
from serving.core.config import Config
from serving.core.errors import StartupError
from serving.core.messages import Attach, Drain, PeerAddress, Roster, WorkerInfo
from serving.core.spec import WorkerSpec
from serving.mailbox import Driven, PeerGone, Received

SUPERVISOR_ID = "supervisor"
_PLACEMENT_TIMEOUT_S = 60.0
_DRAIN_TIMEOUT_S = 20.0
_EXIT_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 30.0
# A rank that served for so long has recovered: its next death is met without delay again.
_RECOVERED_S = 60.0


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What a supervisor is told. `host` is the address that workers and directory listen on."""

    host: str
    secret: bytes = field(repr=False)
    model_dir: str
    config: Config
    units: tuple[UnitPlan, ...]


@dataclass(slots=True)
class _Rank:
    plan: RankPlan
    group: Any
    bundle_index: int
    incarnation: int = 0
    state: str = "starting"
    detail: str = ""
    endpoint: str = ""
    pid: int | None = None
    actor: Any = None
    was_ready: bool = False
    ready_since_s: float = 0.0
    backoff_s: float = _FIRST_BACKOFF_S
    restart_at_s: float | None = None

    def info(self) -> WorkerInfo:
        address = PeerAddress(self.plan.worker_id, self.endpoint, self.incarnation)
        return WorkerInfo(address=address, role=self.plan.role, state=self.state, detail=self.detail)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank said in one incarnation; None: its process has ended."""

    worker_id: str
    incarnation: int
    event: RankEvent | None
    reason: str = ""


@dataclass(slots=True)
class _State:
    ranks: dict[str, _Rank] = field(default_factory=dict)
    attached: set[str] = field(default_factory=set)
    draining_until_s: float | None = None


class Supervisor:
    """A detached actor. `run` occupies its main thread (see serving.cluster.rank); everything else reaches it through its mailbox."""

    def __init__(self, spec: ClusterSpec) -> None:
        logging.basicConfig(stream=sys.stderr, level=spec.config.telemetry.log_level.upper())
        self._spec = spec
        self._log = logging.getLogger("baton.supervisor")
        self._state = _State()
        self._told: deque[_Told] = deque()
        self._mailbox = directory_mailbox(SUPERVISOR_ID, host=spec.host, secret=spec.secret)
        self._mailbox.start()

    def address(self) -> PeerAddress:
        """Where the directory listens."""
        return self._mailbox.address

    def run(self) -> None:
        """Until the cluster is drained; then no rank is left."""
        try:
            self._place()
            for rank in self._state.ranks.values():
                self._start(rank)
            while not self._drained():
                self._turn()
        finally:
            self._end()

    def _place(self) -> None:
        for unit in self._spec.units:
            bundles = [rank.bundle for rank in unit.ranks]
            group = placement_group(bundles, strategy="STRICT_PACK", name=unit.name, lifetime="detached")
            if not group.wait(timeout_seconds=_PLACEMENT_TIMEOUT_S):
                raise StartupError(
                    f"no host has room for unit {unit.name} ({bundles}); lower units, or free CPUs or GPUs"
                )
            for index, plan in enumerate(unit.ranks):
                self._state.ranks[plan.worker_id] = _Rank(plan, group, index)

    def _start(self, rank: _Rank) -> None:
        rank.incarnation += 1
        rank.state, rank.detail, rank.endpoint, rank.pid, rank.restart_at_s = "starting", "placing", "", None, None
        options = actor_options(rank.plan, rank.group, rank.bundle_index)
        rank.actor = ray.remote(Rank).options(name=f"{rank.plan.worker_id}/{rank.incarnation}", **options).remote()
        spec = WorkerSpec(
            worker_id=rank.plan.worker_id,
            role=rank.plan.role,
            incarnation=rank.incarnation,
            host=self._spec.host,
            secret=self._spec.secret,
            model_dir=self._spec.model_dir,
            num_threads=rank.plan.num_threads,
            config=self._spec.config,
            gpu_share=rank.plan.gpu_share,
        )
        events = rank.actor.run.options(num_returns="streaming").remote(spec)
        watch = (rank.plan.worker_id, rank.incarnation, rank.actor, events)
        threading.Thread(target=self._watch, args=watch, name=f"watch-{rank.plan.worker_id}", daemon=True).start()
        self._broadcast()

    def _watch(self, worker_id: str, incarnation: int, actor: Any, events: Iterable[Any]) -> None:
        """In a thread a rank: passes its events on, and says that it has ended only when its process has."""
        pid, reason = None, ""
        try:
            for reference in events:
                event: RankEvent = ray.get(reference)
                pid, reason = event.pid, event.detail if event.state == "failed" else ""
                self._tell(_Told(worker_id, incarnation, event))
        except ray.exceptions.RayError as error:
            reason = _first_line(error)
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(actor)
        if pid is not None:
            wait_for_end(pid, timeout_s=_EXIT_TIMEOUT_S)
        self._tell(_Told(worker_id, incarnation, None, reason))

    def _tell(self, told: _Told) -> None:
        self._told.append(told)
        self._mailbox.wake()

    def _turn(self) -> None:
        for event in self._mailbox.get(self._patience_s()):
            self._hear(event)
        while self._told:
            self._note(self._told.popleft())
        for rank in self._state.ranks.values():
            if rank.restart_at_s is not None and time.monotonic() >= rank.restart_at_s and not self._draining:
                self._start(rank)

    def _patience_s(self) -> float | None:
        """Time until something is due without an event; None: nothing is."""
        due = [rank.restart_at_s for rank in self._state.ranks.values() if rank.restart_at_s is not None]
        if self._state.draining_until_s is not None:
            due = [self._state.draining_until_s]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _hear(self, event: Received | PeerGone | Driven[None]) -> None:
        if isinstance(event, PeerGone):
            self._state.attached.discard(event.peer)
        elif isinstance(event, Received) and isinstance(event.message, Attach):
            self._state.attached.add(event.sender)
            self._mailbox.post(event.sender, self._roster())
        elif isinstance(event, Received) and isinstance(event.message, Drain):
            self._drain()

    def _note(self, told: _Told) -> None:
        rank = self._state.ranks[told.worker_id]
        assert told.incarnation == rank.incarnation, "a rank starts only when its last incarnation has ended"
        if told.event is None:
            self._bury(rank, told.reason)
        elif told.event.state in ("loading", "ready"):
            rank.pid, rank.detail = told.event.pid, told.event.detail
            if told.event.address is not None and not self._draining:
                rank.state, rank.endpoint = "ready", told.event.address.endpoint
                rank.was_ready, rank.ready_since_s = True, time.monotonic()
        self._broadcast()

    def _bury(self, rank: _Rank, reason: str) -> None:
        rank.state, rank.detail, rank.actor = "dead", reason or "ended", None
        self._log.warning("%s, incarnation %d: %s", rank.plan.worker_id, rank.incarnation, rank.detail)
        if rank.was_ready:
            now_s = time.monotonic()
            if now_s - rank.ready_since_s > _RECOVERED_S:
                rank.backoff_s = _FIRST_BACKOFF_S
            rank.restart_at_s = now_s + rank.backoff_s
            rank.backoff_s = min(2 * rank.backoff_s, _LONGEST_BACKOFF_S)
        self._testify()

    def _testify(self) -> None:
        """Pages that a dead prefill worker was writing are free only on our word: decode workers do not attach, so we go to them."""
        for rank in self._state.ranks.values():
            if rank.plan.role == "decode" and rank.state in ("ready", "draining"):
                self._mailbox.connect(rank.info().address)
                self._mailbox.post(rank.plan.worker_id, self._roster())

    @property
    def _draining(self) -> bool:
        return self._state.draining_until_s is not None

    def _drain(self) -> None:
        if self._draining:
            return
        self._state.draining_until_s = time.monotonic() + _DRAIN_TIMEOUT_S
        for rank in self._state.ranks.values():
            if rank.state == "ready":
                rank.state = "draining"
                self._mailbox.connect(rank.info().address)
                self._mailbox.post(rank.plan.worker_id, Drain())
            elif rank.actor is not None:
                ray.kill(rank.actor)
        self._broadcast()

    def _drained(self) -> bool:
        until_s = self._state.draining_until_s
        if until_s is None:
            return False
        return time.monotonic() >= until_s or all(rank.actor is None for rank in self._state.ranks.values())

    def _roster(self) -> Roster:
        return Roster(workers=[rank.info() for rank in self._state.ranks.values()])

    def _broadcast(self) -> None:
        roster = self._roster()
        for name in self._state.attached:
            self._mailbox.post(name, roster)

    def _end(self) -> None:
        for rank in self._state.ranks.values():
            if rank.actor is not None:
                ray.kill(rank.actor)
            remove_placement_group(rank.group)
        self._mailbox.close()


def actor_options(plan: RankPlan, group: Any, bundle_index: int) -> dict[str, Any]:
    """How Ray starts a rank. Ray hands GPUs out in order and shows the process those of its bundle alone (CUDA_VISIBLE_DEVICES)."""
    return {
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "num_cpus": plan.bundle["CPU"],
        "num_gpus": plan.bundle.get("GPU", 0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle_index),
    }


def _first_line(error: Exception) -> str:
    """Ray's errors hold a traceback; what people need is its last line, or the sentence before it."""
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process has ended"
    return str(error).strip().splitlines()[-1]
