"""Which units there are, which ranks they have, and what each rank may use. Pure: no Ray, no torch, no clock.

config, cores, GPUs  ->  units of ranks, each rank with its id, role, threads and resource bundle
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serving.core.config import Config


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One worker process. `bundle` is what Ray keeps free for it."""

    worker_id: str
    role: str
    num_threads: int
    bundle: dict[str, float]

    @property
    def gpu_share(self) -> float:
        """Of one GPU's memory; 1.0 also where there is none."""
        return self.bundle.get("GPU", 1.0)


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """Ranks that start, serve and end together; one placement group."""

    name: str
    ranks: tuple[RankPlan, ...]


def plan_units(config: Config, *, num_cores: int, num_gpus: int) -> tuple[UnitPlan, ...]:
    """One rank a unit for now (TP1). Ranks get GPUs in this order, prefill first; with fewer GPUs than ranks they share them."""
    roles = _roles(config)
    bundle = {"CPU": 1.0}
    if num_gpus:
        # Whole ranks to a GPU: Ray cannot give a rank parts of two.
        bundle["GPU"] = 1.0 / math.ceil(len(roles) / num_gpus)
    units = []
    for index, role in roles:
        name = f"{role}-{index}"
        threads = num_threads(config, role, num_cores=num_cores, num_workers=len(roles))
        rank = RankPlan(worker_id=name, role=role, num_threads=threads, bundle=bundle)
        units.append(UnitPlan(name=name, ranks=(rank,)))
    return tuple(units)


def num_threads(config: Config, role: str, *, num_cores: int, num_workers: int) -> int:
    """CPU threads of one worker: what the configuration says, else the cores shared evenly among the workers."""
    configured = config.prefill.threads if role == "prefill" else config.decode.threads
    return configured or max(1, num_cores // num_workers)


def count_ranks(units: tuple[UnitPlan, ...]) -> tuple[int, int]:
    """(prefill ranks, decode ranks); a rank of role `both` counts as one of each."""
    roles = [rank.role for unit in units for rank in unit.ranks]
    both = roles.count("both")
    return roles.count("prefill") + both, roles.count("decode") + both


def _roles(config: Config) -> list[tuple[int, str]]:
    if config.engine.mode == "both":
        return [(index, "both") for index in range(config.decode.units)]
    prefill = [(index, "prefill") for index in range(config.prefill.units)]
    return prefill + [(index, "decode") for index in range(config.decode.units)]
