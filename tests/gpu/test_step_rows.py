"""A decode step's rows by their slots, eager and in a graph whose rows change."""

from __future__ import annotations

import pytest
import torch

from serving.kernels.step_rows import step_rows, step_rows_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("num_pages", [5, 2561])
def test_graph_and_eager_equal_the_reference(num_pages: int) -> None:
    num_slots, num_rows = 40, 17
    table = torch.randint(0, 9000, (num_slots, num_pages), dtype=torch.int32, device="cuda")
    last_token = torch.randint(0, 9000, (num_slots,), device="cuda")

    def rows(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        slots = torch.randperm(num_slots, generator=generator)[:num_rows]
        positions = torch.randint(0, 64 * num_pages, (num_rows,), generator=generator)
        pages = torch.randint(0, 9000, (num_rows,), generator=generator)
        return [slots.cuda(), positions.cuda(), (pages * 64).cuda() + positions.cuda() % 64]

    inputs = rows(0)
    step_rows(table.clone(), last_token, *inputs)
    own = table.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step_rows(own, last_token, *inputs)
    for seed in (1, 2):
        for old, new in zip(inputs, rows(seed), strict=True):
            old.copy_(new)
        before = own.clone()
        want_table = own.clone()
        want = step_rows_reference(want_table, last_token, *inputs)
        eager_table = own.clone()
        eager = step_rows(eager_table, last_token, *inputs)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(own, want_table)
        assert torch.equal(eager_table, want_table)
        assert not torch.equal(own, before)
        for ours, captured_one, theirs in zip(eager, captured, want, strict=True):
            assert torch.equal(ours, theirs)
            assert torch.equal(captured_one, theirs)
