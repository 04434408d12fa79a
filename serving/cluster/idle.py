"""`baton bench idle`: what a server without a request costs, process by process, as a share of one core.

CPU time is read from the kernel before and after, for the server and everything below it, so nothing runs in between that would not
run anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from serving.cluster.served import ServedProcess

_SETTLE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One process over the interval: percent of one core, resident MiB at its end."""

    pid: int
    name: str
    cpu_percent: float
    rss_mib: int


def main(arguments: Sequence[str]) -> int:
    """`arguments` without the command's name. A table on standard error, JSON on standard output or in --out."""
    parser = argparse.ArgumentParser(
        prog="baton bench idle", description="CPU of a server without requests. Other options go to `baton serve`."
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    options, server_arguments = parser.parse_known_args(arguments)
    with ServedProcess(server_arguments) as server:
        usages = measure(server.process.pid, options.seconds)
    total = sum(usage.cpu_percent for usage in usages)
    for usage in usages:
        print(f"{usage.cpu_percent:6.2f} %  {usage.rss_mib:5d} MiB  {usage.name}", file=sys.stderr)
    print(f"{total:6.2f} % of one core over {options.seconds:g} s", file=sys.stderr)
    report = {"seconds": options.seconds, "cpu_percent": total, "processes": [vars(usage) for usage in usages]}
    text = json.dumps(report, indent=2)
    if options.out is None:
        print(text)
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 0


def measure(root_pid: int, seconds: float) -> list[Usage]:
    """`root_pid` and all below it; processes that came or went in between are left out."""
    time.sleep(_SETTLE_S)
    before, started_s = _cpu_seconds(root_pid), time.monotonic()
    time.sleep(seconds)
    after, elapsed_s = _cpu_seconds(root_pid), time.monotonic() - started_s
    usages = []
    for process, cpu_s in after.items():
        with contextlib.suppress(psutil.Error):
            if process in before:
                percent = 100 * (cpu_s - before[process]) / elapsed_s
                rss_mib = process.memory_info().rss >> 20
                usages.append(Usage(pid=process.pid, name=_name(process), cpu_percent=percent, rss_mib=rss_mib))
    return usages


def _cpu_seconds(root_pid: int) -> dict[psutil.Process, float]:
    root = psutil.Process(root_pid)
    found = {}
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process] = times.user + times.system
    return found


def _name(process: psutil.Process) -> str:
    """`ray::Rank.run`, `gcs_server`, or the Python module that runs."""
    words = process.cmdline()
    if "-m" in words:
        words = [word for word in words[words.index("-m") + 1 :] if not word.isdigit()]
        return " ".join(words[1:2] if words[0].endswith("process") else words[:1])
    return Path(words[0]).name if words else process.name()
