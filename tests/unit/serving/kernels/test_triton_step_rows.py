"""A decode step's rows by their slots, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.step_rows import StepRows, step_rows_reference
from serving.kernels.triton import step_rows as device

NUM_SLOTS, NUM_PAGES, SCRATCH = 6, 21, 99


@pytest.mark.parametrize("block", [8, 1024])
def test_each_row_has_its_slots_pages_and_the_one_of_its_own_token(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_MOST_COLUMNS", block)
    table = torch.randint(0, 90, (NUM_SLOTS + 1, NUM_PAGES), dtype=torch.int32)
    table[NUM_SLOTS] = SCRATCH
    last_token = torch.arange(100, 101 + NUM_SLOTS)
    # The last two are nobody's, as in a captured step with rows to spare.
    slots = torch.tensor([3, 0, 5, NUM_SLOTS, NUM_SLOTS])
    positions = torch.tensor([0, 64 * 20 + 63, 64 * 9, 0, 0])
    row_ids = torch.tensor([7, 64 * 91 + 63, 64 * 92, 64 * SCRATCH, 64 * SCRATCH])
    want_table = table.clone()
    want = step_rows_reference(want_table, last_token, slots, positions, row_ids)
    before = table.clone()
    got = StepRows(*device.step_rows(table, last_token, slots, positions, row_ids))
    assert torch.equal(table, want_table)
    assert not torch.equal(table, before)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert got.page_table_BP[1, 20] == 91
    assert got.context_lens_B.tolist() == [1, 1344, 577, 1, 1]
