"""What a step with drafts picks of its slots and leaves there, on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.draft_rows import (
    accepted,
    accepted_reference,
    opened,
    opened_reference,
    placed,
    placed_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_SLOTS, NUM_ROWS, NUM_PAGES, WIDTH, NUM_DRAFTS = 40, 17, 2561, 7168, 3


def randint(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, device="cuda")


def test_each_part_of_a_step_equals_the_reference() -> None:
    torch.manual_seed(0)
    slots = torch.randperm(NUM_SLOTS, device="cuda")[:NUM_ROWS]
    table, positions, last_token = (
        randint(9000, NUM_SLOTS, NUM_PAGES).int(),
        randint(9000, NUM_SLOTS),
        randint(9000, NUM_SLOTS),
    )
    hidden = torch.randn(NUM_SLOTS, WIDTH, device="cuda", dtype=torch.bfloat16)
    ours, theirs = ([x.clone() for x in (table, positions, last_token, hidden)] for _ in range(2))
    known = torch.where(randint(2, NUM_ROWS) > 0, randint(9000, NUM_ROWS), -1)
    rows = slots, known, randint(NUM_PAGES, NUM_ROWS), randint(9000, NUM_ROWS)
    got, want = opened(*ours, *rows), opened_reference(*theirs, *rows)
    for one, other in zip([*ours, *got], [*theirs, *want], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(ours[0], table)

    tokens = placed(got.page_table_BP, got.positions_B, first=0, num_tokens=NUM_DRAFTS + 1)
    for one, other in zip(
        tokens, placed_reference(want.page_table_BP, want.positions_B, first=0, num_tokens=NUM_DRAFTS + 1), strict=True
    ):
        assert torch.equal(one, other.to(one.dtype))

    drawn = randint(3, NUM_ROWS, NUM_DRAFTS + 1)
    states = torch.randn(NUM_ROWS, NUM_DRAFTS + 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    step = slots, got.positions_B, states, drawn, randint(3, NUM_ROWS, NUM_DRAFTS)
    counts = accepted(ours[2], ours[3], ours[1], *step)
    assert torch.equal(counts, accepted_reference(theirs[2], theirs[3], theirs[1], *step))
    assert len(counts[:, -1].unique()) > 1
    for one, other, old in zip(ours[1:], theirs[1:], (positions, last_token, hidden), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, old)
