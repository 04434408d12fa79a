"""The one table of Hugging Face tensor names: which tensor of a checkpoint fills which part of which parameter.

Names are those of the published V3, R1 and V3.1 files. A fused parameter is filled by several tensors, each through a
view with the tensor's own shape, so loading is a copy and nothing is transposed or concatenated. Of a unit of many ranks each
keeps parts: heads of W_q and W_kv are rows, of W_o columns; embedding and head are rows; an expert is kept or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from serving.kernels.quant import BLOCK, Fp8Weight
from serving.model.deepseek_v3 import Attention, Block, DeepseekV3
from serving.model.experts import Moe
from serving.model.mtp import Mtp
from serving.model.parallel import vocabulary_rows
from serving.model.weight import Weight

SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """Where one tensor goes: `into` is a view of the parameter, of the tensor's shape, or of that of the part which this rank
    keeps: the tensor is `whole` then, and the part begins at row and column `at`. A part of no rows is not read.

    `quantised`: the tensor may be FP8 with a `<name>_scale_inv` beside it; `scales`: where those go if `into` stays FP8.
    `repeats`: name of the tensor whose copy this is; it may be absent, is compared with that one where present, and takes
    no memory.
    """

    into: Tensor
    whole: tuple[int, ...] | None = None
    at: tuple[int, int] = (0, 0)
    quantised: bool = False
    scales: Tensor | None = None
    repeats: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the checkpoint."""
        return tuple(self.into.shape) if self.whole is None else self.whole

    @property
    def has_all_columns(self) -> bool:
        return self.into.shape[-1] == self.shape[-1]


Part = tuple[Callable[[], None] | None, dict[str, Target]]


def name_table(model: DeepseekV3) -> dict[str, Target]:
    """Every tensor name of the model's checkpoint, in the order of the model. Works on the meta device too."""
    return {name: target for _, targets in name_tables(model) for name, target in targets.items()}


def name_tables(model: DeepseekV3, *, kept: bool = False) -> Iterator[Part]:
    """`name_table` in parts: once a part's tensors are loaded, what stands before them is to be called. `kept`: without experts that are
    on other ranks alone.

    It packs the part into its final layout, after which its targets no longer point at the model's memory.
    """
    yield None, {"model.embed_tokens.weight": _vocabulary(model, model.embed)}
    for layer, block in enumerate(model.blocks):
        yield from _block(f"model.layers.{layer}.", block, kept)
    yield None, {"model.norm.weight": Target(into=model.norm)}
    yield model.head.pack, {"lm_head.weight": _vocabulary(model, model.head.weight)}
    if model.mtp is not None:
        prefix = f"model.layers.{model.config.num_layers}."
        yield model.mtp.pack, dict(_mtp(prefix, model.mtp))
        yield from _block(prefix, model.mtp.block, kept)
        yield None, dict(_repeated(prefix, model))


def _mtp(prefix: str, mtp: Mtp) -> Iterator[tuple[str, Target]]:
    yield prefix + "enorm.weight", Target(into=mtp.embed_norm)
    yield prefix + "hnorm.weight", Target(into=mtp.hidden_norm)
    yield prefix + "eh_proj.weight", Target(into=mtp.join, quantised=True)
    yield prefix + "shared_head.norm.weight", Target(into=mtp.norm)


def _repeated(prefix: str, model: DeepseekV3) -> Iterator[tuple[str, Target]]:
    # The head is packed by now; where its rows lie in the file is the same.
    part = _vocabulary(model, model.embed)
    yield prefix + "embed_tokens.weight", replace(part, repeats="model.embed_tokens.weight")
    yield prefix + "shared_head.head.weight", replace(part, repeats="lm_head.weight")


def _vocabulary(model: DeepseekV3, weight: Tensor) -> Target:
    """This rank's rows of embedding or head."""
    tp, vocab_size, hidden = model.parallel.tp, model.config.vocab_size, model.config.hidden_size
    rows = vocabulary_rows(vocab_size, tp.world_size)
    start = min(tp.rank * rows, vocab_size)
    return Target(into=weight[: min(rows, vocab_size - start)], whole=(vocab_size, hidden), at=(start, 0))


def _block(prefix: str, block: Block, kept: bool) -> Iterator[Part]:
    norms = {
        prefix + "input_layernorm.weight": Target(into=block.attention_norm),
        prefix + "post_attention_layernorm.weight": Target(into=block.mlp_norm),
    }
    yield None, norms
    yield block.attention.pack, dict(_attention(prefix + "self_attn.", block.attention))
    if isinstance(block.mlp, Moe):
        yield from _moe(prefix + "mlp.", block.mlp, kept)
    else:
        yield block.mlp.pack, dict(_mlp(prefix + "mlp.", block.mlp.gate_up, block.mlp.down))


def _attention(prefix: str, attention: Attention) -> Iterator[tuple[str, Target]]:
    query_rows, rank, tp = attention.query_rows, attention.tp.rank, attention.tp.world_size
    if attention.q_b is not None and attention.q_norm is not None:
        yield prefix + "q_a_proj.weight", _rows(attention.qkv_a, 0, query_rows)
        yield prefix + "q_a_layernorm.weight", Target(into=attention.q_norm)
        yield prefix + "q_b_proj.weight", _part_of_rows(_rows(attention.q_b), rank, tp)
    else:
        yield prefix + "q_proj.weight", _part_of_rows(_rows(attention.qkv_a, 0, query_rows), rank, tp)
    yield prefix + "kv_a_proj_with_mqa.weight", _rows(attention.qkv_a, query_rows)
    yield prefix + "kv_a_layernorm.weight", Target(into=attention.kv_norm)
    assert attention.kv_b is not None, "the table is made before the model is packed"
    yield prefix + "kv_b_proj.weight", _part_of_rows(Target(into=attention.kv_b, quantised=True), rank, tp)
    out = _rows(attention.out)
    hidden, columns = out.into.shape
    yield prefix + "o_proj.weight", replace(out, whole=(hidden, tp * columns), at=(0, rank * columns))


def _moe(prefix: str, moe: Moe, kept: bool) -> Iterator[Part]:
    gate = {
        prefix + "gate.weight": Target(into=moe.gate),
        prefix + "gate.e_score_correction_bias": Target(into=moe.gate_bias),
    }
    yield moe.pack_gate, gate
    num_routed = moe.config.num_routed_experts
    prefixes = {expert: f"{prefix}experts.{expert}." for expert in range(num_routed)}
    if moe.shared is None:
        prefixes[num_routed] = prefix + "shared_experts."
    here = set(moe.experts_here)
    elsewhere = _elsewhere(moe)
    for expert, of_expert in prefixes.items():
        if expert in here:
            yield _expert(of_expert, moe, moe.slots_of(expert))
        elif not kept:
            yield None, {of_expert + name: target for name, target in elsewhere.items()}
    if moe.shared is not None:
        yield moe.shared.pack, dict(_mlp(prefix + "shared_experts.", moe.shared.gate_up, moe.shared.down))


def _expert(prefix: str, moe: Moe, slots: list[int]) -> Part:
    """A logical expert, into the first of its slots here."""
    return partial(moe.pack_expert, *slots), dict(_mlp(prefix, *moe.expert(slots[0])))


def _elsewhere(moe: Moe) -> dict[str, Target]:
    """Of an expert that others hold: nothing."""
    hidden, inner = moe.config.hidden_size, moe.config.moe_intermediate_size
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {
        f"{name}.weight": Target(into=moe.gate_bias.new_empty(0, shape[1]), whole=shape, quantised=True)
        for name, shape in shapes.items()
    }


def _mlp(prefix: str, gate_up: Weight, down: Weight) -> Iterator[tuple[str, Target]]:
    inner = gate_up.shape[0] // 2
    yield prefix + "gate_proj.weight", _rows(gate_up, 0, inner)
    yield prefix + "up_proj.weight", _rows(gate_up, inner)
    yield prefix + "down_proj.weight", _rows(down)


def _part_of_rows(target: Target, rank: int, tp: int) -> Target:
    """`target` is one of `tp` equal parts, one below the other."""
    rows, columns = target.into.shape
    return replace(target, whole=(tp * rows, columns), at=(rank * rows, 0))


def _rows(weight: Weight, start: int = 0, end: int | None = None) -> Target:
    """Rows of a weight that the checkpoint may hold as FP8; `start` begins a block of scales."""
    if not isinstance(weight, Fp8Weight):
        return Target(into=weight[start:end], quantised=True)
    end = weight.shape[0] if end is None else end
    scales = weight.scales[start // BLOCK : -(-end // BLOCK)]
    return Target(into=weight.quantised[start:end], quantised=True, scales=scales)
