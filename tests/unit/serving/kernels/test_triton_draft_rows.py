"""What a step with drafts picks of its slots and leaves there, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.draft_rows import accepted_reference, opened_reference, placed_reference
from serving.kernels.triton import draft_rows as device

NUM_SLOTS, NUM_PAGES, WIDTH, SCRATCH = 6, 21, 40, 99


def state() -> list[Tensor]:
    """Page table, positions, last tokens, hidden states; the last slot is nobody's."""
    table = torch.randint(0, 90, (NUM_SLOTS + 1, NUM_PAGES), dtype=torch.int32)
    table[NUM_SLOTS] = SCRATCH
    positions, tokens = torch.arange(70, 71 + NUM_SLOTS), torch.arange(100, 101 + NUM_SLOTS)
    return [table, positions, tokens, torch.randn(NUM_SLOTS + 1, WIDTH)]


@pytest.mark.parametrize("block", [8, 1024])
def test_a_row_has_what_its_slot_has(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_MOST_COLUMNS", block)
    ours = state()
    theirs = [part.clone() for part in ours]
    before = ours[0].clone()
    rows = (
        torch.tensor([3, 0, 5, NUM_SLOTS, NUM_SLOTS]),
        torch.tensor([-1, 640, -1, 0, 0]),
        torch.tensor([2, 10, 20, 20, 20]),
        torch.tensor([91, 92, SCRATCH, SCRATCH, SCRATCH]),
    )
    got, want = device.opened(*ours, *rows), opened_reference(*theirs, *rows)
    for one, other in zip([*ours, *got], [*theirs, *want], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert not torch.equal(ours[0], before)
    assert got[1].tolist() == [73, 640, 75, 0, 0]


@pytest.mark.parametrize(("first", "num_tokens"), [(0, 1), (2, 1), (0, 3), (0, 4)])
def test_tokens_have_places_behind_the_position(first: int, num_tokens: int) -> None:
    table, positions = torch.randint(0, 90, (3, NUM_PAGES), dtype=torch.int32), torch.tensor([0, 62, 640])
    got = device.placed(table, positions, first=first, num_tokens=num_tokens)
    want = placed_reference(table, positions, first=first, num_tokens=num_tokens)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other.to(one.dtype))
    assert not torch.equal(device.placed(table + 1, positions, first=first, num_tokens=num_tokens)[2], got[2])


@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_drafts_count_up_to_the_first_that_was_not_drawn(
    num_drafts: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_MOST_COLUMNS", block)
    _, positions, tokens, hidden = state()
    slots, rows = torch.tensor([4, 1, 0, 2, 3]), 5
    drawn = torch.randint(0, 1000, (rows, num_drafts + 1))
    drafts = drawn[:, :-1].clone()
    for row in range(rows):
        # Row r loses its r-th draft, and one behind it agrees again.
        drafts[row, row : row + 1] += 1
    drafts = drafts.t().contiguous().t()
    at, states = torch.arange(200, 200 + rows), torch.randn(rows, num_drafts + 1, WIDTH)
    ours = [tokens.clone(), hidden.clone(), positions.clone()]
    got = device.accepted(*ours, slots, at, states, drawn, drafts)
    theirs = [tokens.clone(), hidden.clone(), positions.clone()]
    want = accepted_reference(*theirs, slots, at, states, drawn, drafts)
    assert torch.equal(got, want)
    assert got[:, -1].tolist() == [min(row, num_drafts) for row in range(rows)]
    for one, other, old in zip(ours, theirs, (tokens, hidden, positions), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, old)
        assert torch.equal(one[5:], old[5:])
