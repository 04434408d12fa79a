"""`baton bench engine --virtual CONFIG`: both units of a configuration in one process, every rank of them executed.

The counts are the configuration's (ranks, nodes, slots, micro-batches) and the published model's (experts, groups, those a token
chooses); widths and depth are small. Greedy texts of all requests are compared with those of one rank that holds everything, and what
went from rank to rank is counted. No times: 352 ranks that take turns on one core say nothing of any.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvcache.layout import num_pages_for
from serving.bench.shapes import SHAPES, write_checkpoint
from serving.bench.units import (
    DISPATCH_GROUPS,
    LatentBytes,
    Unit,
    UnitSizes,
    generate,
    generate_alone,
    tokens_of_experts,
)
from serving.core.config import UnitTable, load_config
from serving.core.errors import ConfigError
from serving.engine.placing import placement_for
from serving.model.config import ModelConfig
from serving.model.units import UnitShape, shape_of
from serving.parallel.dispatch import Dispatch
from serving.parallel.loads import with_shared_expert
from serving.parallel.placement import Floats, Ints, balance
from serving.parallel.traffic import Traffic

SHAPE = "paper-scaled"
_CONFIGS = Path(__file__).parents[2] / "deploy" / "configs"
_LONGEST_PROMPT = 160
# A DP group's tokens from which a step is split, where the configuration has micro-batches: with one token there is nothing to split.
_SPLIT_FROM = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Both units when they have ended. `expected`: the texts of one rank that holds everything."""

    prompts: list[list[int]]
    texts: list[list[int]]
    expected: list[list[int]]
    prefill: Unit
    decode: Unit
    latents: LatentBytes
    one_rank_s: float
    units_s: float


def run_units(
    config_name: str,
    folder: Path,
    *,
    num_requests: int,
    new_tokens: int,
    seed: int,
    overrides: Sequence[str] = (),
    wrap: Callable[[str, int, Dispatch], Dispatch] = lambda _role, _rank, dispatch: dispatch,
) -> Run:
    """`folder` gets the model. `overrides`: "table.key=value". `wrap`: as `Unit`'s, by role. Raises ConfigError where the units do not fit
    together or the model."""
    config = load_config(_config_path(config_name), overrides=overrides)
    write_checkpoint(folder, SHAPE, seed)
    model = ModelConfig.from_folder(folder)
    generator = random.Random(seed)
    prompts = [
        [generator.randrange(2, model.vocab_size) for _ in range(generator.randint(1, _LONGEST_PROMPT))]
        for _ in range(num_requests)
    ]
    begin_s = time.perf_counter()
    expected = generate_alone(folder, prompts, new_tokens)
    one_rank_s = time.perf_counter() - begin_s
    # What a unit that has run for a while knows of the experts.
    expert_tokens = tokens_of_experts(folder, prompts[: -(-num_requests // 4)])
    begin_s = time.perf_counter()
    most_tokens = _LONGEST_PROMPT + new_tokens
    prefill, decode = (
        _unit(folder, model, table, expert_tokens, num_requests, most_tokens, role == "prefill", partial(wrap, role))
        for role, table in (("prefill", config.prefill), ("decode", config.decode))
    )
    texts, latents = generate(prefill, decode, prompts, new_tokens)
    return Run(
        prompts=prompts,
        texts=texts,
        expected=expected,
        prefill=prefill,
        decode=decode,
        latents=latents,
        one_rank_s=one_rank_s,
        units_s=time.perf_counter() - begin_s,
    )


def report_of(run: Run) -> dict[str, Any]:
    """Plain data."""
    return {
        "model": {"name": SHAPE, "config": SHAPES[SHAPE]},
        "requests": len(run.prompts),
        "same_text_as_one_rank": sum(mine == theirs for mine, theirs in zip(run.texts, run.expected, strict=True)),
        "prefill": _of_unit(run.prefill),
        "decode": _of_unit(run.decode),
        "latent_bytes": asdict(run.latents),
        "seconds": {"one_rank": round(run.one_rank_s, 1), "units": round(run.units_s, 1)},
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def table(report: Mapping[str, Any]) -> str:
    """A report in lines."""
    lines = [
        f"{report['same_text_as_one_rank']} of {report['requests']} texts are those of one rank; "
        f"{report['seconds']['units']} s, {report['peak_memory_bytes'] / 1e9:.1f} GB"
    ]
    for role in ("prefill", "decode"):
        unit = report[role]
        lines.append(
            f"{role}: {unit['ranks']} ranks (TP{unit['tp']} x DP{unit['dp']}, EP{unit['ep']}) on {unit['nodes']} nodes, {unit['slots']} slots, "
            f"{unit['slots_in_use']} in use, {unit['micro_batches']} micro-batches; balance by layer {_figures(unit['balance_by_layer'])}"
        )
        if "static_balance_by_layer" in unit:
            lines[-1] += f"; of a static placement {_figures(unit['static_balance_by_layer'])}"
        lines += [
            f"  {way['group']:<5} over {way['link']:<9}{way['num_messages']:>10.0f} messages a layer:{way['payload_bytes']:>12.0f} bytes of rows, "
            f"{way['routing_bytes']:.0f} of routing, {way['padding_bytes']:.0f} of padding"
            for way in unit["traffic_a_layer"]
        ]
    latents = report["latent_bytes"]
    lines.append(
        f"latents: {latents['between_units']} bytes between units, {latents['inside_nodes']} from owners to TP peers"
    )
    return "\n".join(lines)


def _figures(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _config_path(name: str) -> Path:
    """A file, or one of those shipped by its name."""
    path = Path(name)
    if path.suffix == ".toml" or path.exists():
        return path
    shipped = _CONFIGS / f"{name}.toml"
    if not shipped.exists():
        known = ", ".join(sorted(file.stem for file in _CONFIGS.glob("*.toml")))
        raise ConfigError(f"--virtual {name}: there is no such configuration; give a TOML file, or one of {known}")
    return shipped


def _unit(
    folder: Path,
    model: ModelConfig,
    table: UnitTable,
    expert_tokens: Ints,
    num_jobs: int,
    most_tokens: int,
    by_nodes: bool,
    wrap: Callable[[int, Dispatch], Dispatch],
) -> Unit:
    shape = shape_of(table, model)
    groups = shape.groups
    if groups.ep == 1:
        raise ConfigError(
            "--virtual is for units whose ranks hold the experts together, and this configuration has one with ep = 1; "
            "choose one with ep above 1, paper-32-320 for instance"
        )
    loads = _loads(shape, model, expert_tokens)
    without_choice = replace(shape, hosted_slots=shape.active_slots)
    sizes = UnitSizes(
        shape=shape,
        placement=placement_for(loads, shape, model),
        static=placement_for(loads, without_choice, model) if shape.chooses else None,
        by_nodes=by_nodes,
        split_from=_SPLIT_FROM if table.microbatches > 1 else 0,
    )
    # Jobs are shared out by their tokens or pages: no group gets many more than its part of them.
    most_jobs = 2 * -(-num_jobs // groups.dp)
    return Unit(folder, sizes, num_pages=most_jobs * num_pages_for(most_tokens), max_num_seqs=most_jobs, wrap=wrap)


def _loads(shape: UnitShape, model: ModelConfig, expert_tokens: Ints) -> Floats:
    """[L, E] of the logical experts."""
    loads = expert_tokens.astype(np.float64)
    if shape.shared_expert_routed:
        return with_shared_expert(loads, experts_per_token=model.num_experts_per_token)
    return loads


def _of_unit(unit: Unit) -> dict[str, Any]:
    groups, model = unit.sizes.groups, unit.config
    num_moe = model.num_layers - model.num_dense_layers
    report: dict[str, Any] = {
        "ranks": groups.world_size,
        "tp": groups.tp,
        "dp": groups.dp,
        "ep": groups.ep,
        "nodes": groups.num_nodes,
        "slots": int(unit.sizes.placement.slots.shape[1]),
        "slots_in_use": groups.ep * unit.sizes.shape.active_slots,
        "micro_batches": 2 if unit.sizes.split_from else 1,
    }
    report |= _balances(unit, num_moe)
    return report | {
        "traffic_a_layer": [
            {"group": group, "operation": operation, "link": str(link)} | _traffic(seen, num_moe)
            for (group, operation, link), seen in sorted(unit.virtual.traffic.items())
            if group in DISPATCH_GROUPS
        ],
        "traffic_between_layers": [
            {"group": group, "operation": operation, "link": str(link)} | _traffic(seen, 1)
            for (group, operation, link), seen in sorted(unit.virtual.traffic.items())
            if group not in DISPATCH_GROUPS
        ],
    }


def _traffic(seen: Traffic, num_layers: int) -> dict[str, float]:
    """Of one of so many layers, over the whole run."""
    counts = {
        "num_messages": seen.num_messages,
        "payload_rows": sum(seen.payload_rows.values()),
        "payload_bytes": seen.payload_bytes,
        "routing_bytes": seen.routing_bytes,
        "padding_bytes": seen.padding_bytes,
    }
    return {name: value / num_layers for name, value in counts.items()}


def _balances(unit: Unit, num_layers: int) -> dict[str, list[float]]:
    """Mean over largest load of a GPU in each layer with experts: as the tokens of the whole run fell; where replicas were chosen, the sums
    over all choices, and beside them what a static placement would have made of the same tokens."""
    sizes = unit.sizes
    if sizes.static is None:
        loads = _loads(sizes.shape, unit.config, unit.expert_tokens())
        return {"balance_by_layer": balance(sizes.placement, loads)[:num_layers].round(4).tolist()}
    mean, chosen, static = np.zeros((3, num_layers))
    for layer, tokens in unit.chosen:
        if layer >= num_layers:
            continue
        hosts, slots = (of.slots[layer] for of in (sizes.placement, sizes.static))
        experts = np.bincount(hosts, tokens.ravel(), minlength=sizes.static.num_experts)
        mean[layer] += tokens.sum() / len(tokens)
        chosen[layer] += tokens.sum(axis=1).max()
        static[layer] += (experts / sizes.static.copies[layer])[slots].reshape(len(tokens), -1).sum(axis=1).max()
    return {
        name: (mean / of).round(4).tolist()
        for name, of in (("balance_by_layer", chosen), ("static_balance_by_layer", static))
    }
