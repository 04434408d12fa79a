"""Collectives between processes, measured: every operation, size and implementation has a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.bench.collectives import main


def test_every_call_is_timed_over_shared_memory_and_gloo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "collectives.json"
    assert main(["--processes", "2", "--bytes", "4096", "--rounds", "2", "--out", str(out)]) == 0
    points = json.loads(out.read_text())["points"]
    assert [point["operation"] for point in points] == ["all_gather", "reduce_scatter", "all_to_all", "barrier"]
    for point in points:
        for name in ("shared_memory", "gloo"):
            first_us, second_us = point[f"{name}_raw_us"]
            assert min(first_us, second_us) > 1.0
            assert point[f"{name}_us"] == pytest.approx((first_us + second_us) / 2, abs=0.11)
    assert "reduce_scatter" in capsys.readouterr().err
