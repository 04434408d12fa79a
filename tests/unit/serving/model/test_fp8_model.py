"""Weights that stay FP8: which part of the checkpoint goes where, on the references of the kernels that a GPU runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.kernels.quant import Fp8Weight
from serving.model import deepseek_v3
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.experts import Moe
from serving.model.parallel import Parallel
from serving.model.weights import load_weights
from serving.parallel.dispatch import DirectDispatch
from serving.parallel.groups import Groups
from serving.parallel.placement import Placement
from serving.parallel.virtual import VirtualCollectives, VirtualUnit
from tests.fp8_model import WIDE, cosine, load_wide, logits_of
from tests.model_factory import make_checkpoint


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


def test_ranks_keep_their_parts_of_fp8_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four routed experts and the shared one in six slots, one of them a copy.
    make_checkpoint(tmp_path, 4, storage="fp8", **{**WIDE, "num_attention_heads": 4, "num_key_value_heads": 4})
    config = ModelConfig.from_folder(tmp_path)
    want = logits_of(load_weights(tmp_path, config, torch.float32))
    monkeypatch.setattr(deepseek_v3, "keeps_fp8", lambda *_: True)
    single = load_weights(tmp_path, config, torch.bfloat16)
    placed = Placement(slots=np.array([[3, 1, 1, 0, 4, 2]] * 3), num_experts=5, num_gpus=2)

    def main(world: VirtualCollectives) -> tuple[DeepseekV3, Tensor, Tensor]:
        parallel = Parallel(
            tp=world.subgroup((0, 1), "tp"),
            experts=DirectDispatch(world.subgroup((0, 1), "ep"), 3),
            placement=placed,
            ep_rank=world.rank,
            shared_is_routed=True,
        )
        model = load_weights(tmp_path, config, torch.bfloat16, parallel=parallel)
        right = logits_of(model)
        if world.rank == 1:
            _fp8(_moe(model).gate_up).scales[1] *= 3
        return model, right, logits_of(model)

    ranks = VirtualUnit(Groups(tp=2, dp=1, ep=2, ranks_per_node=2)).run(main)
    for rank, (model, right, wrong) in enumerate(ranks):
        out, whole = _fp8(model.blocks[1].attention.out), _fp8(single.blocks[1].attention.out)
        assert torch.equal(out.quantised.float(), whole.quantised.float()[:, 256 * rank : 256 * (rank + 1)])
        assert torch.equal(out.scales, whole.scales[:, 2 * rank : 2 * (rank + 1)])
        for slot, expert in enumerate(placed.slots[0, 3 * rank : 3 * rank + 3].tolist()):
            own = _moe(model).expert(slot)[1]
            theirs = _moe(single).expert(expert)[1] if expert < 4 else _shared(single)
            assert torch.equal(_fp8(own).quantised.float(), _fp8(theirs).quantised.float())
            assert torch.equal(_fp8(own).scales, _fp8(theirs).scales)
        # The sums of ranks are rounded, and what is quantised next with them; a single rank is as far from the exact logits.
        assert cosine(right, want) >= 0.995
        assert cosine(wrong, want) < 0.99
    assert cosine(logits_of(single), want) >= 0.995


def _moe(model: DeepseekV3) -> Moe:
    moe = model.blocks[1].mlp
    assert isinstance(moe, Moe)
    return moe


def _shared(model: DeepseekV3) -> object:
    shared = _moe(model).shared
    assert shared is not None
    return shared.down


def _fp8(weight: object) -> Fp8Weight:
    assert isinstance(weight, Fp8Weight)
    return weight
