"""Weights that stay FP8: which part of the checkpoint goes where, on the references of the kernels that a GPU runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.kernels.quant import Fp8Weight
from serving.model import deepseek_v3
from tests.fp8_model import cosine, load_wide, logits_of


def test_kept_weights_say_what_their_dequantised_copies_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = load_wide(tmp_path, torch.float32, "cpu")
    assert isinstance(wide.blocks[0].attention.out, Tensor), "a CPU multiplies no FP8"
    want = logits_of(wide)
    monkeypatch.setattr(deepseek_v3, "keeps_fp8", lambda *_: True)
    kept = load_wide(tmp_path, torch.bfloat16, "cpu")
    for block in kept.blocks:
        weights = block.attention.qkv_a, block.attention.q_b, block.attention.out, block.mlp.gate_up, block.mlp.down
        assert all(isinstance(weight, Fp8Weight) for weight in weights)
    # Activations are rounded to three bits; nothing else is lost.
    assert cosine(logits_of(kept), want) >= 0.995
    out = kept.blocks[1].attention.out
    assert isinstance(out, Fp8Weight)
    out.scales.mul_(2)
    assert cosine(logits_of(kept), want) < 0.99
