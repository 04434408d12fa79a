"""`baton bench handoff` over three real worker processes."""

from __future__ import annotations

import json
from pathlib import Path

from serving.bench.handoff import APART, TOGETHER, main


def test_it_measures_both_systems_and_they_write_the_same(tmp_path: Path) -> None:
    sizes = {
        "prompt-tokens": "200,70",
        "new-tokens": 5,
        "repeats": 2,
        "streams": 2,
        "stream-prompt-tokens": 8,
        "stream-tokens": 400,
    }
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    assert main(["--shape", "tiny", "--device", "cpu", *arguments, "--out", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["same_text"] == {"200": 1.0, "70": 1.0}
    assert report["gpus"] == 0
    single = {figure["system"]: figure for figure in report["single"][:2]}
    assert single[APART]["gap_s"] > single[APART]["tpot_s"] > 0
    assert set(single[APART]["stages_s"]) >= {"prefill", "transfer_exposed", "decode_join", "first_step"}
    assert [(figure["system"], figure["loaded"]) for figure in report["streams"]] == [
        (APART, False),
        (APART, True),
        (TOGETHER, False),
        (TOGETHER, True),
    ]
    assert all((figure["num_prefills"] > 0) == figure["loaded"] for figure in report["streams"])
    assert [limit["gate"] for limit in report["limits"]] == [2, 5, 1.15, None]
