"""Loading: exact where it succeeds, one clear error that names every fault where it does not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from serving.core.errors import ModelFolderError
from serving.model.config import ModelConfig
from serving.model.progress import ConsoleProgress
from serving.model.weights import load_weights
from tests.model_factory import make_checkpoint

SHARD = "model-00001-of-00001.safetensors"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_weights(folder, ModelConfig.from_folder(folder), dtype)


def edit(folder: Path, change: Any) -> None:
    """Let `change` edit the tensors of a one-shard folder."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    (folder / "model.safetensors.index.json").unlink()


def one_shard(folder: Path, **overrides: Any) -> dict[str, Tensor]:
    return make_checkpoint(folder, seed=1, num_shards=1, **overrides)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp8"])
def test_every_kind_of_storage_is_read_exactly(tmp_path: Path, storage: str) -> None:
    # Sizes that leave partial FP8 blocks in rows and in columns.
    weights = make_checkpoint(tmp_path, seed=2, storage=storage, hidden_size=136, kv_lora_rank=130, num_shards=3)
    model = load(tmp_path)
    prefix = "model.layers.1."
    assert torch.equal(model.embed, weights["model.embed_tokens.weight"])
    attention = model.blocks[1].attention
    kv_b = weights[prefix + "self_attn.kv_b_proj.weight"].view(4, 48, 130)
    assert torch.equal(attention.w_uk_HNC, kv_b[:, :24])
    assert torch.equal(attention.w_uv_HVC, kv_b[:, 24:])
    moe = model.blocks[1].mlp
    assert torch.equal(moe.gate_bias, weights[prefix + "mlp.gate.e_score_correction_bias"])
    up = weights[prefix + "mlp.experts.5.up_proj.weight"]
    gate = weights[prefix + "mlp.experts.5.gate_proj.weight"]
    stored = moe.gate_up[5].to_dense() if moe.gate_up[5].is_mkldnn else moe.gate_up[5]
    assert torch.equal(stored, torch.cat([gate, up]))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=1, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"model-00002-of-00003\.safetensors is missing"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    one_shard(tmp_path)
    content = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(content[:keep])
    with pytest.raises(ModelFolderError, match=rf"{SHARD} is truncated or damaged") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    one_shard(tmp_path)
    content = (tmp_path / SHARD).read_bytes()
    # The same length, another shape of the same tensor: shape and byte range no longer agree.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 131}))
    (tmp_path / SHARD).write_bytes(content.replace(b'"shape":[128,64]', b'"shape":[131,64]'))
    with pytest.raises(ModelFolderError, match=f"{SHARD} cannot be opened"):
        load(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    one_shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / SHARD).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=r"pytorch_model\.bin is not read: only safetensors is"):
        load(tmp_path)


def test_an_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    one_shard(tmp_path)
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match="outside the folder"):
        load(tmp_path)


def test_every_missing_and_unexpected_tensor_is_named(tmp_path: Path) -> None:
    one_shard(tmp_path)
    gone = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (0, 3, 7)]

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [*gone, "model.norm.weight"]:
            del tensors[name]
        tensors["model.layers.0.self_attn.extra.weight"] = torch.zeros(2)

    edit(tmp_path, change)
    with pytest.raises(ModelFolderError) as caught:
        load(tmp_path)
    first, *rest = str(caught.value).splitlines()
    assert "4 missing" in first
    assert "1 unexpected" in first
    assert any("model.layers.1.mlp.experts.{0,3,7}.up_proj.weight" in line for line in rest)
    assert any("missing: model.norm.weight" in line for line in rest)
    assert any("unexpected: model.layers.0.self_attn.extra.weight" in line for line in rest)


def test_a_wrong_shape_and_a_wrong_dtype_are_named(tmp_path: Path) -> None:
    one_shard(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(65)
        tensors["lm_head.weight"] = torch.zeros(128, 64, dtype=torch.int8)

    edit(tmp_path, change)
    with pytest.raises(ModelFolderError) as caught:
        load(tmp_path)
    assert "of shape [65] where config.json asks for [64]: model.norm.weight" in str(caught.value)
    assert "of dtype I8, supported are BF16, F16, F32, F64: lm_head.weight" in str(caught.value)


def test_fp8_needs_its_scales_and_its_configuration(tmp_path: Path) -> None:
    one_shard(tmp_path, storage="fp8")
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    edit(tmp_path, lambda tensors: tensors.pop(scale))
    with pytest.raises(ModelFolderError, match=f"missing: {scale}"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="no quantization_config"):
        load(tmp_path)


def test_a_folder_without_its_mtp_layer_says_how_to_serve_it(tmp_path: Path) -> None:
    one_shard(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    edit(tmp_path, change)
    with pytest.raises(ModelFolderError, match="set num_nextn_predict_layers to 0"):
        load(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).mtp is None


def test_an_mtp_layer_may_be_left_unread(tmp_path: Path) -> None:
    one_shard(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).mtp is None


def test_the_mtp_copies_are_optional_but_must_equal_what_they_repeat(tmp_path: Path) -> None:
    one_shard(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("model.layers.3.embed_tokens.weight"))
    model = load(tmp_path)
    assert model.mtp.embed is model.embed

    tensors = load_file(tmp_path / SHARD)
    tensors["model.layers.3.shared_head.head.weight"][7, 7] += 1
    save_file(tensors, tmp_path / SHARD)
    with pytest.raises(ModelFolderError, match=r"shared_head\.head\.weight differs from lm_head\.weight"):
        load(tmp_path)


def test_progress_counts_every_byte_and_ends_with_a_rate(tmp_path: Path) -> None:
    one_shard(tmp_path, storage="fp8")
    counted: list[int] = []

    class Counter:
        def start(self, total_bytes: int) -> None:
            counted.append(-total_bytes)

        def advance(self, num_bytes: int) -> None:
            counted.append(num_bytes)

        def tell(self, text: str) -> None:
            raise AssertionError("nothing is compiled while weights are loaded")

        def finish(self) -> None:
            assert sum(counted) == 0

    config = ModelConfig.from_folder(tmp_path)
    load_weights(tmp_path, config, torch.float32, progress=Counter())
    assert len(counted) > 10

    stream = io.StringIO()
    load_weights(tmp_path, config, torch.float32, progress=ConsoleProgress(stream))
    assert stream.getvalue().startswith("loading weights: ")
    assert "MB/s" in stream.getvalue()
