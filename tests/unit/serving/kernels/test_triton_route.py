"""The device's way from experts to slots against plain torch, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from serving.kernels.route import route_reference
from serving.kernels.triton.route import route

EXPERTS = 11


def tables(most: int) -> tuple[Tensor, Tensor]:
    """Slots [E + 2, C] and copies [E + 2]: one row more for the shared expert, and the last for no expert."""
    some = torch.Generator().manual_seed(most)
    copies = torch.randint(1, most + 1, (EXPERTS + 2,), generator=some)
    slots = torch.randperm((EXPERTS + 2) * most, generator=some).view(-1, most)
    slots[torch.arange(most) >= copies[:, None]] = -1
    slots[-1], copies[-1] = -1, 1
    return slots, copies


@pytest.mark.parametrize("nobodys", [False, True])
@pytest.mark.parametrize("shared", [None, EXPERTS])
@pytest.mark.parametrize(("num_tokens", "top_k", "most"), [(5, 3, 4), (1, 8, 1), (0, 2, 2), (1030, 2, 3)])
def test_slots_weights_and_counts_are_the_reference_s(
    num_tokens: int, top_k: int, most: int, shared: int | None, nobodys: bool
) -> None:
    some = torch.Generator().manual_seed(num_tokens)
    experts = torch.rand(num_tokens, EXPERTS, generator=some).argsort(1)[:, :top_k]
    weights = torch.rand(num_tokens, top_k, generator=some)
    nobody = torch.rand(num_tokens, generator=some) < 0.4 if nobodys else None
    found_counts, counts = torch.full((2, EXPERTS), 7)
    found = route(experts, weights, nobody, *tables(most), found_counts, first=9, shared=shared)
    expected = route_reference(experts, weights, nobody, *tables(most), counts, first=9, shared=shared)
    assert torch.equal(found_counts, counts)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    if num_tokens > 1 and most > 1:
        other, _ = route_reference(experts, weights, nobody, *tables(most), counts, first=10, shared=shared)
        assert not torch.equal(found[0], other)
