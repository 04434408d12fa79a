"""Pages between two processes, measured: on a CPU what NIXL does over memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcache.transfer.base import runs
from serving.bench.shapes import SHAPES
from serving.bench.transfer import main, setups_of
from serving.model.config import ModelConfig


def test_scattered_pages_go_alone_and_adjacent_ones_together() -> None:
    setups = setups_of(ModelConfig.from_dict(SHAPES["lite"]), 4096, "cpu", 3, 0)
    pieces = {name: len(list(runs(setup.sources, setup.targets))) for name, setup in setups.items()}
    assert pieces["one piece"] == 1
    assert pieces["pages"] > 60
    assert pieces["planes"] > 1700
    assert {setup.num_bytes for setup in setups.values()} == {64 * 27 * 64 * 576 * 2}


def test_every_way_of_a_cpu_is_measured_and_the_bytes_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "transfer.json"
    arguments = ["--shape", "tiny", "--tokens", "300", "--device", "cpu", "--repeats", "2", "--out", str(out)]
    assert main(arguments) == 0
    ways = {way["name"]: way for way in json.loads(out.read_text())["ways"]}
    assert list(ways) == ["NIXL, pages", "NIXL, one piece", "NIXL, planes"]
    assert [way["num_descriptors"] for way in ways.values()] == [5, 1, 10]
    assert all(way["seen_s"] >= way["raw_s"][0] * 0.01 > 0 and len(way["raw_s"]) == 2 for way in ways.values())
    assert "NIXL, planes" in capsys.readouterr().err
