import json
from pathlib import Path

import pytest

from serving.bench.balance import main


def test_no_figure_is_above_its_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "balance.json"
    main(["--seeds", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["cases"]
    assert {row["case"] for row in rows} == {"EP32 hierarchical", "EP32 global", "EP144 global", "EP320 single"}
    for row in rows:
        assert row["balance"] <= row["bound"] + 1e-9
        drift = row["after_drift"]
        assert drift["unchanged"] < drift["4 changes"] < drift["16 changes"] <= row["bound"] + 0.02
    assert "EP320 single, 0.6" in capsys.readouterr().err
