"""Where a figure comes from: machine, versions, commit, command. A figure without them is not reported."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from serving.bench.systems import installed_version


def provenance(command: Sequence[str], *, libraries: Sequence[str] = ()) -> dict[str, Any]:
    """Plain data for the head of a report. `commit` is None outside a repository.

    `libraries`: whose versions stand there too, by the names of their wheels; one that has no metadata here is left out.
    """
    known = {name: installed_version(name) for name in libraries}
    return {
        "command": " ".join(command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": installed_version("transformers"),
            "baton-serving": installed_version("baton-serving"),
        }
        | {name: version for name, version in known.items() if version is not None},
    }


def write_report(report: Mapping[str, Any], out: Path | None) -> None:
    """JSON to `out`, or to standard output."""
    text = json.dumps(report, indent=2)
    if out is None:
        print(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
