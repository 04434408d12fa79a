"""The file written for llama.cpp holds the checkpoint's weights, all of them, in the shapes of absorbed attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.bench.peers.llama_cpp import read_tensors, renamed
from serving.bench.shapes import SHAPES, write_checkpoint

CONFIG = SHAPES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, "tiny", seed=3)
    return folder


def test_every_weight_is_written_once(folder: Path) -> None:
    source = read_tensors(folder)
    written = [tensor.ravel() for _, tensor in renamed(source, CONFIG)]
    everything = np.concatenate([tensor.ravel() for tensor in source.values()])
    assert np.array_equal(np.sort(np.concatenate(written)), np.sort(everything))
    assert not np.array_equal(np.sort(np.concatenate(written[1:])), np.sort(everything))


def test_absorbed_attention_reads_the_same_keys_and_values(folder: Path) -> None:
    written = dict(renamed(read_tensors(folder), CONFIG))
    num_heads, nope = CONFIG["num_attention_heads"], CONFIG["qk_nope_head_dim"]
    kv_b = load_file(folder / "model.safetensors")["model.layers.1.self_attn.kv_b_proj.weight"].numpy()
    rng = np.random.default_rng(0)
    latent = rng.standard_normal(CONFIG["kv_lora_rank"], np.float32)
    q_HN = rng.standard_normal((num_heads, nope), np.float32)
    kv_HW = (kv_b @ latent).reshape(num_heads, -1)
    # ggml multiplies by the transpose: its first axis is numpy's last.
    absorbed_HC = np.einsum("hcn,hn->hc", written["blk.1.attn_k_b.weight"], q_HN)
    values_HV = np.einsum("hvc,c->hv", written["blk.1.attn_v_b.weight"], latent)
    scores_H = np.einsum("hn,hn->h", q_HN, kv_HW[:, :nope])
    np.testing.assert_allclose(absorbed_HC @ latent, scores_H, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values_HV, kv_HW[:, nope:], rtol=1e-4, atol=1e-5)
    assert not np.allclose(absorbed_HC[::-1] @ latent, scores_H, rtol=1e-2)


def test_an_expert_keeps_its_number(folder: Path) -> None:
    source = load_file(folder / "model.safetensors")
    stacked = dict(renamed(read_tensors(folder), CONFIG))["blk.1.ffn_down_exps.weight"]
    for expert in range(CONFIG["n_routed_experts"]):
        assert np.array_equal(stacked[expert], source[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_read_exactly_in_each_type(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"a": weight, "b": weight[1:].clone()}, tmp_path / "model.safetensors")
    read = read_tensors(tmp_path)
    assert np.array_equal(read["a"], weight.float().numpy())
    assert np.array_equal(read["b"], weight[1:].float().numpy())


def test_weights_of_an_unknown_type_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="F8_E4M3"):
        read_tensors(tmp_path)
