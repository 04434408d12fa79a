"""What a process tree has used, as the kernel counts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from serving.bench.usage import cpu_between, cpu_seconds, peak_bytes, process_name

# Waits for a line, then computes or does nothing; its child does nothing at all.
_SCRIPT = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
for line in sys.stdin:
    until_s = time.process_time() + float(line)
    held = bytearray(int(float(line) * 100_000_000))
    held[::4096] = b"x" * len(held[::4096])
    while time.process_time() < until_s:
        pass
    del held
    print("done", flush=True)
child.kill()
child.wait()
"""


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        compute(process, 0.0)
        yield process


def compute(process: subprocess.Popen[str], seconds: float) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def test_seconds_go_to_the_process_that_computed(worker: subprocess.Popen[str]) -> None:
    before = cpu_seconds([worker.pid])
    compute(worker, 0.3)
    used = cpu_between(before, cpu_seconds([worker.pid]))
    (name, seconds), (child, nothing) = used.items()
    assert (name, child) == (process_name(psutil.Process(worker.pid)), "sleep")
    assert 0.25 <= seconds < 0.6
    assert nothing < 0.05


def test_the_peak_stays_when_the_memory_is_given_back(worker: subprocess.Popen[str]) -> None:
    before = peak_bytes(worker.pid)
    compute(worker, 0.5)
    assert 40_000_000 < peak_bytes(worker.pid) - before < 80_000_000
    assert psutil.Process(worker.pid).memory_info().rss < before + 20_000_000
