"""Writes the trained weights as a Hugging Face folder in DeepSeek's own format, and reads such a folder back.

FP8 e4m3 with `weight_scale_inv` for linear layers, bf16 for embeddings, norms, routers and head, fp32 for the routers'
correction bias; the MTP layer stands behind the last layer and repeats embedding and head, as the published files do.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from serving.demo.trainable import QUANTISED, Shape, block_scales, dequantise

LAYER_NAMES = {
    "input_norm": "input_layernorm",
    "q_a": "self_attn.q_a_proj",
    "q_a_norm": "self_attn.q_a_layernorm",
    "q_b": "self_attn.q_b_proj",
    "kv_a": "self_attn.kv_a_proj_with_mqa",
    "kv_a_norm": "self_attn.kv_a_layernorm",
    "kv_b": "self_attn.kv_b_proj",
    "o": "self_attn.o_proj",
    "post_norm": "post_attention_layernorm",
}
DENSE_NAMES = {"dense_gate": "mlp.gate_proj", "dense_up": "mlp.up_proj", "dense_down": "mlp.down_proj"}
SPARSE_NAMES = {
    "router": "mlp.gate",
    "shared_gate": "mlp.shared_experts.gate_proj",
    "shared_up": "mlp.shared_experts.up_proj",
    "shared_down": "mlp.shared_experts.down_proj",
}
EXPERT_NAMES = {"expert_gate": "gate_proj", "expert_up": "up_proj", "expert_down": "down_proj"}
MTP_NAMES = {
    "mtp_embed_norm": "enorm",
    "mtp_hidden_norm": "hnorm",
    "mtp_norm": "shared_head.norm",
    "embed": "embed_tokens",
    "head": "shared_head.head",
}
NUM_SHARDS = 2


def placed(shape: Shape, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, published name without `.weight`, matrix or vector) of every stored weight, in layer order."""
    yield "embed", "model.embed_tokens", weights["embed"]
    for index in range(shape.layers + 1):
        prefix = f"model.layers.{index}"
        yield from ((kind, f"{prefix}.{name}", weights[kind][index]) for kind, name in LAYER_NAMES.items())
        if index == 0:
            yield from ((kind, f"{prefix}.{name}", weights[kind][0]) for kind, name in DENSE_NAMES.items())
            continue
        yield from ((kind, f"{prefix}.{name}", weights[kind][index - 1]) for kind, name in SPARSE_NAMES.items())
        for expert in range(shape.experts):
            yield from (
                (kind, f"{prefix}.mlp.experts.{expert}.{name}", weights[kind][index - 1, expert])
                for kind, name in EXPERT_NAMES.items()
            )
    yield "mtp_project", f"{prefix}.eh_proj", weights["mtp_project"][0]
    yield from ((kind, f"{prefix}.{name}", weights[kind]) for kind, name in MTP_NAMES.items())
    yield "norm", "model.norm", weights["norm"]
    yield "head", "lm_head", weights["head"]


def published(shape: Shape, weights: Mapping[str, Tensor], bias: Tensor) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its published name, in its stored dtype."""
    tensors = dict[str, Tensor]()
    for kind, name, weight in placed(shape, weights):
        if kind in QUANTISED:
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = block_scales(weight.detach().float())
        else:
            tensors[f"{name}.weight"] = weight.detach().bfloat16()
    for index, row in enumerate(bias):
        tensors[f"model.layers.{index + 1}.mlp.gate.e_score_correction_bias"] = row.float()
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}


def write_model(folder: Path, shape: Shape, weights: Mapping[str, Tensor], bias: Tensor) -> int:
    """Write configs, shards and index to `folder`; returns the bytes of the shards."""
    tensors, shards = published(shape, weights, bias), [dict[str, Tensor]() for _ in range(NUM_SHARDS)]
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    for name, tensor in tensors.items():
        shards[min(NUM_SHARDS - 1, done * NUM_SHARDS // total)][name] = tensor
        done += tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    place = dict[str, str]()
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{NUM_SHARDS:06}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        place |= dict.fromkeys(shard, file)
    _write(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))},
    )
    _write(folder / "config.json", shape.config())
    _write(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False})
    return total


def read_model(folder: Path, shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
    """fp32 weights and router bias [L, E] of a folder that `write_model` made, in the stacked form of `trainable`."""
    tensors = dict[str, Tensor]()
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    found = dict[str, list[Tensor]]()
    for kind, name, _ in placed(shape, _Names()):
        weight, scale = tensors[f"{name}.weight"], tensors.get(f"{name}.weight_scale_inv")
        found.setdefault(kind, []).append(weight.float() if scale is None else dequantise(weight, scale))
    single = {"embed", "head", "norm", *MTP_NAMES}
    weights = {kind: parts[0] if kind in single else torch.stack(parts) for kind, parts in found.items()}
    for kind in EXPERT_NAMES:
        weights[kind] = weights[kind].unflatten(0, (shape.layers, shape.experts))
    bias = [tensors[f"model.layers.{index + 1}.mlp.gate.e_score_correction_bias"] for index in range(shape.layers)]
    return weights, torch.stack(bias)


class _Names(dict[str, Tensor]):
    """Stands for weights where only their names matter."""

    def __missing__(self, key: str) -> Tensor:
        return torch.empty(1).expand(64, 64)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
