"""Counters, gauges and histograms: one table of names, one registry a process, text in and out.

`CATALOGUE` is the contract of DESIGN section 8 with everybody who scrapes. A worker labels all its samples with its id
when it writes them out; the router merges the texts of its workers with its own, family by family. Nothing here knows
who is asking or when.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from serving.core.config import SloTable

Kind = Literal["counter", "gauge", "histogram"]
Owner = Literal["router", "worker"]
Writer = Literal["router", "worker", "both"]

_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One metric: who writes it, what it says.

    What a worker writes gets the label `worker` on top of `labels` when it is written out; what a router writes does not.
    """

    name: str
    kind: Kind
    owner: Writer
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _router(name: str, kind: Kind, text: str, *labels: str, buckets: tuple[float, ...] = ()) -> Family:
    return Family(name=name, kind=kind, owner="router", help=text, labels=labels, buckets=buckets)


def _worker(name: str, kind: Kind, text: str, *labels: str, buckets: tuple[float, ...] = ()) -> Family:
    return Family(name=name, kind=kind, owner="worker", help=text, labels=labels, buckets=buckets)


def _both(name: str, kind: Kind, text: str, *labels: str) -> Family:
    return Family(name=name, kind=kind, owner="both", help=text, labels=labels)


CATALOGUE: tuple[Family, ...] = (
    _router(
        "baton_requests_total", "counter", "Requests that ended, by outcome: finished, failed, cancelled.", "outcome"
    ),
    _router("baton_requests_rejected_total", "counter", "Requests that were never admitted, by reason.", "reason"),
    _router("baton_ttft_seconds", "histogram", "Arrival of a request to its first token.", buckets=_TTFT_BUCKETS),
    _router(
        "baton_tpot_seconds",
        "histogram",
        "Mean time per output token after the first, by request.",
        buckets=_TPOT_BUCKETS,
    ),
    _router(
        "baton_ttft_stage_seconds",
        "histogram",
        "Time to first token by stage: admission, prefill_queue, prefill, first_token.",
        "stage",
        buckets=_STAGE_BUCKETS,
    ),
    _router(
        "baton_handoff_gap_seconds",
        "histogram",
        "First to second token by stage: transfer_exposed, decode_join, first_step.",
        "stage",
        buckets=_STAGE_BUCKETS,
    ),
    _router(
        "baton_slo_total",
        "counter",
        "Requests that met their SLO or not, and the stage to blame.",
        "slo",
        "met",
        "blame",
    ),
    _router("baton_worker_up", "gauge", "1 while the worker is ready.", "worker", "role"),
    _worker("baton_kv_pages", "gauge", "Pages of the pool by state; they add up to the pool.", "state"),
    _worker(
        "baton_kv_handoff_bytes_total",
        "counter",
        "Bytes written to decode pools: latent, mtp, manifest, padding; peer: copied there to the other TP ranks.",
        "kind",
    ),
    _worker(
        "baton_kv_handoff_seconds",
        "histogram",
        "First write of a hand-off to the completion of its last.",
        buckets=_STAGE_BUCKETS,
    ),
    _worker("baton_kv_handoff_failures_total", "counter", "Hand-offs that did not complete, by reason.", "reason"),
    _worker(
        "baton_kv_stale_total", "counter", "Messages and completions of an old epoch or incarnation that were refused."
    ),
    _worker(
        "baton_frames_refused_total", "counter", "Frames that were not authentic, too long or not a known message."
    ),
    _worker("baton_prefix_hit_tokens_total", "counter", "Prompt tokens found in the worker's prefix cache."),
    _worker(
        "baton_preemptions_total", "counter", "Sequences that left a decode worker because it had no page for them."
    ),
    _worker(
        "baton_tokens_total", "counter", "Tokens by phase: computed by prefill, drawn for a text by decode.", "phase"
    ),
    _worker(
        "baton_step_seconds",
        "histogram",
        "Time of an engine step: from its launch, or the end of the step before, to its settled result.",
        buckets=_STEP_BUCKETS,
    ),
    _both("baton_requests_running", "gauge", "Jobs in the engine; role router: requests that workers have.", "role"),
    _both(
        "baton_requests_waiting",
        "gauge",
        "Jobs that wait for a slot, pages or their latents; role router: requests that no worker has room for.",
        "role",
    ),
    _worker("baton_expert_tokens_total", "counter", "Tokens routed to an expert.", "layer", "expert"),
    _worker("baton_expert_balance", "gauge", "Mean over maximum of the tokens of a unit's ranks.", "unit"),
    _worker("baton_placement_version", "gauge", "Version of the expert placement in force.", "unit"),
    _worker("baton_placement_age_seconds", "gauge", "Time since that version came into force.", "unit"),
    _worker("baton_placement_moved_bytes_total", "counter", "Expert weights copied between a unit's slots.", "unit"),
    _worker(
        "baton_placement_aborts_total",
        "counter",
        "Placements that were given up, by reason: asked, checksum, source, disagreement.",
        "unit",
        "reason",
    ),
    _worker("baton_spec_draft_tokens_total", "counter", "Tokens drafted by the MTP layer."),
    _worker("baton_spec_accepted_tokens_total", "counter", "Drafted tokens that the model accepted."),
)


class Metrics:
    """The families of one owner in a registry of their own. Safe to use from several threads.

    `worker` is the id that labels every sample of a worker; a router has none. `slo` adds its values to the bucket
    bounds of TTFT and TPOT.
    """

    def __init__(self, owner: Owner, *, worker: str = "", slo: SloTable | None = None) -> None:
        assert (owner == "worker") == bool(worker)
        self.registry = CollectorRegistry()
        self._constant = {"worker": worker} if worker else {}
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for family in CATALOGUE:
            if family.owner in (owner, "both"):
                self._register(family, slo)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Raises a counter."""
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Puts one value into a histogram."""
        histogram = self._histograms[name]
        (histogram.labels(**labels) if labels else histogram).observe(seconds)

    def value(self, name: str, **labels: str) -> float:
        """One sample as it stands: a counter, a gauge, or a histogram's `_count` or `_sum`; 0 before its first use."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def exposition(self) -> str:
        return exposition(self.registry, self._constant)

    def _register(self, family: Family, slo: SloTable | None) -> None:
        if family.kind == "counter":
            self._counters[family.name] = Counter(family.name, family.help, family.labels, registry=self.registry)
        elif family.kind == "gauge":
            self._gauges[family.name] = Gauge(family.name, family.help, family.labels, registry=self.registry)
        else:
            bounds = _bounds(family, slo)
            self._histograms[family.name] = Histogram(
                family.name, family.help, family.labels, registry=self.registry, buckets=bounds
            )


def exposition(registry: CollectorRegistry, labels: Mapping[str, str] | None = None) -> str:
    """Prometheus text of a registry, `labels` added to every sample. Creation times are left out: nobody reads them."""
    relabelled = CollectorRegistry()
    relabelled.register(_Relabelled(registry, labels or {}))
    return generate_latest(relabelled).decode()


def merge(expositions: Iterable[str]) -> str:
    """One text out of several: every family once, with the samples of all texts in order.

    The first text's HELP and TYPE stand.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in expositions:
        for name, header, lines in _families(text):
            headers.setdefault(name, header)
            samples.setdefault(name, []).extend(lines)
    return "".join(f"{line}\n" for name in headers for line in (*headers[name], *samples[name]))


def _families(text: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """(name, comment lines, sample lines) of each family; a HELP line opens a family."""
    name, header, lines = "", list[str](), list[str]()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            if name:
                yield name, header, lines
            name, header, lines = line.split(" ", 3)[2], [line], []
        elif line.startswith("#"):
            header.append(line)
        elif line:
            lines.append(line)
    if name:
        yield name, header, lines


def _bounds(family: Family, slo: SloTable | None) -> Sequence[float]:
    if slo is None:
        return family.buckets
    promised = {"baton_ttft_seconds": slo.ttft_ms, "baton_tpot_seconds": slo.tpot_ms}.get(family.name)
    return family.buckets if promised is None else sorted({*family.buckets, promised / 1000.0})


class _Relabelled(Collector):
    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._registry = registry
        self._labels = dict(labels)

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            copy = Metric(family.name, family.documentation, family.type, family.unit)
            copy.samples = [self._sample(sample) for sample in family.samples if not sample.name.endswith("_created")]
            yield copy

    def _sample(self, sample: Sample) -> Sample:
        return Sample(sample.name, {**self._labels, **sample.labels}, sample.value, sample.timestamp, sample.exemplar)
