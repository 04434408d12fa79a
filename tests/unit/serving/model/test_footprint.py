"""Bytes of a rank's weights from sizes alone, beside those of a model that is there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from serving.bench.shapes import SHAPES
from serving.cluster.preflight import embedded_model_dir
from serving.core.config import DecodeTable, PrefillTable
from serving.kernels.quant import Fp8Weight
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.footprint import fits_fp8, rank_footprint
from serving.model.names import name_table
from serving.model.published import DEEPSEEK_V3
from serving.model.units import shape_of
from serving.model.weight import keeps_fp8, new_weight

MODELS = {name: ModelConfig.from_dict(fields) for name, fields in SHAPES.items()} | {
    "published": DEEPSEEK_V3,
    "embedded": ModelConfig.from_folder(embedded_model_dir()),
}
ALONE = DecodeTable()


@pytest.mark.parametrize("name", ["tiny", "cpu-34m", "lite", "embedded"])
@pytest.mark.parametrize("mtp", [0, 1])
def test_one_rank_holds_what_the_model_has(name: str, mtp: int):
    model = dataclasses.replace(MODELS[name], num_mtp_layers=mtp)
    targets = name_table(DeepseekV3(model, torch.bfloat16, "meta")).values()
    held = sum(target.into.numel() * target.into.element_size() for target in targets if target.repeats is None)
    assert rank_footprint(model, shape_of(ALONE, model), element_bytes=2, fp8=False).total == held
    assert rank_footprint(model, shape_of(ALONE, model), element_bytes=4, fp8=False).total != held


def test_an_fp8_matrix_counts_its_scales():
    model = MODELS["slice"]
    shape = shape_of(DecodeTable(dp=256, ep=256), model)
    weights = [
        new_weight(*size, dtype=torch.bfloat16, device=torch.device("meta"), fp8=True)
        for size in (
            (2 * model.moe_intermediate_size, model.hidden_size),
            (model.hidden_size, model.moe_intermediate_size),
        )
    ]
    assert all(isinstance(weight, Fp8Weight) for weight in weights)
    expert = sum(weight.quantised.nbytes + weight.scales.nbytes for weight in weights if isinstance(weight, Fp8Weight))
    assert rank_footprint(model, shape, element_bytes=2, fp8=True).experts == model.num_moe_layers * expert


@pytest.mark.parametrize("name", MODELS)
def test_fp8_stays_where_the_model_keeps_it(name: str):
    assert fits_fp8(MODELS[name]) == keeps_fp8(MODELS[name], torch.bfloat16, torch.device("cuda"))


def test_fp8_stays_in_some_models_only():
    assert {name for name, model in MODELS.items() if fits_fp8(model)} == {"slice", "lite-fp8", "published"}


def test_the_published_model_is_671_billion_parameters_without_its_mtp_layer():
    model = dataclasses.replace(DEEPSEEK_V3, num_mtp_layers=0)
    whole = rank_footprint(model, shape_of(ALONE, model), element_bytes=1, fp8=False)
    gates = model.num_moe_layers * (model.hidden_size + 1) * model.num_routed_experts
    assert whole.total - 3 * gates == pytest.approx(
        671e9, rel=1e-3
    )  # a gate's values have four bytes, all others one here


def test_what_is_parted_is_parted_and_what_is_not_is_whole():
    alone = rank_footprint(DEEPSEEK_V3, shape_of(ALONE, DEEPSEEK_V3), element_bytes=2, fp8=True)
    table = PrefillTable(tp=4, dp=8, redundant_experts=32)
    part = rank_footprint(DEEPSEEK_V3, shape_of(table, DEEPSEEK_V3), element_bytes=2, fp8=True)
    assert part.experts * 256 == alone.experts * 9
    assert part.vocabulary * 4 == alone.vocabulary
    assert alone.attention / 4 < part.attention < alone.attention / 3
    assert part.dense == alone.dense
    routed = dataclasses.replace(table, redundant_experts=64, shared_expert_routed=True)
    assert rank_footprint(DEEPSEEK_V3, shape_of(routed, DEEPSEEK_V3), element_bytes=2, fp8=True).dense < part.dense


def test_hosted_experts_are_in_memory():
    few = shape_of(PrefillTable(dp=32, redundant_experts=32), DEEPSEEK_V3)
    many = shape_of(PrefillTable(dp=32, redundant_experts=32, hosted_slots=18), DEEPSEEK_V3)
    sizes = [rank_footprint(DEEPSEEK_V3, shape, element_bytes=2, fp8=True).experts for shape in (few, many)]
    assert sizes[1] == 2 * sizes[0]
