"""`baton bench make-checkpoint`: folders that load, hold what was drawn, and are the same for the same seed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from serving.bench import shapes
from serving.bench.make_checkpoint import GateSpread, main
from serving.bench.shapes import SHAPES, checkpoint_bytes, write_checkpoint
from serving.bench.shards import INDEX
from serving.cli import main as baton
from serving.core.errors import ConfigError
from serving.kernels.quant import dequantise_block_fp8
from serving.model.config import ModelConfig
from serving.model.published import DEEPSEEK_V3
from serving.model.weights import load_weights

FP8 = SHAPES["slice"] | {
    "vocab_size": 256,
    "hidden_size": 160,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
}
SMALL = {"fp8": FP8, "bf16": {key: value for key, value in FP8.items() if key != "quantization_config"}}
SHARD_BYTES = 300_000


@pytest.fixture(autouse=True)
def _small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fields in SMALL.items():
        monkeypatch.setitem(SHAPES, name, fields)


class Drawn(dict[str, Tensor]):
    def see(self, name: str, weight: Tensor) -> None:
        self[name] = weight.clone()


def _write(folder: Path, shape: str, seed: int = 0, **options: Any) -> Drawn:
    drawn = Drawn()
    write_checkpoint(folder, shape, seed, max_shard_bytes=SHARD_BYTES, see=drawn.see, **options)
    return drawn


def _stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_shards_are_within_the_limit_and_in_the_index(tmp_path: Path) -> None:
    _write(tmp_path, "fp8")
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for name in files:
        stored = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in stored.values()) <= SHARD_BYTES
        assert set(stored) == {key for key, file in index["weight_map"].items() if file == name}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in _stored(tmp_path).values())
    assert index["metadata"]["total_size"] == checkpoint_bytes("fp8")


def test_fp8_is_what_was_drawn_to_a_rounding_step(tmp_path: Path) -> None:
    drawn, stored = _write(tmp_path, "fp8"), _stored(tmp_path)
    quantised = [name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn]
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in quantised
    assert not {"model.layers.1.mlp.gate.weight", "lm_head.weight", "model.norm.weight"} & set(quantised)
    for name in quantised:
        scales = stored[name + "_scale_inv"]
        found = dequantise_block_fp8(stored[name], scales, (128, 128), torch.float32)
        # e4m3 has 3 bits of mantissa; below its smallest normal number steps are 2^-9.
        step = torch.maximum(drawn[name].abs() * 2**-4, scales.max() * 2**-10)
        assert bool(((found - drawn[name]).abs() <= step * 1.001).all()), name
        assert not bool(((found * 1.2 - drawn[name]).abs() <= step * 1.001).all())


@pytest.mark.parametrize("shape", ["fp8", "bf16"])
def test_the_loader_reads_it(tmp_path: Path, shape: str) -> None:
    drawn = _write(tmp_path, shape)
    model = load_weights(tmp_path, ModelConfig.from_folder(tmp_path), torch.float32)
    assert torch.equal(model.embed, drawn["model.embed_tokens.weight"].bfloat16().float())
    assert not torch.equal(model.embed, drawn["model.embed_tokens.weight"])
    assert torch.equal(model.blocks[2].mlp.gate_bias, drawn["model.layers.2.mlp.gate.e_score_correction_bias"])


def test_a_seed_gives_the_same_bytes_and_another_gives_others(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        _write(tmp_path / folder, "fp8", seed)
    files = {folder: {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in "abc"}
    assert files["a"] == files["b"]
    assert all(files["a"][name] != files["c"][name] for name in files["a"] if name.endswith(".safetensors"))


def test_tensors_longer_than_a_staging_buffer_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.bench.shards._BUFFER_BYTES", 1000)
    drawn, stored = _write(tmp_path, "bf16"), _stored(tmp_path)
    assert set(stored) == set(drawn)
    for name, tensor in stored.items():
        assert torch.equal(tensor, drawn[name].to(tensor.dtype)), name
    assert not torch.equal(stored["lm_head.weight"], drawn["lm_head.weight"].bfloat16().flip(0))


def test_the_command_reports_size_rate_and_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "model", tmp_path / "report.json"
    arguments = ["bench", "make-checkpoint", "--shape", "fp8", "--seed", "3", "--out", str(out), "--device", "cpu"]
    assert baton([*arguments, "--report", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["bytes"] == checkpoint_bytes("fp8") == sum(tensor.nbytes for tensor in _stored(out).values())
    assert found["bytes_per_s"] == pytest.approx(found["bytes"] / found["seconds"])
    assert [layer["layer"] for layer in found["gate"]["layers"]] == [1, 2]
    assert all(layer["entropy"] > 0.99 and layer["max_over_mean"] < 1.5 for layer in found["gate"]["layers"])
    shown = capsys.readouterr().err
    assert "writing fp8:" in shown
    assert "MB/s" in shown
    assert "the fullest expert" in shown


def test_a_gate_that_spreads_badly_shows() -> None:
    config = ModelConfig.from_dict(FP8)
    drawn = {
        "model.embed_tokens.weight": torch.randn(256, 160),
        "model.layers.1.post_attention_layernorm.weight": torch.ones(160),
    }
    torch.manual_seed(0)
    spreads = []
    for bias in (torch.zeros(16), torch.arange(16) * 1.0):
        gates = GateSpread(config, seed=0, num_tokens=512)
        gate = {
            "model.layers.1.mlp.gate.weight": torch.randn(16, 160) / 13,
            "model.layers.1.mlp.gate.e_score_correction_bias": bias,
        }
        for name, weight in (drawn | gate).items():
            gates.see(name, weight)
        spreads += gates.layers
    even, uneven = spreads
    assert even.entropy > 0.97
    # Always the same four experts.
    assert uneven.entropy == pytest.approx(0.5)
    assert uneven.max_over_mean == pytest.approx(4)


@pytest.mark.parametrize(("shape", "factor"), [("bf16", 1 / 3), ("paper-scaled", 8**-0.5), ("tiny", 1.0)])
def test_what_a_block_adds_is_scaled_by_depth_except_where_figures_were_recorded_or_texts_are_compared(
    tmp_path: Path, shape: str, factor: float
) -> None:
    drawn = _write(tmp_path, shape)
    sizes = {name: tensor.std() * tensor.shape[-1] ** 0.5 for name, tensor in drawn.items() if tensor.dim() == 2}
    added = {name for name in sizes if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert {"model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.shared_experts.down_proj.weight"} < added
    for name, size in sizes.items():
        expected = factor if name in added else drawn[name].shape[-1] ** 0.5 if "embed" in name else 1.0
        assert size == pytest.approx(expected, rel=0.15), name


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ConfigError, match="is not empty; name a new"):
        main(["--shape", "fp8", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="is not a folder"):
        main(["--shape", "fp8", "--out", str(tmp_path / "precious")])
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_without_room_on_the_disk_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40_000_000_000))
    with pytest.raises(ConfigError, match=r"take 50.3 GB, the disk has 40.0 GB free; make room"):
        main(["--shape", "slice", "--out", str(tmp_path / "new" / "model")])
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_leaves_no_half_written_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: memoryview, offset: int) -> int:
        if offset > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(file, data, offset)

    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        _write(tmp_path, "fp8")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_no_half_written_weights(tmp_path: Path) -> None:
    def interrupt(name: str, weight: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, "fp8", 0, see=interrupt)
    assert not list(tmp_path.iterdir())


def test_published_sizes() -> None:
    """15.7 B parameters as DeepSeek-V2-Lite has; V3's layers weigh 11.5 GB each in FP8."""
    lite, slice_ = (ModelConfig.from_dict(SHAPES[name]) for name in ("lite", "slice"))
    assert checkpoint_bytes("lite") == pytest.approx(2 * 15.7e9, rel=1e-3)
    assert checkpoint_bytes("slice") == pytest.approx(50.3e9, rel=1e-3)
    assert checkpoint_bytes("lite-fp8") == pytest.approx(16.2e9, rel=1e-2)
    assert lite.weight_block_size is None
    assert slice_.weight_block_size == (128, 128)
    assert slice_ == replace(DEEPSEEK_V3, num_layers=5, num_dense_layers=1, num_mtp_layers=0)
    assert slice_ != DEEPSEEK_V3
    # Magnitude 1: mscale and mscale_all_dim cancel.
    assert lite.yarn is not None
    assert lite.yarn.attention_factor == 1.0
    assert lite.softmax_scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * 3.6888795 + 1) ** 2)
    assert shapes.MAX_SHARD_BYTES == 5_000_000_000
