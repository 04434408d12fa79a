"""`baton bench redundancy --device cuda`: the kernels on the same layer-steps; time from CUDA graphs, so that launches cost what they do in a captured step."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serving.bench.redundancy import ACTIVE, GPUS_PER_NODE, Step, between_nodes
from serving.kernels.redundancy import assign_replicas, assign_replicas_reference
from serving.parallel.redundancy import balance

_CALLS = 8
_EVERY = 50


def measure_on_device(steps: Iterable[Step]) -> dict[str, Any]:
    """Plain data: balance, largest load over the mean, tokens between nodes, time of each step, and whether the bits are the reference's."""
    balances, crossing, us, equal, legal = [], [], [], [], []
    for step in steps:
        counts, hosted = torch.from_numpy(step.counts), torch.from_numpy(step.hosted)
        tokens, sent = (tensor.cpu() for tensor in _assigned(counts.cuda(), hosted.cuda()))
        balances.append(balance(tokens.sum(dim=1).numpy()))
        crossing.append(between_nodes(sent.numpy()))
        legal.append(_legal(counts, hosted, tokens, sent))
        us.append(_time_us(counts, hosted))
        if step.index % _EVERY == _EVERY - 1:
            want = assign_replicas_reference(counts, hosted, active=ACTIVE, gpus_per_node=GPUS_PER_NODE)
            equal.append(torch.equal(tokens, want[0]) and torch.equal(sent, want[1]))
    return {
        "name": torch.cuda.get_device_name(),
        "balance": {"mean": round(statistics.fmean(balances), 4), "least": round(min(balances), 4)},
        "over_mean": {
            "mean": round(statistics.fmean(1 / value for value in balances), 4),
            "p99": round(float(np.quantile([1 / value for value in balances], 0.99)), 4),
            "max": round(1 / min(balances), 4),
        },
        "crossing": round(statistics.fmean(crossing), 4),
        "us": {
            "median": round(statistics.median(us), 1),
            "mean": round(statistics.fmean(us), 1),
            "p99": round(float(np.quantile(us, 0.99)), 1),
            "max": round(max(us), 1),
        },
        "legal": all(legal),
        "equals_the_reference": {"of": len(equal), "equal": sum(equal)},
    }


def _assigned(counts: Tensor, hosted: Tensor) -> tuple[Tensor, Tensor]:
    return assign_replicas(counts, hosted, active=ACTIVE, gpus_per_node=GPUS_PER_NODE)


def _legal(counts: Tensor, hosted: Tensor, tokens: Tensor, sent: Tensor) -> bool:
    """Whether every token is sent once, to a slot of its expert, and no GPU uses more slots than it may."""
    there = torch.zeros_like(counts).scatter_add_(1, hosted.flatten().expand(len(counts), -1), sent.flatten(1).long())
    return bool(
        torch.equal(there, counts)
        and torch.equal(sent.sum(dim=0).int(), tokens)
        and sent.min() >= 0
        and (tokens > 0).sum(dim=1).max() <= ACTIVE
    )


def _time_us(counts: Tensor, hosted: Tensor) -> float:
    """Microseconds a call, of several in one graph, each on its own copy."""
    inputs = [(counts.cuda(), hosted.cuda()) for _ in range(_CALLS)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pair in inputs:
            _assigned(*pair)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(3):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / _CALLS)
    return statistics.median(times)
