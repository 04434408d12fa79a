"""Experts that follow the load while a unit runs: what the model counts, given to the balancer before each step.

Every rank of the EP group does this before the same steps (`serving.engine.unit.BetweenSteps`); what is decided, and how experts come to
their new slots, is `serving.parallel.rebalance`'s and `transaction`'s.
"""

from __future__ import annotations

import time

from serving.core.config import BalanceTable
from serving.engine.placing import nodes_and_groups
from serving.metrics import Metrics
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.units import UnitShape
from serving.parallel.collectives import Collectives
from serving.parallel.rebalance import Policy, Rebalancer, Trigger
from serving.parallel.transaction import LivePlacement

_LOOK_EVERY = 32
"""Steps after which the counts are summed over the group; a quarter of them after which they are read from the device."""
_SMALLEST_BUDGET_BYTES = 1 << 16
"""More than a layer's slots need not be had at once, but for what exchanges round up."""


def policy_of(shape: UnitShape, config: ModelConfig) -> Policy:
    """How the experts of an EP group are placed anew. Raises ConfigError where that cannot change anything."""
    num_nodes, num_groups = nodes_and_groups(shape, config)
    return Policy(
        num_experts=shape.num_experts,
        num_slots=shape.num_slots,
        num_gpus=shape.groups.ep,
        num_nodes=num_nodes,
        num_groups=num_groups,
        active=shape.active_slots if shape.chooses else None,
    )


class Balancing:
    """One rank's part. All ranks of `ep` construct it at once. `data`: the same ranks where the weights are; None: `ep`, which is in host
    memory. Raises ConfigError where balancing cannot change anything."""

    def __init__(
        self,
        model: DeepseekV3,
        shape: UnitShape,
        ep: Collectives,
        table: BalanceTable,
        *,
        look_every: int = _LOOK_EVERY,
        data: Collectives | None = None,
    ) -> None:
        placement, routing = model.parallel.placement, model.routing
        assert placement is not None, "a rank of an EP group has a placement"
        assert routing is not None, "a rank of an EP group routes"
        config = model.config
        policy = policy_of(shape, config)
        slots = model.expert_slots
        layer_bytes = slots.num_slots * sum(tensor.nbytes for tensor in slots.read(0, 0))
        self._num_tokens_LE = routing.num_tokens_LE
        self._live = LivePlacement(
            control=ep,
            data=data or ep,
            slots=slots,
            placement=placement,
            budget_bytes=min(table.step_bytes, layer_bytes + _SMALLEST_BUDGET_BYTES),
            ranks_per_node=min(shape.groups.ranks_per_node, shape.groups.ep),
            on_commit=routing.place,
        )
        self._rebalancer = Rebalancer(
            live=self._live,
            policy=policy,
            trigger=Trigger(period_s=table.period_s, threshold=table.threshold, min_gain=table.min_gain),
            half_life_s=table.half_life_s,
            look_every=look_every,
            now_s=time.monotonic(),
            routed_top_k=config.num_experts_per_token if shape.shared_expert_routed else None,
        )
        self._count_every = max(1, look_every // 4)
        self._num_steps = 0

    @property
    def placement_version(self) -> int:
        return self._live.version

    def advance(self) -> None:
        """Raises RanksMissing and PeerError, which end the unit."""
        now_s = time.monotonic()
        self._num_steps += 1
        if self._num_steps % self._count_every == 0:
            self._rebalancer.count(self._num_tokens_LE.cpu().numpy(), now_s=now_s)
            self._num_tokens_LE.zero_()
        self._rebalancer.step(now_s=now_s)

    def report(self, metrics: Metrics, *, unit: str) -> None:
        """The figures are those of the EP group, so its first rank alone has any."""
        if self._live.control.rank == 0:
            self._rebalancer.report(metrics, unit=unit)
