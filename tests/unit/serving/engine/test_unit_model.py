"""A unit's text is one rank's text, whatever groups have work and when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.core.config import UnitTable
from serving.engine.unit import MicroBatches
from serving.model import hosting
from serving.model.hosting import slots_by_share
from serving.parallel.collectives import RanksMissing
from serving.parallel.virtual import Fault
from tests.engine_factory import GREEDY, create_engine, create_loop, random_prompts
from tests.unit.serving.engine.unit_loops import Arrival, run_unit

NUM_NEW = 4
LENGTHS = [1, 40, 64, 70, 130, 2, 65, 12]
TP2_DP2 = UnitTable(tp=2, dp=2, ranks_per_node=2, redundant_experts=4)
TP1_DP4 = UnitTable(tp=1, dp=4, ranks_per_node=4)
HOSTED_TP2_DP2 = UnitTable(tp=2, dp=2, ranks_per_node=2, redundant_experts=4, hosted_slots=5)
HOSTED_DP4 = UnitTable(tp=1, dp=4, ranks_per_node=4, redundant_experts=4, hosted_slots=4, shared_expert_routed=True)
SPLIT = MicroBatches(prefill_tokens=8, rows=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS, seed=3)


@pytest.fixture(scope="module")
def wanted(folder: Path, prompts: list[list[int]]) -> dict[int, list[int]]:
    loop = create_loop(create_engine(folder), max_batched_tokens=48)
    return dict(enumerate(loop.generate(prompts, GREEDY, NUM_NEW)))


def _arrivals(prompts: list[list[int]], dp: int) -> list[list[Arrival]]:
    """The last group has nothing; the second begins while the first is at work; after a pause there is more."""
    numbers = [range(dp_rank, len(prompts), dp - 1) for dp_rank in range(dp - 1)]
    return [
        [
            Arrival(round=4 * dp_rank + 20 * (i // 2), number=number, prompt=prompts[number], num_new=NUM_NEW)
            for i, number in enumerate(of_group)
        ]
        for dp_rank, of_group in enumerate(numbers)
    ] + [[]]


@pytest.mark.parametrize(
    ("table", "micro_batches", "by_nodes", "run_ahead", "balances"),
    [
        (TP2_DP2, None, False, False, False),
        (TP2_DP2, SPLIT, True, True, True),
        (TP1_DP4, None, False, True, True),
        (TP1_DP4, SPLIT, False, False, False),
        (HOSTED_TP2_DP2, SPLIT, True, True, True),
        (HOSTED_DP4, None, False, False, True),
    ],
)
def test_the_text_is_that_of_one_rank(
    folder: Path,
    prompts: list[list[int]],
    wanted: dict[int, list[int]],
    table: UnitTable,
    micro_batches: MicroBatches | None,
    by_nodes: bool,
    run_ahead: bool,
    balances: bool,
) -> None:
    outcome = run_unit(
        folder,
        table,
        _arrivals(prompts, table.dp),
        micro_batches=micro_batches,
        by_nodes=by_nodes,
        run_ahead=run_ahead,
        balances=balances,
    )
    assert outcome.texts == wanted
    assert (outcome.placement_version > 1) == balances
    assert len(set(outcome.num_rounds)) == 1


def test_a_wrong_expert_of_a_rank_without_work_shows(
    folder: Path, prompts: list[list[int]], wanted: dict[int, list[int]]
) -> None:
    outcome = run_unit(folder, TP1_DP4, _arrivals(prompts, 4), spoil_rank=3)
    assert outcome.texts.keys() == wanted.keys()
    assert outcome.texts != wanted


def test_a_token_in_a_slot_that_does_not_hold_its_expert_shows(
    folder: Path, prompts: list[list[int]], wanted: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_moved = 0

    def moved(experts_TK: Tensor, share_S: Tensor, by_expert_S: Tensor, num_experts: int) -> Tensor:
        nonlocal num_moved
        slots_TK = slots_by_share(experts_TK, share_S, by_expert_S, num_experts)
        if len(slots_TK):
            # Of the first expert; of the last one, where that is its own.
            slots_TK[0, 0] = by_expert_S[0 if experts_TK[0, 0] else -2]
            num_moved += 1
        return slots_TK

    monkeypatch.setattr(hosting, "slots_by_share", moved)
    outcome = run_unit(folder, HOSTED_TP2_DP2, _arrivals(prompts, 2))
    assert num_moved
    assert outcome.texts.keys() == wanted.keys()
    assert outcome.texts != wanted


@pytest.mark.parametrize(("rank", "call"), [(1, 60), (2, 200)])
def test_a_rank_that_dies_in_a_step_ends_the_unit(folder: Path, prompts: list[list[int]], rank: int, call: int) -> None:
    outcome = run_unit(folder, TP2_DP2, _arrivals(prompts, 2), faults=[Fault(rank=rank, call=call)])
    named = {other: error.ranks for other, error in outcome.errors.items() if isinstance(error, RanksMissing)}
    assert named.keys() == set(range(4))
    assert all(rank in ranks for ranks in named.values())
