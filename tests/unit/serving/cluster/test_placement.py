"""From a configuration to units, ranks, threads and bundles."""

from __future__ import annotations

import pytest

from serving.cluster.placement import UnitPlan, count_ranks, plan_units
from serving.core.config import load_config


def plan(*overrides: str, cores: int = 2, gpus: int = 0) -> tuple[UnitPlan, ...]:
    return plan_units(load_config(overrides=overrides), num_cores=cores, num_gpus=gpus)


def names(units: tuple[UnitPlan, ...]) -> list[tuple[str, str]]:
    return [(rank.worker_id, rank.role) for unit in units for rank in unit.ranks]


def test_the_defaults_are_one_prefill_and_one_decode_rank():
    units = plan()
    assert names(units) == [("prefill-0", "prefill"), ("decode-0", "decode")]
    assert count_ranks(units) == (1, 1)


def test_units_of_a_role_are_counted_from_zero():
    units = plan("prefill.units=2", "decode.units=3")
    assert [name for name, _ in names(units)] == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]
    assert count_ranks(units) == (2, 3)


def test_mode_both_has_one_kind_of_rank_that_counts_twice():
    units = plan("engine.mode=both", "decode.units=2")
    assert names(units) == [("both-0", "both"), ("both-1", "both")]
    assert count_ranks(units) == (2, 2)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (8, 4)])
def test_cores_are_shared_evenly_and_nobody_gets_none(cores: int, threads: int):
    assert [rank.num_threads for unit in plan(cores=cores) for rank in unit.ranks] == [threads, threads]


def test_configured_threads_win():
    units = plan("prefill.threads=5", "decode.threads=3", cores=2)
    assert [rank.num_threads for unit in units for rank in unit.ranks] == [5, 3]


def test_without_gpus_nobody_asks_for_one():
    assert all("GPU" not in rank.bundle for unit in plan() for rank in unit.ranks)


@pytest.mark.parametrize(("gpus", "share"), [(1, 0.5), (2, 1.0), (8, 1.0)])
def test_ranks_share_gpus_only_where_there_are_too_few(gpus: int, share: float):
    ranks = [rank for unit in plan(gpus=gpus) for rank in unit.ranks]
    assert [rank.bundle["GPU"] for rank in ranks] == [share, share]
    assert [rank.gpu_share for rank in ranks] == [share, share]


def test_a_rank_is_never_given_parts_of_two_gpus():
    units = plan("prefill.units=2", gpus=2)  # two thirds each would fit the sum, and no GPU
    assert [rank.bundle["GPU"] for unit in units for rank in unit.ranks] == [0.5, 0.5, 0.5]


def test_without_gpus_nobody_shares_one():
    assert [rank.gpu_share for unit in plan() for rank in unit.ranks] == [1.0, 1.0]
