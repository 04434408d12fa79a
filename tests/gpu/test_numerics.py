"""FP8 beside bf16 at the depth of lite, a quarter as wide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serving.bench.numerics import GATE, compare
from serving.bench.shapes import SHAPES, random_prompts, write_checkpoint
from serving.model.config import ModelConfig
from serving.model.weights import load_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

NARROW = SHAPES["lite-fp8"] | {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 2688,
    "moe_intermediate_size": 384,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def test_fp8_logits_are_those_of_bf16_where_the_experts_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "narrow", NARROW)
    write_checkpoint(tmp_path, "narrow", 1, device="cuda")
    model = load_weights(tmp_path, ModelConfig.from_folder(tmp_path), torch.bfloat16, "cuda")
    prompts = random_prompts(2, 200, 4096, 1) + random_prompts(1, 77, 4096, 2)
    found, _ = compare(model, prompts, num_decoded=5)
    for each in found:
        print(each)
        if each.what == "fp8, same experts":
            assert each.mean >= GATE
        if each.what == "control":
            assert each.mean < GATE
