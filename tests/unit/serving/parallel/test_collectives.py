"""One contract for every implementation: the same cases on four ranks (one for the single rank), the same results.

What is expected is computed here from what each rank brings, in a few plain lines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.core.errors import ConfigError
from serving.parallel.collectives import SingleRank
from serving.parallel.distributed import TorchCollectives
from serving.parallel.groups import Groups
from serving.parallel.virtual import VirtualUnit
from tests.unit.serving.parallel import rank_cases
from tests.unit.serving.parallel.rank_cases import DTYPES, POISON, WIDTH, rows
from tests.unit.serving.parallel.rank_processes import RankProcesses

WORLD = 4
UNEVEN = [3, 0, 1, 5]
PAIRS = [[1, 0, 2, 3], [0, 0, 0, 0], [4, 0, 0, 1], [0, 0, 5, 2]]
IMPLEMENTATIONS = ["single", "virtual", "shared_memory", "gloo"]
PROCESSES = ["shared_memory", "gloo"]
DEADLINE_S = 0.7

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    ranks = RankProcesses(WORLD, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request: pytest.FixtureRequest) -> Run:
    """Case name and arguments -> its result on each rank."""
    if request.param == "single":
        return lambda case, *arguments: [getattr(rank_cases, case)(SingleRank(), *arguments)]
    if request.param == "virtual":
        groups = Groups(tp=2, dp=2, ep=4, ranks_per_node=2)
        return lambda case, *arguments: VirtualUnit(groups).run(
            lambda group: getattr(rank_cases, case)(group, *arguments)
        )
    processes: RankProcesses = request.getfixturevalue("processes")
    return lambda case, *arguments: processes.run(request.param, case, *arguments)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> int:
    return 1 if "single" in request.node.name else WORLD


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [None, UNEVEN], ids=["even", "uneven"])
def test_all_gather_puts_every_ranks_rows_in_order(run: Run, world: int, counts: list[int] | None, dtype: str) -> None:
    counts = counts and counts[:world]
    sizes = counts or [2] * world
    expected = torch.cat([rows(rank, 0, size, DTYPES[dtype]).float() for rank, size in enumerate(sizes)])
    result = run("all_gather", counts, dtype)
    assert result == [expected.tolist()] * world
    assert world == 1 or result[0] != expected.flip(0).tolist()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int64"])
@pytest.mark.parametrize("counts", [None, UNEVEN], ids=["even", "uneven"])
def test_reduce_scatter_sums_each_ranks_rows(run: Run, world: int, counts: list[int] | None, dtype: str) -> None:
    counts = counts and counts[:world]
    sizes = counts or [2] * world
    total = rows(0, 0, sum(sizes), DTYPES[dtype]).float() * (world * (world + 1) // 2)
    assert run("reduce_scatter", counts, dtype) == [part.tolist() for part in total.split(sizes)]


def test_sums_have_the_bits_of_adding_the_ranks_in_order(run: Run, world: int) -> None:
    terms = []
    for rank in range(world):
        torch.manual_seed(rank)
        terms.append(torch.randn(4 * world, WIDTH) * 10.0**rank)

    def bits(order: list[torch.Tensor]) -> list[list[int]]:
        total = order[0].clone()
        for term in order[1:]:
            total += term
        return [part.flatten().tolist() for part in total.view(torch.int32).split(4)]

    result = run("reduce_scatter_bits")
    assert result == bits(terms)
    assert world == 1 or result != bits(terms[::-1])


@pytest.mark.parametrize("dtypes", [["fp32"], ["fp8", "fp32", "int64", "bf16"]], ids=["one", "four payloads"])
@pytest.mark.parametrize(
    "counts", [PAIRS, [[2] * WORLD] * WORLD, [[0] * WORLD] * WORLD], ids=["uneven", "even", "none"]
)
def test_all_to_all_carries_rows_to_whom_they_are_for(
    run: Run, world: int, counts: list[list[int]], dtypes: list[str]
) -> None:
    counts = [of_source[:world] for of_source in counts[:world]]
    result = run("all_to_all", counts, dtypes)
    if counts == PAIRS:
        assert result != run("all_to_all", [list(of_target) for of_target in zip(*counts, strict=True)], dtypes)
    for target, payloads in enumerate(result):
        for dtype, payload in zip(dtypes, payloads, strict=True):
            expected = [
                row
                for source, of_source in enumerate(counts)
                for row in rows(source, sum(of_source[:target]), of_source[target], DTYPES[dtype]).float().tolist()
            ]
            # Two rows more than were announced stay as they were.
            assert payload == expected + [[float(POISON)] * WIDTH] * 2


@pytest.mark.parametrize("dtypes", [["fp32"], ["fp8", "fp32", "int64"]])
def test_an_exchange_says_how_many_rows_came_from_whom(processes: RankProcesses, dtypes: list[str]) -> None:
    results = processes.run("shared_memory", "exchange", PAIRS, dtypes)
    other_way = [list(of_target) for of_target in zip(*PAIRS, strict=True)]
    assert [received for received, _ in results] == other_way != PAIRS
    for target, (_, payloads) in enumerate(results):
        for dtype, payload in zip(dtypes, payloads, strict=True):
            assert payload == [
                row
                for source, of_source in enumerate(PAIRS)
                for row in rows(source, sum(of_source[:target]), of_source[target], DTYPES[dtype]).float().tolist()
            ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_makes_everybody_hold_what_the_source_held(run: Run, world: int, dtype: str) -> None:
    src = world - 1
    result = run("broadcast", src, dtype)
    assert result == [rows(src, 0, 2, DTYPES[dtype]).float().tolist()] * world
    assert world == 1 or result[0] != rows(0, 0, 2, DTYPES[dtype]).float().tolist()


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
def test_calls_in_flight_keep_their_order_whichever_is_waited_for_first(run: Run, world: int, backwards: bool) -> None:
    expected = [[float((100 * rank + 10 * index) % 256) for rank in range(world)] for index in range(9)]
    assert run("many_in_flight", backwards) == [expected] * world


def test_a_unit_falls_into_subgroups_that_know_nothing_of_each_other(run: Run, world: int) -> None:
    members = [[0, 2], [1, 3]] if world == WORLD else [[0]]
    expected = [next(list(map(float, ranks)) for ranks in members if rank in ranks) for rank in range(world)]
    assert run("subgroup_sums", members, "odd-and-even") == expected


@pytest.mark.parametrize("implementation", PROCESSES)
def test_a_rank_that_stays_away_is_named_by_all_within_the_deadline(
    processes: RankProcesses, implementation: str
) -> None:
    results = processes.run(implementation, "rank_stays_away", 2, "stays-away", DEADLINE_S)
    for rank, result in enumerate(results):
        assert result["first"] == result["again"] == [2], f"rank {rank}"
        if rank != 2:
            assert 0.5 * DEADLINE_S < result["first_s"] < 1.8 * DEADLINE_S
        assert result["again_s"] < 0.5 * DEADLINE_S
    # Nobody stays away, and the unit's own group has not noticed.
    assert [result["first"] for result in processes.run(implementation, "rank_stays_away", -1, "all-come", 5.0)] == [
        []
    ] * 4


@pytest.mark.parametrize("implementation", PROCESSES)
def test_a_rank_that_never_joins_is_named_by_all(processes: RankProcesses, implementation: str) -> None:
    results = processes.run(implementation, "joins_alone", 1, "joins-alone", DEADLINE_S)
    assert [named for named, _ in results] == [[1], [], [1], [1]]
    assert max(taken_s for _, taken_s in results) < 1.8 * DEADLINE_S


def test_shared_memory_waits_without_burning_a_core(processes: RankProcesses) -> None:
    shares = processes.run("shared_memory", "cpu_share_of_a_wait", 0, 0.5)
    assert max(shares[1:]) < 0.15


def test_shared_memory_leaves_nothing_behind(processes: RankProcesses) -> None:
    processes.run("shared_memory", "broadcast", 0, "fp32")
    assert [name for name in os.listdir("/dev/shm") if name.startswith(f"baton-{processes.name}")] == []


@pytest.mark.parametrize("implementation", PROCESSES)
def test_a_rank_that_is_killed_is_named_by_all_who_live(tmp_path: Path, implementation: str) -> None:
    deadline_s = 1.0
    ranks = RankProcesses(3, tmp_path)
    try:
        results = ranks.run(implementation, "rank_dies", 1, "dies", deadline_s)
    finally:
        ranks.close()
    assert results[1] is None
    assert [results[0]["first"], results[2]["first"]] == [[1], [1]]
    longest_s = max(results[0]["first_s"], results[2]["first_s"])
    # The kernel tells the ranks of one host; over a network the others get until the deadline to be heard.
    assert longest_s < (0.5 if implementation == "shared_memory" else 1.5) * deadline_s


def test_a_backend_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="gloo, nccl"):
        TorchCollectives(
            backend="mpi", store=torch.distributed.HashStore(), ranks=(0,), rank=0, name="unit", deadline_s=1.0
        )
