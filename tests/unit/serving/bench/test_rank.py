"""One rank of the published units, small: its steps run, its parts are counted, its share is the balanced one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from serving.bench.engine import main
from serving.bench.kernel_cases.stage import Bound
from serving.bench.rank import RANKS, build_rank, measure_rank, table
from serving.bench.rank_parts import Part, Step
from serving.bench.shapes import SHAPES
from serving.core.errors import ConfigError

FIELDS: dict[str, Any] = SHAPES["paper-scaled"] | {"num_nextn_predict_layers": 0, "num_hidden_layers": 3}
CEILING: dict[Bound, float] = {"copy": 1e9, "bf16": 1e9, "fp8": 2e9}
CPU = torch.device("cpu")


def measured(name: str, num_seqs: int, context: int) -> dict[str, Any]:
    case = replace(RANKS[name], step=replace(RANKS[name].step, num_seqs=num_seqs, context=context))
    return measure_rank(case, FIELDS, CEILING, dtype=torch.float32, device=CPU, seed=1, repeats=1, profiles=False)


def test_a_rank_of_the_prefill_unit() -> None:
    report = measured("rank-prefill-ep32", num_seqs=4, context=128)
    assert report["failed"] == []
    assert report["tokens"] == {"of_tp_group": 512, "of_rank": 128}
    assert report["load"]["balanced_pairs"] == 128 * 8
    assert report["load"]["pairs"] == pytest.approx(1024, rel=0.5)
    assert len(report["load"]["pairs_by_layer"]) == 2
    assert set(report["step_ms"]) == {1, 2}
    # W_kv_b is one matrix on a GPU alone.
    assert {part["name"]: part["layers"] for part in report["parts"]} == {
        "embedding": 1,
        "head": 1,
        "W_qkv_a": 3,
        "all-gather": 3,
        "norm, W_q_b": 3,
        "attention": 3,
        "W_o": 3,
        "reduce-scatter": 3,
        "norms": 3,
        "dense MLP": 1,
        "gate": 2,
        "dispatch, combine": 2,
        "experts": 2,
        "shared expert": 2,
    }
    in_sum = sum(part["layers"] * part["least_us"] for part in report["parts"] if part["name"] != "norms")
    assert report["sum_of_parts_ms"] == pytest.approx(in_sum / 1e3)
    assert report["ratio"] == pytest.approx(min(report["step_ms"].values()) / report["sum_of_parts_ms"])
    assert "parts alone" in table(report)


def test_a_rank_of_the_decode_unit_sends_to_the_routed_shared_expert_too() -> None:
    report = measured("rank-decode-ep320", num_seqs=10, context=100)
    assert report["failed"] == []
    assert report["tokens"] == {"of_tp_group": 10, "of_rank": 3}
    assert report["load"]["sent"] == 3 * 9
    assert "shared expert" not in {part["name"] for part in report["parts"]}


def test_a_rank_without_a_tp_group_neither_gathers_nor_scatters() -> None:
    report = measured("rank-decode-ep144", num_seqs=4, context=80)
    assert report["failed"] == []
    assert not {"all-gather", "reduce-scatter"} & {part["name"] for part in report["parts"]}


def test_the_rank_is_one_of_the_unit_s() -> None:
    case = replace(RANKS["rank-prefill-ep32"], step=Step(role="prefill", num_seqs=2, context=64))
    rank = build_rank(case, FIELDS, dtype=torch.float32, device=CPU, seed=1)
    assert rank.model.parallel.tp.world_size == 4
    assert rank.model.expert_slots.num_slots == 9
    assert rank.shape.num_slots == 288


def test_a_part_costs_the_larger_of_its_products_and_its_bytes() -> None:
    part = Part(name="x", layers=1, call=lambda _: None, num_sets=1, num_bytes=1e9, flops=4e9)
    assert part.least_s(CEILING) == 2.0
    assert replace(part, flops=1e9).least_s(CEILING) == 1.0
    assert replace(part, bound="bf16").least_s(CEILING) == 4.0


def test_it_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="rank-decode-ep320"):
        main(["--shape", "rank-decode-ep320"])
