"""`baton bench engine` on a tiny model: a complete report, the same text as the peer, and figures that are what they say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import serving.bench.engine
from serving.bench.engine import main, measure, ratios
from serving.core.errors import ConfigError

FAST = ["--shape", "tiny", "--threads", "1", "--repeats", "1", "--prompt-tokens", "9", "--new-tokens", "4"]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.bench.engine, "_PAUSE_S", 0.0)


class _Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class _Paced:
    """Takes so many seconds for the prompt and for each further token, and one more where another has run in between."""

    last: _Paced | None = None

    version = "0"

    def __init__(self, name: str, clock: _Clock, prompt_s: float, token_s: float) -> None:
        self.name = name
        self._clock, self._prompt_s, self._token_s = clock, prompt_s, token_s

    def generate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[list[int]]:
        self._clock.now_s += 0.0 if _Paced.last is self else 1.0
        _Paced.last = self
        self._clock.now_s += self._prompt_s + self._token_s * (num_new_tokens - 1)
        return [[1] * num_new_tokens for _ in prompts]


def test_the_report_says_where_each_figure_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "engine.json"
    assert main([*FAST, "--batch", "1,3", "--peer", "transformers", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["command"].startswith("baton bench engine --shape tiny")
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"]
    assert report["settings"]["new_tokens"] == 4
    assert report["same_text_as_baton"] == {"transformers": 1.0}
    assert [(row["system"], row["batch"]) for row in report["results"]] == [
        ("baton", 1), ("transformers", 1), ("baton", 3), ("transformers", 3),
    ]  # fmt: skip
    # Their rate is another test's: on a busy machine the first token alone may take longer than all of them the time after.
    assert [len(row["raw_s"]) for row in report["results"]] == [1, 1, 1, 1]
    assert "transformers at batch 3" in capsys.readouterr().err


def test_without_a_file_the_json_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAST, "--batch", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["ratios"] == {}


def test_figures_and_ratios_are_those_of_the_clock() -> None:
    clock = _Clock()
    systems = [_Paced("baton", clock, 0.02, 0.01), _Paced("peer", clock, 0.04, 0.03)]
    figures, same = measure(systems, [2], 100, prompt_tokens=10, new_tokens=5, repeats=3, seed=0, clock=clock)
    mine = figures[0]
    assert mine.ttft_s == pytest.approx(0.02)
    assert mine.tpot_s == pytest.approx(0.01)
    assert mine.decode_tokens_per_s == pytest.approx(200)
    assert mine.prefill_tokens_per_s == pytest.approx(1000)
    assert ratios(figures)["peer at batch 2"] == pytest.approx({"decode": 3.0, "ttft": 2.0})
    assert same == {"peer": 1.0}


def test_a_run_longer_than_the_model_is_refused_with_its_limit() -> None:
    with pytest.raises(ConfigError, match="limit is 1024"):
        main(["--shape", "tiny", "--prompt-tokens", "1000", "--new-tokens", "100"])
