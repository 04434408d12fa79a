"""From the gate's choice to the slots of the EP group: one object a rank, for all layers with experts (the MTP layer is the last).

Which copy of an expert takes a token follows from the placement in force: the copies take turns, or where a rank hosts more of them
than it uses in a step (`Parallel.hosting`) all ranks' token counts decide, and rows wait for those. What it is told of a new placement
(`place`) holds from the next step on. Counts the tokens that this rank's gate gave each expert, for whoever balances them; who reads
them zeroes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from serving.kernels.quant import QuantisedRows
from serving.kernels.route import counted
from serving.model.config import ModelConfig
from serving.model.hosting import Counting, HostedReplicas
from serving.model.parallel import Parallel, num_moe_layers
from serving.parallel.dispatch import Arrived, Dispatch, Returning, Sending
from serving.parallel.placement import Placement
from serving.parallel.replicas import Replicas

Rows = Tensor | QuantisedRows


class CountedSending:
    """A `Sending` whose rows go when the counts of all ranks have come: `advance` waits for them and issues the first rows."""

    queues_rest = False

    def __init__(self, counting: Counting, send: Callable[[Tensor], Sending[Rows]]) -> None:
        self.num_more = 1
        self._counting = counting
        self._send = send

    def advance(self) -> None:
        """Raises RanksMissing."""
        if self.num_more:
            self.num_more = 0
            self._counting.wait()
            self.rows = self._send(self._counting.counts_WE)
            self.rows.advance()

    def wait(self) -> Arrived[Rows]:
        """As `Sending.wait`."""
        self.advance()
        return self.rows.wait()


class Routing:
    """`parallel` has a dispatch and a placement that were checked against the model."""

    def __init__(self, config: ModelConfig, parallel: Parallel, device: torch.device) -> None:
        assert parallel.experts is not None
        assert parallel.placement is not None
        self.dispatch: Dispatch = parallel.experts
        self._make_fixed = parallel.fixed
        self._fixed: dict[int, Dispatch] = {}
        self._num_experts = config.num_routed_experts
        self._shared_is_routed = parallel.shared_is_routed
        self._ep_rank = parallel.ep_rank
        self._replicas: Replicas | HostedReplicas
        if parallel.hosting is None:
            self._replicas = Replicas(parallel.placement, device, near=parallel.near)
        else:
            self._replicas = HostedReplicas(parallel.placement, parallel.hosting, device)
        self.num_tokens_LE = torch.zeros(
            num_moe_layers(config), config.num_routed_experts, dtype=torch.int64, device=device
        )

    @contextmanager
    def fixed(self, capacity: int) -> Iterator[None]:
        """For what is issued inside every rank sends `capacity` rows to every other, so that no shape depends on the choice of experts."""
        assert self._make_fixed is not None, "this rank was given no dispatch for captured steps"
        if capacity not in self._fixed:
            self._fixed[capacity] = self._make_fixed(capacity)
        counted, self.dispatch = self.dispatch, self._fixed[capacity]
        try:
            yield
        finally:
            self.dispatch = counted

    def place(self, placement: Placement) -> None:
        """Between two steps, on every rank of the EP group; in place, so that captured steps see it."""
        self._replicas.write(placement)

    def send(
        self, layer: int, x: Rows, experts_TK: Tensor, weights_TK: Tensor, nobody_T: Tensor | None = None
    ) -> Sending[Rows] | CountedSending:
        """Rows [T, D] of this rank on their way; experts int64 and weights fp32 as the gate has them. Rows with `nobody_T` (bool) go to no
        expert and count for none."""
        replicas, counts_E = self._replicas, self.num_tokens_LE[layer]
        shared = self._num_experts if self._shared_is_routed else None
        if isinstance(replicas, Replicas):
            chosen = experts_TK, weights_TK, nobody_T
            return self.dispatch.send(x, *replicas.route(layer, *chosen, counts_E, first=self._ep_rank, shared=shared))
        experts_TK, weights_TK = counted(experts_TK, weights_TK, nobody_T, counts_E, shared)

        def send(counts_WE: Tensor) -> Sending[Rows]:
            return self.dispatch.send(x, replicas.slots(layer, experts_TK, counts_WE), weights_TK)

        return CountedSending(replicas.count(experts_TK), send)

    def give_back(
        self, sending: Sending[Rows] | CountedSending, y_RD: Tensor, added_TD: Tensor | None = None
    ) -> Returning:
        """What the experts here made of the rows that `sending` brought, as `Dispatch.give_back`."""
        rows = sending.rows if isinstance(sending, CountedSending) else sending
        return self.dispatch.give_back(rows, y_RD, added_TD)
