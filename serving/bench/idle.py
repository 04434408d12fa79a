"""`baton bench idle`: what a server without a request costs, process by process, as a share of one core.

CPU time is read from the kernel before and after, for the server and everything below it, so nothing runs in between that
would not run anyway.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serving.bench.report import provenance, write_report
from serving.bench.usage import cpu_between, cpu_seconds
from serving.cluster.served import ServedProcess

GATE = 0.03
_SETTLE_S = 5.0


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: over the gate."""
    parser = argparse.ArgumentParser(
        prog="baton bench idle", description="CPU of a server without requests. Other options go to `baton serve`."
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    options, server_arguments = parser.parse_known_args(argv)
    report = provenance(["baton", "bench", "idle", *argv])
    with ServedProcess(server_arguments) as server:
        cores = measure(server.process.pid, options.seconds)
    total = sum(cores.values())
    for name, share in cores.items():
        print(f"{share:8.2%}  {name}", file=sys.stderr)
    print(f"{total:8.2%}  of one core over {options.seconds:g} s, at most {GATE:.0%} allowed", file=sys.stderr)
    report |= {"seconds": options.seconds, "cores": cores, "total": total, "gate": GATE, "passed": total <= GATE}
    write_report(report, options.out)
    return 0 if report["passed"] else 1


def measure(root_pid: int, seconds: float) -> dict[str, float]:
    """Cores in use by each process from `root_pid` downwards, largest first."""
    time.sleep(_SETTLE_S)
    before, begin_s = cpu_seconds([root_pid]), time.monotonic()
    time.sleep(seconds)
    used = cpu_between(before, cpu_seconds([root_pid]))
    length_s = time.monotonic() - begin_s
    return {name: cpu_s / length_s for name, cpu_s in used.items()}
