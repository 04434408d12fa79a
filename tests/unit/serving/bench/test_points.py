"""Points of `baton bench engine`: what a figure is taken from, on a tiny model and on systems whose steps are known."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from serving.bench import systems
from serving.bench.engine import main
from serving.bench.foreign import FOREIGN
from serving.bench.points import Point, batches_of_prompts, idle_of, measure_points, point_ratios, tpot
from serving.bench.systems import Run
from serving.core.config import KernelsTable
from serving.core.errors import ConfigError
from serving.engine.build import Engine, build_engine

TIMED = """
def load(*, model_dir, dtype, max_num_seqs, max_tokens, threads):
    def generate(prompts, num_new_tokens, timed):
        steps = len(prompts) - 1 + num_new_tokens
        return {
            "token_ids": [[0] * num_new_tokens for _ in prompts],
            "steps_s": [2.0 * (step + 1) for step in range(steps)],
            "last_steps": [i + num_new_tokens - 1 for i in range(len(prompts))],
        }
    return f"{max_num_seqs} {max_tokens}", generate
"""


class _Staggered:
    """A prompt a step; a step takes 1 s with prompts in it, and `step_s` where every sequence decodes."""

    version = "0"

    def __init__(self, name: str, step_s: float) -> None:
        self.name = name
        self._step_s = step_s
        self.num_runs = 0

    def generate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[list[int]]:
        return self.timed(prompts, num_new_tokens).token_ids

    def timed(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> Run:
        self.num_runs += 1
        now_s, steps_s = 0.0, []
        for step in range(len(prompts) - 1 + num_new_tokens):
            now_s += self._step_s if len(prompts) <= step < num_new_tokens else 1.0
            steps_s.append(now_s)
        return Run(
            token_ids=[[7] * num_new_tokens for _ in prompts],
            steps_s=steps_s,
            last_steps=[i + num_new_tokens - 1 for i in range(len(prompts))],
        )


def test_tpot_is_of_the_steps_that_have_every_sequence() -> None:
    run = _Staggered("baton", 0.01).timed([[1]] * 4, 20)
    assert tpot(run, 20) == pytest.approx(0.01)
    # One step more or less than those is another figure.
    assert (run.steps_s[20] - run.steps_s[3]) / 17 != pytest.approx(0.01)
    assert (run.steps_s[19] - run.steps_s[2]) / 17 != pytest.approx(0.01)


def test_a_run_in_which_the_sequences_never_met_is_refused() -> None:
    with pytest.raises(ConfigError, match="no steps in which all of 4 sequences ran"):
        tpot(_Staggered("baton", 0.01).timed([[1]] * 4, 3), 3)


def test_a_point_writes_enough_for_its_prompts_and_its_steps() -> None:
    assert Point(kind="prefill", batch=32, prompt_tokens=2048).num_new_tokens(64, 8192) == 1
    assert Point(kind="decode", batch=16, prompt_tokens=4096).num_new_tokens(64, 8192) == 8 + 64 + 1
    assert Point(kind="decode", batch=1, prompt_tokens=512).num_new_tokens(64, 8192) == 1 + 64 + 1


def test_ratios_are_our_time_over_the_peers() -> None:
    systems = [_Staggered("baton", 0.01), _Staggered("peer", 0.02)]
    points = [Point(kind="prefill", batch=1, prompt_tokens=4), Point(kind="decode", batch=2, prompt_tokens=4)]
    heard: list[str] = []
    figures = measure_points(
        systems, points, vocab_size=50, num_steps=10, step_tokens=4, repeats=3, seed=0,
        told=lambda figure: heard.append(f"{figure.point} {figure.system}"),
    )  # fmt: skip
    ratios = point_ratios(figures, "baton")
    assert figures[0].seconds == pytest.approx(1.0)
    assert ratios["peer"]["decode 2x4"] == pytest.approx(0.5)
    assert set(ratios["peer"]) == {"prefill 1x4", "decode 2x4"}
    assert heard == ["prefill 1x4 baton", "prefill 1x4 peer", "decode 2x4 baton", "decode 2x4 peer"]
    assert [len(figure.raw_s) for figure in figures] == [3, 3, 3, 3]
    # One prefill of each is not counted.
    assert systems[0].num_runs == 4 + 3
    assert figures[2].tokens_per_s == pytest.approx(2 / 0.01)
    assert all(figure.same_first_token == 1.0 for figure in figures)


def test_what_no_span_covers_is_idle() -> None:
    spans = [(0.0, 4.0), (5.0, 7.0), (6.0, 6.5), (9.0, 20.0)]
    assert idle_of(spans, 2.0, 12.0) == pytest.approx(0.3)
    assert idle_of(spans, 5.0, 7.0) == pytest.approx(0.0)


@pytest.mark.parametrize("text", ["16", "1x2x3", "1x0", "ax5"])
def test_what_is_no_batch_of_prompts_is_refused(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        batches_of_prompts(text)


def test_the_report_has_every_point_of_both_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peer.py").write_text(TIMED)
    monkeypatch.setitem(FOREIGN, "vllm", (tmp_path / "peer.py", {}))
    out = tmp_path / "engine.json"
    command = ["--shape", "tiny", "--threads", "1", "--repeats", "1", "--new-tokens", "5", "--max-batched-tokens", "64"]
    peer = ["--peer", "vllm", "--peer-python", f"vllm={sys.executable}"]
    assert main([*command, *peer, "--prefill", "1x30,2x40", "--decode", "3x40", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    # Two steps of 64 tokens for 120 of the prompts, four that count, and the one of the first token.
    assert report["versions"]["vllm"] == "3 47"
    assert [(row["point"], row["system"]) for row in report["results"]] == [
        ("prefill 1x30", "baton"), ("prefill 1x30", "vllm"), ("prefill 2x40", "baton"), ("prefill 2x40", "vllm"),
        ("decode 3x40", "baton"), ("decode 3x40", "vllm"),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in report["results"])
    assert report["results"][-1]["seconds"] == pytest.approx(2.0)
    assert set(report["ratios"]["vllm"]) == {"prefill 1x30", "prefill 2x40", "decode 3x40"}


def test_baton_is_measured_against_itself_with_another_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[KernelsTable] = []

    def noted(*args: Any, kernels: KernelsTable, **options: Any) -> Engine:
        tables.append(kernels)
        return build_engine(*args, **options)

    monkeypatch.setattr(systems, "build_engine", noted)
    out = tmp_path / "engine.json"
    command = ["--shape", "tiny", "--threads", "1", "--repeats", "1", "--new-tokens", "5", "--decode", "2x16"]
    assert main([*command, "--against", "kernels.linear_fp8=baton", "--out", str(out)]) == 0
    assert [table.linear_fp8 for table in tables] == ["auto", "baton"]
    report = json.loads(out.read_text())
    other = "baton kernels.linear_fp8=baton"
    assert [row["system"] for row in report["results"]] == ["baton", other]
    assert set(report["ratios"]) == set(report["kernel_choices"]) - {"baton"} == {other}
    assert report["kernel_choices"]["baton"] == {"mla_decode": "baton", "linear_fp8": "baton", "grouped_fp8": "baton"}


@pytest.mark.parametrize(
    ("against", "said"),
    [
        ("router.port=1", "give a key of [kernels]"),
        ("kernels.linear_fp9=baton", "linear_fp8"),
        ("kernels.linear_fp8=baton", "give --prefill or --decode"),
    ],
)
def test_settings_are_compared_at_points_and_are_those_of_kernels(
    against: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--shape", "tiny", "--device", "cpu", "--against", against])
    assert said in capsys.readouterr().err


def test_points_are_not_for_peers_that_do_not_tell_their_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--shape", "tiny", "--decode", "1x8", "--peer", "transformers"])
    assert "only vllm can be measured" in capsys.readouterr().err
