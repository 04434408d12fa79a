"""What a step with drafts picks of its slots and leaves there, on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.draft_rows import (
    Placed,
    accepted,
    accepted_reference,
    opened,
    opened_reference,
    placed,
    placed_reference,
)
from tests.gpu.graphs import replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_SLOTS, NUM_ROWS, NUM_PAGES, WIDTH, NUM_DRAFTS = 40, 17, 2561, 7168, 3


def randint(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, device="cuda")


def test_graph_and_eager_of_each_part_of_a_step_equal_the_reference() -> None:
    torch.manual_seed(0)
    slots = torch.randperm(NUM_SLOTS, device="cuda")[:NUM_ROWS]
    table, positions, last_token = (
        randint(9000, NUM_SLOTS, NUM_PAGES).int(),
        randint(9000, NUM_SLOTS),
        randint(9000, NUM_SLOTS),
    )
    hidden = torch.randn(NUM_SLOTS, WIDTH, device="cuda", dtype=torch.bfloat16)
    # Each part leaves in the slots what it leaves when it comes again, as in a graph's first run and its replay.
    eager, captured, theirs = ([x.clone() for x in (table, positions, last_token, hidden)] for _ in range(3))
    known = torch.where(randint(2, NUM_ROWS) > 0, randint(9000, NUM_ROWS), -1)
    rows = slots, known, randint(NUM_PAGES, NUM_ROWS), randint(9000, NUM_ROWS)
    got, again = opened(*eager, *rows), replayed(lambda: opened(*captured, *rows))
    want = opened_reference(*theirs, *rows)
    for one, other, right in zip([*eager, *got], [*captured, *again], [*theirs, *want], strict=True):
        assert torch.equal(one, right)
        assert torch.equal(other, right)
    assert not torch.equal(eager[0], table)

    def tokens(first: int = 0) -> Placed:
        return placed(got.page_table_BP, got.positions_B, first=first, num_tokens=NUM_DRAFTS + 1)

    places = placed_reference(want.page_table_BP, want.positions_B, first=0, num_tokens=NUM_DRAFTS + 1)
    for one, other, right in zip(tokens(), replayed(tokens), places, strict=True):
        assert torch.equal(one, right.to(one.dtype))
        assert torch.equal(other, one)
    assert not torch.equal(tokens(1).row_ids_N, places.row_ids_N)

    drawn = randint(3, NUM_ROWS, NUM_DRAFTS + 1)
    states = torch.randn(NUM_ROWS, NUM_DRAFTS + 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    step = slots, got.positions_B, states, drawn, randint(3, NUM_ROWS, NUM_DRAFTS)

    def counted(state: list[Tensor]) -> Tensor:
        return accepted(state[2], state[3], state[1], *step)

    counts = counted(eager)
    assert torch.equal(counts, accepted_reference(theirs[2], theirs[3], theirs[1], *step))
    assert torch.equal(replayed(lambda: counted(captured)), counts)
    assert len(counts[:, -1].unique()) > 1
    of_slots = zip(eager[1:], captured[1:], theirs[1:], (positions, last_token, hidden), strict=True)
    for one, other, right, old in of_slots:
        assert torch.equal(one, right)
        assert torch.equal(other, right)
        assert not torch.equal(one, old)
