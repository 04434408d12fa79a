"""Random requests at random times on the DP groups of a unit, some idle: for up to 200 rounds no deadlock and no difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.config import UnitTable
from serving.engine.unit import MicroBatches
from tests.engine_factory import GREEDY, create_engine, create_loop, random_prompts
from tests.unit.serving.engine.unit_loops import Arrival, run_unit

MOST_ROUNDS = 200
NUM_NEW = 12
LENGTHS = [1, 2, 5, 17, 40, 63, 64, 65, 66, 90, 110, 127, 128, 130, 160, 190]
TABLES = [
    UnitTable(tp=2, dp=2, ranks_per_node=2, redundant_experts=4),
    UnitTable(tp=2, dp=2, ranks_per_node=4, ep=2),
    UnitTable(tp=1, dp=4, ranks_per_node=2, redundant_experts=8, shared_expert_routed=True),
    UnitTable(tp=4, dp=1, ranks_per_node=4),
    UnitTable(tp=2, dp=2, ranks_per_node=2, redundant_experts=4, hosted_slots=5),
    UnitTable(tp=1, dp=4, ranks_per_node=4, redundant_experts=4, hosted_slots=4, shared_expert_routed=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS, seed=4)


@pytest.fixture(scope="module")
def wanted(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    return create_loop(create_engine(folder), max_batched_tokens=48).generate(prompts, GREEDY, NUM_NEW)


@given(table=st.sampled_from(TABLES), data=st.data())
@settings(max_examples=12, deadline=None)
def test_whatever_comes_when_the_text_is_that_of_one_rank(
    folder: Path, prompts: list[list[int]], wanted: list[list[int]], table: UnitTable, data: st.DataObject
) -> None:
    number, arrivals = 0, []
    for _ in range(table.dp):
        round, requests = 0, []
        for gap in data.draw(st.lists(st.integers(0, 40), max_size=8)):
            round += gap
            prompt = data.draw(st.integers(0, len(prompts) - 1))
            num_new = data.draw(st.integers(1, NUM_NEW))
            requests.append(Arrival(round=round, number=number, prompt=prompts[prompt], num_new=num_new))
            number += 1
        arrivals.append([request for request in requests if request.round < MOST_ROUNDS - 40])
    outcome = run_unit(
        folder,
        table,
        arrivals,
        micro_batches=data.draw(st.sampled_from([None, MicroBatches(prefill_tokens=8, rows=2)])),
        by_nodes=data.draw(st.booleans()),
        run_ahead=data.draw(st.booleans()),
        balances=data.draw(st.booleans()),
    )
    of_prompt = {tuple(prompt): text for prompt, text in zip(prompts, wanted, strict=True)}
    assert outcome.texts == {
        request.number: of_prompt[tuple(request.prompt)][: request.num_new]
        for of_group in arrivals
        for request in of_group
    }
    assert len(set(outcome.num_rounds)) == 1
