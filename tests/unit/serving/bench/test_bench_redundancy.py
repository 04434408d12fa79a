"""`baton bench redundancy`: what it reports, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from serving.bench.redundancy import main
from serving.core.errors import ConfigError


def test_it_reports_its_gates_beside_the_lower_bound(tmp_path: Path) -> None:
    out = tmp_path / "redundancy.json"
    main(["--steps", "4", "--samples", "2", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["balance"]["mean"] > report["static"]["mean"]
    assert report["optimum"]["samples"] == 2
    assert report["optimum"]["largest_over"] >= 1


def test_an_optimum_that_cannot_be_computed_is_not_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install scipy"):
        main(["--steps", "1", "--milp-seconds", "1"])


def test_a_device_that_is_not_there_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="leave the option out"):
        main(["--steps", "1", "--device", "cuda"])
