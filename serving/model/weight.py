"""Where a model's large weights live: in the compute dtype, or FP8 as the checkpoint has them where the device multiplies that."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serving.kernels.quant import BLOCK, Fp8Weight

if TYPE_CHECKING:
    from serving.kernels.libraries import DeepGemm
    from serving.model.config import ModelConfig

Weight = Tensor | Fp8Weight


def keeps_fp8(config: ModelConfig, dtype: torch.dtype, device: torch.device, tp: int = 1) -> bool:
    """Whether FP8 weights of the checkpoint stay FP8. Neither fused matrices nor ranks must part a scale's block."""
    heads = config.num_heads // tp
    fused = (
        config.q_lora_rank or heads * config.qk_head_dim,
        *((heads * config.qk_head_dim, heads * config.v_head_dim) if tp > 1 else ()),
        config.intermediate_size,
        config.moe_intermediate_size,
        config.shared_intermediate_size,
    )
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and config.weight_block_size == (BLOCK, BLOCK)
        and all(rows % BLOCK == 0 for rows in fused)
    )


def new_weight(
    *shape: int, dtype: torch.dtype, device: torch.device, fp8: bool, library: DeepGemm | None = None
) -> Weight:
    """Uninitialised [N, K], or [E, N, K]; `library` multiplies it if it is FP8."""
    if not fp8:
        return torch.empty(shape, dtype=dtype, device=device)
    *stack, rows, columns = shape
    blocks = (*stack, -(-rows // BLOCK), -(-columns // BLOCK))
    return Fp8Weight(
        quantised=torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
        scales=torch.empty(blocks, dtype=torch.float32, device=device),
        library=library,
    )


def expert_of(weight: Weight, expert: int) -> Weight:
    """One matrix of a stack, as a view."""
    if isinstance(weight, Fp8Weight):
        return replace(weight, quantised=weight.quantised[expert], scales=weight.scales[expert])
    return weight[expert]


def copy_weight(into: Weight, source: Weight) -> None:
    """Both of one kind and shape."""
    if isinstance(into, Fp8Weight) and isinstance(source, Fp8Weight):
        into.quantised.copy_(source.quantised)
        into.scales.copy_(source.scales)
        return
    assert isinstance(into, Tensor)
    assert isinstance(source, Tensor)
    into.copy_(source)
