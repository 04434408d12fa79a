"""`baton bench numerics`: what it calls a reference is one, and what it says of FP8 can be wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.bench import numerics, shapes
from serving.bench.numerics import agreements, compare, holds, say, widened
from serving.bench.shapes import SHAPES, random_prompts, write_checkpoint
from serving.cli import main as baton
from serving.core.errors import ConfigError
from serving.kernels.packed import packing
from serving.kernels.quant import Fp8Weight
from serving.model import deepseek_v3
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.weights import load_weights

WHOLE_BLOCKS = SHAPES["lite-fp8"] | {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
}
NUM_DECODED = 3
# Of a model so small: one expert that a CPU's rounding exchanges is 0.001 of a cosine. Without half a block it has 0.98.
GATE = 0.99
PROMPTS = random_prompts(2, 70, 256, 1) + random_prompts(1, 20, 256, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "whole-blocks", WHOLE_BLOCKS)
        write_checkpoint(folder, "whole-blocks", 1)
        yield folder


@pytest.fixture(autouse=True)
def gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "GATE", GATE)


@pytest.fixture
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> DeepseekV3:
    """Its weights FP8, multiplied by the references of a GPU's kernels."""
    for module in (deepseek_v3, numerics):
        monkeypatch.setattr(module, "keeps_fp8", lambda *_: True)
    with packing(False):
        return load_weights(folder, ModelConfig.from_folder(folder), torch.bfloat16)


def test_the_reference_is_the_model_that_the_loader_dequantises(
    model: DeepseekV3, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for dtype, near in ((torch.float32, 0.99999), (torch.bfloat16, 0.9998)):
        loaded = load_weights(folder, ModelConfig.from_folder(folder), dtype)
        assert not isinstance(loaded.blocks[1].attention.out, Fp8Weight)
        want = say(loaded, PROMPTS, NUM_DECODED)
        said, fp8 = (say(each, PROMPTS, NUM_DECODED, want.experts) for each in (widened(model, dtype), model))
        assert said.prefill.shape == (sum(map(len, PROMPTS)) - 3 * NUM_DECODED, 256)
        assert said.decode.shape == (3 * NUM_DECODED, 256)
        assert all(each.least > near for each in agreements("", said, want))
        assert all(each.mean < near for each in agreements("", fp8, want))


def test_decoded_positions_say_what_prefilled_ones_say(model: DeepseekV3) -> None:
    exact = widened(model, torch.float32)
    decoded, prefilled = say(exact, PROMPTS, NUM_DECODED).decode, say(exact, PROMPTS, 1).prefill
    ends = torch.tensor([len(prompt) - 1 for prompt in PROMPTS]).cumsum(0)
    torch.testing.assert_close(decoded[:3], prefilled[ends - 2], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded[3:6], prefilled[ends - 1], atol=1e-4, rtol=0)
    assert (decoded[:3] - prefilled[ends - 1]).abs().max() > 0.1


def test_experts_that_are_told_are_taken(model: DeepseekV3) -> None:
    bf16 = widened(model, torch.bfloat16)
    own = say(bf16, PROMPTS, NUM_DECODED)
    assert [tuple(experts.shape) for experts in own.experts] == [(160, 4)] * 3
    again = say(bf16, PROMPTS, NUM_DECODED, own.experts)
    torch.testing.assert_close(again.prefill, own.prefill, atol=7e-2, rtol=0)
    others = [(experts + 1) % 16 for experts in own.experts]
    led = say(bf16, PROMPTS, NUM_DECODED, others)
    assert all(torch.equal(a, b.sort(dim=1)[0]) for a, b in zip(led.experts, others, strict=True))
    assert (led.prefill - own.prefill).abs().max() > 0.3


def test_the_same_experts_agree_more_and_a_missing_half_of_a_block_shows(model: DeepseekV3) -> None:
    found, choices = compare(model, PROMPTS, NUM_DECODED)
    mean = {(each.what, each.part): each.mean for each in found}
    for part in ("prefill", "decode"):
        assert mean["fp8, own experts", part] > GATE > mean["control", part]
        assert mean["bf16 to fp32, same experts", part] > mean["fp8, same experts", part]
    assert mean["fp8, same experts", "prefill"] > mean["fp8, own experts", "prefill"]
    assert [each.layer for each in choices] == [1, 2, 3]
    assert all(each.fp8_parted >= each.bf16_parted for each in choices)
    assert choices[-1].fp8_parted > 0
    assert holds(found)
    for what, told in (("fp8, own experts", 0.9899), ("fp8, same experts", 0.99)):
        assert not holds([replace(each, mean=told) if each.what == what else each for each in found])


def test_the_command_fails_where_fp8_is_wrong(
    model: DeepseekV3, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    arguments = [
        "bench",
        "numerics",
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--lengths",
        "120,60",
        "--decode",
        "2",
        "--seed",
        "3",
    ]
    assert baton([*arguments, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["passed"]
    assert [each["positions"] for each in report["agreements"][:2]] == [180, 4]
    attention = model.blocks[2].attention
    assert isinstance(attention.out, Fp8Weight)
    attention.out.scales.mul_(-1)
    exact = widened(model, torch.bfloat16)
    attention.out.scales.mul_(-1)
    monkeypatch.setattr(numerics, "widened", lambda model, dtype: widened(exact, dtype))
    assert baton([*arguments, "--out", str(out)]) == 1
    assert not json.loads(out.read_text())["passed"]


def test_a_model_whose_weights_do_not_stay_fp8_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="do not stay FP8 on cpu; this needs a GPU"):
        numerics.main(["--model", str(folder), "--device", "cpu"])


def test_prompts_spread_over_the_experts_in_the_last_layer_as_in_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only with what a block adds scaled by depth: else tokens come to resemble each other."""
    deep = WHOLE_BLOCKS | {
        "num_hidden_layers": 24,
        "n_routed_experts": 32,
        "moe_intermediate_size": 32,
        "vocab_size": 2048,
    }
    del deep["quantization_config"]
    monkeypatch.setitem(SHAPES, "deep", deep)
    fullest = {}
    for name in ("scaled", "unscaled"):
        if name == "unscaled":
            monkeypatch.setattr(shapes, "_RECORDED_SHAPES", ("deep",))
            monkeypatch.setattr(shapes, "_RECORDED", shapes.Scales(gate_bias=0.01, residual=1.0))
        write_checkpoint(tmp_path / name, "deep", 3)
        with packing(False):
            model = load_weights(tmp_path / name, ModelConfig.from_folder(tmp_path / name), torch.float32)
        said = say(model, random_prompts(1, 513, 2048, 5), 1)
        loads = [torch.bincount(experts.flatten()).max().item() * 32 / experts.numel() for experts in said.experts]
        fullest[name] = loads[0], loads[-1]
    assert fullest["scaled"][1] < 1.2 * fullest["scaled"][0]
    assert fullest["unscaled"][1] > 1.4 * fullest["unscaled"][0]
