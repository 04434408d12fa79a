"""`baton bench engine --virtual CONFIG`: both units of a configuration in one process, every rank of them executed.

The counts are the configuration's (ranks, nodes, slots, micro-batches) and the published model's (experts, groups, those a token
chooses); widths and depth are small. Greedy texts of all requests are compared with those of one rank that holds everything, and what
went from rank to rank is counted. No times: 352 ranks that take turns on one core say nothing of any.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcache.layout import num_pages_for
from serving.bench.shapes import write_checkpoint
from serving.bench.units import DISPATCH_GROUPS, Unit, UnitSizes, generate, generate_alone, tokens_of_experts
from serving.core.config import Config, UnitTable, load_config
from serving.core.errors import ConfigError
from serving.model.config import ModelConfig
from serving.model.units import UnitShape, shape_of
from serving.parallel.balance import hierarchical_placement, single_placement
from serving.parallel.loads import with_shared_expert
from serving.parallel.placement import Floats, Placement, balance
from serving.parallel.traffic import Traffic

SHAPE = "paper-scaled"
_CONFIGS = Path(__file__).parents[2] / "deploy" / "configs"
_LONGEST_PROMPT = 160
# A DP group's tokens from which a step is split, where the configuration has micro-batches: with one token there is nothing to split.
_SPLIT_FROM = 2


def run_virtual(config_name: str, *, num_requests: int, new_tokens: int, seed: int) -> dict[str, Any]:
    """The report. Raises ConfigError where the configuration's units do not fit together or the model."""
    config = load_config(_config_path(config_name))
    generator = random.Random(seed)
    prompts = [
        [generator.randrange(2, 512) for _ in range(generator.randint(1, _LONGEST_PROMPT))] for _ in range(num_requests)
    ]
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        folder = Path(scratch)
        write_checkpoint(folder, SHAPE, seed)
        begin_s = time.perf_counter()
        expected = generate_alone(folder, prompts, new_tokens)
        alone_s = time.perf_counter() - begin_s
        expert_tokens = tokens_of_experts(folder, prompts[: -(-num_requests // 4)])
        model = ModelConfig.from_folder(folder)
        begin_s = time.perf_counter()
        prefill, decode = (
            _unit(folder, model, table, expert_tokens, prompts, new_tokens) for table in (config.prefill, config.decode)
        )
        texts, latents = generate(prefill, decode, prompts, new_tokens)
        seconds = time.perf_counter() - begin_s
    return {
        "model": {"name": SHAPE, "num_experts": model.num_routed_experts, "top_k": model.num_experts_per_token},
        "settings": {"config": config_name, "requests": num_requests, "new_tokens": new_tokens, "seed": seed},
        "same_text_as_one_rank": sum(mine == theirs for mine, theirs in zip(texts, expected, strict=True)),
        "prefill": _of_unit(prefill, model),
        "decode": _of_unit(decode, model),
        "latent_bytes": {"between_units": latents.between_units, "inside_nodes": latents.inside_nodes},
        "seconds": {"one_rank": round(alone_s, 1), "units": round(seconds, 1)},
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def show(report: Mapping[str, Any]) -> None:
    """On standard error."""
    settings = report["settings"]
    lines = [
        f"{report['same_text_as_one_rank']} of {settings['requests']} texts are those of one rank; "
        f"{report['seconds']['units']} s, {report['peak_memory_bytes'] / 1e9:.1f} GB"
    ]
    for role in ("prefill", "decode"):
        unit = report[role]
        lines.append(
            f"{role}: {unit['ranks']} ranks (TP{unit['tp']} x DP{unit['dp']}, EP{unit['ep']}) on {unit['nodes']} nodes, {unit['slots']} slots; "
            f"balance by layer {', '.join(f'{value:.2f}' for value in unit['balance_by_layer'])}"
        )
        lines += [
                f"  {way['group']:<5} over {way['link']:<9}{way['num_messages']:>10.0f} messages a layer:{way['payload_bytes']:>12.0f} bytes of rows, "
                f"{way['routing_bytes']:.0f} of routing, {way['padding_bytes']:.0f} of padding"
            for way in unit["traffic_a_layer"]
        ]
    latents = report["latent_bytes"]
    lines.append(
        f"latents: {latents['between_units']} bytes between units, {latents['inside_nodes']} from owners to TP peers"
    )
    print("\n".join(lines), file=sys.stderr)


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
    expert_tokens: Floats,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> Unit:
    shape = shape_of(table, model)
    groups = shape.groups
    sizes = UnitSizes(
        groups=groups,
        placement=_placement(shape, model, expert_tokens),
        by_nodes=groups.num_nodes > 1 and shape.active_slots > 1,
        shared_is_routed=shape.shared_expert_routed,
        split_from=_SPLIT_FROM if table.microbatches > 1 else 0,
    )
    # Jobs are shared out evenly, so no group holds many more than its part of them.
    most_jobs = 2 * -(-len(prompts) // groups.dp)
    most_pages = most_jobs * num_pages_for(_LONGEST_PROMPT + new_tokens)
    return Unit(folder, sizes, num_pages=most_pages, max_num_seqs=most_jobs)


def _placement(shape: UnitShape, model: ModelConfig, expert_tokens: Floats) -> Placement:
    groups, loads = shape.groups, expert_tokens
    if shape.shared_expert_routed:
        loads = with_shared_expert(loads, experts_per_token=model.num_experts_per_token)
    if shape.active_slots == 1:
        return single_placement(loads, num_gpus=groups.ep)
    return hierarchical_placement(
        loads,
        num_slots=shape.num_slots,
        num_gpus=groups.ep,
        num_nodes=max(1, groups.ep // groups.ranks_per_node),
        num_groups=model.num_groups,
    )


def _of_unit(unit: Unit, model: ModelConfig) -> dict[str, Any]:
    groups = unit.sizes.groups
    num_moe = model.num_layers - model.num_dense_layers
    return {
        "ranks": groups.world_size,
        "tp": groups.tp,
        "dp": groups.dp,
        "ep": groups.ep,
        "nodes": groups.num_nodes,
        "slots": int(unit.sizes.placement.slots.shape[1]),
        "micro_batches": 2 if unit.sizes.split_from else 1,
        "balance_by_layer": _balance(unit, num_moe),
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


def _balance(unit: Unit, num_layers: int) -> list[float]:
    """Mean over largest load of a GPU in each layer with experts, as the tokens of this run fell."""
    loads = unit.expert_tokens()
    if unit.sizes.shared_is_routed:
        loads = with_shared_expert(loads, experts_per_token=unit.config.num_experts_per_token)
    figures: list[float] = balance(unit.sizes.placement, loads)[:num_layers].round(4).tolist()
    return figures
