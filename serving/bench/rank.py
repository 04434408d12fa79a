"""`baton bench engine --shape rank-...`: one rank of a published unit on one GPU, at full depth, beside the sum of its parts.

The model is DeepSeek-V3 with random weights, of which the rank keeps its heads, its rows of the vocabulary and its slots of experts. Groups,
placement and dispatch are those that the unit would have (`serving.engine.joining`), and so are counts and bytes; the ranks that are not
there are taken to do what this one does (`serving.parallel.rehearsal`). Gates are balanced first, as a trained model's are, so that this
rank's share of tokens is what a rank of the unit gets.

A step is the engine's own (`serving.engine.runner`): all prompts of a prefill step, or a token for each sequence as a captured graph.
Beside its time stands what its parts take alone, one after the other, and at what the machine does at best, measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvcache.layout import PageLayout, num_pages_for
from kvcache.pool import KVPool
from serving.bench.filled import fill_random
from serving.bench.kernel_cases.ceilings import ceilings
from serving.bench.kernel_cases.stage import Bound, Stage, Work
from serving.bench.kernels import OWN, run_case
from serving.bench.rank_parts import Load, Part, Parts, Step, Watched
from serving.bench.report import provenance, write_report
from serving.bench.shapes import SHAPES
from serving.core.config import KernelsTable, load_config, unit_table
from serving.core.errors import ConfigError
from serving.core.request import SamplingParams
from serving.engine.joining import parallel_of
from serving.engine.plan import DecodeRow, PrefillChunk, SlotSpec, StepPlan, StepShape
from serving.engine.runner import LaunchedStep, Runner
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.experts import Moe
from serving.model.kernels import choose_kernels
from serving.model.parallel import Parallel, shares
from serving.model.units import UnitShape, shape_of
from serving.parallel.rehearsal import Rehearsal
from serving.parallel.symmetric import Exchanged, rehearse_symmetric

_CONFIGS = Path(__file__).parents[2] / "deploy" / "configs"
_GREEDY = SamplingParams(temperature=0.0)
# Of V3 the widths; and its depth.
PUBLISHED: dict[str, Any] = SHAPES["slice"] | {"num_hidden_layers": 61, "first_k_dense_replace": 3}
# Rounds in which gates are balanced, tokens of each prompt in one, and by how much a bias moves where an expert gets nothing.
_NUM_ROUNDS, _ROUND_TOKENS, _GAIN = 10, 1024, 0.03
_NUM_DECODE_STEPS = 32
_DEADLINE_S = 10.0
_NUM_UNCOUNTED = 4
_PROFILED_KERNELS = 40


@dataclass(frozen=True, kw_only=True)
class RankCase:
    """A rank of the unit that `config` has for the step's role. `gate`, `goal`: how many times the sum of its parts a step may take."""

    config: str
    step: Step
    gate: float | None = None
    goal: float | None = None


RANKS: dict[str, RankCase] = {
    "rank-prefill-ep32": RankCase(
        config="paper-32-320", step=Step(role="prefill", num_seqs=16, context=4096), gate=1.4, goal=1.25
    ),
    "rank-decode-ep320": RankCase(
        config="paper-32-320", step=Step(role="decode", num_seqs=102, context=4096), gate=2.0, goal=1.6
    ),
    "rank-decode-ep144": RankCase(config="production-ep144", step=Step(role="decode", num_seqs=128, context=4096)),
}


@dataclass(frozen=True, kw_only=True)
class PartFigure:
    """Of one layer: what the part takes alone, and at the least. `layers` of a step have it."""

    name: str
    layers: int
    own_us: float
    least_us: float
    in_sum: bool
    error: str | None = None


@dataclass(kw_only=True, eq=False)
class Rank:
    """What a rank of the unit holds, and its runner."""

    case: RankCase
    shape: UnitShape
    model: DeepseekV3
    runner: Runner
    pool: KVPool
    arrived_bytes: Counter[tuple[str, str]]

    def open_slots(self) -> None:
        """One for each sequence, as long as it is before the steps that `plans` yields."""
        step = self.case.step
        num_tokens = step.context if step.role == "prefill" else self._first_position
        for slot in range(step.num_seqs):
            spec = SlotSpec(
                sampling=_GREEDY,
                token_ids=[slot + 2] * num_tokens,
                num_prompt_tokens=num_tokens,
                page_ids=self.page_ids(slot),
            )
            self.runner.open_slot(slot, spec)

    def plans(self) -> Iterator[StepPlan]:
        """Steps without end."""
        step = self.case.step
        if step.role == "prefill":
            plan = self.prefill_plan(step.context)
            while True:
                yield plan
        for position in itertools.count(self._first_position):
            yield StepPlan(rows=tuple(DecodeRow(slot=slot, position=position) for slot in range(step.num_seqs)))

    @property
    def _first_position(self) -> int:
        """In the middle of the counted steps a sequence is as long as it should be."""
        return self.case.step.context - 1 - _NUM_UNCOUNTED - _NUM_DECODE_STEPS // 2

    def prefill_plan(self, num_tokens: int) -> StepPlan:
        """So many tokens of each prompt; of those whose embeddings this rank holds: nobody would bring the others'."""
        config, tp = self.model.config, self.shape.groups.tp
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(
            2, config.vocab_size // tp, (self.case.step.num_seqs, num_tokens), generator=generator
        ).tolist()
        chunks = [
            PrefillChunk(slot=slot, token_ids=prompt, start=0, store_from=0, page_ids=self.page_ids(slot), sample=True)
            for slot, prompt in enumerate(ids)
        ]
        return StepPlan(chunks=tuple(chunks))

    def page_ids(self, slot: int) -> list[int]:
        return list(range(slot * self.pages_each, (slot + 1) * self.pages_each))

    @property
    def pages_each(self) -> int:
        return self.pool.num_pages // self.case.step.num_seqs


def build_rank(
    case: RankCase, fields: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device, seed: int
) -> Rank:
    """`fields`: of the model's config.json. Raises ConfigError where the unit is none for this model."""
    step = case.step
    config = ModelConfig.from_dict(fields)
    shape = shape_of(unit_table(load_config(_CONFIGS / f"{case.config}.toml"), step.role), config)
    arrived_bytes: Counter[tuple[str, str]] = Counter()
    world = Rehearsal(range(shape.groups.world_size), 0, arrived_bytes=arrived_bytes)
    parallel = _parallel(shape, config, world, step, device)
    kernels = choose_kernels(KernelsTable(), config, dtype, device, tp=shape.groups.tp)
    model = DeepseekV3(config, dtype, device, kernels=kernels, parallel=parallel)
    fill_random(model, seed)
    pages_each = num_pages_for(step.context + _NUM_DECODE_STEPS)
    layout = PageLayout(
        num_layers=config.num_layers,
        num_mtp_layers=config.num_mtp_layers,
        row_width=config.latent_width,
        element_bytes=dtype.itemsize,
    )
    pool = KVPool(layout, step.num_seqs * pages_each, dtype, device)
    if step.role == "decode":
        for page in pool.tensor:
            page.normal_()
    runner = Runner(
        model,
        pool.tensor,
        num_slots=step.num_seqs,
        max_pages=pages_each,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
    )
    rank = Rank(case=case, shape=shape, model=model, runner=runner, pool=pool, arrived_bytes=arrived_bytes)
    rank.open_slots()
    return rank


def _parallel(shape: UnitShape, config: ModelConfig, world: Rehearsal, step: Step, device: torch.device) -> Parallel:
    def group_of(name: str, ranks: Sequence[int]) -> Rehearsal:
        return world.subgroup(ranks, name)

    on_gpu = device.type == "cuda"
    parallel = parallel_of(shape, 0, config, group_of, by_nodes=step.role == "prefill", queues=on_gpu)
    if step.role == "prefill" or not on_gpu:
        return parallel
    exchanged = Exchanged(
        slots_per_rank=shape.hosted_slots,
        capacity=-(-step.num_seqs // shape.groups.tp),
        width=config.hidden_size,
        top_k=config.num_experts_per_token + shape.shared_expert_routed,
        deadline_s=_DEADLINE_S,
    )
    return replace(parallel, fixed=rehearse_symmetric(shape.groups.ep_group(0), device, exchanged).dispatch)


def balance_gates(rank: Rank) -> float:
    """Steps of a part of each prompt, after each of which the biases follow the loads, as in training (report section 2.1.2).

    Returns the largest load of an expert over the mean, of the last step, averaged over the layers."""
    model, routing = rank.model, rank.model.routing
    assert routing is not None
    moes = [block.mlp for block in model.blocks if isinstance(block.mlp, Moe)]
    plan = rank.prefill_plan(min(_ROUND_TOKENS, rank.case.step.context))
    for _ in range(_NUM_ROUNDS):
        routing.num_tokens_LE.zero_()
        rank.runner.settle(rank.runner.launch(plan))
        loads_LE = routing.num_tokens_LE[: len(moes)].float()
        missing_LE = 1 - loads_LE / loads_LE.mean(1, keepdim=True)
        for moe, missing_E in zip(moes, missing_LE, strict=True):
            moe.gate_bias.add_(missing_E.clamp(-1, 1), alpha=_GAIN)
    return float((loads_LE.amax(1) / loads_LE.mean(1)).mean())


def timed_steps(rank: Rank, num_steps: int, num_micro_batches: int, *, num_uncounted: int) -> list[float]:
    """Seconds from one step's end on the device to the next one's; the host is a step ahead, as it is when it serves."""
    runner = rank.runner
    ends: list[_End] = []
    in_flight: list[LaunchedStep] = []
    for plan in itertools.islice(rank.plans(), num_uncounted + num_steps):
        shape = StepShape(
            prefill_tokens=plan.num_prefill_tokens, rows=len(plan.rows), num_micro_batches=num_micro_batches
        )
        in_flight.append(runner.launch(plan, shape))
        ends.append(_End(runner.device))
        if len(in_flight) == 2:
            runner.settle(in_flight.pop(0))
    for launched in in_flight:
        runner.settle(launched)
    return [end.seconds_after(before) for before, end in itertools.pairwise(ends)][-num_steps:]


def loads_of_a_step(rank: Rank) -> list[Load]:
    """Of each layer with experts. What a rank of the decode unit sends comes back to it from as many others, so that counts are the same."""
    step, parallel = rank.case.step, rank.model.parallel
    routing, num_moe = rank.model.routing, sum(isinstance(block.mlp, Moe) for block in rank.model.blocks)
    assert routing is not None
    if step.role == "decode" and rank.runner.device.type == "cuda":
        share = shares(step.num_tokens, parallel.tp.world_size)[parallel.tp.rank]
        sent = share * (rank.model.config.num_experts_per_token + parallel.shared_is_routed)
        return [Load(sent=sent, rows=sent, pairs=sent)] * num_moe
    watched = Watched(routing.dispatch, parallel)
    routing.dispatch, dispatch = watched, routing.dispatch
    timed_steps(rank, 1, 1, num_uncounted=0)
    routing.dispatch = dispatch
    return watched.loads()


class _End:
    """Of what has been launched so far."""

    def __init__(self, device: torch.device) -> None:
        self._s = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_after(self, other: _End) -> float:
        if self._event is None or other._event is None:
            return self._s - other._s
        self._event.synchronize()
        return float(other._event.elapsed_time(self._event)) / 1e3


def measure_parts(
    parts: Parts, ceiling: Mapping[Bound, float], device: torch.device, repeats: int, *, captured: bool
) -> list[PartFigure]:
    """Each alone, over the layers it is called of."""
    figures: list[PartFigure] = []
    for part in parts:
        row = run_case(part.name, partial(_work, part, captured), device, ceiling, repeats)
        figures.append(
            PartFigure(
                name=part.name,
                layers=part.layers,
                own_us=row.timings[OWN].us if row.timings else 0.0,
                least_us=part.least_s(ceiling) * 1e6,
                in_sum=part.in_sum,
                error=row.error,
            )
        )
    return figures


def _work(part: Part, captured: bool) -> Work:
    def own(index: int) -> None:
        part.call(index)

    return Work(own=own, num_sets=part.num_sets, amount=part.num_bytes, bound="copy", captured=captured)


def profiled(rank: Rank, num_micro_batches: int) -> list[dict[str, Any]]:
    """Kernels of two steps by name, and how long the device idled before each: calls and microseconds a layer, the longest first. Those of
    two streams run at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed_steps(rank, 1, num_micro_batches, num_uncounted=1)
        torch.cuda.synchronize()
    layers = 2 * len(rank.model.blocks)
    seen: dict[str, list[float]] = {}
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events() or ()
        if event.device_type.name == "CUDA"
    ]
    for begin, end, name in spans:
        seen.setdefault(name, []).append(end - begin)
    reached = min((begin for begin, _, _ in spans), default=0.0)
    for begin, end, name in sorted(spans):
        if begin > reached:
            seen.setdefault(f"(idle before {name})", []).append(begin - reached)
        reached = max(reached, end)
    longest = sorted(seen.items(), key=lambda kernel: -sum(kernel[1]))[:_PROFILED_KERNELS]
    return [
        {"kernel": name[:120], "calls_a_layer": len(times) / layers, "us_a_layer": sum(times) / layers}
        for name, times in longest
    ]


def run_rank(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """1: a part failed, or a step takes longer than the gate allows."""
    if not torch.cuda.is_available():
        raise ConfigError(f"--shape {options.shape} is measured on a GPU, and torch finds none; run it where one is")
    case, device = RANKS[options.shape], torch.device("cuda")
    fields = PUBLISHED | ({"num_hidden_layers": options.layers} if options.layers else {})
    report = provenance(["baton", "bench", "engine", *argv]) | {"device": torch.cuda.get_device_name(device)}
    with torch.inference_mode():
        stage = Stage(device)
        rows = [run_case(name, each, device, {}, options.repeats) for name, each in ceilings(stage).items()]
        torch.cuda.empty_cache()
        ceiling = {row.bound: row.rate for row in rows if row.bound is not None}
        report |= measure_rank(
            case,
            fields,
            ceiling,
            dtype=torch.bfloat16,
            device=device,
            seed=options.seed,
            repeats=options.repeats,
            profiles=options.profile,
        )
    print(table(report), file=sys.stderr)
    write_report(report, options.out)
    return 1 if report["failed"] or (case.gate is not None and report["ratio"] > case.gate) else 0


def measure_rank(
    case: RankCase,
    fields: Mapping[str, Any],
    ceiling: Mapping[Bound, float],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    repeats: int,
    profiles: bool,
) -> dict[str, Any]:
    """Plain data. `ceiling`: bytes or flops a second."""
    begin_s = time.perf_counter()
    rank = build_rank(case, fields, dtype=dtype, device=device, seed=seed)
    _synchronise(device)
    built_s = time.perf_counter() - begin_s
    prefills = case.step.role == "prefill"
    spread = balance_gates(rank) if prefills else None
    num_steps, num_uncounted = (repeats, 1) if prefills else (_NUM_DECODE_STEPS, _NUM_UNCOUNTED)
    steps = {
        number: timed_steps(rank, num_steps, number, num_uncounted=num_uncounted)
        for number in ((1, 2) if prefills else (1,))
    }
    layers = len(rank.model.blocks)
    kernels = {number: profiled(rank, number) for number in steps} if profiles else {}
    loads = loads_of_a_step(rank)
    load = Load(**{name: statistics.mean(getattr(each, name) for each in loads) for name in ("sent", "rows", "pairs")})
    parts = Parts(rank.model, rank.pool.tensor, case.step, rank.arrived_bytes, load)
    figures = measure_parts(parts, ceiling, device, repeats, captured=not prefills and device.type == "cuda")
    sum_s = sum(figure.layers * figure.least_us for figure in figures if figure.in_sum) / 1e6
    own_s = sum(figure.layers * figure.own_us for figure in figures) / 1e6
    step_s = {number: statistics.median(times) for number, times in steps.items()}
    best = min(step_s.values())
    return {
        "case": asdict(case),
        "kernel_choices": rank.model.kernels.names(),
        "settings": {"layers": layers, "seed": seed, "repeats": repeats},
        "tokens": {"of_tp_group": case.step.num_tokens, "of_rank": parts.share},
        "load": asdict(load)
        | {"balanced_pairs": parts.balanced_pairs, "pairs_by_layer": [each.pairs for each in loads]},
        "gates_max_over_mean": spread,
        "ceilings": dict(ceiling),
        "built_s": built_s,
        "step_ms": {number: 1e3 * seconds for number, seconds in step_s.items()},
        "raw_ms": {number: [1e3 * seconds for seconds in times] for number, times in steps.items()},
        "layer_us": 1e6 * best / layers,
        "sum_of_parts_ms": 1e3 * sum_s,
        "sum_of_parts_layer_us": 1e6 * sum_s / layers,
        "parts_alone_ms": 1e3 * own_s,
        "ratio": best / sum_s,
        "parts": [asdict(figure) for figure in figures],
        "kernels": kernels,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "failed": [figure.name for figure in figures if figure.error is not None],
    }


def table(report: Mapping[str, Any]) -> str:
    """A report in lines."""
    load, layers = report["load"], report["settings"]["layers"]
    lines = [
        f"{report['tokens']['of_tp_group']} tokens of the TP group, {report['tokens']['of_rank']} of the rank; "
        f"a layer brings {load['rows']:.0f} rows, {load['pairs']:.0f} pairs of row and expert (balanced: {load['balanced_pairs']})",
        f"{'part':<20}{'layers':>7}{'alone us':>12}{'least us':>12}{'of it':>8}",
    ]
    for part in report["parts"]:
        share = f"{part['own_us'] / part['least_us']:>8.2f}" if part["least_us"] else ""
        beside = "" if part["in_sum"] else "  (not in the sum)"
        failed = "" if part["error"] is None else f"  FAILED {part['error']}"
        lines.append(
            f"{part['name']:<20}{part['layers']:>7}{part['own_us']:>12.1f}{part['least_us']:>12.1f}{share}{beside}{failed}"
        )
    for number, rows in report["kernels"].items():
        lines.append(f"kernels of a step in {number} micro-batches, us a layer")
        lines += [f"{row['us_a_layer']:>10.1f}{row['calls_a_layer']:>8.2f}  {row['kernel']}" for row in rows]
    for number, step_ms in report["step_ms"].items():
        lines.append(f"step in {number} micro-batches: {step_ms:.2f} ms, {1e3 * step_ms / layers:.1f} us a layer")
    lines.append(
        f"parts alone: {report['parts_alone_ms']:.2f} ms; at the least: {report['sum_of_parts_ms']:.2f} ms, "
        f"{report['sum_of_parts_layer_us']:.1f} us a layer; the step takes {report['ratio']:.3f} times as long"
    )
    return "\n".join(lines)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
