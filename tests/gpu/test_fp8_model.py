"""A model whose weights stay FP8, on the GPU's kernels and on their references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serving.kernels.quant import Fp8Weight
from serving.model import deepseek_v3
from tests.fp8_model import cosine, load_wide, logits_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def test_the_kernels_are_as_exact_as_their_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp32 on the same weights. Against each other says less: a value between two of e4m3 goes to either of them
    for one rounding of bf16, so two ways of adding the same sums come out nearly as far apart as either is from fp32."""
    exact = logits_of(load_wide(tmp_path, torch.float32, "cpu"))

    def error(logits: torch.Tensor) -> float:
        return 1 - cosine(logits, exact)

    model = load_wide(tmp_path, torch.bfloat16, "cuda")
    out = model.blocks[1].attention.out
    assert isinstance(out, Fp8Weight)
    monkeypatch.setattr(deepseek_v3, "keeps_fp8", lambda *_: True)
    allowed = 1.25 * error(logits_of(load_wide(tmp_path, torch.bfloat16, "cpu")))
    got = error(logits_of(model))
    print(f"1 - cosine to fp32: {got:.5f}, allowed {allowed:.5f}")
    assert got <= allowed
    out.scales.mul_(1.2)
    assert error(logits_of(model)) > allowed
