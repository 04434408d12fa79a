"""Figures of `baton bench ranks --device cuda`: what a unit gains over one GPU, and what two micro-batches hide.

throughput    prompt tokens of all ranks a second, by the slowest rank         TPOT    seconds of a decode step of all rows
hidden        by kernels' spans, of all ranks: `serving.bench.kernel_spans`; median, least and most of several profiles
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
from serving.bench.kernel_spans import KernelSpan, overlaps, saved_share, together, trace_events


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
class Profile:
    """Of dispatch and combine of a whole prefill, whose time `seconds` is, over all ranks. `waited_s`: of what was in flight, for a rank
    that had not come. `hidden_moving`: without that. `hidden_by_rank`: of each."""

    seconds: float
    in_flight_s: float
    exposed_s: float
    waited_s: float
    hidden: float
    hidden_moving: float
    hidden_by_rank: list[float]


@dataclass(frozen=True, kw_only=True)
class HiddenFigure:
    """Of several profiles: `hidden` and `hidden_moving` are medians. `saved`: None without ways that are local to hold it against."""

    name: str
    way: Way
    hidden: float
    least: float
    most: float
    hidden_moving: float
    saved: float | None
    profiles: list[Profile]


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


def ways_of(
    step_tokens: Sequence[int], micro_batches: Sequence[int], free_sms: Sequence[int], *, local: bool
) -> list[Way]:
    """One GPU first; then the unit, with `local` each way that sends beside the one that copies."""
    alone = [Way(unit=False, step_tokens=tokens) for tokens in step_tokens]
    sends = [
        Way(step_tokens=tokens, counted=counted, micro_batches=number, free_sms=sms)
        for tokens in step_tokens
        for counted in (True, False)
        for number in micro_batches
        for sms in (free_sms if number > 1 else (0,))
    ]
    return [*alone, *(way for sent in sends for way in ((sent, _local(sent)) if local else (sent,)))]


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
    profiles: int,
    scratch: Path,
    trace: Path | None,
    told: Told,
) -> dict[str, Any]:
    """The report's parts. `trace`: of the quickest way with two micro-batches. Raises BatonError."""
    with GpuRanks(setup, scratch) as ranks:
        told("ranks are ready")
        prefill = measure_prefill(ranks, setup, ways, repeats, told)
        hidden = measure_hidden(ranks, prefill, profiles, trace, told)
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
    """Each turn begins with another way: what a GPU has just done tells in how fast it may go on."""
    runs: list[list[list[Done]]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for index in range(len(ways)):
            way, of_way = ways[(index + turn) % len(ways)], runs[(index + turn) % len(ways)]
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
    ranks: GpuRanks, prefill: Sequence[PrefillFigure], profiles: int, trace: Path | None, told: Told
) -> list[HiddenFigure]:
    """So many profiles of each way, in turns; before them one that is not counted, in which the profiler sets itself up on each rank."""
    seconds = {figure.way: figure.seconds for figure in prefill}
    sends = [figure.way for figure in prefill if figure.way.unit and not figure.way.local]
    quickest = min((way for way in sends if way.micro_batches > 1), key=lambda way: seconds[way], default=None)
    found: list[list[Profile]] = [[] for _ in sends]
    for turn in range(profiles + 1):
        for way, of_way in zip(sends, found, strict=True):
            done = ranks.run(Prefill(way=way, profiled=True))
            if not turn:
                continue
            spans = [each.spans or [] for each in done]
            of_way.append(profile_of(slowest(done), spans))
            if trace is not None and way == quickest and turn == profiles:
                events = [event for rank, of_rank in enumerate(spans) for event in trace_events(of_rank, rank)]
                trace.write_text(json.dumps({"traceEvents": events, "otherData": asdict(of_way[-1])}))
    figures = [
        HiddenFigure(
            name=way.name,
            way=way,
            hidden=statistics.median(each.hidden for each in of_way),
            least=min(each.hidden for each in of_way),
            most=max(each.hidden for each in of_way),
            hidden_moving=statistics.median(each.hidden_moving for each in of_way),
            saved=_saved(way, seconds),
            profiles=of_way,
        )
        for way, of_way in zip(sends, found, strict=True)
    ]
    for figure in figures:
        told(f"{_hidden_line(asdict(figure))}  by rank {[_shares(each.hidden_by_rank) for each in figure.profiles]}")
    return figures


def profile_of(seconds: float, spans: Sequence[Sequence[KernelSpan]]) -> Profile:
    """`spans` of every rank, of a prefill that took so long."""
    ranks = overlaps(spans)
    unit = together(ranks)
    return Profile(
        seconds=seconds,
        in_flight_s=unit.in_flight_s,
        exposed_s=unit.exposed_s,
        waited_s=unit.in_flight_s - unit.moving_s,
        hidden=unit.hidden,
        hidden_moving=unit.hidden_moving,
        hidden_by_rank=[rank.hidden for rank in ranks],
    )


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
    lines += [_hidden_line(figure) for figure in report["hidden"]]
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


def _hidden_line(figure: dict[str, Any]) -> str:
    profiles = figure["profiles"]
    in_flight, waited, took = (
        1e3 * statistics.median(each[name] for each in profiles) for name in ("in_flight_s", "waited_s", "seconds")
    )
    return (
        f"hidden {figure['hidden']:4.0%} ({figure['least']:.0%} to {figure['most']:.0%}) of {in_flight:6.1f} ms, {waited:5.1f} of them waiting for the other; "
        f"{figure['hidden_moving']:4.0%} while rows move; {took:.0f} ms profiled; {_percent(figure['saved'])} saved  {figure['name']}"
    )


def _shares(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)


def _percent(share: float | None) -> str:
    return "   -" if share is None else f"{share:4.0%}"
