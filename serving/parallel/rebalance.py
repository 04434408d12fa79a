"""When experts are placed anew, and where: loads of the unit -> trigger -> policy -> changes, layer after layer, worst first.

    count -> look, every `look_every` steps -> (a rank wishes it) -> sweep: for each layer, plan and change -> look ...

Everything here is resumed once a step and leaves its collectives in flight meanwhile. A look is a reduce-scatter of the counters in one
step and an all-gather of their sums in the next: every rank has the same bits then, and goes by nothing else. Clocks differ, so time
decides nothing by itself: each rank brings a wish, its own clock's or that of the balance at the look before, and any wish is everybody's. A layer
is planned when its turn comes, on every rank alike: a few milliseconds a step instead of a tenth of a second at once.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch

from serving.core.errors import ConfigError
from serving.metrics import Metrics
from serving.parallel.balance import (
    check_choice,
    global_placement,
    hierarchical_placement,
    incremental_placement,
    single_placement,
)
from serving.parallel.loads import ExpertLoads, with_shared_expert
from serving.parallel.moves import fewest_moves
from serving.parallel.placement import Floats, Ints, Placement, balance
from serving.parallel.redundancy import hosted_balance, hosted_placement
from serving.parallel.transaction import LivePlacement, Phase

_HOSTED_LAYERS_A_STEP = 4


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """Rebalance `period_s` after the last time, or as soon as the mean balance of the layers falls below `threshold`.

    Hysteresis: where the threshold cannot be had, balance has to fall by `min_gain` below what the last time has led to; and a layer is
    changed only if its balance gains as much. Raises ConfigError.
    """

    period_s: float = 600.0
    threshold: float = 0.8
    min_gain: float = 0.02

    def __post_init__(self) -> None:
        if self.period_s <= 0:
            raise ConfigError(f"balancing every {self.period_s:g} s is no period; give a number of seconds above 0")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(
                f"a balance of {self.threshold:g} is never reached: it is mean over maximum; choose the threshold between 0 "
                "(by period alone) and 1"
            )
        if not 0 < self.min_gain < 1:
            raise ConfigError(
                f"a gain of {self.min_gain:g} would rebalance at every look, or never; choose one above 0 and below 1"
            )

    def wishes(self, *, balance: float, achieved: float, age_s: float) -> bool:
        """`balance` at the latest look; `achieved` by the last rebalancing, `age_s` seconds ago."""
        return age_s >= self.period_s or balance < min(self.threshold, achieved - self.min_gain)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Load to placement for `num_slots` slots on the `num_gpus` ranks of an EP group, as the shape demands: one slot a GPU,
    hierarchical where a token is limited to some of `num_groups` groups and there are several nodes, global otherwise. With
    `max_changes`, at most so many slots of a layer change. `active`: of a GPU's slots a step uses so many and chooses them for its own
    tokens (`redundancy`), so what is placed are their hosts; None: it uses all. Raises ConfigError if balancing is impossible."""

    num_experts: int
    num_slots: int
    num_gpus: int
    num_nodes: int = 1
    num_groups: int = 1
    max_changes: int | None = None
    active: int | None = None

    def __post_init__(self) -> None:
        if self.num_gpus == 1:
            raise ConfigError(
                "experts cannot be balanced with ep = 1: the one GPU holds them all; raise ep, or set balance.period_s to 0"
            )
        # The functions themselves refuse what does not fit together.
        self.initial(1)
        check_choice(num_experts=self.num_experts, num_slots=self.num_slots, num_gpus=self.num_gpus)
        if self.max_changes is not None and self.max_changes < 1:
            raise ConfigError(f"with {self.max_changes} changes a layer nothing is balanced; allow at least 1")
        assert self.active is None or self.max_changes is None, "hosts are chosen as a whole"

    def initial(self, num_layers: int) -> Placement:
        """To load the weights by, before any load is known."""
        return self._anew(np.ones((num_layers, self.num_experts)))

    def place(self, present: Placement, loads: Floats) -> Placement:
        """For `loads` [L, E] of the same layers."""
        if self.max_changes is not None:
            nodes = self.num_nodes if self._is_hierarchical else 1
            return incremental_placement(present, loads, max_changes=self.max_changes, num_nodes=nodes)
        by_node = self._is_hierarchical or self.active is not None
        target = self._anew(loads, present)
        return fewest_moves(present, target, num_nodes=self.num_nodes if by_node else 1, num_first=self.active)

    def balance(self, placement: Placement, loads: Floats) -> Floats:
        """[L]: mean over largest load of a GPU, as its slots share `loads` [L, E]."""
        if self.active is None:
            return balance(placement, loads)
        return hosted_balance(placement, loads, active=self.active, num_nodes=self.num_nodes)

    @property
    def layers_a_step(self) -> int | None:
        """Whose balance is computed at once; None: all layers'. Replicas are chosen one layer after the other, in a millisecond each."""
        return None if self.active is None else _HOSTED_LAYERS_A_STEP

    @property
    def _is_hierarchical(self) -> bool:
        return self.num_slots > self.num_gpus and self.num_nodes > 1 and self.num_groups > 1

    def _anew(self, loads: Floats, present: Placement | None = None) -> Placement:
        if self.active is not None:
            return hosted_placement(
                loads,
                num_slots=self.num_slots,
                num_gpus=self.num_gpus,
                active=self.active,
                num_nodes=self.num_nodes,
                present=present,
            )
        if self.num_slots == self.num_gpus:
            return single_placement(loads, num_gpus=self.num_gpus)
        if not self._is_hierarchical:
            return global_placement(loads, num_slots=self.num_slots, num_gpus=self.num_gpus)
        return hierarchical_placement(
            loads,
            num_slots=self.num_slots,
            num_gpus=self.num_gpus,
            num_nodes=self.num_nodes,
            num_groups=self.num_groups,
        )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """`balance` at the latest look, mean over the layers; 1 before. `age_s` since `version` came into force. `num_bytes_moved` by all
    ranks together."""

    balance: float
    version: int
    age_s: float
    num_bytes_moved: int
    num_aborts: dict[str, int]
    last_error: str


class Rebalancer:
    """One rank's part in balancing its EP group. All ranks give the same `policy`, `trigger` and `look_every` (steps).

    `routed_top_k`: the shared expert is one more logical expert, the last, which a token takes beside so many; None: it is not."""

    def __init__(
        self,
        *,
        live: LivePlacement,
        policy: Policy,
        trigger: Trigger,
        half_life_s: float,
        look_every: int,
        now_s: float,
        routed_top_k: int | None = None,
    ) -> None:
        self._live = live
        self._policy = policy
        self._trigger = trigger
        self._look_every = look_every
        self._routed_top_k = routed_top_k
        self._loads = ExpertLoads(
            num_layers=len(live.placement.slots),
            num_experts=policy.num_experts - (routed_top_k is not None),
            half_life_s=half_life_s,
        )
        self._now_s = self._swept_s = self._changed_s = now_s
        self._is_asked = False
        # Until something is known, all is well.
        self._balance = self._achieved = 1.0
        self._num_aborts: dict[str, int] = {}
        self._reported_bytes = 0
        self._reported_aborts: dict[str, int] = {}
        self._steps = self._live_on()

    def count(self, tokens: Ints, *, now_s: float) -> None:
        """Adds what this rank's own tokens have chosen in one or more steps, [layers, routed experts]."""
        self._loads.add(tokens, now_s=now_s)

    def ask(self) -> None:
        """Wishes a rebalancing at the next look, whatever the trigger says."""
        self._is_asked = True

    def step(self, *, now_s: float) -> None:
        """Called by all ranks of the group before every step, on the stream that computes it. Raises RanksMissing and PeerError,
        which end the unit."""
        self._now_s = now_s
        next(self._steps)

    def figures(self) -> Figures:
        live = self._live
        return Figures(
            balance=self._balance,
            version=live.version,
            age_s=self._now_s - self._changed_s,
            num_bytes_moved=live.num_bytes_moved,
            num_aborts=dict(self._num_aborts),
            last_error=live.last_error,
        )

    def report(self, metrics: Metrics, *, unit: str) -> None:
        """Brings `metrics` up to date. One rank of the group does so: the figures are the group's."""
        figures = self.figures()
        metrics.set("baton_expert_balance", figures.balance, unit=unit)
        metrics.set("baton_placement_version", figures.version, unit=unit)
        metrics.set("baton_placement_age_seconds", figures.age_s, unit=unit)
        metrics.add("baton_placement_moved_bytes_total", figures.num_bytes_moved - self._reported_bytes, unit=unit)
        for reason, count in figures.num_aborts.items():
            new = count - self._reported_aborts.get(reason, 0)
            metrics.add("baton_placement_aborts_total", new, unit=unit, reason=reason)
        self._reported_bytes, self._reported_aborts = figures.num_bytes_moved, figures.num_aborts

    def _live_on(self) -> Generator[None, None, None]:
        while True:
            for _ in range(self._look_every):
                yield
            loads, is_wished = yield from self._look()
            by_layer = yield from self._balance_by_layer(loads)
            self._balance = float(by_layer.mean())
            if is_wished and loads.any():
                yield from self._sweep(loads, by_layer)

    def _look(self) -> Generator[None, None, tuple[Floats, bool]]:
        """The group's loads [L, E], and whether any rank wishes to rebalance."""
        age_s = self._now_s - self._swept_s
        wish = self._is_asked or self._trigger.wishes(balance=self._balance, achieved=self._achieved, age_s=age_s)
        self._is_asked = False
        own = self._loads.at(self._now_s)
        world_size = self._live.control.world_size
        # Sums are shared out evenly, so they are filled up.
        share = -(-(own.size + 1) // world_size)
        words = torch.zeros(share * world_size, 1, dtype=torch.float64)
        words[: own.size, 0] = torch.from_numpy(own.ravel())
        words[-1] = float(wish)
        sums = words.new_empty(share, 1)
        handle = self._live.control.reduce_scatter(sums, words)
        yield
        handle.wait()
        handle = self._live.control.all_gather(words, sums)
        yield
        handle.wait()
        totals = words[:, 0].numpy()
        loads = totals[: own.size].reshape(own.shape).copy()
        if self._routed_top_k is not None:
            loads = with_shared_expert(loads, experts_per_token=self._routed_top_k)
        return loads, bool(totals[-1] > 0)

    def _sweep(self, loads: Floats, by_layer: Floats) -> Generator[None, None, None]:
        """Every layer's turn, the least balanced first. An abort ends it: what was changed is valid and stays."""
        by_need = by_layer.argsort(kind="stable")
        for start in range(0, len(by_need), self._live.staged_layers):
            layers = by_need[start : start + self._live.staged_layers]
            if (yield from self._live.change(self._target(layers, loads))):
                self._changed_s = self._now_s
            elif self._live.phase is Phase.ABORTED:
                reason = self._live.last_failure.name.lower()
                self._num_aborts[reason] = self._num_aborts.get(reason, 0) + 1
                break
        by_layer = yield from self._balance_by_layer(loads)
        self._balance = self._achieved = float(by_layer.mean())
        self._swept_s = self._now_s

    def _target(self, layers: Ints, loads: Floats) -> Placement:
        """The placement in force, with those of `layers` placed anew that gain enough by it."""
        live = self._live.placement
        present = _with_slots(live, live.slots[layers])
        planned = self._policy.place(present, loads[layers])
        gains = self._policy.balance(planned, loads[layers]) - self._policy.balance(present, loads[layers])
        worth = gains >= self._trigger.min_gain
        slots = live.slots.copy()
        slots[layers[worth]] = planned.slots[worth]
        return _with_slots(live, slots)

    def _balance_by_layer(self, loads: Floats) -> Generator[None, None, Floats]:
        """[L], of the placement in force, which does not change meanwhile."""
        live, num_layers = self._live.placement, len(loads)
        figures = np.empty(num_layers)
        at_once = self._policy.layers_a_step or num_layers
        for start in range(0, num_layers, at_once):
            if start:
                yield
            part = slice(start, start + at_once)
            figures[part] = self._policy.balance(_with_slots(live, live.slots[part]), loads[part])
        return figures


def _with_slots(placement: Placement, slots: Ints) -> Placement:
    return Placement(slots=slots, num_experts=placement.num_experts, num_gpus=placement.num_gpus)
