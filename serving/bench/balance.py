"""`baton bench balance`: how evenly each way of placing experts spreads a load, and what it costs on one core.

Loads are drawn, per layer, as Zipf(s) x lognormal(0.3) over the experts in random order, which at s = 0.6 is as uneven as a recorded
trace. Beside the figure of each way (mean over heaviest GPU, averaged over layers) stands its bound: for `hierarchical` the
node that is heaviest under the best pairing of groups, for one and two slots a GPU the optimum for its copies, found another way.
`after_drift` multiplies the load by another lognormal(0.3) and says what the placement in force, a few changed slots and a new
placement come to.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.bench.options import count
from serving.bench.report import provenance, write_report
from serving.parallel.balance import (
    global_placement,
    hierarchical_placement,
    incremental_placement,
    single_placement,
)
from serving.parallel.loads import with_shared_expert
from serving.parallel.placement import Floats, Placement, balance

_LAYERS, _EXPERTS, _GROUPS, _NODES = 58, 256, 8, 4
_EXPERTS_PER_TOKEN = 8
_EXPONENTS = (0.6, 0.8)
_SPREAD = 0.3
_CHANGES = (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """`bound` of loads is [L]; `gates` by exponent; `within` is how far a seed may stay under its bound."""

    place: Callable[[Floats], Placement]
    bound: Callable[[Floats], Floats]
    gates: dict[float, float]
    within: float
    limit_ms: float
    num_nodes: int = 1
    shared_expert: bool = False


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: under a gate."""
    options = _parse(argv)
    report = provenance(["baton", "bench", "balance", *argv])
    report["versions"]["numpy"] = np.__version__
    report["settings"] = {"layers": _LAYERS, "experts": _EXPERTS, "seeds": options.seeds, "lognormal": _SPREAD}
    report["cases"] = [
        {"case": name, "zipf": exponent, **_measure(case, exponent, options.seeds)}
        for name, case in _cases().items()
        for exponent in _EXPONENTS
    ]
    report["passed"] = all(row["passed"] for row in report["cases"])
    _show(report)
    write_report(report, options.out)
    return 0 if report["passed"] else 1


def _cases() -> dict[str, _Case]:
    ep32 = {"num_slots": 288, "num_gpus": 32}
    return {
        "EP32 hierarchical": _Case(
            place=lambda loads: hierarchical_placement(loads, **ep32, num_nodes=_NODES, num_groups=_GROUPS),
            bound=_heaviest_node,
            gates={0.6: 0.92, 0.8: 0.85},
            within=0.02,
            limit_ms=40,
            num_nodes=_NODES,
        ),
        "EP32 global": _Case(
            place=lambda loads: global_placement(loads, **ep32),
            bound=lambda loads: np.ones(len(loads)),
            gates={0.6: 0.99, 0.8: 0.99},
            within=0.01,
            limit_ms=150,
        ),
        "EP144 global": _Case(
            place=lambda loads: global_placement(loads, num_slots=288, num_gpus=144),
            bound=_optimal_pairs,
            gates={0.6: 0.77},
            within=1e-9,
            limit_ms=150,
        ),
        "EP320 single": _Case(
            place=lambda loads: single_placement(loads, num_gpus=320),
            bound=lambda loads: 1 / 320 / _lightest_threshold(loads, 320),
            gates={0.6: 0.52},
            within=1e-9,
            limit_ms=5,
            shared_expert=True,
        ),
    }


def _measure(case: _Case, exponent: float, num_seeds: int) -> dict[str, Any]:
    reached, bounds, times_ms, drifts = [], [], [], []
    for seed in range(num_seeds):
        random = np.random.default_rng(seed)
        loads = _draw(exponent, random)
        drifted = loads * random.lognormal(0, _SPREAD, loads.shape)
        if case.shared_expert:
            loads, drifted = (with_shared_expert(now, experts_per_token=_EXPERTS_PER_TOKEN) for now in (loads, drifted))
        began = time.perf_counter()
        placement = case.place(loads)
        times_ms.append(1e3 * (time.perf_counter() - began))
        reached.append(float(balance(placement, loads).mean()))
        bounds.append(float(case.bound(loads / loads.sum(axis=1, keepdims=True)).mean()))
        drifts.append(_after_drift(case, placement, drifted))
    under_bound = max(bound - figure for bound, figure in zip(bounds, reached, strict=True))
    passed = np.mean(reached) >= case.gates.get(exponent, 0.0) and under_bound <= case.within
    return {
        "balance": float(np.mean(reached)),
        "balance_of_worst_seed": min(reached),
        "bound": float(np.mean(bounds)),
        "most_under_bound": under_bound,
        "time_ms": {"median": float(np.median(times_ms)), "max": max(times_ms), "limit": case.limit_ms},
        "after_drift": {key: float(np.mean([drift[key] for drift in drifts])) for key in drifts[0]},
        "passed": bool(passed and np.median(times_ms) <= case.limit_ms),
    }


def _draw(exponent: float, random: np.random.Generator) -> Floats:
    loads = np.arange(1, _EXPERTS + 1) ** -exponent * random.lognormal(0, _SPREAD, (_LAYERS, _EXPERTS))
    return random.permuted(loads, axis=1)


def _after_drift(case: _Case, present: Placement, loads: Floats) -> dict[str, float]:
    figures = {"unchanged": float(balance(present, loads).mean())}
    for changes in _CHANGES:
        began = time.perf_counter()
        placement = incremental_placement(present, loads, max_changes=changes, num_nodes=case.num_nodes)
        figures[f"{changes} changes time_ms"] = 1e3 * (time.perf_counter() - began)
        figures[f"{changes} changes"] = float(balance(placement, loads).mean())
    return figures | {"new": float(balance(case.place(loads), loads).mean())}


def _heaviest_node(loads: Floats) -> Floats:
    """Two groups a node: the heaviest with the lightest, and so on, is the best pairing."""
    ordered = np.sort(loads.reshape(len(loads), _GROUPS, -1).sum(axis=-1), axis=1)
    nodes = ordered[:, :_NODES] + ordered[:, : _NODES - 1 : -1]
    bound: Floats = nodes.mean(axis=1) / nodes.max(axis=1)
    return bound


def _optimal_pairs(loads: Floats) -> Floats:
    """144 pairs of the copies whose heaviest is as light as can be."""
    copies = np.ceil(loads / _lightest_threshold(loads, 288)[:, None] * (1 - 1e-12)).astype(int)
    shares = np.sort(np.stack([np.repeat(row / num, num) for row, num in zip(loads, copies, strict=True)]), axis=1)
    bound: Floats = 1 / 144 / (shares[:, :144] + shares[:, :143:-1]).max(axis=1)
    return bound


def _lightest_threshold(loads: Floats, num_slots: int) -> Floats:
    """[L]: the least load a copy may have such that `num_slots` copies suffice, by bisection."""
    low, high = loads.sum(axis=1) / num_slots, loads.max(axis=1)
    for _ in range(60):
        middle = (low + high) / 2
        fits = np.ceil(loads / middle[:, None]).sum(axis=1) <= num_slots
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    least: Floats = high
    return least


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="baton bench balance", description="Ways to place experts, and their time.")
    parser.add_argument("--seeds", type=count, default=20, help="loads drawn for each case (20)")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    return parser.parse_args(argv)


def _show(report: dict[str, Any]) -> None:
    print(f"{'':<24}balance   bound      ms    drifted 16 slots     new", file=sys.stderr)
    for row in report["cases"]:
        drift = row["after_drift"]
        name = f"{row['case']}, {row['zipf']}"
        print(
            f"{name:<24}{row['balance']:7.4f} {row['bound']:7.4f} {row['time_ms']['median']:7.1f}"
            f"    {drift['unchanged']:7.4f} {drift['16 changes']:7.4f} {drift['new']:7.4f}{'' if row['passed'] else '  under its gate'}",
            file=sys.stderr,
        )
