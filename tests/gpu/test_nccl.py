"""Collectives over NCCL between two GPUs: the contract of all implementations, in CUDA graphs too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu import nccl_cases
from tests.unit.serving.parallel.rank_cases import DTYPES, POISON, WIDTH, rows
from tests.unit.serving.parallel.rank_processes import RankProcesses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
    # Its ranks are started once, by one worker.
    pytest.mark.xdist_group("nccl"),
]

WORLD = 2
PAIRS = [[1, 2], [0, 3]]
DEADLINE_S = 2.0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    ranks = RankProcesses(WORLD, tmp_path_factory.mktemp("ranks"), on_gpus=True)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [None, [3, 0], [1, 4], [0, 0]], ids=["even", "one without", "uneven", "none"])
def test_all_gather_puts_every_ranks_rows_in_order(ranks: RankProcesses, counts: list[int] | None, dtype: str) -> None:
    expected = torch.cat([rows(rank, 0, size, DTYPES[dtype]).float() for rank, size in enumerate(counts or [2, 2])])
    result = ranks.run("nccl", "all_gather", counts, dtype)
    assert result == [expected.tolist()] * WORLD
    assert not len(expected) or counts == [3, 0] or result[0] != expected.flip(0).tolist()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int64"])
@pytest.mark.parametrize("counts", [None, [3, 0], [1, 4]], ids=["even", "one without", "uneven"])
def test_reduce_scatter_sums_each_ranks_rows(ranks: RankProcesses, counts: list[int] | None, dtype: str) -> None:
    sizes = counts or [2, 2]
    total = rows(0, 0, sum(sizes), DTYPES[dtype]).float() * 3
    assert ranks.run("nccl", "reduce_scatter", counts, dtype) == [part.tolist() for part in total.split(sizes)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows_each", [1, 5, 4096])
def test_a_sum_of_two_ranks_is_that_of_an_addition(ranks: RankProcesses, dtype: str, rows_each: int) -> None:
    for found, expected, other in ranks.run("nccl", nccl_cases.sums, dtype, rows_each):
        assert found == expected
        assert rows_each == 1 or found != other


@pytest.mark.parametrize("dtypes", [["fp32"], ["fp8", "fp32", "int64", "bf16"]], ids=["one", "four payloads"])
@pytest.mark.parametrize("counts", [PAIRS, [[2, 2]] * 2, [[0, 0]] * 2], ids=["uneven", "even", "none"])
def test_all_to_all_carries_rows_to_whom_they_are_for(
    ranks: RankProcesses, counts: list[list[int]], dtypes: list[str]
) -> None:
    result = ranks.run("nccl", "all_to_all", counts, dtypes)
    if counts == PAIRS:
        assert result != ranks.run("nccl", "all_to_all", [list(column) for column in zip(*counts, strict=True)], dtypes)
    for target, payloads in enumerate(result):
        for dtype, payload in zip(dtypes, payloads, strict=True):
            expected = [
                row
                for source, of_source in enumerate(counts)
                for row in rows(source, sum(of_source[:target]), of_source[target], DTYPES[dtype]).float().tolist()
            ]
            assert payload == expected + [[float(POISON)] * WIDTH] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_makes_everybody_hold_what_the_source_held(ranks: RankProcesses, dtype: str) -> None:
    assert ranks.run("nccl", "broadcast", 1, dtype) == [rows(1, 0, 2, DTYPES[dtype]).float().tolist()] * WORLD


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
def test_calls_in_flight_keep_their_order_whichever_is_waited_for_first(ranks: RankProcesses, backwards: bool) -> None:
    expected = [[float((100 * rank + 10 * index) % 256) for rank in range(WORLD)] for index in range(9)]
    assert ranks.run("nccl", "many_in_flight", backwards) == [expected] * WORLD


def test_subgroups_know_nothing_of_each_other(ranks: RankProcesses) -> None:
    assert ranks.run("nccl", "subgroup_sums", [[0], [1]], "alone") == [[0.0], [1.0]]
    assert ranks.run("nccl", "subgroup_sums", [[0, 1]], "together") == [[0.0, 1.0]] * 2


@pytest.mark.parametrize("max_ctas", [1, 4])
def test_few_processors_are_enough(ranks: RankProcesses, max_ctas: int) -> None:
    expected = [row[0] for rank in range(WORLD) for row in rows(rank, 0, 5000, torch.float32).tolist()]
    assert ranks.run("nccl", nccl_cases.few_processors, max_ctas) == [expected] * WORLD


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_captured_step_does_what_the_calls_do(ranks: RankProcesses, dtype: str) -> None:
    for found in ranks.run("nccl", nccl_cases.captured, dtype):
        assert found[0::2] == found[1::2]
        assert found[0] != found[2]


@pytest.mark.parametrize("replays", [False, True], ids=["called", "captured"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("form", ["direct", "fixed"])
@pytest.mark.parametrize("num_tokens", [[5, 8], [0, 7], [64, 64]], ids=["uneven", "idle", "even"])
def test_rows_find_their_experts_and_back(
    ranks: RankProcesses, num_tokens: list[int], form: str, fp8: bool, replays: bool
) -> None:
    if replays and form == "direct":
        pytest.skip("its counts are read on the host")
    assert max(ranks.run("nccl", nccl_cases.moved, form, num_tokens, fp8, replays, False)) <= 2**-7
    assert max(ranks.run("nccl", nccl_cases.moved, form, num_tokens, fp8, replays, True)) > 0.1


def test_a_rank_that_stays_away_is_named_by_all_within_the_deadline(tmp_path: Path) -> None:
    ranks = RankProcesses(WORLD, tmp_path, on_gpus=True)
    try:
        assert [one["first"] for one in ranks.run("nccl", "rank_stays_away", -1, "all-come", 20.0)] == [[], []]
        there, away = ranks.run("nccl", "rank_stays_away", 1, "stays-away", DEADLINE_S)
        assert there["first"] == there["again"] == away["first"] == away["again"] == [1]
        assert 0.5 * DEADLINE_S < there["first_s"] < 1.8 * DEADLINE_S
        assert there["again_s"] < 0.5 * DEADLINE_S
        named, none = ranks.run("nccl", "joins_alone", 1, "joins-alone", DEADLINE_S)
        assert (named[0], none[0]) == ([1], [])
        assert named[1] < 1.8 * DEADLINE_S
    finally:
        ranks.close()


def test_a_rank_that_is_killed_is_named_by_who_lives(tmp_path: Path) -> None:
    ranks = RankProcesses(WORLD, tmp_path, on_gpus=True)
    try:
        alive, dead = ranks.run("nccl", "rank_dies", 1, "dies", DEADLINE_S)
        assert dead is None
        assert alive["first"] == [1]
        assert alive["first_s"] < 1.8 * DEADLINE_S
        # What was aborted hinders nobody: the device computes.
        assert ranks.run_on("nccl", 0, nccl_cases.still_computes) == 6.0
    finally:
        ranks.close()
