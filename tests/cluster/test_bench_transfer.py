"""Pages between two processes, measured: on a CPU what NIXL does over memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.bench.transfer import main


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
