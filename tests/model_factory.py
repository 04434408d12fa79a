"""Random checkpoints in the published DeepSeek-V3 folder format, for tests that need a model but no training.

`checkpoint_shapes` is a description of the format of its own, written from the published files, and shares nothing with
`serving.model.names`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FP8_BLOCK = 128

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

TINY: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "qk_nope_head_dim": 24,
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_checkpoint(
    folder: Path, seed: int, *, storage: str = "fp32", num_shards: int = 2, **overrides: Any
) -> dict[str, Tensor]:
    """Write `config.json` (TINY with `overrides`) and safetensors shards; no tokenizer.

    `storage` is fp32, bf16 or fp8 (128x128 blocks, as published). Returns the weights as a reader must see them: fp32
    of what was stored.
    """
    config = {**TINY, **overrides}
    if storage == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    weights = random_weights(config, seed)
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if storage == "fp8" and is_quantised(name):
            stored[name], stored[name + "_scale_inv"], weights[name] = _quantise(weight)
        elif storage == "fp32" or name.endswith("e_score_correction_bias"):
            stored[name] = weight
        else:
            stored[name] = weight.to(torch.bfloat16)
            weights[name] = stored[name].float()
    write_folder(folder, config, stored, num_shards)
    return weights


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], num_shards: int = 1) -> None:
    """`config.json`, shards and index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::num_shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """fp32 weights scaled so that activations stay near 1; the MTP copies of embedding and head equal the main ones."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in checkpoint_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            weights[name] = 1 + 0.1 * noise
        elif name.endswith("e_score_correction_bias"):
            weights[name] = 0.1 * noise
        elif "embed_tokens" in name:
            weights[name] = noise
        else:
            weights[name] = noise * shape[1] ** -0.5
    mtp = f"model.layers.{config['num_hidden_layers']}."
    if config["num_nextn_predict_layers"]:
        weights[mtp + "embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[mtp + "shared_head.head.weight"] = weights["lm_head.weight"].clone()
    return weights


def is_quantised(name: str) -> bool:
    """Stored as FP8 in the published checkpoints: the linear layers inside blocks, but not the gate and not eh_proj."""
    return name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")) and "eh_proj" not in name


def checkpoint_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a published checkpoint, without the FP8 scales."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    last = config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(last + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _attention_shapes(config).items()}
        shapes |= {prefix + name: shape for name, shape in _mlp_shapes(config, layer).items()}
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if layer == last:
            shapes[prefix + "embed_tokens.weight"] = (vocab, hidden)
            shapes[prefix + "enorm.weight"] = (hidden,)
            shapes[prefix + "hnorm.weight"] = (hidden,)
            shapes[prefix + "eh_proj.weight"] = (hidden, 2 * hidden)
            shapes[prefix + "shared_head.norm.weight"] = (hidden,)
            shapes[prefix + "shared_head.head.weight"] = (vocab, hidden)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, v_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query: dict[str, tuple[int, ...]]
    if config["q_lora_rank"] is None:
        query = {"self_attn.q_proj.weight": (heads * (nope + rope), hidden)}
    else:
        query = {
            "self_attn.q_a_proj.weight": (config["q_lora_rank"], hidden),
            "self_attn.q_a_layernorm.weight": (config["q_lora_rank"],),
            "self_attn.q_b_proj.weight": (heads * (nope + rope), config["q_lora_rank"]),
        }
    return query | {
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * (nope + v_dim), latent),
        "self_attn.o_proj.weight": (hidden, heads * v_dim),
    }


def _mlp_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    if layer < config["first_k_dense_replace"] and layer < config["num_hidden_layers"]:
        return _three_projections("mlp.", hidden, config["intermediate_size"])
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (config["n_routed_experts"], hidden),
        "mlp.gate.e_score_correction_bias": (config["n_routed_experts"],),
    }
    for expert in range(config["n_routed_experts"]):
        shapes |= _three_projections(f"mlp.experts.{expert}.", hidden, inner)
    return shapes | _three_projections("mlp.shared_experts.", hidden, inner * config["n_shared_experts"])


def _three_projections(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (inner, hidden),
        prefix + "up_proj.weight": (inner, hidden),
        prefix + "down_proj.weight": (hidden, inner),
    }


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 tensor, its scales, and the fp32 weight that the two stand for; one block after the other."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    quantised, seen = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK), slice(j * FP8_BLOCK, (j + 1) * FP8_BLOCK)
            scales[i, j] = weight[at].abs().max() / 448
            quantised[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            seen[at] = quantised[at].float() * scales[i, j]
    return quantised, scales, seen
