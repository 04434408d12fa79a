"""From a configuration to units, ranks, coordinates, threads and bundles."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.cluster.placement import UnitPlan, by_gpu, count_ranks, plan_units
from serving.core.config import load_config
from serving.core.errors import ConfigError

CONFIGS = Path(__file__).parents[4] / "deploy" / "configs"


def plan(*overrides: str, cores: int = 2, gpus: int = 0, file: str | None = None) -> tuple[UnitPlan, ...]:
    path = None if file is None else CONFIGS / file
    return plan_units(load_config(path, overrides=overrides), num_cores=cores, num_gpus=gpus)


def names(units: tuple[UnitPlan, ...]) -> list[tuple[str, str]]:
    return [(rank.worker_id, rank.role) for unit in units for rank in unit.ranks]


def test_the_defaults_are_one_prefill_and_one_decode_rank():
    units = plan()
    assert names(units) == [("prefill-0", "prefill"), ("decode-0", "decode")]
    assert count_ranks(units) == (1, 1)
    assert [(unit.bundles, unit.strategy) for unit in units] == [([{"CPU": 1.0}], "STRICT_PACK")] * 2


def test_units_of_a_role_are_counted_from_zero():
    units = plan("prefill.units=2", "decode.units=3")
    assert [name for name, _ in names(units)] == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]
    assert count_ranks(units) == (2, 3)


def test_mode_both_has_one_kind_of_rank_that_counts_twice():
    units = plan("engine.mode=both", "decode.units=2")
    assert names(units) == [("both-0", "both"), ("both-1", "both")]
    assert count_ranks(units) == (2, 2)


def test_mode_both_has_the_sizes_of_decode():
    units = plan("engine.mode=both", "decode.dp=2", "prefill.tp=4")
    assert names(units) == [("both-0.0", "both"), ("both-0.1", "both")]


def test_ranks_of_a_unit_are_numbered_and_the_first_of_each_tp_group_leads():
    (prefill, decode) = plan("prefill.tp=2", "prefill.dp=2")
    assert [rank.worker_id for rank in prefill.ranks] == ["prefill-0.0", "prefill-0.1", "prefill-0.2", "prefill-0.3"]
    assert [rank.leads for rank in prefill.ranks] == [True, False, True, False]
    assert [rank.worker_id for rank in decode.ranks] == ["decode-0"]
    assert decode.ranks[0].leads


def test_the_papers_units_are_352_ranks_on_44_nodes():
    prefill, decode = plan(file="paper-32-320.toml", gpus=8, cores=64)
    assert (len(prefill.ranks), len(decode.ranks)) == (32, 320)
    assert (len(prefill.bundles), len(decode.bundles)) == (4, 40)
    assert count_ranks((prefill, decode)) == (32, 320)
    for unit in (prefill, decode):
        assert unit.strategy == "STRICT_SPREAD"
        assert unit.bundles == [{"CPU": 8.0, "GPU": 8.0}] * len(unit.bundles)
        assert len({rank.worker_id for rank in unit.ranks}) == len(unit.ranks)
        assert [rank.at.rank for rank in unit.ranks] == list(range(len(unit.ranks)))
        assert {rank.num_threads for rank in unit.ranks} == {8}
        for node in range(len(unit.bundles)):
            assert [rank.at.local_rank for rank in unit.ranks if rank.at.node == node] == list(range(8))
        for dp_rank in range(unit.groups.dp):
            group = [rank for rank in unit.ranks if rank.at.dp_rank == dp_rank]
            assert [rank.at.tp_rank for rank in group] == [0, 1, 2, 3]
            assert len({rank.at.node for rank in group}) == 1, "a TP group spans nodes"
            assert [rank.leads for rank in group] == [True, False, False, False]
        assert [rank.at.ep_rank for rank in unit.ranks] == list(range(len(unit.ranks)))


def test_the_production_units_are_32_and_144_ranks():
    prefill, decode = plan(file="production-ep144.toml", gpus=8)
    assert [(len(unit.ranks), len(unit.bundles)) for unit in (prefill, decode)] == [(32, 4), (144, 18)]
    assert all(rank.leads for unit in (prefill, decode) for rank in unit.ranks)


def test_a_unit_that_fills_a_part_of_a_node_needs_that_part():
    prefill, decode = plan(file="node.toml", gpus=8)
    assert [unit.bundles for unit in (prefill, decode)] == [[{"CPU": 4.0, "GPU": 4.0}]] * 2


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (8, 4)])
def test_cores_are_shared_evenly_and_nobody_gets_none(cores: int, threads: int):
    assert [rank.num_threads for unit in plan(cores=cores) for rank in unit.ranks] == [threads, threads]


def test_configured_threads_win():
    units = plan("prefill.threads=5", "decode.threads=3", cores=2)
    assert [rank.num_threads for unit in units for rank in unit.ranks] == [5, 3]


def test_without_gpus_nobody_asks_for_one():
    assert all("GPU" not in rank.needs for unit in plan("decode.dp=4") for rank in unit.ranks)


@pytest.mark.parametrize(("gpus", "share"), [(1, 0.5), (2, 1.0), (8, 1.0)])
def test_ranks_share_gpus_only_where_there_are_too_few(gpus: int, share: float):
    ranks = [rank for unit in plan(gpus=gpus) for rank in unit.ranks]
    assert [rank.needs["GPU"] for rank in ranks] == [share, share]
    assert [rank.gpu_share for rank in ranks] == [share, share]


def test_a_rank_is_never_given_parts_of_two_gpus():
    units = plan("prefill.units=2", gpus=2)  # two thirds each would fit the sum, and no GPU
    assert [rank.needs["GPU"] for unit in units for rank in unit.ranks] == [0.5, 0.5, 0.5]


def test_ranks_of_one_unit_never_share_a_gpu():
    units = plan("decode.dp=2", gpus=2)  # three ranks: Ray will not find room, and says so
    assert [rank.needs["GPU"] for unit in units for rank in unit.ranks] == [1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"\[decode\] ranks_per_node = 8 .* node of 2; set ranks_per_node to 2"):
        plan("decode.dp=4", gpus=2)


def test_without_gpus_nobody_shares_one():
    assert [rank.gpu_share for unit in plan() for rank in unit.ranks] == [1.0, 1.0]


def test_ranks_take_the_processes_of_their_node_in_the_order_of_gpus():
    (_, unit) = plan("decode.tp=2", "decode.dp=4", "decode.ranks_per_node=4", gpus=16)
    seen = ["9", "10", "2", "3", "1", "0", "11", "2"]
    assert by_gpu(unit, seen) == [2, 3, 0, 1, 5, 4, 7, 6]
    assert by_gpu(unit, ["0", "1", "2", "3"] * 2) == list(range(8))
