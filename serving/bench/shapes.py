"""Models to measure without downloading one: named shapes, filled with random weights from a seed.

Weights are scaled so that activations stay near 1 and the gate spreads tokens over the experts; a random model is as fast
as a trained one. The folder is in the published format, so a peer reads the very same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.names import name_table

_COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

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
        "q_lora_rank": None,
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
}


def write_checkpoint(folder: Path, shape: str, seed: int) -> int:
    """A folder that any reader of the format can load, weights in fp32. Returns the number of parameters."""
    fields = SHAPES[shape]
    model = DeepseekV3(ModelConfig.from_dict(fields), torch.float32, "meta")
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _random(name, target.into, generator) for name, target in name_table(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.numel() for weight in weights.values())


def random_prompts(batch: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed + 1)
    prompts: list[list[int]] = torch.randint(2, vocab_size, (batch, num_tokens), generator=generator).tolist()
    return prompts


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * noise
    if name.endswith("e_score_correction_bias"):
        return 0.1 * noise
    return noise if "embed_tokens" in name else noise * like.shape[-1] ** -0.5
