"""`baton bench engine` on a GPU: what a prompt costs, and what a token costs to a batch that is complete.

    prefill BxL    wall time until each of B prompts of L tokens has its first token
    decode BxL     time of a step in which every one of B sequences gets a token, each behind a prompt of L tokens

The prompts of a large batch take many steps, in which those that came first decode already; so a decode figure is taken from
the middle of a run, from the step with the last sequence's first token until the first sequence ends. Systems take turns
within each repeat. Figures are medians over repeats; ratios are our time over the peer's, below 1 is faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from serving.bench.options import count
from serving.bench.shapes import random_prompts
from serving.bench.systems import Run, TimedSystem
from serving.core.errors import ConfigError

Kind = Literal["prefill", "decode"]
# Sequences, and tokens of each one's prompt.
Batches = tuple[tuple[int, int], ...]

# A first prefill of a shape may compile; a decode step was captured before the first.
_NUM_UNCOUNTED_PREFILLS = 1
# Prefill alone takes seconds beyond; the steps that count are many in one run.
_MOST_REPEATED_TOKENS = 1 << 19
# As served on a GPU, and what a peer's step has at least: bounds how many steps the prompts take.
STEP_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Point:
    """`batch` prompts of `prompt_tokens` each."""

    kind: Kind
    batch: int
    prompt_tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch}x{self.prompt_tokens}"

    def num_new_tokens(self, num_steps: int, step_tokens: int) -> int:
        """What each sequence writes, so that at least `num_steps` steps have them all."""
        return 1 if self.kind == "prefill" else -(-self.batch * self.prompt_tokens // step_tokens) + num_steps + 1


@dataclass(frozen=True, kw_only=True)
class PointFigure:
    """One system at one point. `seconds`: TTFT of the whole batch, or TPOT. `raw_s`: of each repeat.

    `same_first_token`: share of sequences whose first token is the first system's.
    """

    system: str
    point: str
    seconds: float
    tokens_per_s: float
    raw_s: list[float]
    same_first_token: float


GPU_PREFILL: Batches = ((1, 1024), (1, 4096), (32, 2048))
GPU_DECODE: Batches = tuple((batch, prompt_tokens) for prompt_tokens in (512, 4096) for batch in (1, 16, 64, 256))


def points_of(prefill: Batches, decode: Batches) -> list[Point]:
    return [
        *(Point(kind="prefill", batch=batch, prompt_tokens=prompt_tokens) for batch, prompt_tokens in prefill),
        *(Point(kind="decode", batch=batch, prompt_tokens=prompt_tokens) for batch, prompt_tokens in decode),
    ]


def batches_of_prompts(text: str) -> Batches:
    """BxL, comma-separated: 1x1024,32x2048."""
    pairs = [part.split("x") for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}; give BATCHxTOKENS, comma-separated: 1x1024,32x2048")
    return tuple((count(batch), count(prompt_tokens)) for batch, prompt_tokens in pairs)


def measure_points(
    systems: Sequence[TimedSystem],
    points: Sequence[Point],
    *,
    vocab_size: int,
    num_steps: int,
    step_tokens: int,
    repeats: int,
    seed: int,
    told: Callable[[PointFigure], None] = lambda _: None,
) -> list[PointFigure]:
    """In the order of points and systems; `told` hears each as soon as it is known."""
    figures: list[PointFigure] = []
    for point in points:
        prompts = random_prompts(point.batch, point.prompt_tokens, vocab_size, seed)
        num_new_tokens = point.num_new_tokens(num_steps, step_tokens)
        raw: list[list[float]] = [[] for _ in systems]
        firsts: list[list[int]] = [[] for _ in systems]
        for turn in range(_num_turns(point, repeats)):
            for i, system in enumerate(systems):
                run = system.timed(prompts, num_new_tokens)
                firsts[i] = [token_ids[0] for token_ids in run.token_ids]
                if point.kind == "decode":
                    raw[i].append(tpot(run, num_new_tokens))
                elif turn >= _NUM_UNCOUNTED_PREFILLS:
                    raw[i].append(run.steps_s[max(run.last_steps)])
        for system, times, first in zip(systems, raw, firsts, strict=True):
            figures.append(_figure(system.name, point, times, first, firsts[0]))
            told(figures[-1])
    return figures


def tpot(run: Run, num_new_tokens: int) -> float:
    """Seconds of a step that brings every sequence a token. Raises ConfigError where no two steps do."""
    # From its first token on a sequence gets one in every step.
    first, last = max(run.last_steps) - (num_new_tokens - 1), min(run.last_steps)
    if first < 0 or last <= first:
        raise ConfigError(
            f"no steps in which all of {len(run.last_steps)} sequences ran; give a larger --new-tokens, or a peer more memory"
        )
    return (run.steps_s[last] - run.steps_s[first]) / (last - first)


def point_ratios(figures: Sequence[PointFigure], own: str) -> dict[str, dict[str, float]]:
    """By peer and point: our time over the peer's."""
    ours = {figure.point: figure.seconds for figure in figures if figure.system == own}
    ratios: dict[str, dict[str, float]] = {}
    for figure in figures:
        if figure.system != own:
            ratios.setdefault(figure.system, {})[figure.point] = ours[figure.point] / figure.seconds
    return ratios


def idle_share(system: TimedSystem, point: Point, *, vocab_size: int, num_steps: int, seed: int) -> float:
    """1 - union of the kernels' times over the wall time, in the last `num_steps` steps that have every sequence; profiled."""
    prompts = random_prompts(point.batch, point.prompt_tokens, vocab_size, seed)
    num_new_tokens = point.num_new_tokens(num_steps, STEP_TOKENS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run = system.timed(prompts, num_new_tokens)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type.name == "CUDA"
    )
    tail_s = run.steps_s[min(run.last_steps)] - run.steps_s[min(run.last_steps) - num_steps]
    # The profiler's clock is another one; the run ends with its last kernel.
    end_us = spans[-1][1] - 1e6 * (run.steps_s[-1] - run.steps_s[min(run.last_steps)])
    return idle_of(spans, end_us - 1e6 * tail_s, end_us)


def idle_of(spans: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Share of [begin, end] that no span covers. Spans in the order of their beginnings."""
    busy, reached = 0.0, begin
    for span_begin, span_end in spans:
        busy += max(0.0, min(span_end, end) - max(span_begin, reached))
        reached = max(reached, min(span_end, end))
    return 1 - busy / (end - begin)


def ratio_table(ratios: Mapping[str, Mapping[str, float]]) -> str:
    return "\n".join(
        f"{point:<18}{ratio:>7.3f} of {peer}'s time"
        for peer, points in ratios.items()
        for point, ratio in points.items()
    )


def point_line(figure: PointFigure) -> str:
    return f"{figure.point:<18}{figure.system:<12}{figure.seconds * 1e3:>10.2f} ms{figure.tokens_per_s:>12.0f} tok/s"


def _num_turns(point: Point, repeats: int) -> int:
    if point.kind == "prefill":
        return repeats + _NUM_UNCOUNTED_PREFILLS
    return 1 if point.batch * point.prompt_tokens > _MOST_REPEATED_TOKENS else repeats


def _figure(system: str, point: Point, times: list[float], first: list[int], reference: list[int]) -> PointFigure:
    seconds = statistics.median(times)
    return PointFigure(
        system=system,
        point=point.name,
        seconds=seconds,
        tokens_per_s=point.batch * (point.prompt_tokens if point.kind == "prefill" else 1) / seconds,
        raw_s=times,
        same_first_token=sum(a == b for a, b in zip(first, reference, strict=True)) / len(first),
    )
