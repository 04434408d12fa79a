"""From the gate's choice to the slots of the EP group: one object a rank, for all layers with experts (the MTP layer is the last).

Which copy of an expert takes a token follows from the placement in force; what it is told of a new one (`place`) holds from the
next step on. Counts the tokens that this rank's gate gave each expert, for whoever balances them; who reads them zeroes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.quant import QuantisedRows
from serving.model.config import ModelConfig
from serving.model.parallel import Parallel, num_moe_layers
from serving.parallel.dispatch import Dispatch, Sending
from serving.parallel.placement import Placement
from serving.parallel.replicas import Replicas


class Routing:
    """`parallel` has a dispatch and a placement that were checked against the model."""

    def __init__(self, config: ModelConfig, parallel: Parallel, device: torch.device) -> None:
        assert parallel.experts is not None
        assert parallel.placement is not None
        self.dispatch: Dispatch = parallel.experts
        self._num_experts = config.num_routed_experts
        self._shared_is_routed = parallel.shared_is_routed
        self._ep_rank = parallel.ep_rank
        self._replicas = Replicas(parallel.placement, device, near=parallel.near)
        self.num_tokens_LE = torch.zeros(
            num_moe_layers(config), config.num_routed_experts, dtype=torch.int64, device=device
        )

    def place(self, placement: Placement) -> None:
        """Between two steps, on every rank of the EP group; in place, so that captured steps see it."""
        self._replicas.write(placement)

    def send(
        self, layer: int, x: Tensor | QuantisedRows, experts_TK: Tensor, weights_TK: Tensor
    ) -> Sending[Tensor | QuantisedRows]:
        """Rows [T, D] of this rank on their way; experts int64 and weights fp32 as the gate has them."""
        chosen = experts_TK.flatten()
        self.num_tokens_LE[layer].scatter_add_(0, chosen, torch.ones_like(chosen))
        if self._shared_is_routed:
            experts_TK = F.pad(experts_TK, (0, 1), value=self._num_experts)
            weights_TK = F.pad(weights_TK, (0, 1), value=1.0)
        slots_TK = self._replicas.slots(layer, experts_TK, self._ep_rank)
        return self.dispatch.send(x, slots_TK, weights_TK)
