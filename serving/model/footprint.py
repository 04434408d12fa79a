"""Bytes of weights that one rank of a unit holds, from sizes alone.

What is divided: heads over TP, vocabulary over TP, routed experts over EP. What every rank has whole: the products that make latents and
query latents, dense layers, gates, norms, and the shared expert where it is not routed. FP8 matrices count a byte a value and four a block
of 128 x 128. No torch: the sizes of a unit are judged where there is no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.model.config import ModelConfig
from serving.model.units import UnitShape

_BLOCK = 128
_FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on one rank. `dense`: everything but attention, experts and the vocabulary's two tables."""

    attention: int
    experts: int
    dense: int
    vocabulary: int

    @property
    def total(self) -> int:
        return self.attention + self.experts + self.dense + self.vocabulary


def fits_fp8(model: ModelConfig) -> bool:
    """Whether a GPU that multiplies FP8 keeps the checkpoint's matrices so: as `serving.model.weight.keeps_fp8` decides."""
    fused = (
        model.q_lora_rank or model.num_heads * model.qk_head_dim,
        model.intermediate_size,
        model.moe_intermediate_size,
        model.shared_intermediate_size,
    )
    return model.weight_block_size == (_BLOCK, _BLOCK) and all(rows % _BLOCK == 0 for rows in fused)


def rank_footprint(model: ModelConfig, shape: UnitShape, *, element_bytes: int, fp8: bool) -> Footprint:
    """`element_bytes` of the compute type; `fp8`: the checkpoint's FP8 matrices stay FP8."""
    hidden, tp = model.hidden_size, shape.groups.tp
    num_layers, num_moe = model.num_kv_layers, model.num_moe_layers + model.num_mtp_layers

    def matrix(rows: int, columns: int, *, quantised: bool = True) -> int:
        if not (fp8 and quantised):
            return rows * columns * element_bytes
        return rows * columns + _FP32_BYTES * -(-rows // _BLOCK) * -(-columns // _BLOCK)

    def mlp(inner: int) -> int:
        return matrix(2 * inner, hidden) + matrix(hidden, inner)

    query_rows = shape.heads * model.qk_head_dim
    expand = matrix(shape.heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank, quantised=False)
    attention = expand + matrix(hidden, shape.heads * model.v_head_dim) + model.kv_lora_rank * element_bytes
    if model.q_lora_rank is None:
        attention += matrix(query_rows + model.latent_width, hidden)
    else:
        attention += matrix(model.q_lora_rank + model.latent_width, hidden) + matrix(query_rows, model.q_lora_rank)
        attention += model.q_lora_rank * element_bytes
    shared = 0 if shape.shared_expert_routed else mlp(model.shared_intermediate_size)
    gate = (hidden + 1) * model.num_routed_experts * _FP32_BYTES
    norms = (2 * num_layers + 1 + 3 * model.num_mtp_layers) * hidden * element_bytes
    joins = model.num_mtp_layers * matrix(hidden, 2 * hidden, quantised=False)
    return Footprint(
        attention=num_layers * attention,
        experts=num_moe * shape.hosted_slots * mlp(model.moe_intermediate_size),
        dense=model.num_dense_layers * mlp(model.intermediate_size) + num_moe * (shared + gate) + norms + joins,
        vocabulary=2 * -(-model.vocab_size // tp) * hidden * element_bytes,
    )
