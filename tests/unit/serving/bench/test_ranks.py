"""A unit of processes beside one process: same texts, every figure there, a trace in which communication overlaps with computing."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from serving.bench.processes import Group, Load, Sizes, Trace, Unit, decode_rate
from serving.bench.ranks import Hidden, main, merged, same_texts
from serving.bench.shapes import random_prompts, write_checkpoint
from serving.core.errors import BatonError
from serving.engine.build import Engine

_NUMBERS = itertools.count()
_SMALL = ["--shape", "tiny", "--ranks", "1x2", "--requests", "16", "--prompt-tokens", "32", "--new-tokens", "9"]


def test_a_unit_writes_what_one_process_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, timeline = tmp_path / "ranks.json", tmp_path / "trace.json"
    quick = ["--collectives", "shared-memory", "--repeats", "1", "--threads", "1"]
    assert main([*_SMALL, *quick, "--timeline", str(timeline), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    single, unit = report["results"]
    assert (single["decode_ratio"], single["in_collectives"]) == (1.0, 0.0)
    assert unit["same_texts"] == 16
    assert unit["decode_ratio"] == pytest.approx(unit["decode_tokens_per_s"] / single["decode_tokens_per_s"])
    assert 0.0 < unit["in_collectives"] < 1.0
    one, two = report["hidden"]
    # What is hidden is a matter of time, and of who else computes here.
    assert all(0.0 <= of["share"] < 1.0 for of in (one, two))
    events = json.loads(timeline.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert any(
        one["cat"] == "in flight" and other["cat"] == "compute" and one["pid"] == other["pid"] and _overlap(one, other)
        for one in events
        for other in events
    )
    said = capsys.readouterr().err
    assert "in collectives  16 of 16 texts the same" in said
    assert "of the communication hidden" in said


def test_other_weights_are_found_out_by_their_texts(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("model", "other")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_checkpoint(folder, "tiny", seed)
    load = Load(folder=folders[0], prompts=4, prompt_tokens=16, new_tokens=4, max_batched_tokens=256)
    prompts = random_prompts(4, 16, 256, 0)
    with Unit(Sizes(), load, tmp_path) as one, Unit(Sizes(), replace(load, folder=folders[1]), tmp_path) as other:
        expected, texts = (unit.generate(prompts, 4).texts for unit in (one, other))
        again = one.generate(prompts, 4).texts
    assert same_texts(again, expected) == 4
    assert same_texts(texts, expected) < 4


def test_engines_that_join_as_the_servers_do_write_what_one_process_writes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny", 0)
    load = Load(folder=tmp_path, prompts=8, prompt_tokens=16, new_tokens=12, max_batched_tokens=64)
    prompts = random_prompts(8, 16, 256, 0)

    def texts(sizes: Sizes, altered: Callable[[Engine, int], None] | None = None) -> list[list[int]]:
        scratch = tmp_path / f"{tmp_path.name}-{os.getpid()}-{next(_NUMBERS)}"
        scratch.mkdir()
        with Unit(sizes, load, scratch, altered=altered) as unit:
            generation = unit.generate(prompts, [12, 3] * 4, logprobs=2)
            unit.close()
        assert all(logprobs is not None for of_text in generation.logprobs for logprobs in of_text)
        return generation.texts

    expected = texts(Sizes(device="cpu"))
    assert texts(Sizes(tp=2, device="cpu")) == expected
    assert texts(Sizes(dp=2, micro_batches=2, device="cpu")) == expected
    assert texts(Sizes(dp=2, hosted_slots=3, device="cpu")) == expected
    assert texts(Sizes(dp=2, device="cpu"), with_another_expert) != expected


def with_another_expert(engine: Engine, rank: int) -> None:
    if rank == 1:
        slots = engine.runner.model.expert_slots  # type: ignore[attr-defined]
        slots.write(0, 0, [tensor * 3 for tensor in slots.read(0, 0)])


def test_the_death_of_a_rank_ends_the_measurement(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny", 0)
    load = Load(folder=tmp_path, prompts=4, prompt_tokens=16, new_tokens=900, max_batched_tokens=256)
    scratch = tmp_path / f"ranks-{os.getpid()}"
    scratch.mkdir()
    with Unit(Sizes(dp=2), load, scratch) as unit:
        processes = unit.processes
        processes[1].kill()
        with pytest.raises(BatonError, match=r"rank 1|ranks? 1 did not come"):
            unit.generate(random_prompts(4, 16, 256, 0), 900)
    assert not any(process.is_alive() for process in processes)


def test_decoding_is_timed_while_every_group_decodes_all_its_texts() -> None:
    early = Group(texts=[], steps=[(1.0, 5), (2.0, 2), (3.0, 2), (4.0, 2)], all_since=1.0, all_until=4.0)
    late = Group(texts=[], steps=[(2.0, 1), (3.0, 3), (3.5, 3), (5.0, 3)], all_since=2.0, all_until=5.0)
    # After 2.0, up to 4.0: two steps of one and two of the other.
    assert decode_rate([early, late]) == pytest.approx((2 + 2 + 3 + 3) / 2.0)
    assert decode_rate([early, replace(late, all_since=4.5)]) == 0.0


def test_traces_of_ranks_come_on_one_clock() -> None:
    traces = [Trace(begin_s=begin, events=[{"ts": 10.0}], in_flight_s=1.0, exposed_s=0.5) for begin in (5.0, 5.25)]
    assert [event["ts"] for event in merged(traces)] == [10.0, 250_010.0]
    assert Hidden(micro_batches=2, in_flight_s=2.0, exposed_s=0.5).share == 0.75
    assert Hidden(micro_batches=1, in_flight_s=0.0, exposed_s=0.0).share == 0.0


def _overlap(one: dict[str, float], other: dict[str, float]) -> bool:
    return max(one["ts"], other["ts"]) < min(one["ts"] + one["dur"], other["ts"] + other["dur"])
