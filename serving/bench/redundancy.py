"""`baton bench redundancy`: dynamic redundancy at the prefill unit's size, beside a static placement, a lower bound and the exact optimum.

Experts change ranks in the order of load as Gaussians that drift (AR(1), correlation 0.9 over 100 steps), and what an expert at a rank gets is
Zipf; tokens are drawn from that. Each DP group leans towards experts of its own, so that there is something to save between nodes.

The optimum lies between the bound (slots in use without limit: a maximum flow, exact) and what was found. HiGHS of scipy narrows that where `--milp-seconds` asks for it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import statistics
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.bench.options import count
from serving.bench.report import provenance, write_report
from serving.bench.systems import installed_version
from serving.core.errors import ConfigError
from serving.parallel.redundancy import Assignment, assign, balance, choose_hosted, static_placement

NUM_GPUS, GPUS_PER_NODE, NUM_EXPERTS, HOSTED, ACTIVE = 32, 8, 256, 16, 9
TOP_K, DP_GROUPS = 8, 8
GATES = {"balance": 0.95, "over_optimum": 1.03, "mean_ms": 2.0, "device_us": 100.0}
_RENEWAL = 100
_ZIPF, _CORRELATION = 0.8, 0.9
_LEANING = 0.5

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One layer-step: counts int64 [source ranks, experts], hosted and the static placement int64 [GPUs, slots]."""

    index: int
    counts: Ints
    hosted: Ints
    static: Ints


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a summary on standard error. 1: over a gate."""
    parser = argparse.ArgumentParser(
        prog="baton bench redundancy", description="Dynamic redundancy: EP32, 16 experts hosted a GPU, 9 in use."
    )
    parser.add_argument("--steps", type=count, default=1000, help="layer-steps (1000)")
    parser.add_argument("--tokens", type=count, default=4096, help="tokens of a rank in a step (4096)")
    parser.add_argument("--samples", type=count, default=20, help="steps that are compared with the optimum (20)")
    parser.add_argument(
        "--milp-seconds",
        type=float,
        default=0.0,
        help="at most so long a sample for HiGHS; needs scipy (0: compare with the lower bound alone)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the kernels on the same steps as well (cpu)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    options = parser.parse_args(argv)
    if options.milp_seconds > 0 and not importlib.util.find_spec("scipy"):
        raise ConfigError(
            "--milp-seconds needs scipy, which is not installed; `pip install scipy`, or leave the option out"
        )
    if options.device == "cuda":
        _require_cuda()
    report = provenance(["baton", "bench", "redundancy", *argv])
    report["versions"]["scipy"] = installed_version("scipy")
    report |= measure(
        steps=options.steps,
        tokens=options.tokens,
        samples=options.samples,
        milp_s=options.milp_seconds,
        seed=options.seed,
    )
    names = ["balance", "static", "static_of_the_step", "ms", "crossing", "optimum"]
    if options.device == "cuda":
        from serving.bench.redundancy_device import measure_on_device

        found = measure_on_device(drifting_steps(steps=options.steps, tokens=options.tokens, seed=options.seed))
        report["device"] = found
        report["passed"] &= bool(
            found["legal"]
            and found["balance"]["mean"] >= GATES["balance"]
            and found["us"]["median"] <= GATES["device_us"]
            and found["equals_the_reference"]["equal"] == found["equals_the_reference"]["of"]
        )
        names.append("device")
    write_report(report, options.out)
    for name in names:
        print(f"{name:<20}{report[name]}", file=sys.stderr)
    return 0 if report["passed"] else 1


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a CUDA GPU, and PyTorch finds none; leave the option out")


def drifting_steps(*, steps: int, tokens: int, seed: int) -> Iterator[Step]:
    """Layer-steps as in the module's text; hosted experts and static placement are made anew every 100 steps from that step's totals."""
    rng = np.random.default_rng(seed)
    keep = _CORRELATION ** (1 / _RENEWAL)
    zipf = np.arange(1, NUM_EXPERTS + 1) ** -_ZIPF
    leaning = rng.lognormal(sigma=_LEANING, size=(NUM_EXPERTS, DP_GROUPS)).repeat(NUM_GPUS // DP_GROUPS, axis=1)
    state = rng.standard_normal(NUM_EXPERTS)
    hosted = static = np.empty(0, dtype=np.int64)
    for index in range(steps):
        share = np.empty(NUM_EXPERTS)
        share[np.argsort(-state, kind="stable")] = zipf / zipf.sum()
        totals = rng.multinomial(NUM_GPUS * tokens * TOP_K, share)
        counts = rng.multinomial(totals, leaning / leaning.sum(axis=1, keepdims=True)).T.copy()
        if index % _RENEWAL == 0:
            hosted = choose_hosted(
                totals, num_gpus=NUM_GPUS, hosted_slots=HOSTED, active=ACTIVE, gpus_per_node=GPUS_PER_NODE
            )
            static = static_placement(totals, num_gpus=NUM_GPUS, slots=ACTIVE)
        yield Step(index=index, counts=counts, hosted=hosted, static=static)
        state = keep * state + (1 - keep**2) ** 0.5 * rng.standard_normal(NUM_EXPERTS)


def assigned(step: Step) -> Assignment:
    """What every rank computes in this step."""
    return assign(step.counts, step.hosted, active=ACTIVE, gpus_per_node=GPUS_PER_NODE)


def measure(*, steps: int, tokens: int, samples: int, milp_s: float, seed: int) -> dict[str, Any]:
    """Plain data: balance, time, tokens between nodes, distance to the optimum at evenly spread samples, gates."""
    balances, static, of_the_step, ms, crossing, crossing_anyhow = [], [], [], [], [], []
    sampled: list[dict[str, Any]] = []
    every = max(steps // samples, 1)
    # Another rank computes everything too, in a process of its own and beforehand, so as not to disturb the time taken here.
    with multiprocessing.get_context("spawn").Pool(1) as rank:
        elsewhere = rank.apply(_digests, (steps, tokens, seed))
    digests = []
    for step in drifting_steps(steps=steps, tokens=tokens, seed=seed):
        begin_s = time.perf_counter()
        result = assigned(step)
        ms.append((time.perf_counter() - begin_s) * 1e3)
        digests.append(_digest(result))
        totals = step.counts.sum(axis=0)
        balances.append(result.balance)
        static.append(static_balance(totals, step.static))
        if step.index % 10 == 0:
            fresh = static_placement(totals, num_gpus=NUM_GPUS, slots=ACTIVE)
            of_the_step.append(static_balance(totals, fresh))
        crossing.append(between_nodes(result.sent))
        crossing_anyhow.append(between_nodes(_evenly(step.counts, result.tokens)))
        if step.index % every == every - 1 and len(sampled) < samples:
            sampled.append(beside_optimum(totals, step.hosted, result, milp_s))
    identical = elsewhere == digests
    over = [sample["over_optimum"] for sample in sampled]
    report: dict[str, Any] = {
        "shape": {
            "gpus": NUM_GPUS,
            "experts": NUM_EXPERTS,
            "hosted": HOSTED,
            "active": ACTIVE,
            "steps": steps,
            "tokens_a_rank": tokens,
        },
        "balance": _spread(balances),
        "static": _spread(static),
        "static_of_the_step": _spread(of_the_step),
        "ms": {
            "mean": round(statistics.fmean(ms), 3),
            "p99": round(float(np.quantile(ms, 0.99)), 3),
            "max": round(max(ms), 3),
        },
        "crossing": {
            "own_node_first": round(statistics.fmean(crossing), 4),
            "evenly": round(statistics.fmean(crossing_anyhow), 4),
        },
        "identical_in_another_process": identical,
        "optimum": {"largest_over": max(over), "mean_over": round(statistics.fmean(over), 5), "samples": len(over)},
        "samples": sampled,
        "gates": GATES,
    }
    report["passed"] = bool(
        report["balance"]["mean"] >= GATES["balance"]
        and max(over) <= GATES["over_optimum"]
        and report["ms"]["mean"] <= GATES["mean_ms"]
        and identical
    )
    return report


def static_balance(totals: Ints, placement: Ints) -> float:
    """Mean over largest load where the replicas of an expert share its tokens evenly."""
    copies = np.bincount(placement.ravel(), minlength=len(totals))
    return balance((totals / copies)[placement].sum(axis=1))


def between_nodes(sent: Ints | Floats) -> float:
    """Part of the (expert, token) pairs in sent [sources, GPUs, slots] whose expert is computed on another node than the token's."""
    nodes = sent.reshape(NUM_GPUS // GPUS_PER_NODE, GPUS_PER_NODE, NUM_GPUS // GPUS_PER_NODE, -1).sum(axis=(1, 3))
    return float(1 - np.trace(nodes) / nodes.sum())


def beside_optimum(totals: Ints, hosted: Ints, result: Assignment, milp_s: float) -> dict[str, Any]:
    """The largest load over what is known of the optimum: `bound` is at most it, the MILP's best at least."""
    bound: float = least_load(totals, hosted)
    largest = int(result.tokens.sum(axis=1).max())
    sample: dict[str, Any] = {"largest_load": largest, "bound": bound, "over_bound": round(largest / bound, 5)}
    if milp_s > 0:
        found, proven = _milp(totals, hosted, seconds=milp_s)
        sample |= {"milp": found, "milp_bound": proven}
        bound = max(bound, proven)
    return sample | {"over_optimum": round(largest / bound, 5)}


def least_load(totals: Ints, hosted: Ints) -> int:
    """The smallest possible largest load of a GPU with every hosted slot in use: no choice of active slots can do better. Exact, by bisection."""
    least, enough = -(-int(totals.sum()) // len(hosted)), int(totals.sum())
    while least < enough:
        middle = (least + enough) // 2
        if _fits(totals, hosted, middle):
            enough = middle
        else:
            least = middle + 1
    return least


def _fits(totals: Ints, hosted: Ints, capacity: int) -> bool:
    """Whether the tokens fit GPUs that take `capacity` each: a maximum flow by shortest augmenting paths."""
    hosts = [np.flatnonzero((hosted == expert).any(axis=1)).tolist() for expert in range(len(totals))]
    held: list[dict[int, int]] = [{} for _ in hosted]
    free = [capacity] * len(hosted)
    for expert, tokens in enumerate(totals.tolist()):
        while tokens:
            came: dict[int, tuple[int, int] | None] = dict.fromkeys(hosts[expert])
            queue = list(came)
            end = next((gpu for gpu in queue if free[gpu]), None)
            for gpu in queue:
                if end is not None:
                    break
                for other, there in held[gpu].items():
                    for target in hosts[other] if there else ():
                        if target not in came:
                            came[target] = (gpu, other)
                            queue.append(target)
                            end = target if free[target] and end is None else end
            if end is None:
                return False
            path, gpu = [], end
            while (hop := came[gpu]) is not None:
                path.append((*hop, gpu))
                gpu = hop[0]
            amount = min([tokens, free[end], *(held[source][other] for source, other, _ in path)])
            for source, other, target in path:
                held[source][other] -= amount
                held[target][other] = held[target].get(other, 0) + amount
            held[gpu][expert] = held[gpu].get(expert, 0) + amount
            free[end] -= amount
            tokens -= amount
    return True


def _milp(totals: Ints, hosted: Ints, *, seconds: float) -> tuple[float | None, float]:
    """Largest load of HiGHS's best assignment, None without one, and its proven lower bound, in tokens (not whole ones)."""
    optimize, sparse = importlib.import_module("scipy.optimize"), importlib.import_module("scipy.sparse")
    experts, gpus = hosted.ravel(), np.repeat(np.arange(len(hosted)), hosted.shape[1])
    mean, size = totals.sum() / len(hosted), len(experts)
    slot = np.arange(size)
    # Columns: each slot's part of its expert, whether the slot is in use, the largest load over the mean.
    parts = sparse.coo_array((np.ones(size), (experts, slot)), shape=(len(totals), 2 * size + 1))
    loads = sparse.coo_array((totals[experts] / mean, (gpus, slot)), shape=(len(hosted), 2 * size + 1)).tolil()
    loads[:, 2 * size] = -1
    in_use = sparse.coo_array((np.ones(size), (gpus, size + slot)), shape=(len(hosted), 2 * size + 1))
    only_used = sparse.coo_array(
        (np.repeat([1.0, -1.0], size), (np.tile(slot, 2), np.concatenate([slot, size + slot]))),
        shape=(size, 2 * size + 1),
    )
    limits = [
        optimize.LinearConstraint(parts.tocsc(), 1, 1),
        optimize.LinearConstraint(loads.tocsc(), -np.inf, 0),
        optimize.LinearConstraint(in_use.tocsc(), -np.inf, ACTIVE),
        optimize.LinearConstraint(only_used.tocsc(), -np.inf, 0),
    ]
    largest = np.append(np.zeros(2 * size), 1.0)
    bounds = optimize.Bounds(largest, np.append(np.ones(2 * size), np.inf))
    integral = np.concatenate([np.zeros(size), np.ones(size), [0]])
    solved = optimize.milp(
        largest,
        constraints=limits,
        integrality=integral,
        bounds=bounds,
        options={"time_limit": seconds, "mip_rel_gap": 0.005},
    )
    found = None if solved.x is None else round(float(solved.x[-1] * mean), 1)
    return found, round(float(solved.mip_dual_bound * mean), 1)


def _evenly(counts: Ints, tokens: Ints) -> Floats:
    """The same tokens of the slots, each drawn from all ranks alike: in proportion to what they have in all."""
    sent: Floats = counts.sum(axis=1)[:, None, None] / counts.sum() * tokens
    return sent


def _digests(steps: int, tokens: int, seed: int) -> list[int]:
    """Another rank: the same counts, its own answers."""
    return [_digest(assigned(step)) for step in drifting_steps(steps=steps, tokens=tokens, seed=seed)]


def _digest(result: Assignment) -> int:
    return zlib.crc32(result.tokens.tobytes() + result.sent.tobytes())


def _spread(values: Sequence[float]) -> Mapping[str, float]:
    return {
        "mean": round(statistics.fmean(values), 4),
        "p1": round(float(np.quantile(values, 0.01)), 4),
        "least": round(min(values), 4),
    }
