"""The one table of Hugging Face tensor names: which tensor of a checkpoint fills which part of which parameter.

Names are those of the published V3, R1 and V3.1 files. A fused parameter is filled by several tensors, each through a
view with the tensor's own shape, so loading is a copy and nothing is transposed or concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from serving.model.deepseek_v3 import Attention, Block, DeepseekV3
from serving.model.experts import Mlp, Moe

SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """Where one tensor goes: `into` is a view of the parameter, of the tensor's shape.

    `quantised`: the tensor may be FP8 with a `<name>_scale_inv` beside it. `repeats`: name of the tensor whose copy this
    is; it may be absent, is compared with that one where present, and takes no memory.
    """

    into: Tensor
    quantised: bool = False
    repeats: str | None = None


class Part(Protocol):
    """A piece of the model that takes its final layout once all of its tensors are loaded."""

    def pack(self) -> None: ...


def name_table(model: DeepseekV3) -> dict[str, Target]:
    """Every tensor name of the model's checkpoint, in the order of the model. Works on the meta device too."""
    return {name: target for _, targets in name_tables(model) for name, target in targets.items()}


def name_tables(model: DeepseekV3) -> Iterator[tuple[Part | None, dict[str, Target]]]:
    """`name_table` part by part. Only before the part is packed do its targets point at its memory."""
    yield None, {"model.embed_tokens.weight": Target(into=model.embed)}
    for layer, block in enumerate(model.blocks):
        yield block, dict(_block(f"model.layers.{layer}.", block))
    yield None, {"model.norm.weight": Target(into=model.norm)}
    yield model.head, {"lm_head.weight": Target(into=model.head.weight)}
    if model.mtp is not None:
        yield model.mtp, dict(_mtp(f"model.layers.{model.config.num_layers}.", model))


def _mtp(prefix: str, model: DeepseekV3) -> Iterator[tuple[str, Target]]:
    assert model.mtp is not None
    yield prefix + "embed_tokens.weight", Target(into=model.embed, repeats="model.embed_tokens.weight")
    yield prefix + "enorm.weight", Target(into=model.mtp.embed_norm)
    yield prefix + "hnorm.weight", Target(into=model.mtp.hidden_norm)
    yield prefix + "eh_proj.weight", Target(into=model.mtp.join, quantised=True)
    yield from _block(prefix, model.mtp.block)
    yield prefix + "shared_head.norm.weight", Target(into=model.mtp.norm)
    yield prefix + "shared_head.head.weight", Target(into=model.head.weight, repeats="lm_head.weight")


def _block(prefix: str, block: Block) -> Iterator[tuple[str, Target]]:
    yield prefix + "input_layernorm.weight", Target(into=block.attention_norm)
    yield from _attention(prefix + "self_attn.", block.attention)
    yield prefix + "post_attention_layernorm.weight", Target(into=block.mlp_norm)
    if isinstance(block.mlp, Moe):
        yield from _moe(prefix + "mlp.", block.mlp)
    else:
        yield from _mlp(prefix + "mlp.", block.mlp.gate_up, block.mlp.down)


def _attention(prefix: str, attention: Attention) -> Iterator[tuple[str, Target]]:
    query, latent = attention.qkv_a[: attention.query_rows], attention.qkv_a[attention.query_rows :]
    if attention.q_b is not None and attention.q_norm is not None:
        yield prefix + "q_a_proj.weight", Target(into=query, quantised=True)
        yield prefix + "q_a_layernorm.weight", Target(into=attention.q_norm)
        yield prefix + "q_b_proj.weight", Target(into=attention.q_b, quantised=True)
    else:
        yield prefix + "q_proj.weight", Target(into=query, quantised=True)
    yield prefix + "kv_a_proj_with_mqa.weight", Target(into=latent, quantised=True)
    yield prefix + "kv_a_layernorm.weight", Target(into=attention.kv_norm)
    assert attention.kv_b is not None, "the table is made before the model is packed"
    yield prefix + "kv_b_proj.weight", Target(into=attention.kv_b, quantised=True)
    yield prefix + "o_proj.weight", Target(into=attention.out, quantised=True)


def _moe(prefix: str, moe: Moe) -> Iterator[tuple[str, Target]]:
    yield prefix + "gate.weight", Target(into=moe.gate)
    yield prefix + "gate.e_score_correction_bias", Target(into=moe.gate_bias)
    for expert, (gate_up, down) in enumerate(zip(moe.gate_up, moe.down, strict=True)):
        yield from _mlp(f"{prefix}experts.{expert}.", gate_up, down)
    shared: Mlp = moe.shared
    yield from _mlp(prefix + "shared_experts.", shared.gate_up, shared.down)


def _mlp(prefix: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Target]]:
    inner = gate_up.shape[0] // 2
    yield prefix + "gate_proj.weight", Target(into=gate_up[:inner], quantised=True)
    yield prefix + "up_proj.weight", Target(into=gate_up[inner:], quantised=True)
    yield prefix + "down_proj.weight", Target(into=down, quantised=True)
