"""Which GPU each rank sees. Ray believes in the GPUs that it is told of, so none is needed."""

from __future__ import annotations

import os
from typing import Any

import pytest

from serving.cluster.placement import plan_units
from serving.cluster.ray_head import RayHead
from serving.core.config import load_config


class Looking:
    """Stands where a rank would."""

    def visible(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]


def seen_by_ranks(*overrides: str, num_gpus: int) -> dict[str, str]:
    """What each rank sees of the GPUs of a running Ray, units placed in order as the supervisor does."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from serving.cluster.supervisor import actor_options

    answers: dict[str, Any] = {}
    groups, actors = [], []
    for unit in plan_units(load_config(overrides=overrides), num_cores=2, num_gpus=num_gpus):
        groups.append(placement_group([rank.bundle for rank in unit.ranks], strategy="STRICT_PACK"))
        assert groups[-1].wait(timeout_seconds=30), f"no room for {unit.name}"
        for index, rank in enumerate(unit.ranks):
            actors.append(ray.remote(Looking).options(**actor_options(rank, groups[-1], index)).remote())
            answers[rank.worker_id] = actors[-1].visible.remote()
    seen = {name: ray.get(answer, timeout=60) for name, answer in answers.items()}
    for actor in actors:
        ray.kill(actor)
    for group in groups:
        remove_placement_group(group)
    return seen


def test_prefill_gets_the_first_gpu_and_decode_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with RayHead(num_cpus=3, num_gpus=2):
        assert seen_by_ranks(num_gpus=2) == {"prefill-0": "0", "decode-0": "1"}
        assert seen_by_ranks("prefill.units=2", num_gpus=2) == {"prefill-0": "0", "prefill-1": "0", "decode-0": "1"}
        # As if there were one: they share the first and leave the second alone.
        assert seen_by_ranks(num_gpus=1) == {"prefill-0": "0", "decode-0": "0"}
