"""What is measured on GPUs runs on CPUs too, over gloo, for its plans and figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.bench.gpu_ranks import Done, Setup, Way, median_s, prefill_plans
from serving.bench.gpu_unit import decodes_of, measure, table, ways_of


def test_a_unit_stands_beside_one_rank(tmp_path: Path) -> None:
    setup = Setup(
        shape="tiny",
        device="cpu",
        dtype="float32",
        prompts=8,
        prompt_tokens=48,
        rows=4,
        context=20,
        steps=3,
        free_sms=(8,),
    )
    told: list[str] = []
    ways = ways_of([128], [1, 2], [0, 8], local=True)
    report = measure(
        setup,
        ways,
        decodes_of(["nccl"], [1]),
        repeats=1,
        profiles=2,
        scratch=tmp_path,
        trace=tmp_path / "trace.json",
        told=told.append,
    )
    one, *unit = report["prefill"]
    assert one["ratio"] == 1.0
    assert len(unit) == 2 * 2 * 3
    for figure in unit:
        local = figure["way"]["local"]
        # A token travels once at most, fp32 rows of 32 there and back and two picks; or every row of steps of 128 and 64 tokens does,
        # in two parts of up to 65, filled up to the largest part of a step.
        counted = figure["way"]["counted"]
        num_rows = 192 if counted else 256 if figure["way"]["micro_batches"] == 1 else 4 * 65
        assert (figure["sent_bytes"] == 0) == local
        assert figure["sent_bytes"] <= 2 * num_rows * (128 + 16 + 128) + 2 * 4 * 16 * counted
        assert local or counted or figure["sent_bytes"] == 2 * num_rows * (128 + 16 + 128)
        assert figure["same_first_tokens"] == (None if local else 1.0)
        assert figure["tokens_per_s"] == pytest.approx(8 * 48 / figure["seconds"])
    assert [figure["way"]["micro_batches"] for figure in report["hidden"]] == 2 * [1, 2, 2]
    assert all(figure["saved"] is not None for figure in report["hidden"][1:])
    assert [len(figure["profiles"]) for figure in report["hidden"]] == [2] * 6
    alone, both = report["decode"]
    assert (alone["ratio"], both["ratio"]) == (1.0, pytest.approx(both["tpot_s"] / alone["tpot_s"]))
    assert len(table(report).splitlines()) == 13 + 6 + 2
    assert len([line for line in told if line.startswith("prefill:")]) == 13
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


def test_steps_hold_all_tokens_and_prompts_go_on_in_the_next() -> None:
    prompts = [list(range(10 * i, 10 * i + 5)) for i in range(3)]
    plans = prefill_plans(prompts, [[0], [1], [2]], 7)
    assert [plan.num_prefill_tokens for plan in plans] == [7, 7, 1]
    chunks = [(chunk.slot, chunk.start, chunk.token_ids, chunk.sample) for plan in plans for chunk in plan.chunks]
    assert chunks == [
        (0, 0, [0, 1, 2, 3, 4], True),
        (1, 0, [10, 11], False),
        (1, 2, [12, 13, 14], True),
        (2, 0, [20, 21, 22, 23], False),
        (2, 4, [24], True),
    ]


def test_the_slowest_rank_is_what_a_run_takes() -> None:
    runs = [
        [Done(seconds=one, first_tokens=[]), Done(seconds=other, first_tokens=[])]
        for one, other in ((1, 3), (2, 1), (9, 0))
    ]
    assert median_s(runs) == 3


def test_every_way_that_sends_stands_beside_one_that_copies() -> None:
    ways = ways_of([8192], [1, 2], [0, 16], local=True)
    assert [way.unit for way in ways] == [False, *[True] * 12]
    assert [(way.micro_batches, way.free_sms, way.local) for way in ways[1:7]] == [
        (1, 0, False), (1, 0, True), (2, 0, False), (2, 0, True), (2, 16, False), (2, 16, True),
    ]  # fmt: skip
    assert ways_of([8192], [1, 2], [0, 16], local=False) == [way for way in ways if not way.local]
    assert Way(step_tokens=64, micro_batches=2, free_sms=8).name.endswith("2 micro-batches, 8 SMs kept free")
