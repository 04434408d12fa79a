"""`baton bench collectives`: microseconds a call between processes of this host, shared memory beside gloo.

A call gathers a tensor of the given size in all from equal shares, adds and scatters it, or exchanges it in equal parts. Ranks
make the calls one after the other, in rounds, the implementations in turn; the slowest rank's mean counts, and the median of rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore

from serving.bench.options import count, counts
from serving.bench.report import provenance, write_report
from serving.parallel.collectives import Collectives, Handle
from serving.parallel.distributed import TorchCollectives
from serving.parallel.shared_memory import SharedMemoryCollectives

_WIDTH = 512
_DEADLINE_S = 60.0
_OPERATIONS = ("all_gather", "reduce_scatter", "all_to_all", "barrier")
_CALLS = {"shared_memory": 200, "gloo": 40}
"""In a round; shared memory first."""


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error."""
    options = _parse(argv)
    report = provenance(["baton", "bench", "collectives", *argv])
    settings = {"processes": options.processes, "rounds": options.rounds, "bytes": options.bytes}
    points = measure(options.processes, options.bytes, options.rounds)
    for point in points:
        print("{operation:<15} {bytes:>9} B".format(**point), *_columns(point), file=sys.stderr)
    write_report(report | {"settings": settings, "points": points}, options.out)
    return 0


def measure(num_processes: int, sizes: Sequence[int], rounds: int) -> list[dict[str, object]]:
    """One row for each operation and size: median microseconds a call by implementation, and those of each round."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["serving.bench.collectives"])
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        pipes, processes = [], []
        for rank in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, scratch, rank, num_processes, sizes, rounds))
            process.start()
            # With the only other end in the child, its death ends the wait for it.
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            of_ranks: list[dict[tuple[str, int, str], list[float]]] = [pipe.recv() for pipe in pipes]
        finally:
            for process in processes:
                process.join(_DEADLINE_S)
                process.kill()
    points = []
    for operation in _OPERATIONS:
        for size in sizes if operation != "barrier" else (0,):
            point: dict[str, object] = {"operation": operation, "bytes": size}
            for name in _CALLS:
                slowest = [
                    max(of_round) for of_round in zip(*(rank[operation, size, name] for rank in of_ranks), strict=True)
                ]
                point[f"{name}_us"] = round(statistics.median(slowest), 1)
                point[f"{name}_raw_us"] = [round(value, 1) for value in slowest]
            points.append(point)
    return points


def _rank(pipe: Connection, scratch: str, rank: int, world_size: int, sizes: Sequence[int], rounds: int) -> None:
    torch.set_num_threads(1)
    ranks = range(world_size)
    store = FileStore(f"{scratch}/store", world_size)
    groups: dict[str, Collectives] = {
        "shared_memory": SharedMemoryCollectives(
            name=Path(scratch).name, ranks=ranks, rank=rank, deadline_s=_DEADLINE_S
        ),
        "gloo": TorchCollectives(
            backend="gloo", store=store, ranks=ranks, rank=rank, name="bench", deadline_s=_DEADLINE_S
        ),
    }
    taken_us: dict[tuple[str, int, str], list[float]] = {}
    for operation in _OPERATIONS:
        for size in sizes if operation != "barrier" else (0,):
            for _ in range(rounds):
                for name, group in groups.items():
                    call = _call(group, operation, size)
                    taken_us.setdefault((operation, size, name), []).append(_mean_us(group, call, _CALLS[name]))
    pipe.send(taken_us)


def _call(group: Collectives, operation: str, size: int) -> Callable[[], object]:
    """One call on buffers of its own, waited for."""
    if operation == "barrier":
        return group.barrier
    rows = max(1, size // (4 * _WIDTH * group.world_size))
    share, whole = torch.zeros(rows, _WIDTH), torch.zeros(rows * group.world_size, _WIDTH)
    received, even = torch.zeros_like(whole), [rows] * group.world_size
    issue: dict[str, Callable[[], Handle]] = {
        "all_gather": lambda: group.all_gather(whole, share),
        "reduce_scatter": lambda: group.reduce_scatter(share, whole),
        "all_to_all": lambda: group.all_to_all([received], [whole], even, even),
    }
    return lambda: issue[operation]().wait()


def _mean_us(group: Collectives, call: Callable[[], object], num_calls: int) -> float:
    for _ in range(3):
        call()
    group.barrier()
    begin_s = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - begin_s) / num_calls * 1e6


def _columns(point: dict[str, object]) -> list[str]:
    return [f"{name} {point[f'{name}_us']:>9} us" for name in _CALLS]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="baton bench collectives", description="Collectives between processes.")
    parser.add_argument("--processes", type=count, default=4)
    parser.add_argument(
        "--bytes", type=counts, default=[16 << 10, 1 << 20], help="of the whole tensor; comma-separated"
    )
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    return parser.parse_args(argv)
