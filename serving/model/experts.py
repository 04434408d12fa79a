"""The feed-forward halves of a block: a dense MLP, or gate + routed experts + shared experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp
from serving.kernels.gemm import linear, linear_fp32, linear_silu_mul
from serving.kernels.packed import pack
from serving.kernels.quant import Fp8Weight, QuantisedRows
from serving.kernels.topk import gate_topk
from serving.model.config import ModelConfig
from serving.model.kernels import OURS, KernelChoices
from serving.model.microbatches import Pass, Sent
from serving.model.parallel import SINGLE, Parallel
from serving.model.routing import Routing
from serving.model.weight import Weight, copy_weight, expert_of, new_weight
from serving.parallel.dispatch import Arrived


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
    """Routed experts chosen by the gate, plus the shared experts that every token takes. Nothing is dropped.

    `layer` counts those with experts. `experts_here`: the logical expert in each slot of this rank. `shared` is None where the
    shared expert is in a slot of some rank, as the last logical expert.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fp8: bool = False,
        kernels: KernelChoices = OURS,
        parallel: Parallel = SINGLE,
        layer: int = 0,
        routing: Routing | None = None,
    ) -> None:
        self.config = config
        self.layer = layer
        self.routing = routing
        self.experts_here = parallel.experts_here(config, layer)
        num_slots = len(self.experts_here)
        hidden, inner, num_experts = config.hidden_size, config.moe_intermediate_size, config.num_routed_experts
        # The gate decides in fp32 whatever the compute dtype; of an fp64 model in fp64, so that batches do not change it.
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.gate = torch.empty(num_experts, hidden, dtype=gate_dtype, device=device)
        self._is_bf16 = dtype == torch.bfloat16
        self.gate_bias = torch.empty(num_experts, dtype=torch.float32, device=device)
        # On CPU one matrix a slot, so that each can be packed as soon as it is loaded; else stacked.
        self.gate_up: Weight | list[Tensor]
        self.down: Weight | list[Tensor]
        if device.type == "cpu" and not fp8:
            self.gate_up = [torch.empty(2 * inner, hidden, dtype=dtype) for _ in range(num_slots)]
            self.down = [torch.empty(hidden, inner, dtype=dtype) for _ in range(num_slots)]
        else:
            kind: dict[str, Any] = {"dtype": dtype, "device": device, "fp8": fp8, "library": kernels.grouped_fp8}
            self.gate_up = new_weight(num_slots, 2 * inner, hidden, **kind)
            self.down = new_weight(num_slots, hidden, inner, **kind)
        self.shared: Mlp | None = None
        if not parallel.shared_is_routed:
            self.shared = Mlp(hidden, config.shared_intermediate_size, dtype, device, fp8=fp8, kernels=kernels)

    def pack_gate(self) -> None:
        """Once loaded: into the layout that the products read fastest."""
        if self.gate.is_cuda and self._is_bf16:
            # bf16 factors of fp32 sums say the same where the file has them, and a GPU multiplies them faster.
            rounded = self.gate.to(torch.bfloat16)
            self.gate = rounded if torch.equal(rounded.to(torch.float32), self.gate) else self.gate
        self.gate = pack(self.gate)

    def slots_of(self, expert: int) -> list[int]:
        """Slots of this rank that hold a logical expert."""
        return [slot for slot, other in enumerate(self.experts_here) if other == expert]

    def pack_expert(self, slot: int, *copies: int) -> None:
        """The same for one expert, which `copies` get too."""
        if isinstance(self.gate_up, list) and isinstance(self.down, list):
            self.gate_up[slot] = pack(self.gate_up[slot])
            self.down[slot] = pack(self.down[slot])
            for copy in copies:
                self.gate_up[copy], self.down[copy] = self.gate_up[slot], self.down[slot]
            return
        for copy in copies:
            for into, source in zip(self.expert(copy), self.expert(slot), strict=True):
                copy_weight(into, source)

    def write_expert(self, slot: int, gate_up: Tensor, down: Tensor, scales: Sequence[Tensor]) -> None:
        """Plain tensors into a slot; `scales` are theirs, of FP8 weights."""
        if isinstance(self.gate_up, list) and isinstance(self.down, list):
            # Copies share memory, so what is here is replaced.
            self.gate_up[slot], self.down[slot] = pack(gate_up.clone()), pack(down.clone())
            return
        for index, (into, values) in enumerate(zip(self.expert(slot), (gate_up, down), strict=True)):
            source = replace(into, quantised=values, scales=scales[index]) if isinstance(into, Fp8Weight) else values
            copy_weight(into, source)

    def expert(self, slot: int) -> tuple[Weight, Weight]:
        """gate_up [2I, D] and down [D, I] of the expert in a slot, as views."""
        if isinstance(self.gate_up, list) and isinstance(self.down, list):
            return self.gate_up[slot], self.down[slot]
        assert not isinstance(self.gate_up, list)
        assert not isinstance(self.down, list)
        return expert_of(self.gate_up, slot), expert_of(self.down, slot)

    def forward(self, x_TD: Tensor, rows: QuantisedRows | None = None, nobody_T: Tensor | None = None) -> Pass:
        """[T, D]. `rows`: x quantised, for FP8 weights. `nobody_T`, bool: rows of nobody, which go to no other rank."""
        x = x_TD if rows is None else rows
        if self.routing is None:
            assert self.shared is not None, "a rank that holds all experts holds the shared one"
            shared = self.shared.gate_up, self.shared.down
            return grouped_mlp(x, self.gate_up, self.down, *self.choose(x_TD), shared)
        sending = self.routing.send(self.layer, x, *self.choose(x_TD), nobody_T)
        # While counts travel, where rows have to wait for them; they go before the pass gives way, or where the host then queues all
        # the rest when it has queued another's work too, lest the device wait for the host.
        shared_TD = None if self.shared is None else self.shared.forward(x)
        late = sending.num_more > 0 and sending.queues_rest
        if sending.num_more:
            yield Sent(name="counts", wait=sending.advance, gives_way=late)
        arrived: Arrived[Tensor | QuantisedRows] = yield Sent(name="dispatch", wait=sending.wait, gives_way=not late)
        y_RD = self.compute(arrived)
        returning = self.routing.give_back(sending, y_RD, shared_TD)
        # A hop inside the node comes first: it is waited for, so that the one between nodes travels meanwhile.
        if returning.num_more:
            yield Sent(name="combine in the node", wait=returning.advance, gives_way=False)
        sum_TD: Tensor = yield Sent(name="combine", wait=returning.wait)
        return sum_TD

    def compute(self, arrived: Arrived[Tensor | QuantisedRows]) -> Tensor:
        """What the experts here make of the rows that came, [R, D]."""
        return grouped_mlp(
            arrived.x_RD,
            self.gate_up,
            self.down,
            arrived.slots_RK,
            arrived.weights_RK,
            partial=True,
            fill=arrived.fill,
            num_used=arrived.num_used,
            max_used=arrived.max_used,
        )

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
