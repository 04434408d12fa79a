"""What a GPU computed and what it had in flight, from the profiler's spans of its kernels.

Communication is in flight while one of NCCL's kernels runs, which begins when it gets SMs and ends when its last byte is here: also while
it waits for a rank that has not come, which is time lost if nothing runs meanwhile. The share of that time in which some other kernel
runs as well is hidden, the rest is exposed. Of a collective the rank that comes last waits for nobody, so that rank's kernel, the
shortest, takes as long as the rows move, and what another's takes longer it waits, before they do: no clock has to be common.
Kernels that run beside communication are slower for it, so how much time is saved only a step without communication tells
(`saved_share`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]

_COMMUNICATION = re.compile(r"^nccl")


@dataclass(frozen=True, kw_only=True)
class KernelSpan:
    """One launch on the device; microseconds on the profiler's clock."""

    name: str
    begin_us: float
    end_us: float

    @property
    def communicates(self) -> bool:
        return _COMMUNICATION.search(self.name) is not None


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Of one rank, or of several together. `moving_s`, `moving_exposed_s`: the same without waits for other ranks."""

    in_flight_s: float
    exposed_s: float
    moving_s: float
    moving_exposed_s: float

    @property
    def hidden(self) -> float:
        """The share of the time in flight in which something was computed; 0 where nothing was sent."""
        return 1.0 - self.exposed_s / self.in_flight_s if self.in_flight_s else 0.0

    @property
    def hidden_moving(self) -> float:
        """The same share of the time in which rows moved."""
        return 1.0 - self.moving_exposed_s / self.moving_s if self.moving_s else 0.0


def kernel_spans(profile: Any) -> list[KernelSpan]:
    """Of a `torch.profiler.profile` that has ended, in the order of their beginnings."""
    spans = [
        KernelSpan(name=event.name, begin_us=event.time_range.start, end_us=event.time_range.end)
        for event in profile.events() or ()
        if event.device_type.name == "CUDA"
    ]
    return sorted(spans, key=lambda span: span.begin_us)


def overlaps(ranks: Sequence[Sequence[KernelSpan]]) -> list[Overlap]:
    """What communication and computing had of the same time, of each rank of a group; all have issued the same collectives."""
    sent = [[(span.begin_us, span.end_us) for span in spans if span.communicates] for spans in ranks]
    moves = [min(end - begin for begin, end in one) for one in zip(*sent, strict=True)]
    found = []
    for spans, of_rank in zip(ranks, sent, strict=True):
        busy = union((span.begin_us, span.end_us) for span in spans if not span.communicates)
        in_flight = union(of_rank)
        moving = union((end - move, end) for (_, end), move in zip(of_rank, moves, strict=True))
        found.append(
            Overlap(
                in_flight_s=1e-6 * length(in_flight),
                exposed_s=1e-6 * (length(in_flight) - common(in_flight, busy)),
                moving_s=1e-6 * length(moving),
                moving_exposed_s=1e-6 * (length(moving) - common(moving, busy)),
            )
        )
    return found


def together(ranks: Sequence[Overlap]) -> Overlap:
    return Overlap(
        in_flight_s=sum(rank.in_flight_s for rank in ranks),
        exposed_s=sum(rank.exposed_s for rank in ranks),
        moving_s=sum(rank.moving_s for rank in ranks),
        moving_exposed_s=sum(rank.moving_exposed_s for rank in ranks),
    )


def saved_share(one_s: float, two_s: float, local_one_s: float, local_two_s: float) -> float:
    """Of what communication costs a step of one micro-batch, the share that it does not cost a step of two: `local` are the same steps
    with copies on the rank instead. May leave [0, 1], since two micro-batches are themselves slower or quicker."""
    cost_s = one_s - local_one_s
    return 1.0 - (two_s - local_two_s) / cost_s if cost_s else 0.0


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def length(disjoint: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in disjoint)


def common(one: Sequence[Interval], other: Sequence[Interval]) -> float:
    """Of two lists of disjoint intervals in order."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total


def trace_events(spans: Sequence[KernelSpan], rank: int) -> list[dict[str, Any]]:
    """As chrome://tracing and Perfetto read it: a process a rank, one thread computes and one communicates; from the first kernel on."""
    first_us = spans[0].begin_us if spans else 0.0
    names = {0: "computes", 1: "communicates"}
    threads = [
        {"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in names.items()
    ]
    return threads + [
        {
            "ph": "X",
            "pid": rank,
            "tid": int(span.communicates),
            "name": span.name[:40],
            "ts": round(span.begin_us - first_us, 1),
            "dur": round(span.end_us - span.begin_us, 1),
        }
        for span in spans
    ]
