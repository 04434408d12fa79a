"""What a configuration asks for, as a table for people: units, ranks, nodes, experts, and what a GPU's memory is spent on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from kvcache.layout import PAGE_TOKENS, PageLayout
from serving.cluster.placement import UnitPlan, plan_units
from serving.cluster.preflight import check_mode, check_replicas, check_served, resolve_model_dir
from serving.core.config import Config, UnitTable, unit_table
from serving.core.errors import ConfigError, ModelFolderError, StartupError
from serving.model.config import ModelConfig
from serving.model.footprint import Footprint, fits_fp8, rank_footprint
from serving.model.published import DEEPSEEK_V3
from serving.model.units import UnitShape, shape_of

_GIB = 1 << 30
_GPUS = (("H200", 139), ("H800", 79))
"""GiB that a process finds on one."""
_POOL_FRACTION = 0.9
"""kv.memory_fraction of a GPU where the file names none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Role:
    name: str
    table: UnitTable
    shape: UnitShape
    weights: Footprint


def describe_units(config: Config) -> list[str]:
    """Lines of the table. Raises ConfigError where sizes do not fit together or do not fit the model.

    A model whose folder is not on this machine is taken to have DeepSeek-V3's sizes; the table says so.
    """
    check_mode(config)
    model, known_by = _model(config)
    names = ["both"] if config.engine.mode == "both" else ["prefill", "decode"]
    roles = [_role(config, name, model) for name in names]
    rows = [("", [role.name for role in roles])]
    rows += [(label, [cell(role) for role in roles]) for label, cell in _ROWS]
    for gpu, memory in _GPUS:
        rows.append((f"KV on an {gpu}", [_room(config, model, role, memory * _GIB) for role in roles]))
    units = plan_units(config, num_cores=1, num_gpus=0)
    num_ranks = sum(len(unit.ranks) for unit in units)
    total = f"In all {num_ranks} ranks, a GPU each, on {_counted(_num_nodes(units), 'node')}."
    return [f"Units for {known_by}.", *_aligned(rows), total, *_not_served(config, roles, model)]


def _model(config: Config) -> tuple[ModelConfig, str]:
    try:
        folder = resolve_model_dir(config)
    except ModelFolderError:
        model, known_by = (
            DEEPSEEK_V3,
            f"DeepSeek-V3's published sizes, since {Path(config.model.dir)} is not on this machine",
        )
    else:
        model, known_by = ModelConfig.from_folder(folder), config.model.dir or "the embedded model"
    return (model if config.model.mtp else dataclasses.replace(model, num_mtp_layers=0)), known_by


def _role(config: Config, name: str, model: ModelConfig) -> _Role:
    table = unit_table(config, name)
    shape = shape_of(table, model)
    wide = config.model.dtype == "float32"
    weights = rank_footprint(model, shape, element_bytes=4 if wide else 2, fp8=fits_fp8(model) and not wide)
    return _Role(name=name, table=table, shape=shape, weights=weights)


def _ranks(role: _Role) -> str:
    groups = role.shape.groups
    return f"{groups.world_size} = tp {groups.tp} x dp {groups.dp}"


def _nodes(role: _Role) -> str:
    groups = role.shape.groups
    return f"{groups.num_nodes}, {_counted(min(groups.world_size, groups.ranks_per_node), 'rank')} each"


def _experts(role: _Role) -> str:
    table, shape = role.table, role.shape
    routed = shape.num_experts - shape.shared_expert_routed
    shared = " with the shared one" if shape.shared_expert_routed else ""
    return f"{routed} + {table.redundant_experts} redundant{shared}"


_ROWS: tuple[tuple[str, Callable[[_Role], str]], ...] = (
    ("units", lambda role: str(role.table.units)),
    ("ranks a unit", _ranks),
    ("nodes a unit", _nodes),
    ("attention heads a rank", lambda role: str(role.shape.heads)),
    ("experts a layer", _experts),
    ("over ranks (ep)", lambda role: str(role.shape.groups.ep)),
    ("experts a rank, in a step", lambda role: str(role.shape.active_slots)),
    ("experts a rank, in memory", lambda role: str(role.shape.hosted_slots)),
    ("micro-batches", lambda role: str(role.table.microbatches)),
    ("a page of KV is on", lambda role: _counted(1 if role.table.kv_sharding else role.shape.groups.tp, "rank")),
    ("weights a rank", lambda role: _size(role.weights.total)),
    ("    attention", lambda role: _size(role.weights.attention)),
    ("    experts", lambda role: _size(role.weights.experts)),
    ("    vocabulary", lambda role: _size(role.weights.vocabulary)),
    ("    all else", lambda role: _size(role.weights.dense)),
)


def _room(config: Config, model: ModelConfig, role: _Role, memory: int) -> str:
    """Before what the largest step takes, which only the GPU can say."""
    left = memory - role.weights.total
    if left <= 0:
        return f"none: the weights need {_size(-left)} more"
    layout = PageLayout(
        num_layers=model.num_layers,
        num_mtp_layers=model.num_mtp_layers,
        row_width=model.latent_width,
        element_bytes=4 if config.model.dtype == "float32" else 2,
    )
    pool = int(left * (config.kv.memory_fraction or _POOL_FRACTION))
    num_tokens = pool // layout.page_bytes * PAGE_TOKENS * (role.shape.groups.tp if role.table.kv_sharding else 1)
    return f"{_size(pool)}, {num_tokens:,} tokens a dp group"


def _num_nodes(units: tuple[UnitPlan, ...]) -> int:
    """Units that fill nodes have them to themselves; smaller ones share."""
    whole = sum(unit.groups.num_nodes for unit in units if unit.groups.num_nodes > 1)
    parts = sum(len(unit.ranks) / unit.groups.ranks_per_node for unit in units if unit.groups.num_nodes == 1)
    return whole + math.ceil(parts)


def _not_served(config: Config, roles: list[_Role], model: ModelConfig) -> list[str]:
    try:
        check_served(config)
        for role in roles:
            if role.shape.chooses:
                check_replicas(config, role.name, role.shape, model)
    except (StartupError, ConfigError) as error:
        return [f"Not yet to be served: {error}"]
    return []


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB // 2 else f"{num_bytes / (1 << 20):.1f} MiB"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _aligned(rows: list[tuple[str, list[str]]]) -> list[str]:
    label_width = max(len(label) for label, _ in rows)
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(rows[0][1]))]
    return [
        f"{label:<{label_width}}  {'  '.join(f'{cell:<{width}}' for cell, width in zip(cells, widths, strict=True))}".rstrip()
        for label, cells in rows
    ]
