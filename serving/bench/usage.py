"""What processes have used: CPU seconds and peak memory of whole process trees, read from the kernel, by name.

before = cpu_seconds([pid]); ...; cpu_between(before, cpu_seconds([pid]))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil


def cpu_seconds(pids: Iterable[int]) -> dict[psutil.Process, float]:
    """User and system time of the processes `pids` and of all below the first: the server; the others stand alone."""
    first, *others = [psutil.Process(pid) for pid in pids]
    found = {}
    for process in [first, *first.children(recursive=True), *others]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process] = times.user + times.system
    return found


def cpu_between(before: Mapping[psutil.Process, float], after: Mapping[psutil.Process, float]) -> dict[str, float]:
    """Seconds in between by name, largest first; processes that came or went are left out."""
    seconds: dict[str, float] = {}
    for process, cpu_s in after.items():
        with contextlib.suppress(psutil.Error):
            if process in before:
                name = process_name(process)
                while name in seconds:
                    name += "'"
                seconds[name] = cpu_s - before[process]
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def peak_bytes(pid: int) -> int:
    """VmHWM: the most that was ever resident."""
    return _status_bytes(pid, "VmHWM")


def private_bytes(pid: int) -> int:
    """RssAnon: what is resident now and is no file's."""
    return _status_bytes(pid, "RssAnon")


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise psutil.NoSuchProcess(pid)


def process_name(process: psutil.Process) -> str:
    """`ray::Rank.run`, `gcs_server`, or the Python module that runs; "" for one that has ended."""
    try:
        words = process.cmdline()
    except psutil.ZombieProcess:
        return ""
    if "-m" in words:
        words = [word for word in words[words.index("-m") + 1 :] if not word.isdigit()]
        return " ".join(words[1:2] if words[0].endswith("process") else words[:1])
    return Path(words[0]).name if words else process.name()
