"""Which node and which GPU each rank is on. Ray believes in the GPUs and the nodes that it is told of, so none is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from serving.cluster.placement import UnitPlan, plan_units
from serving.cluster.ray_head import RayHead
from serving.core.config import load_config
from tests.cluster.watched_server import eventually

Seen = dict[str, tuple[str, str]]


class Looking:
    """Stands where a rank would."""

    def gpu(self) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())


@contextmanager
def placed(*overrides: str, num_gpus: int) -> Iterator[tuple[tuple[UnitPlan, ...], Seen]]:
    """The plan, and (node, GPU) that each rank of it sees on a running Ray, units placed in order as the supervisor does."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from serving.cluster.supervisor import actor_options, in_order_of_gpus

    units = plan_units(load_config(overrides=overrides), num_cores=2, num_gpus=num_gpus)
    seen: Seen = {}
    groups, actors = [], []
    for unit in units:
        groups.append(placement_group(unit.bundles, strategy=unit.strategy))
        assert groups[-1].wait(timeout_seconds=30), f"no room for {unit.name}"
        made = [ray.remote(Looking).options(**actor_options(rank, groups[-1])).remote() for rank in unit.ranks]
        actors += made
        for rank, actor in zip(unit.ranks, in_order_of_gpus(unit, made), strict=True):
            seen[rank.worker_id] = ray.get([actor.node.remote(), actor.gpu.remote()], timeout=60)
    yield units, seen
    for actor in actors:
        ray.kill(actor)
    for group in groups:
        remove_placement_group(group)


def gpus(*overrides: str, num_gpus: int) -> dict[str, str]:
    with placed(*overrides, num_gpus=num_gpus) as (_, seen):
        return {name: gpu for name, (_, gpu) in seen.items()}


def test_prefill_gets_the_first_gpu_and_decode_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with RayHead(num_cpus=3, num_gpus=2):
        assert gpus(num_gpus=2) == {"prefill-0": "0", "decode-0": "1"}
        assert gpus("prefill.units=2", num_gpus=2) == {"prefill-0": "0", "prefill-1": "0", "decode-0": "1"}
        # As if there were one: they share the first and leave the second alone.
        assert gpus(num_gpus=1) == {"prefill-0": "0", "decode-0": "0"}


def test_a_unit_on_two_nodes_has_its_ranks_and_gpus_in_order_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = set(psutil.Process().children(recursive=True))
    with RayHead(num_cpus=10, num_gpus=5, num_nodes=2) as head:
        assert head.alive
        sizes = ("decode.tp=2", "decode.dp=4", "decode.ranks_per_node=4")
        with placed(*sizes, num_gpus=5) as ((_, decode), seen):
            nodes = {rank.worker_id: seen[rank.worker_id][0] for rank in decode.ranks}
            assert len(set(nodes.values())) == 2
            for node in range(2):
                here = [rank for rank in decode.ranks if rank.at.node == node]
                assert len({nodes[rank.worker_id] for rank in here}) == 1
                # One GPU of a node is prefill's; the others go to the ranks in order, whichever Ray gave first.
                indices = [int(seen[rank.worker_id][1]) for rank in here]
                assert indices == sorted(set(indices))
                assert len(indices) == 4
            assert all(len({nodes[f"decode-0.{rank}"] for rank in (first, first + 1)}) == 1 for first in range(0, 8, 2))
            own = seen["prefill-0"]
            assert own not in [seen[rank.worker_id] for rank in decode.ranks]
    assert eventually(lambda: set(psutil.Process().children(recursive=True)) <= before, timeout_s=10)
