"""`baton bench kernels`: each kernel's time, its share of what the machine can do, and its ratio to installed peers.

A case (`kernel_cases.stage`) prepares several sets of fresh random inputs, together larger than the caches, and says what one call
moves or computes. Calls over all sets one after the other are captured as one CUDA graph, as the engine runs them; own
kernel and peers take turns, and medians over the turns are reported. A kernel whose output is not finite or is not a
peer's fails its case. The ceilings (device copy, matrix products of the library) are measured in the same run. Figures
of different runs do not compare: machines are shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from serving.bench.kernel_cases.ceilings import ceilings
from serving.bench.kernel_cases.named import cases
from serving.bench.kernel_cases.stage import Bound, Call, Case, Stage, Work
from serving.bench.options import count
from serving.bench.report import provenance, write_report
from serving.core.errors import ConfigError

OWN = "baton"
# Kernels round in different places: outputs in bf16 differ by about 0.004 of their size.
_AGREE = 0.03
_NUM_CHECKED_SETS = 4


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One system in one case: median microseconds of a call, the turns it is the median of, and whether it ran as a graph."""

    us: float
    turns_us: list[float]
    captured: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case. `rate`: bytes or flops a second; `of_ceiling`: its share of the ceiling, None where that was not measured.

    By peer: `ratios`, own time over the peer's, below 1 is faster; `differences`, of outputs, relative; `peer_errors`. Where
    `error` is not None the case failed.
    """

    name: str
    bound: Bound | None = None
    rate: float = 0.0
    of_ceiling: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    peer_errors: dict[str, str] = field(default_factory=dict)
    error: str | None = None


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: a case failed."""
    options = _parse(argv)
    device = _device()
    # FlashMLA and DeepGEMM come in vLLM's wheel.
    report = provenance(["baton", "bench", "kernels", *argv], libraries=("triton", "vllm"))
    stage = Stage(device)
    chosen = choose(cases(stage), options.only)
    print(_HEAD, file=sys.stderr, flush=True)
    with torch.inference_mode():
        limits = [run_case(name, case, device, {}, options.repeats) for name, case in ceilings(stage).items()]
        ceiling = {row.bound: row.rate for row in limits if row.bound is not None}
        rows = []
        for name, case in chosen.items():
            rows.append(run_case(name, case, device, ceiling, options.repeats))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    report |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "settings": {"only": options.only, "repeats": options.repeats},
        "ceilings": ceiling,
        "results": [asdict(row) for row in rows],
        "failed": [row.name for row in [*limits, *rows] if row.error is not None],
    }
    print(json.dumps(ceiling), file=sys.stderr)
    write_report(report, options.out)
    return 1 if report["failed"] else 0


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise ConfigError("baton bench kernels: torch finds no CUDA device here; run it where one is")
    return torch.device("cuda")


def choose(named: Mapping[str, Case], only: Sequence[str]) -> dict[str, Case]:
    """Cases whose name begins with one of `only`, all of them where it is empty. Raises ConfigError where one chooses nothing."""
    for prefix in only:
        if not any(name.startswith(prefix) for name in named):
            families = sorted({name.partition("/")[0] for name in named})
            raise ConfigError(f"--only {prefix}: no case is called so; cases begin with {', '.join(families)}")
    return {name: case for name, case in named.items() if not only or name.startswith(tuple(only))}


def run_case(name: str, case: Case, device: torch.device, ceiling: Mapping[Bound, float], repeats: int) -> Row:
    """Never raises: what goes wrong is in the row, and the next case may still run."""
    try:
        return _row(name, case(), device, ceiling, repeats)
    except Exception as error:
        return Row(name=name, error=_text(error))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _row(name: str, work: Work, device: torch.device, ceiling: Mapping[Bound, float], repeats: int) -> Row:
    launches = {OWN: _Launch(work.own, work.num_sets, device, work.captured)}
    checked = range(min(work.num_sets, _NUM_CHECKED_SETS))
    if not all(_is_finite(work.read(work.own(index))) for index in checked):
        return Row(name=name, bound=work.bound, error="the kernel's output holds values that are not finite")
    differences: dict[str, float] = {}
    errors: dict[str, str] = {}
    for peer, call in work.peers.items():
        try:
            found = [_difference(work.read(work.own(index)), work.read(call(index))) for index in checked]
            launches[peer] = _Launch(call, work.num_sets, device, work.captured)
        except Exception as error:
            errors[peer] = _text(error)
        else:
            if None not in found:
                # Python's max may pass over a NaN.
                differences[peer] = torch.tensor(found).max().item()
    turns: dict[str, list[float]] = {system: [] for system in launches}
    for _ in range(repeats):
        for system, launch in launches.items():
            turns[system].append(launch.us())
    timings = {
        system: Timing(us=statistics.median(times), turns_us=times, captured=launches[system].captured)
        for system, times in turns.items()
    }
    rate = work.amount / timings[OWN].us * 1e6
    far = [f"{peer} by {difference:.3f}" for peer, difference in differences.items() if not difference <= _AGREE]
    return Row(
        name=name,
        bound=work.bound,
        rate=rate,
        of_ceiling=rate / ceiling[work.bound] if work.bound in ceiling else None,
        timings=timings,
        ratios={peer: timings[OWN].us / timing.us for peer, timing in timings.items() if peer != OWN},
        differences=differences,
        peer_errors=errors,
        error=f"outputs differ from {', '.join(far)} of their size" if far else None,
    )


class _Launch:
    """All sets one after the other, often enough that the clock's steps do not matter; a graph where it can be captured."""

    _LEAST_CALLS = 32

    def __init__(self, call: Call, num_sets: int, device: torch.device, captured: bool) -> None:
        self._call = call
        self._on_gpu = device.type == "cuda"
        self._sets = list(range(num_sets)) * (-(-self._LEAST_CALLS // num_sets) if self._on_gpu else 1)
        self._graph: torch.cuda.CUDAGraph | None = None
        for index in range(min(num_sets, 2)):
            call(index)
        if self._on_gpu:
            torch.cuda.synchronize()
            self._graph = self._captured() if captured else None
            self.us()

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def us(self) -> float:
        """Microseconds of a call."""
        if not self._on_gpu:
            begin = time.perf_counter()
            self._run()
            return (time.perf_counter() - begin) / len(self._sets) * 1e6
        begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin_event.record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()
        end_event.record()
        end_event.synchronize()
        elapsed_ms: float = begin_event.elapsed_time(end_event)
        return elapsed_ms / len(self._sets) * 1e3

    def _run(self) -> None:
        for index in self._sets:
            self._call(index)

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run()
        except RuntimeError:
            # A peer that reads something back cannot be captured; it is timed as it runs.
            torch.cuda.synchronize()
            return None
        return graph


def _is_finite(output: Tensor | None) -> bool:
    return output is None or bool(output.isfinite().all())


def _difference(own: Tensor | None, peer: Tensor | None) -> float | None:
    if own is None or peer is None:
        return None
    distance = (own.float() - peer.float()).norm() / peer.float().norm()
    return float(distance)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


_HEAD = f"{'case':<44}{'us':>9}{'':>14}{'ceiling':>9}  time over peers'"


def _line(row: Row) -> str:
    if not row.timings:
        return f"{row.name:<44} FAILED {row.error}"
    rate = f"{row.rate / 1e9:.0f} GB/s" if row.bound == "copy" else f"{row.rate / 1e12:.0f} TFLOPS"
    share = "" if row.of_ceiling is None else f"{row.of_ceiling:.0%}"
    eager = "" if row.timings[OWN].captured else "  (not captured)"
    peers = [f"{ratio:.3f} {peer} ({row.timings[peer].us:.1f} us)" for peer, ratio in row.ratios.items()]
    peers += [f"{peer}: {error[:80]}" for peer, error in row.peer_errors.items()]
    failed = f"  FAILED {row.error}" if row.error else ""
    return f"{row.name:<44}{row.timings[OWN].us:>9.1f}{rate:>14}{share:>9}  {', '.join(peers)}{eager}{failed}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="baton bench kernels",
        description="Every kernel at DeepSeek-V3's shapes on fresh random inputs: time, share of the ceiling, ratio to peers.",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="cases whose name begins so: mla_decode/bf16"
    )
    parser.add_argument("--repeats", type=count, default=7, help="turns; figures are their medians (7)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here instead of standard output")
    return parser.parse_args(argv)
