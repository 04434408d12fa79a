"""Figures of `baton bench ranks --device cuda`: what a unit gains over one GPU, and what two micro-batches hide.

throughput    prompt tokens of all ranks a second, by the slowest rank         TPOT    seconds of a decode step of all rows
hidden        by kernels' spans, of all ranks: `serving.bench.kernel_spans`
saved         of what sending costs a step of one micro-batch, the share that it does not cost one of two, against the same
              steps with rows copied on the rank instead
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from serving.bench.gpu_ranks import Decode, Done, Fill, GpuRanks, Prefill, Setup, Way, median_s, slowest
from serving.bench.kernel_spans import overlap, saved_share, together, trace_events


@dataclass(frozen=True, kw_only=True)
class PrefillFigure:
    """Medians. `ratio`: to the best rate of one GPU. `sent_bytes`: of all ranks, to others. `same_first_tokens`: share of the prompts whose
    first token is that of the first way; None where what is computed means nothing."""

    name: str
    way: Way
    seconds: float
    tokens_per_s: float
    ratio: float
    sent_bytes: int
    same_first_tokens: float | None
    raw_s: list[float]


@dataclass(frozen=True, kw_only=True)
class HiddenFigure:
    """Of dispatch and combine of a whole prefill, over all ranks. `saved`: None without ways that are local to hold it against. `raw`: `hidden` of each profile."""

    name: str
    way: Way
    in_flight_s: float
    exposed_s: float
    hidden: float
    saved: float | None
    raw: list[float]


@dataclass(frozen=True, kw_only=True)
class DecodeFigure:
    """Medians. `ratio`: to one GPU's TPOT; below 1 is quicker."""

    name: str
    work: Decode
    tpot_s: float
    tokens_per_s: float
    ratio: float
    raw_s: list[float]


Told = Callable[[str], None]


def ways_of(step_tokens: Sequence[int], micro_batches: Sequence[int], free_sms: Sequence[int]) -> list[Way]:
    """One GPU first; then the unit, each way that sends beside the one that copies."""
    alone = [Way(unit=False, step_tokens=tokens) for tokens in step_tokens]
    sends = [
        Way(step_tokens=tokens, counted=counted, micro_batches=number, free_sms=sms)
        for tokens in step_tokens
        for counted in (True, False)
        for number in micro_batches
        for sms in (free_sms if number > 1 else (0,))
    ]
    return [*alone, *(way for sent in sends for way in (sent, _local(sent)))]


def decodes_of(through: Sequence[str], micro_batches: Sequence[int]) -> list[Decode]:
    """One GPU first. Peer memory has one exchange in flight, so no second micro-batch."""
    unit = [
        Decode(through=name, micro_batches=number)
        for name in through
        for number in (micro_batches if name == "nccl" else [1])
    ]
    return [Decode(unit=False), *unit]


def measure(
    setup: Setup,
    ways: Sequence[Way],
    decodes: Sequence[Decode],
    *,
    repeats: int,
    scratch: Path,
    trace: Path | None,
    told: Told,
) -> dict[str, Any]:
    """The report's parts. `trace`: of the quickest way with two micro-batches. Raises BatonError."""
    with GpuRanks(setup, scratch) as ranks:
        told("ranks are ready")
        prefill = measure_prefill(ranks, setup, ways, repeats, told)
        hidden = measure_hidden(ranks, prefill, repeats, trace, told)
        decode = measure_decode(ranks, setup, decodes, ways[0].step_tokens, repeats, told)
    return {
        "device": torch.cuda.get_device_name() if setup.device == "cuda" else setup.device,
        "setup": asdict(setup),
        "prefill": [asdict(figure) for figure in prefill],
        "hidden": [asdict(figure) for figure in hidden],
        "decode": [asdict(figure) for figure in decode],
    }


def measure_prefill(
    ranks: GpuRanks, setup: Setup, ways: Sequence[Way], repeats: int, told: Told
) -> list[PrefillFigure]:
    runs: list[list[list[Done]]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for way, of_way in zip(ways, runs, strict=True):
            done = ranks.run(Prefill(way=way))
            told(f"{'prefill' if turn else 'prefill, not counted'}: {slowest(done):.3f} s, {way.name}")
            # A first run of a shape compiles.
            if turn:
                of_way.append(done)
    num_tokens = setup.prompts * setup.prompt_tokens
    best = max(num_tokens / median_s(of_way) for way, of_way in zip(ways, runs, strict=True) if not way.unit)
    expected = _first_tokens(runs[0][0])
    return [
        PrefillFigure(
            name=way.name,
            way=way,
            seconds=median_s(of_way),
            tokens_per_s=num_tokens / median_s(of_way),
            ratio=num_tokens / median_s(of_way) / best,
            sent_bytes=sum(done.sent_bytes for done in of_way[0]),
            same_first_tokens=None if way.local else _same(_first_tokens(of_way[0]), expected),
            raw_s=[slowest(run) for run in of_way],
        )
        for way, of_way in zip(ways, runs, strict=True)
    ]


def measure_hidden(
    ranks: GpuRanks, prefill: Sequence[PrefillFigure], repeats: int, trace: Path | None, told: Told
) -> list[HiddenFigure]:
    """Of the profile whose share is the median."""
    seconds = {figure.way: figure.seconds for figure in prefill}
    sends = [figure.way for figure in prefill if figure.way.unit and not figure.way.local]
    quickest = min((way for way in sends if way.micro_batches > 1), key=lambda way: seconds[way], default=None)
    figures = []
    for way in sends:
        profiles = [[each.spans or [] for each in ranks.run(Prefill(way=way, profiled=True))] for _ in range(repeats)]
        found = [together([overlap(of_rank) for of_rank in spans]) for spans in profiles]
        median = sorted(range(repeats), key=lambda index: found[index].hidden)[(repeats - 1) // 2]
        figures.append(
            HiddenFigure(
                name=way.name,
                way=way,
                in_flight_s=found[median].in_flight_s,
                exposed_s=found[median].exposed_s,
                hidden=found[median].hidden,
                saved=_saved(way, seconds),
                raw=[each.hidden for each in found],
            )
        )
        told(f"hidden {figures[-1].hidden:.0%} of {1e3 * figures[-1].in_flight_s:.1f} ms, {way.name}")
        if trace is not None and way == quickest:
            events = [event for rank, spans in enumerate(profiles[median]) for event in trace_events(spans, rank)]
            trace.write_text(json.dumps({"traceEvents": events, "otherData": asdict(figures[-1])}))
    return figures


def measure_decode(
    ranks: GpuRanks, setup: Setup, steps: Sequence[Decode], step_tokens: int, repeats: int, told: Told
) -> list[DecodeFigure]:
    """`steps`: the first is that of one GPU. `step_tokens`: in which contexts are filled."""
    for unit in (False, True):
        ranks.run(Fill(way=Way(unit=unit, step_tokens=step_tokens)))
    runs: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        for work, seconds in zip(steps, runs, strict=True):
            done = slowest(ranks.run(work))
            told(f"{'decode' if turn else 'decode, not counted'}: {1e3 * done:.3f} ms, {work.name}")
            # A first run captures.
            if turn:
                seconds.append(done)
    alone_s = statistics.median(runs[0])
    return [
        DecodeFigure(
            name=f"{work.name}, {setup.rows} sequences behind {setup.context} tokens",
            work=work,
            tpot_s=statistics.median(seconds),
            tokens_per_s=setup.rows / statistics.median(seconds),
            ratio=statistics.median(seconds) / alone_s,
            raw_s=seconds,
        )
        for work, seconds in zip(steps, runs, strict=True)
    ]


def table(report: dict[str, Any]) -> str:
    """A line each."""
    lines = [
        f"prefill {figure['tokens_per_s']:8.0f} tok/s ({figure['ratio']:.2f})  {figure['sent_bytes'] / 1e9:6.2f} GB sent  {figure['name']}"
        for figure in report["prefill"]
    ]
    lines += [
        f"hidden {figure['hidden']:4.0%} of {1e3 * figure['in_flight_s']:6.1f} ms, {_percent(figure['saved'])} saved  {figure['name']}"
        for figure in report["hidden"]
    ]
    lines += [
        f"TPOT {1e3 * figure['tpot_s']:7.3f} ms ({figure['ratio']:.2f})  {figure['name']}"
        for figure in report["decode"]
    ]
    return "\n".join(lines)


def _local(way: Way) -> Way:
    return replace(way, local=True)


def _saved(way: Way, seconds: dict[Way, float]) -> float | None:
    one = replace(way, micro_batches=1, free_sms=0)
    needed = one, way, _local(one), _local(way)
    return saved_share(*(seconds[each] for each in needed)) if all(each in seconds for each in needed) else None


def _first_tokens(done: Sequence[Done]) -> list[int]:
    """In the order of the prompts, which ranks have in turns."""
    return [
        done[index % len(done)].first_tokens[index // len(done)]
        for index in range(sum(len(d.first_tokens) for d in done))
    ]


def _same(tokens: Sequence[int], expected: Sequence[int]) -> float:
    return sum(mine == theirs for mine, theirs in zip(tokens, expected, strict=True)) / len(expected)


def _percent(share: float | None) -> str:
    return "   -" if share is None else f"{share:4.0%}"
