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


def test_the_kernels_say_what_their_references_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_wide(tmp_path, torch.bfloat16, "cuda")
    out = model.blocks[1].attention.out
    assert isinstance(out, Fp8Weight)
    monkeypatch.setattr(deepseek_v3, "keeps_fp8", lambda *_: True)
    want = logits_of(load_wide(tmp_path, torch.bfloat16, "cpu"))
    assert cosine(logits_of(model), want) >= 0.999
    out.scales.mul_(1.2)
    assert cosine(logits_of(model), want) < 0.999
