"""The model as a GPU runs it, its launches in Triton's interpreter on a CPU's tensors, says what a CPU says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from serving.model import deepseek_v3, experts, mtp
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.experts import Moe
from serving.model.weights import load_weights
from tests.model_factory import make_checkpoint
from tests.unit.serving.model.paged import Paged

# What pads a tile is whatever was there; the interpreter computes with it too, and NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Widths that the GPU's attention and latent kernels take, and two shared experts.
FIELDS = {"qk_nope_head_dim": 16, "v_head_dim": 16, "n_shared_experts": 2, "num_hidden_layers": 2}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeepseekV3:
    """Its weights as a GPU has them: nothing packed."""
    make_checkpoint(tmp_path, 0, **FIELDS)
    for module in (deepseek_v3, experts, mtp):
        monkeypatch.setattr(module, "pack", lambda weight: weight)
    return load_weights(tmp_path, ModelConfig.from_folder(tmp_path), torch.float32)


def moes(model: DeepseekV3) -> list[Moe]:
    return [block.mlp for block in model.blocks if isinstance(block.mlp, Moe)]


def stack_experts(model: DeepseekV3) -> None:
    for moe in moes(model):
        moe.gate_up, moe.down = torch.stack(list(moe.gate_up)), torch.stack(list(moe.down))


def said_by(model: DeepseekV3) -> list[Tensor]:
    """Logits of prefill, of decode steps of two rows and of one, of a chunk behind a cached context and of three, one without; steps without tokens too."""
    paged = Paged(model)
    parts = [
        paged.prefill({"a": list(range(2, 10)), "b": [5, 7, 9]}),
        paged.decode({"a": 3, "b": 4}),
        paged.decode({"b": 6}),
        paged.prefill({"a": [8, 9, 10]}),
        paged.prefill({"c": [3], "a": [11, 2], "b": [4, 6, 8]}, capacity=48),
        paged.prefill({}),
        paged.decode({}),
    ]
    return [logits for part in parts for logits in part.values()]


def test_the_gpus_branches_say_what_the_cpu_says(model: DeepseekV3, monkeypatch: pytest.MonkeyPatch) -> None:
    want = said_by(model)
    stack_experts(model)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    got = said_by(model)
    assert len(got) == len(want)
    for ours, cpus in zip(got, want, strict=True):
        torch.testing.assert_close(ours, cpus, rtol=1e-4, atol=1e-4)
    shared = moes(model)[0].shared.down
    assert isinstance(shared, Tensor)
    shared.mul_(1.1)
    other = Paged(model).prefill({"b": [5, 7, 9]})["b"]
    assert not torch.allclose(other, want[1], rtol=1e-4, atol=1e-4)
