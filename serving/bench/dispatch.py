"""`baton bench dispatch`: microseconds of expert dispatch and combine in a captured decode step, without the experts between.

NCCL's fixed exchange beside the one through peer memory, in the same processes, a GPU each, in turn; the slowest rank's time of an
exchange counts, and the median of rounds. What comes back is compared bit by bit. Then a TP group's shares, gathered and summed, the same
way. `--rehearse W`: one GPU in the place of W.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from serving.bench.options import count, counts
from serving.bench.report import provenance, write_report
from serving.core.errors import ConfigError
from serving.kernels.quant import QuantisedRows, quantise_rows_fp8
from serving.parallel.collectives import Collectives
from serving.parallel.dispatch import Dispatch, FixedDispatch
from serving.parallel.distributed import TorchCollectives
from serving.parallel.peer_shares import open_peer_shares
from serving.parallel.shared_memory import SharedMemoryCollectives
from serving.parallel.symmetric import Exchanged, Symmetric, open_symmetric, rehearse_symmetric

_DEADLINE_S = 30.0
_ENDED_S = 10.0
_EXCHANGES = 40
"""In a graph; a replay before the one that is timed brings the ranks together."""
_OPERATIONS = ("all_gather", "reduce_scatter")
_SHARE_WIDTH = 2048
_SETS = 4
"""Of inputs, in turn, so that what an exchange left behind is no answer of the next."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """`rows` a rank, of which each picks `top_k` of the slots of all ranks, at random."""

    rows: int
    slots_per_rank: int
    top_k: int
    width: int
    fp8: bool

    @property
    def exchanged(self) -> Exchanged:
        return Exchanged(
            slots_per_rank=self.slots_per_rank,
            capacity=self.rows,
            width=self.width,
            top_k=self.top_k,
            deadline_s=_DEADLINE_S,
        )

    def tokens(
        self, rank: int, world_size: int, device: torch.device, seed: int = 0
    ) -> tuple[Tensor | QuantisedRows, Tensor, Tensor]:
        some = torch.Generator(device).manual_seed(1000 * seed + rank)
        x = torch.randn(self.rows, self.width, generator=some, device=device, dtype=torch.bfloat16)
        order = torch.rand(self.rows, world_size * self.slots_per_rank, generator=some, device=device).argsort(1)
        weights = torch.rand(self.rows, self.top_k, generator=some, device=device)
        return quantise_rows_fp8(x) if self.fp8 else x, order[:, : self.top_k].contiguous(), weights


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. Raises ConfigError."""
    options = _parse(argv)
    report = provenance(["baton", "bench", "dispatch", *argv])
    wanted = 1 if options.rehearse else options.processes
    if torch.cuda.device_count() < wanted:
        raise ConfigError(f"baton bench dispatch measures on {wanted} GPUs, and {torch.cuda.device_count()} are here")
    if options.rehearse:
        cases = [
            Case(rows=rows, slots_per_rank=1, top_k=options.top_k + 1, width=options.width, fp8=True)
            for rows in options.rows
        ]
        points = [rehearsed(case, options.rehearse, options.rounds) for case in cases]
    else:
        slots = -(-options.experts // options.processes)
        cases = [
            Case(rows=rows, slots_per_rank=slots, top_k=options.top_k, width=options.width, fp8=fp8)
            for fp8 in (True, False)
            for rows in options.rows
        ]
        points = measure(cases, options.processes, options.rounds, shares=options.shares)
    for point in points:
        print(*(f"{key} {value}" for key, value in point.items() if not key.endswith("raw_us")), file=sys.stderr)
    device = {"name": torch.cuda.get_device_name(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    write_report(report | {"device": device, "points": points}, options.out)
    return 0


def rehearsed(case: Case, world_size: int, rounds: int) -> dict[str, Any]:
    """A rank of `world_size` alone, which does to itself what the others do to it."""
    device = torch.device("cuda", torch.cuda.current_device())
    symmetric = rehearse_symmetric(tuple(range(world_size)), device, case.exchanged)
    of_rank = _OfRank(case, 0, world_size, device)
    raw_us, _ = of_rank.timed(symmetric.dispatch(case.rows), rounds, lambda: None)
    symmetric.check()
    return {
        "ranks": world_size,
        **_described(case),
        "rows_used": of_rank.rows_used,
        "symmetric_us": round(statistics.median(raw_us), 1),
        "symmetric_raw_us": [round(value, 1) for value in raw_us],
    }


def measure(
    cases: Sequence[Case], num_processes: int, rounds: int, *, see_all: bool = True, shares: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Of each case, then of a TP group's rows of so many bytes gathered and summed: median microseconds of an exchange by implementation,
    those of each round, and whether the results are equal. `see_all`: whether a process sees the others' GPUs; a server's do not."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        pipes, processes = [], []
        for rank in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(theirs, scratch, rank, num_processes, cases, rounds, see_all, shares)
            )
            process.start()
            # With the only other end in the child, its death ends the wait for it.
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            of_ranks: list[list[dict[str, Any]]] = [pipe.recv() for pipe in pipes]
        finally:
            for process in processes:
                process.join(_ENDED_S)
                process.kill()
    points = []
    described = [_described(case) for case in cases]
    described += [{"operation": operation, "bytes": size} for operation in _OPERATIONS for size in shares]
    for index, description in enumerate(described):
        found = [of_rank[index] for of_rank in of_ranks]
        point: dict[str, Any] = {"ranks": num_processes, **description}
        for name in ("nccl", "symmetric"):
            slowest = [max(of_round) for of_round in zip(*(one[name] for one in found), strict=True)]
            point[f"{name}_us"] = round(statistics.median(slowest), 1)
            point[f"{name}_raw_us"] = [round(value, 1) for value in slowest]
        points.append(point | {"equal": all(one["equal"] for one in found)})
    return points


def _described(case: Case) -> dict[str, Any]:
    return {"rows": case.rows, "top_k": case.top_k, "width": case.width, "payload": "fp8" if case.fp8 else "bf16"}


def _rank(
    pipe: Connection,
    scratch: str,
    rank: int,
    num_processes: int,
    cases: Sequence[Case],
    rounds: int,
    see_all: bool,
    shares: Sequence[int],
) -> None:
    if not see_all:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[rank] if seen else str(rank)
    device = torch.device("cuda", rank if see_all else 0)
    torch.cuda.set_device(device)
    ranks = range(num_processes)
    control = SharedMemoryCollectives(name=Path(scratch).name, ranks=ranks, rank=rank, deadline_s=_DEADLINE_S)
    store = FileStore(f"{scratch}/store", num_processes)
    nccl = TorchCollectives(backend="nccl", store=store, ranks=ranks, rank=rank, name="bench", deadline_s=_DEADLINE_S)
    found = []
    for case in cases:
        of_rank = _OfRank(case, rank, num_processes, device)
        symmetric: Symmetric = open_symmetric(control, device, case.exchanged)
        fixed_us, fixed = of_rank.timed(FixedDispatch(nccl, case.slots_per_rank, case.rows), rounds, control.barrier)
        symmetric_us, ours = of_rank.timed(symmetric.dispatch(case.rows), rounds, control.barrier)
        symmetric.check()
        found.append({"nccl": fixed_us, "symmetric": symmetric_us, "equal": _equal(fixed, ours)})
        symmetric.close()
    if shares:
        found += _shares(nccl, control, device, shares, rounds)
    pipe.send(found)


def _shares(
    nccl: TorchCollectives, control: SharedMemoryCollectives, device: torch.device, sizes: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Gathered, then summed, of each size."""
    ours = open_peer_shares(nccl, control, device, deadline_s=_DEADLINE_S)
    found = []
    for operation in _OPERATIONS:
        for num_bytes in sizes:
            rows = max(nccl.world_size, num_bytes // (2 * _SHARE_WIDTH))
            some = torch.Generator(device).manual_seed(nccl.rank)
            mine = rows // nccl.world_size if operation == "all_gather" else rows
            shape = _SETS, mine, _SHARE_WIDTH
            inputs = torch.randn(shape, generator=some, device=device, dtype=torch.bfloat16)
            over_nccl, over_memory = (
                _replayed(partial(_calls, group, operation, inputs, rows), rounds, control.barrier)
                for group in (nccl, ours)
            )
            equal = _equal(over_nccl[1], over_memory[1])
            found.append({"nccl": over_nccl[0], "symmetric": over_memory[0], "equal": equal})
    ours.check()
    ours.close_memory()
    return found


def _calls(group: Collectives, operation: str, inputs: Tensor, rows: int) -> list[Tensor]:
    outs = []
    for index in range(_EXCHANGES):
        gathers = operation == "all_gather"
        out = inputs.new_empty(rows if gathers else rows // group.world_size, inputs.shape[2])
        call = group.all_gather if gathers else group.reduce_scatter
        call(out, inputs[index % _SETS]).wait()
        outs.append(out)
    return outs


def _equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Bit by bit, and no two sets alike."""
    same = all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))
    return same and not torch.equal(ones[0], ones[1])


class _OfRank:
    """What one rank sends and gives back in a case, the same of every dispatch."""

    def __init__(self, case: Case, rank: int, world_size: int, device: torch.device) -> None:
        self._tokens = [case.tokens(rank, world_size, device, seed) for seed in range(_SETS)]
        some = torch.Generator(device).manual_seed(100 + rank)
        shape = world_size * case.rows, case.width
        self._results = [torch.randn(shape, generator=some, device=device, dtype=torch.bfloat16) for _ in range(_SETS)]
        self.rows_used = 0
        """On this rank, of an exchange, in the mean."""

    def timed(self, dispatch: Dispatch, rounds: int, meet: Callable[[], None]) -> tuple[list[float], list[Tensor]]:
        """Microseconds of an exchange in each round, and what came back of each exchange of the last one."""
        results, used = [], []
        for tokens, values in zip(self._tokens, self._results, strict=True):
            sending = dispatch.send(*tokens)
            used.append((sending.wait().slots_RK >= 0).any(1))
            # Rows that nobody sent come to zeros where they travel too.
            results.append(values * used[-1][:, None])
            dispatch.give_back(sending, results[-1]).wait()
        self.rows_used = int(torch.stack(used).sum()) // _SETS

        def exchanges() -> list[Tensor]:
            totals = []
            for index in range(_EXCHANGES):
                sending = dispatch.send(*self._tokens[index % _SETS])
                sending.wait()
                totals.append(dispatch.give_back(sending, results[index % _SETS]).wait())
            return totals

        return _replayed(exchanges, rounds, meet)


def _replayed(
    exchanges: Callable[[], list[Tensor]], rounds: int, meet: Callable[[], None]
) -> tuple[list[float], list[Tensor]]:
    """Microseconds of each of `exchanges` in each round, captured, and what the last replay left."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        exchanges()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = exchanges()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    raw_us = []
    for _ in range(rounds):
        meet()
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        raw_us.append(begin.elapsed_time(end) * 1e3 / len(results))
    return raw_us, [result.clone() for result in results]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="baton bench dispatch", description="Expert dispatch and combine between GPUs of one host."
    )
    parser.add_argument("--processes", type=count, default=2, help="with a GPU each")
    parser.add_argument("--rows", type=counts, default=[8, 32, 64, 128], help="of each rank; comma-separated")
    parser.add_argument("--width", type=count, default=7168)
    parser.add_argument("--experts", type=count, default=256)
    parser.add_argument("--top-k", type=count, default=8)
    parser.add_argument(
        "--shares",
        type=counts,
        default=[16 << 10, 64 << 10, 256 << 10, 1 << 20],
        help="bytes that a tp group gathers, and sums; comma-separated",
    )
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument(
        "--rehearse", type=count, metavar="W", help="one GPU as a rank of W with an expert each, the shared one routed"
    )
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    return parser.parse_args(argv)
