"""Models to measure without downloading one: named shapes, filled with random weights from a seed.

Weights are scaled so that activations stay near 1 in every layer and the gate spreads tokens over the experts; a random
model is as fast as a trained one. The folder is in the published format, so a peer reads the very same files.

Each matrix passes its input's size on: entries of variance 1 / columns, embeddings of variance 1. What is added to the
residual stream is divided by the layers, twice a layer (Dey et al., 2025). Undivided, the stream grows with depth, tokens
come to resemble each other (Noci et al., 2022: rank collapse), which crowds them onto a few experts, and each layer amplifies
the rounding errors of those before it. Divided by sqrt(2 x layers), as GPT-2's, an expert exchanged at a tie is still an error
that outweighs all rounding, in bf16 too. docs/PERFORMANCE.md has the figures, of DeepSeek's own 0.006 too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serving.bench.shards import Entry, ShardWriter, plan_shards
from serving.kernels.quant import quantise_block_fp8
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.names import SCALE_SUFFIX, Target, name_table
from serving.model.published import FIELDS
from serving.model.weights import Progress

MAX_SHARD_BYTES = 5_000_000_000

# What all of them have as it is published.
_COMMON: dict[str, Any] = {
    key: FIELDS[key]
    for key in (
        "architectures",
        "model_type",
        "hidden_act",
        "norm_topk_prob",
        "rms_norm_eps",
        "rope_theta",
        "routed_scaling_factor",
        "scoring_func",
        "topk_method",
        "tie_word_embeddings",
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
    )
} | {"num_nextn_predict_layers": 0}

SHAPES: dict[str, dict[str, Any]] = {
    # 34.4 M parameters, head widths of V3: small enough that a step shows what the host costs.
    "cpu-34m": _COMMON
    | {
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 384,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "max_position_embeddings": 8192,
    },
    # A fraction of a megabyte: for tests of the measuring itself.
    "tiny": _COMMON
    | {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "max_position_embeddings": 1024,
    },
    # DeepSeek-V2-Lite's sizes under V3's gate: 15.7 B parameters, 31 GB in bf16.
    "lite": _COMMON
    | {
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 163840,
        "rope_scaling": FIELDS["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    # One dense and four MoE layers of V3, every width and the FP8 format as published: 50 GB.
    "slice": FIELDS | {"num_hidden_layers": 5, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
}

# The counts of the published model, experts, groups and those a token chooses, at a hundredth of its widths and a tenth of its depth:
# for units in which every rank is executed.
SHAPES["paper-scaled"] = _COMMON | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 4096,
}

# Lite with its weights stored as slice's are. The dense layer is 64 wider: a fused matrix may not part a scale's block.
SHAPES["lite-fp8"] = SHAPES["lite"] | {
    "intermediate_size": 11008,
    "quantization_config": FIELDS["quantization_config"],
}


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Of random weights. `gate_bias`: its standard deviation. `residual`: factor of the matrices whose products are added to the residual stream."""

    gate_bias: float
    residual: float


# Recorded figures of the small shapes are of these. Scores near the best 8 of 256 lie so close that a bias of 0.1 sends five
# times as many tokens to one expert as to the next, which no trained bias does.
_RECORDED = Scales(gate_bias=0.1, residual=1.0)
_RECORDED_SHAPES = ("cpu-34m", "tiny")
# What blocks add has to decide texts that are compared; with less, the last token decides nearly alone.
_COMPARED_SHAPES = ("paper-scaled",)
SPREADING = 0.01
"""`gate_bias` of all other shapes."""

_GATE_BIAS = "e_score_correction_bias"
_RESIDUAL = ("o_proj.weight", "down_proj.weight")

See = Callable[[str, Tensor], None]


def write_checkpoint(
    folder: Path,
    shape: str,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    see: See | None = None,
) -> int:
    """A folder that any reader of the format can load. Returns the number of parameters.

    Weights are drawn and quantised on `device`, one at a time in the order of the model; a seed gives the same bytes on devices
    of one kind. `see` is shown each by its name, fp32 as drawn. Raises ConfigError where the folder cannot be written.
    """
    fields = SHAPES[shape]
    block = ModelConfig.from_dict(fields).weight_block_size
    shards = plan_shards([group for _, _, group in _planned(fields)], max_shard_bytes)
    generator = torch.Generator(device).manual_seed(seed)
    scales = _scales_of(shape)
    folder.mkdir(parents=True, exist_ok=True)
    if progress is not None:
        progress.start(checkpoint_bytes(shape))
    num_parameters = 0
    with ShardWriter(folder, shards, pinned=torch.device(device).type == "cuda") as writer:
        for name, target, group in _planned(fields):
            drawn = random_weight(name, target.into.shape, generator, scales)
            num_parameters += drawn.numel()
            if see is not None:
                see(name, drawn)
            if len(group) == 2:
                assert block is not None, "scales are planned by the block size"
                stored: tuple[Tensor, ...] = quantise_block_fp8(drawn, block)
            else:
                stored = (drawn.to(group[0].dtype),)
            for entry, tensor in zip(group, stored, strict=True):
                writer.write(entry.name, tensor)
            if progress is not None:
                progress.advance(sum(entry.num_bytes for entry in group))
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    if progress is not None:
        progress.finish()
    return num_parameters


def checkpoint_bytes(shape: str) -> int:
    """Bytes of the weights in the files."""
    return sum(entry.num_bytes for _, _, group in _planned(SHAPES[shape]) for entry in group)


def random_prompts(batch: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed + 1)
    prompts: list[list[int]] = torch.randint(2, vocab_size, (batch, num_tokens), generator=generator).tolist()
    return prompts


def _planned(fields: dict[str, Any]) -> Iterator[tuple[str, Target, list[Entry]]]:
    """Each weight of the model and the tensors it is stored as: itself, or FP8 and its scales; what the gate adds to stays fp32."""
    config = ModelConfig.from_dict(fields)
    dtype = getattr(torch, fields.get("torch_dtype", "float32"))
    for name, target in name_table(DeepseekV3(config, torch.float32, "meta")).items():
        if target.repeats is not None:
            continue
        shape = tuple(target.into.shape)
        if target.quantised and config.weight_block_size:
            blocks = tuple(-(-length // size) for length, size in zip(shape, config.weight_block_size, strict=True))
            quantised = Entry(name=name, dtype=torch.float8_e4m3fn, shape=shape)
            yield name, target, [quantised, Entry(name=name + SCALE_SUFFIX, dtype=torch.float32, shape=blocks)]
        else:
            stored = torch.float32 if name.endswith(_GATE_BIAS) else dtype
            yield name, target, [Entry(name=name, dtype=stored, shape=shape)]


def _scales_of(shape: str) -> Scales:
    if shape in _RECORDED_SHAPES:
        return _RECORDED
    num_layers = SHAPES[shape]["num_hidden_layers"]
    residual = (2 * num_layers) ** -0.5 if shape in _COMPARED_SHAPES else residual_scale(num_layers)
    return Scales(gate_bias=SPREADING, residual=residual)


def residual_scale(num_layers: int) -> float:
    """Of what is added to the residual stream, twice a layer."""
    return 1 / num_layers


def random_weight(name: str, shape: torch.Size, generator: torch.Generator, scales: Scales) -> Tensor:
    """A tensor of a checkpoint by its name, fp32 on the generator's device."""
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if "norm" in name:
        return noise.mul_(0.1).add_(1)
    if name.endswith(_GATE_BIAS):
        return noise.mul_(scales.gate_bias)
    if "embed_tokens" in name:
        return noise
    return noise.mul_(shape[-1] ** -0.5 * (scales.residual if name.endswith(_RESIDUAL) else 1.0))
