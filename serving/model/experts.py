"""The feed-forward halves of a block: a dense MLP, or gate + routed experts + shared experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp
from serving.kernels.gemm import linear, linear_fp32, linear_silu_mul
from serving.kernels.packed import pack
from serving.kernels.quant import QuantisedRows
from serving.kernels.topk import gate_topk
from serving.model.config import ModelConfig
from serving.model.kernels import OURS, KernelChoices
from serving.model.microbatches import Pass
from serving.model.weight import Weight, expert_of, new_weight


class Mlp:
    """down(silu(gate x) * up x), gate and up stored as one matrix, gate above up."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fp8: bool = False,
        kernels: KernelChoices = OURS,
    ) -> None:
        kind: dict[str, Any] = {"dtype": dtype, "device": device, "fp8": fp8, "library": kernels.linear_fp8}
        self.gate_up = new_weight(2 * intermediate, hidden, **kind)
        self.down = new_weight(hidden, intermediate, **kind)

    def pack(self) -> None:
        """Once loaded: into the layout that the products read fastest."""
        if isinstance(self.gate_up, Tensor) and isinstance(self.down, Tensor):
            self.gate_up, self.down = pack(self.gate_up), pack(self.down)

    def forward(self, x: Tensor | QuantisedRows) -> Tensor:
        """[T, D]; FP8 weights take rows that are quantised already."""
        return linear(linear_silu_mul(x, self.gate_up), self.down)


class Moe:
    """Routed experts chosen by the gate, plus the shared experts that every token takes. Nothing is dropped."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fp8: bool = False,
        kernels: KernelChoices = OURS,
    ) -> None:
        self.config = config
        hidden, inner, num_experts = config.hidden_size, config.moe_intermediate_size, config.num_routed_experts
        # The gate decides in fp32 whatever the compute dtype; of an fp64 model in fp64, so that batches do not change it.
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.gate = torch.empty(num_experts, hidden, dtype=gate_dtype, device=device)
        self._is_bf16 = dtype == torch.bfloat16
        self.gate_bias = torch.empty(num_experts, dtype=torch.float32, device=device)
        # On CPU one matrix an expert, so that each can be packed as soon as it is loaded; else stacked over E.
        self.gate_up: Weight | list[Tensor]
        self.down: Weight | list[Tensor]
        if device.type == "cpu" and not fp8:
            self.gate_up = [torch.empty(2 * inner, hidden, dtype=dtype) for _ in range(num_experts)]
            self.down = [torch.empty(hidden, inner, dtype=dtype) for _ in range(num_experts)]
        else:
            kind: dict[str, Any] = {"dtype": dtype, "device": device, "fp8": fp8, "library": kernels.grouped_fp8}
            self.gate_up = new_weight(num_experts, 2 * inner, hidden, **kind)
            self.down = new_weight(num_experts, hidden, inner, **kind)
        self.shared = Mlp(hidden, config.shared_intermediate_size, dtype, device, fp8=fp8, kernels=kernels)

    def pack_gate(self) -> None:
        """Once loaded: into the layout that the products read fastest."""
        if self.gate.is_cuda and self._is_bf16:
            # bf16 factors of fp32 sums say the same where the file has them, and a GPU multiplies them faster.
            rounded = self.gate.to(torch.bfloat16)
            self.gate = rounded if torch.equal(rounded.to(torch.float32), self.gate) else self.gate
        self.gate = pack(self.gate)

    def pack_expert(self, expert: int) -> None:
        """The same for one routed expert."""
        if isinstance(self.gate_up, list) and isinstance(self.down, list):
            self.gate_up[expert] = pack(self.gate_up[expert])
            self.down[expert] = pack(self.down[expert])

    def expert(self, expert: int) -> tuple[Weight, Weight]:
        """gate_up [2I, D] and down [D, I] of one routed expert, as views."""
        if isinstance(self.gate_up, list) and isinstance(self.down, list):
            return self.gate_up[expert], self.down[expert]
        assert not isinstance(self.gate_up, list)
        assert not isinstance(self.down, list)
        return expert_of(self.gate_up, expert), expert_of(self.down, expert)

    def forward(self, x_TD: Tensor, rows: QuantisedRows | None = None) -> Pass:
        """[T, D]. `rows`: x quantised, for FP8 weights."""
        x = x_TD if rows is None else rows
        shared = self.shared.gate_up, self.shared.down
        yield from ()
        return grouped_mlp(x, self.gate_up, self.down, *self.choose(x_TD), shared)

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int64 [T, K] and their weights fp32 [T, K]."""
        experts_TK, weights_TK = gate_topk(
            self._gate_logits(x_TD),
            self.gate_bias,
            num_groups=self.config.num_groups,
            num_groups_kept=self.config.num_groups_kept,
            top_k=self.config.num_experts_per_token,
            renormalise=self.config.norm_topk_prob,
            scaling=self.config.routed_scaling_factor,
        )
        return experts_TK, weights_TK.to(torch.float32)

    def _gate_logits(self, x_TD: Tensor) -> Tensor:
        if self.gate.dtype == torch.bfloat16:
            return linear_fp32(x_TD, self.gate)
        return linear(x_TD.to(self.gate.dtype), self.gate)
