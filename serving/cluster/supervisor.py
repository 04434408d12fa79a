"""The owner of the units: starts every rank, knows how each is, restarts the dead, drains the living, and tells all who are attached.

    starting -> ready -> draining -> (gone)          starting | ready -> dead -> starting, in the next incarnation

The ranks of a unit live and die as one: it is ready when all of them are, and the end of one is the end of the others. A new incarnation
starts only when every process of the one before has ended for certain. A unit that has never been ready is not restarted: what is wrong
with it will be wrong again, and whoever starts the cluster wants to hear of it. It knows ranks, not requests.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serving.cluster.directory import directory_mailbox
from serving.cluster.placement import RankPlan, UnitPlan, by_gpu
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
    """What a supervisor is told. `host` is the address that workers and directory listen on.

    `rendezvous_dir`: a folder of the server's own, in which the ranks of a unit find each other.
    """

    host: str
    secret: bytes = field(repr=False)
    model_dir: str
    rendezvous_dir: str
    config: Config
    units: tuple[UnitPlan, ...]


@dataclass(slots=True)
class _Rank:
    """`alive`: its process may run. `answers`: it has said that it is ready."""

    plan: RankPlan
    alive: bool = True
    answers: bool = False
    detail: str = ""
    endpoint: str = ""


@dataclass(slots=True)
class _Unit:
    """`state` is that of its ranks. `actors` are its processes, not in the order of `ranks`."""

    plan: UnitPlan
    group: Any
    ranks: list[_Rank]
    actors: list[Any] = field(default_factory=list)
    incarnation: int = 0
    state: str = "starting"
    was_ready: bool = False
    ready_since_s: float = 0.0
    backoff_s: float = _FIRST_BACKOFF_S
    restart_at_s: float | None = None

    @property
    def alive(self) -> bool:
        return any(rank.alive for rank in self.ranks)

    def info(self, rank: _Rank) -> WorkerInfo:
        """Dead is who has ended, since that frees pages: of a dead unit the others are called draining until they have."""
        state = "dead" if not rank.alive else "draining" if self.state == "dead" else self.state
        endpoint = "" if state == "starting" else rank.endpoint
        address = PeerAddress(rank.plan.worker_id, endpoint, self.incarnation)
        return WorkerInfo(
            address=address,
            role=rank.plan.role,
            state=state,
            detail=rank.detail,
            leads=rank.plan.leads,
            unit=self.plan.name,
        )

    def reachable(self) -> list[WorkerInfo]:
        """Ranks that serve and can be told something."""
        infos = [self.info(rank) for rank in self.ranks]
        return [info for info in infos if info.state in ("ready", "draining") and info.address.endpoint]


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank said in one incarnation; None: its process has ended, for no `reason` if its work was done."""

    unit: str
    rank: int
    incarnation: int
    event: RankEvent | None
    reason: str = ""


@dataclass(slots=True)
class _State:
    units: dict[str, _Unit] = field(default_factory=dict)
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
            for unit in self._state.units.values():
                self._start(unit)
            while not self._drained():
                self._turn()
        finally:
            self._end()

    def _place(self) -> None:
        for plan in self._spec.units:
            group = placement_group(plan.bundles, strategy=plan.strategy, name=plan.name, lifetime="detached")
            if not group.wait(timeout_seconds=_PLACEMENT_TIMEOUT_S):
                raise StartupError(
                    f"there is no room for unit {plan.name} ({_said(plan)}); lower units or ranks, or free CPUs or GPUs"
                )
            self._state.units[plan.name] = _Unit(plan, group, [_Rank(rank) for rank in plan.ranks])

    def _start(self, unit: _Unit) -> None:
        unit.incarnation += 1
        unit.state, unit.restart_at_s = "starting", None
        for rank in unit.ranks:
            rank.alive, rank.answers, rank.detail, rank.endpoint = True, False, "placing", ""
        name = f"{unit.plan.name}/{unit.incarnation}"
        unit.actors = [
            ray.remote(Rank).options(name=f"{name}/{rank.at.rank}", **actor_options(rank, unit.group)).remote()
            for rank in unit.plan.ranks
        ]
        rendezvous = f"{self._spec.rendezvous_dir}/{unit.plan.name}-{unit.incarnation}-{secrets.token_hex(8)}"
        specs = [self._worker_spec(unit, rank, rendezvous) for rank in unit.plan.ranks]
        launch = (unit.plan, unit.incarnation, list(unit.actors), specs)
        threading.Thread(target=self._launch, args=launch, name=f"launch-{unit.plan.name}", daemon=True).start()

    def _worker_spec(self, unit: _Unit, rank: RankPlan, rendezvous: str) -> WorkerSpec:
        return WorkerSpec(
            worker_id=rank.worker_id,
            role=rank.role,
            incarnation=unit.incarnation,
            host=self._spec.host,
            secret=self._spec.secret,
            model_dir=self._spec.model_dir,
            num_threads=rank.num_threads,
            config=self._spec.config,
            gpu_share=rank.gpu_share,
            unit=unit.plan.name,
            rank=rank.at.rank,
            rendezvous=rendezvous,
        )

    def _launch(self, plan: UnitPlan, incarnation: int, actors: list[Any], specs: list[WorkerSpec]) -> None:
        """In a thread a start: gives each actor its rank, and each rank a thread that watches it."""
        try:
            actors = in_order_of_gpus(plan, actors)
            if any(unit.groups.num_nodes > 1 for unit in self._spec.units):
                specs = on_their_nodes(actors, specs)
        except ray.exceptions.RayError as error:
            _kill(actors)
            for spec in specs:
                self._tell(_Told(plan.name, spec.rank, incarnation, None, _first_line(error)))
            return
        for spec, actor in zip(specs, actors, strict=True):
            watch = (spec, actor, actor.run.options(num_returns="streaming").remote(spec))
            threading.Thread(target=self._watch, args=watch, name=f"watch-{spec.worker_id}", daemon=True).start()

    def _watch(self, spec: WorkerSpec, actor: Any, events: Iterable[Any]) -> None:
        """In a thread a rank: passes its events on, and says that it has ended only when its process has."""
        pid, reason = None, ""
        try:
            for reference in events:
                event: RankEvent = ray.get(reference)
                pid, reason = event.pid, event.detail if event.state == "failed" else ""
                self._tell(_Told(spec.unit, spec.rank, spec.incarnation, event))
        except ray.exceptions.RayError as error:
            reason = _first_line(error)
        _kill([actor])
        if pid is not None:
            wait_for_end(pid, timeout_s=_EXIT_TIMEOUT_S)
        self._tell(_Told(spec.unit, spec.rank, spec.incarnation, None, reason))

    def _tell(self, told: _Told) -> None:
        self._told.append(told)
        self._mailbox.wake()

    def _turn(self) -> None:
        for event in self._mailbox.get(self._patience_s()):
            self._hear(event)
        changed = False
        while self._told:
            self._note(self._told.popleft())
            changed = True
        for unit in self._state.units.values():
            if unit.restart_at_s is not None and time.monotonic() >= unit.restart_at_s and not self._draining:
                self._start(unit)
                changed = True
        if changed:  # once for all that was told, since hundreds of ranks load at a time
            self._broadcast()

    def _patience_s(self) -> float | None:
        """Time until something is due without an event; None: nothing is."""
        due = [unit.restart_at_s for unit in self._state.units.values() if unit.restart_at_s is not None]
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
        unit = self._state.units[told.unit]
        rank = unit.ranks[told.rank]
        assert told.incarnation == unit.incarnation, "a unit starts only when its last incarnation has ended"
        if told.event is None:
            self._bury(unit, rank, told.reason)
        elif told.event.state in ("loading", "ready") and unit.state != "dead":
            rank.detail = told.event.detail
            if told.event.state == "ready":
                rank.answers = True
                rank.endpoint = told.event.address.endpoint if told.event.address is not None else ""
            if unit.state == "starting" and all(rank.answers for rank in unit.ranks) and not self._draining:
                unit.state, unit.was_ready, unit.ready_since_s = "ready", True, time.monotonic()

    def _bury(self, unit: _Unit, rank: _Rank, reason: str) -> None:
        rank.alive = False
        if unit.state != "dead":
            rank.detail = reason or "ended"
            if reason or not self._draining:
                self._end_others(unit, rank)
        if unit.state == "dead" and not unit.alive:
            self._plan_restart(unit)
        self._testify()

    def _end_others(self, unit: _Unit, first: _Rank) -> None:
        """No rank of a unit can go on without the others. Why is what the first to end has said."""
        unit.state = "dead"
        self._log.warning("%s, incarnation %d: %s", first.plan.worker_id, unit.incarnation, first.detail)
        for other in unit.ranks:
            if other.alive:
                other.detail = f"ends with {first.plan.worker_id}: {first.detail}"
        _kill(unit.actors)

    def _plan_restart(self, unit: _Unit) -> None:
        unit.actors = []
        if unit.was_ready:
            now_s = time.monotonic()
            if now_s - unit.ready_since_s > _RECOVERED_S:
                unit.backoff_s = _FIRST_BACKOFF_S
            unit.restart_at_s = now_s + unit.backoff_s
            unit.backoff_s = min(2 * unit.backoff_s, _LONGEST_BACKOFF_S)

    def _testify(self) -> None:
        """Pages that a dead prefill worker was writing are free only on our word: decode workers do not attach, so we go to them."""
        for unit in self._state.units.values():
            for info in unit.reachable() if unit.plan.role == "decode" else ():
                self._mailbox.connect(info.address)
                self._mailbox.post(info.address.worker_id, self._roster())

    @property
    def _draining(self) -> bool:
        return self._state.draining_until_s is not None

    def _drain(self) -> None:
        if self._draining:
            return
        self._state.draining_until_s = time.monotonic() + _DRAIN_TIMEOUT_S
        for unit in self._state.units.values():
            if unit.state == "ready":
                unit.state = "draining"
                for info in unit.reachable():
                    self._mailbox.connect(info.address)
                    self._mailbox.post(info.address.worker_id, Drain())
            else:
                _kill(unit.actors)
        self._broadcast()

    def _drained(self) -> bool:
        until_s = self._state.draining_until_s
        if until_s is None:
            return False
        return time.monotonic() >= until_s or not any(unit.alive for unit in self._state.units.values())

    def _roster(self) -> Roster:
        return Roster(workers=[unit.info(rank) for unit in self._state.units.values() for rank in unit.ranks])

    def _broadcast(self) -> None:
        roster = self._roster()
        for name in self._state.attached:
            self._mailbox.post(name, roster)

    def _end(self) -> None:
        for unit in self._state.units.values():
            _kill(unit.actors)
            remove_placement_group(unit.group)
        self._mailbox.close()


def actor_options(plan: RankPlan, group: Any) -> dict[str, Any]:
    """How Ray starts a rank: inside its node's bundle. Ray shows the process its own GPU alone (CUDA_VISIBLE_DEVICES)."""
    return {
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "num_cpus": plan.needs["CPU"],
        "num_gpus": plan.needs.get("GPU", 0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, plan.at.node),
    }


def in_order_of_gpus(plan: UnitPlan, actors: Sequence[Any]) -> list[Any]:
    """The actors of a unit, started in the order of its ranks, as the ranks get them. Raises RayError."""
    if len(actors) == 1 or "GPU" not in plan.ranks[0].needs:
        return list(actors)
    return [actors[i] for i in by_gpu(plan, ray.get([actor.gpu.remote() for actor in actors]))]


def on_their_nodes(actors: Sequence[Any], specs: Sequence[WorkerSpec]) -> list[WorkerSpec]:
    """Of a unit of a server of several nodes, which share no folder: each rank is reached on its own node, and all meet on rank 0's.
    Raises RayError."""
    hosts: list[str] = ray.get([actor.host.remote() for actor in actors])
    rendezvous = ""
    if len(specs) > 1:
        port: int = ray.get(actors[0].listen.remote(hosts[0]))
        rendezvous = f"tcp://{hosts[0]}:{port}/{Path(specs[0].rendezvous).name}"
    return [replace(spec, host=host, rendezvous=rendezvous) for spec, host in zip(specs, hosts, strict=True)]


def _kill(actors: Iterable[Any]) -> None:
    """Also those that have ended."""
    for actor in actors:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(actor)


def _said(plan: UnitPlan) -> str:
    nodes = len(plan.bundles)
    bundle = ", ".join(f"{amount:g} {resource}" for resource, amount in plan.bundles[0].items())
    return bundle if nodes == 1 else f"{nodes} nodes of {bundle}"


def _first_line(error: Exception) -> str:
    """Ray's errors hold a traceback; what people need is its last line, or the sentence before it."""
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process has ended"
    return str(error).strip().splitlines()[-1]
