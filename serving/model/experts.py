"""The feed-forward halves of a block: a dense MLP, or gate + routed experts + shared experts."""

from __future__ import annotations

import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp, silu_mul
from serving.kernels.gemm import linear
from serving.kernels.packed import pack
from serving.kernels.topk import gate_topk
from serving.model.config import ModelConfig


class Mlp:
    """down(silu(gate x) * up x), gate and up stored as one matrix, gate above up."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        self.gate_up = torch.empty(2 * intermediate, hidden, dtype=dtype, device=device)
        self.down = torch.empty(hidden, intermediate, dtype=dtype, device=device)

    def pack(self) -> None:
        """Once loaded: into the layout that the products read fastest."""
        self.gate_up, self.down = pack(self.gate_up), pack(self.down)

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(silu_mul(linear(x_TD, self.gate_up)), self.down)


class Moe:
    """Routed experts chosen by the gate, plus the shared experts that every token takes. Nothing is dropped."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        hidden, inner, num_experts = config.hidden_size, config.moe_intermediate_size, config.num_routed_experts
        # The gate decides in fp32 whatever the compute dtype.
        self.gate = torch.empty(num_experts, hidden, dtype=torch.float32, device=device)
        self.gate_bias = torch.empty(num_experts, dtype=torch.float32, device=device)
        # On CPU one matrix an expert, so that each can be packed as soon as it is loaded; else stacked over E.
        self.gate_up: Tensor | list[Tensor]
        self.down: Tensor | list[Tensor]
        if device.type == "cpu":
            self.gate_up = [torch.empty(2 * inner, hidden, dtype=dtype) for _ in range(num_experts)]
            self.down = [torch.empty(hidden, inner, dtype=dtype) for _ in range(num_experts)]
        else:
            self.gate_up = torch.empty(num_experts, 2 * inner, hidden, dtype=dtype, device=device)
            self.down = torch.empty(num_experts, hidden, inner, dtype=dtype, device=device)
        self.shared = Mlp(hidden, config.shared_intermediate_size, dtype, device)

    def pack_gate(self) -> None:
        """Once loaded: into the layout that the products read fastest."""
        self.gate = pack(self.gate)

    def pack_expert(self, expert: int) -> None:
        """The same for one routed expert."""
        if isinstance(self.gate_up, list) and isinstance(self.down, list):
            self.gate_up[expert] = pack(self.gate_up[expert])
            self.down[expert] = pack(self.down[expert])

    def forward(self, x_TD: Tensor) -> Tensor:
        experts_TK, weights_TK = self.choose(x_TD)
        routed_TD = grouped_mlp(x_TD, self.gate_up, self.down, experts_TK, weights_TK)
        return routed_TD.add_(self.shared.forward(x_TD))

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int64 [T, K] and their weights fp32 [T, K]."""
        return gate_topk(
            linear(x_TD.to(torch.float32), self.gate),
            self.gate_bias,
            num_groups=self.config.num_groups,
            num_groups_kept=self.config.num_groups_kept,
            top_k=self.config.num_experts_per_token,
            renormalise=self.config.norm_topk_prob,
            scaling=self.config.routed_scaling_factor,
        )
