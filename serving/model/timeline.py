"""What the micro-batches of a step computed when, what they had in flight meanwhile, and how much of that was hidden.

In flight is from where a pass stops to where its wait returns, exposed is the wait. What arrived long before it was waited
for counts as in flight until then, so `hidden` is the more the less there is to hide; beside a run of the same steps with
one micro-batch, where all of it is exposed, `hidden_beside` is what the second one saves. On a GPU times are the device's, of
the stream that computes: exposed is how long that stream stood still for what another one had not brought, and what ran there is
not seen (`serving.bench.kernel_spans` does).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_COMPUTED_AFTER = {"dispatch": "experts", "combine in the node": "experts"}


@dataclass(frozen=True, kw_only=True)
class Span:
    """`micro_batch` had `name` in flight, or waited for it, or computed it. `begin`, `end`: seconds, or events of a GPU."""

    micro_batch: int
    kind: str
    name: str
    begin: Any
    end: Any


class Timeline:
    """Given to a step, it is told by the schedule; one object may take several steps of one rank."""

    def __init__(self, *, rank: int = 0, device: torch.device | None = None) -> None:
        self._rank = rank
        self._on_gpu = device is not None and device.type == "cuda"
        self._first = self._now()
        self._turn: Any = None
        self._computes: Any = None
        self._sent: dict[int, tuple[str, Any]] = {}
        self._spans: list[Span] = []

    def waits(self, micro_batch: int) -> None:
        """For what it has in flight, if anything."""
        self._turn = self._now()

    def computes(self, micro_batch: int) -> None:
        """What it had in flight has arrived."""
        self._computes = self._now()
        if micro_batch in self._sent:
            name, begin = self._sent[micro_batch]
            self._add(micro_batch, "in flight", name, begin, self._computes)
            self._add(micro_batch, "wait", name, self._turn, self._computes)

    def stops(self, micro_batch: int, name: str | None) -> None:
        """It gives way or waits; `name` is in flight."""
        now = self._now()
        before, _ = self._sent.pop(micro_batch, ("", None))
        self._add(micro_batch, "compute", _COMPUTED_AFTER.get(before, "attention"), self._computes, now)
        if name is not None:
            self._sent[micro_batch] = name, now

    @property
    def in_flight_s(self) -> float:
        """Over all micro-batches."""
        return self._total("in flight")

    @property
    def exposed_s(self) -> float:
        """Waiting while nothing was computed."""
        return self._total("wait")

    @property
    def hidden(self) -> float:
        """The share of the time in flight in which something was computed; 0 where nothing was sent."""
        return 1.0 - self.exposed_s / self.in_flight_s if self.in_flight_s else 0.0

    def hidden_beside(self, alone: Timeline) -> float:
        """The share of what the same steps wait for with one micro-batch, `alone`, that is not waited for here."""
        return 1.0 - self.exposed_s / alone.exposed_s if alone.exposed_s else 0.0

    def chrome_trace(self) -> dict[str, Any]:
        """As chrome://tracing and Perfetto read it: a process a rank, two threads a micro-batch; microseconds."""
        events = [
            {
                "ph": "X",
                "pid": self._rank,
                "tid": 2 * span.micro_batch + (span.kind == "in flight"),
                "name": span.name if span.kind != "wait" else f"wait for {span.name}",
                "cat": span.kind,
                "ts": 1e6 * self._seconds(self._first, span.begin),
                "dur": 1e6 * self._seconds(span.begin, span.end),
            }
            for span in self._spans
        ]
        return {"traceEvents": events, "otherData": {"rank": self._rank, "hidden": self.hidden}}

    def write(self, path: Path) -> None:
        """`chrome_trace` as a file."""
        path.write_text(json.dumps(self.chrome_trace()))

    def _add(self, micro_batch: int, kind: str, name: str, begin: Any, end: Any) -> None:
        self._spans.append(Span(micro_batch=micro_batch, kind=kind, name=name, begin=begin, end=end))

    def _total(self, kind: str) -> float:
        return sum(self._seconds(span.begin, span.end) for span in self._spans if span.kind == kind)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        if not self._on_gpu:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
