"""Weights drawn in place: a rank's are its parts of the single rank's, and a seed's are no other's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from serving.bench import filled
from serving.bench.filled import fill_random
from serving.kernels.quant import dequantise_block_fp8
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.experts import Moe
from serving.model.names import Target, name_tables
from serving.model.parallel import Parallel
from serving.parallel.balance import global_placement
from serving.parallel.collectives import SingleRank
from serving.parallel.dispatch import DirectDispatch
from tests.model_factory import TINY

CONFIG = ModelConfig.from_dict(TINY)
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "v_head_dim": 64, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16}
FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
PLACEMENT = global_placement(np.ones((3, 8)), num_slots=10, num_gpus=2)


@dataclass(frozen=True)
class Member(SingleRank):
    """One rank of several, of which only its place counts: nothing is computed."""

    ranks: tuple[int, ...] = (0, 1)
    rank: int = 0
    world_size: int = 2


def filled_model(config: ModelConfig, seed: int = 1, parallel: Parallel | None = None) -> DeepseekV3:
    model = DeepseekV3(config, torch.float32, parallel=parallel or Parallel())
    fill_random(model, seed)
    return model


def ep_rank(rank: int) -> Parallel:
    ep = Member(rank=rank)
    return Parallel(experts=DirectDispatch(ep, PLACEMENT.slots_per_gpu), placement=PLACEMENT, ep_rank=rank)


def moe_layers(model: DeepseekV3) -> list[Moe]:
    assert model.mtp is not None
    return [block.mlp for block in [*model.blocks, model.mtp.block] if isinstance(block.mlp, Moe)]


def dense(model: DeepseekV3, layer: int, slot: int) -> list[torch.Tensor]:
    return model.expert_slots.read(layer, slot)


def test_ranks_of_an_ep_group_hold_the_experts_of_the_single_rank() -> None:
    whole = filled_model(CONFIG)
    assert PLACEMENT.copies.max() == 2
    for rank in range(2):
        part = filled_model(CONFIG, parallel=ep_rank(rank))
        for layer, moe in enumerate(moe_layers(part)):
            for slot, expert in enumerate(moe.experts_here):
                for mine, theirs in zip(dense(part, layer, slot), dense(whole, layer, expert), strict=True):
                    assert torch.equal(mine, theirs)
        assert torch.equal(part.embed, whole.embed)


def test_experts_differ_and_so_do_seeds() -> None:
    one, other = filled_model(CONFIG), filled_model(CONFIG, seed=2)
    assert not torch.equal(dense(one, 0, 0)[0], dense(one, 0, 1)[0])
    assert not torch.equal(dense(one, 0, 0)[0], dense(one, 1, 0)[0])
    assert not torch.equal(dense(one, 0, 0)[0], dense(other, 0, 0)[0])
    assert not torch.equal(one.embed, other.embed)


@pytest.mark.parametrize("fields", [{}, FP8])
def test_ranks_of_a_tp_group_hold_parts_of_the_same_matrices(fields: dict[str, object]) -> None:
    config = ModelConfig.from_dict(TINY | WIDE | fields)
    whole = DeepseekV3(config, torch.float32)
    seen = contents(whole)
    for rank in range(2):
        part = DeepseekV3(config, torch.float32, parallel=Parallel(tp=Member(rank=rank)))
        for name, (target, values) in contents(part).items():
            expected = seen[name][1]
            if values.dim() == 2:
                top, left = target.at
                expected = expected[top : top + len(values), left : left + values.shape[1]]
            assert torch.equal(values, expected), name


def contents(model: DeepseekV3) -> dict[str, tuple[Target, torch.Tensor]]:
    """What each tensor of a checkpoint became, before anything is packed."""
    found: dict[str, tuple[Target, torch.Tensor]] = {}
    for _, targets in name_tables(model):
        for name, target in targets.items():
            if target.repeats is None and target.into.numel():
                filled.fill_weight(model, name, target, 1)
                found[name] = target, target.into.clone()
    return found


def test_what_stays_fp8_is_what_others_widen() -> None:
    config = ModelConfig.from_dict(TINY | WIDE | FP8)
    model = DeepseekV3(config, torch.bfloat16)
    name = "model.layers.0.self_attn.o_proj.weight"
    wide = Target(into=torch.empty(256, 256), whole=(256, 512), at=(0, 256), quantised=True)
    kept = replace(wide, into=torch.empty(256, 256, dtype=torch.float8_e4m3fn), scales=torch.empty(2, 2))
    for target in (wide, kept):
        filled.fill_weight(model, name, target, 1)
    assert kept.scales is not None
    assert torch.equal(dequantise_block_fp8(kept.into, kept.scales, (128, 128), torch.float32), wide.into)
    first = replace(wide, into=torch.empty(256, 256), at=(0, 0))
    filled.fill_weight(model, name, first, 1)
    assert not torch.equal(first.into, wide.into)


def test_a_model_in_bf16_is_rounded_but_for_the_gate_s_bias() -> None:
    model = DeepseekV3(CONFIG, torch.bfloat16)
    fill_random(model, 1)
    bias = moe_layers(model)[0].gate_bias
    assert not torch.equal(bias, bias.to(torch.bfloat16).to(torch.float32))
    assert bias.std() < 0.1
