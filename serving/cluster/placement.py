"""Which units there are, which ranks they have, where each of those is, and what it may use. Pure: no Ray, no torch, no clock.

config, cores and GPUs of a node  ->  units of ranks, each rank with its id, role, coordinates and threads  ->  one bundle a node

Ray can keep bundles together or apart, but not groups of them: a bundle a rank could have a unit's nodes different or its TP ranks
on one node, never both. So a bundle is all that a unit needs of one node, bundles of a unit are on different nodes (STRICT_SPREAD),
and the actors of a node's ranks are started inside their node's bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serving.core.config import Config, unit_table
from serving.core.errors import ConfigError
from serving.model.units import groups_of
from serving.parallel.groups import Coordinates, Groups


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One worker process. `needs` is what Ray keeps free for it: CPU, and a GPU or a part of one."""

    worker_id: str
    role: str
    at: Coordinates
    num_threads: int
    needs: dict[str, float]

    @property
    def leads(self) -> bool:
        """It has the scheduler of its DP group, and is the one that routers and the other role speak to."""
        return self.at.tp_rank == 0

    @property
    def gpu_share(self) -> float:
        """Of one GPU's memory; 1.0 also where there is none."""
        return self.needs.get("GPU", 1.0)


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """Ranks that start, serve and end together, in the order of their numbers; one placement group."""

    name: str
    role: str
    groups: Groups
    ranks: tuple[RankPlan, ...]

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What the unit needs of each of its nodes, by node."""
        bundles: list[dict[str, float]] = [{} for _ in range(self.groups.num_nodes)]
        for rank in self.ranks:
            bundle = bundles[rank.at.node]
            for resource, amount in rank.needs.items():
                bundle[resource] = bundle.get(resource, 0.0) + amount
        return bundles

    @property
    def strategy(self) -> str:
        """Ray's name for how the bundles lie."""
        return "STRICT_SPREAD" if self.groups.num_nodes > 1 else "STRICT_PACK"


def plan_units(config: Config, *, num_cores: int, num_gpus: int) -> tuple[UnitPlan, ...]:
    """Units in the order in which they get GPUs, prefill first. `num_cores` and `num_gpus` of a node; 0: no rank gets a GPU.

    A rank has a GPU to itself. Only where every unit is one rank and they are more than the GPUs do they share. Raises ConfigError.
    """
    sizes = [(index, role, groups_of(unit_table(config, role))) for index, role in _roles(config)]
    num_ranks = sum(groups.world_size for _, _, groups in sizes)
    share = _gpu_share([(role, groups) for _, role, groups in sizes], num_gpus)
    workers_of_node = min(num_ranks, num_gpus) if share == 1.0 else num_ranks
    units = []
    for index, role, groups in sizes:
        name = f"{role}-{index}"
        threads = num_threads(config, role, num_cores=num_cores, num_workers=workers_of_node)
        ranks = tuple(
            RankPlan(
                worker_id=name if groups.world_size == 1 else f"{name}.{rank}",
                role=role,
                at=groups.coordinates(rank),
                num_threads=threads,
                needs={"CPU": 1.0, "GPU": share} if share else {"CPU": 1.0},
            )
            for rank in range(groups.world_size)
        )
        units.append(UnitPlan(name=name, role=role, groups=groups, ranks=ranks))
    return tuple(units)


def by_gpu(unit: UnitPlan, gpus: Sequence[str]) -> list[int]:
    """For each rank the number of the process that is to be it, when process i, on rank i's node, sees GPU `gpus[i]`.

    Ray gives a node's GPUs out in any order. By this a node's later rank has a later GPU: ranks of one local index have GPUs of one index
    on every node that the unit fills, and with them network cards on one rail.
    """
    nodes = [rank.at.node for rank in unit.ranks]
    return sorted(range(len(nodes)), key=lambda i: (nodes[i], len(gpus[i]), gpus[i]))


def num_threads(config: Config, role: str, *, num_cores: int, num_workers: int) -> int:
    """CPU threads of one worker: what the configuration says, else the cores shared evenly among the workers."""
    configured = config.prefill.threads if role == "prefill" else config.decode.threads
    return configured or max(1, num_cores // num_workers)


def count_ranks(units: tuple[UnitPlan, ...]) -> tuple[int, int]:
    """(prefill ranks, decode ranks); a rank of role `both` counts as one of each."""
    roles = [rank.role for unit in units for rank in unit.ranks]
    both = roles.count("both")
    return roles.count("prefill") + both, roles.count("decode") + both


def _gpu_share(units: list[tuple[str, Groups]], num_gpus: int) -> float:
    """Of a GPU, for each rank; 0 where there are none."""
    if not num_gpus:
        return 0.0
    for role, groups in units:
        needed = min(groups.world_size, groups.ranks_per_node)
        if needed > num_gpus:
            raise ConfigError(
                f"[{'prefill' if role == 'prefill' else 'decode'}] ranks_per_node = {groups.ranks_per_node} puts {needed} ranks with a GPU each on a node of {num_gpus}; "
                f"set ranks_per_node to {num_gpus} or less, or model.device to cpu"
            )
    if any(groups.world_size > 1 for _, groups in units):
        return 1.0
    # Whole ranks to a GPU: Ray cannot give a rank parts of two.
    return 1.0 / math.ceil(len(units) / num_gpus)


def _roles(config: Config) -> list[tuple[int, str]]:
    if config.engine.mode == "both":
        return [(index, "both") for index in range(config.decode.units)]
    prefill = [(index, "prefill") for index in range(config.prefill.units)]
    return prefill + [(index, "decode") for index in range(config.decode.units)]
