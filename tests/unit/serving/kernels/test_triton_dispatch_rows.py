"""Copies of rows for members and their sums in Triton's interpreter, against their definitions; those against the CPU's dispatch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.dispatch_rows import (
    Copies,
    copies_for,
    routing_here,
    spread,
    spread_reference,
    total,
    total_reference,
)
from serving.parallel.collectives import SingleRank
from serving.parallel.hops import Hop, members_wanted, routing_of

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import dispatch_rows as device

# Rows, picks, members, slots of each; all slots of the last case lie at one member.
CASES = [(1, 3, 2, 4), (5, 2, 4, 1), (130, 4, 3, 2), (70, 8, 32, 9), (20, 9, 20, 1), (33, 8, 1, 9)]


def slots_for(num_rows: int, top_k: int, num_slots: int) -> Tensor:
    """Distinct slots, some picks of none, some rows without any."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(num_rows, max(num_slots, top_k), generator=generator).argsort(dim=1)[:, :top_k]
    taken = (torch.rand(num_rows, top_k, generator=generator) < 0.7) & (order < num_slots)
    taken[num_rows // 2] = False
    return torch.where(taken, order, -1).contiguous()


def copies_of(case: tuple[int, int, int, int]) -> tuple[Copies, int]:
    num_rows, top_k, num_members, slots_per_member = case
    copies = copies_for(slots_for(num_rows, top_k, num_members * slots_per_member), slots_per_member, num_members)
    return copies, int(copies.counts_WC[:, 0].sum())


@pytest.mark.parametrize("case", CASES)
def test_copies_stand_by_member_and_in_the_order_of_rows(case: tuple[int, int, int, int]) -> None:
    num_rows, top_k, num_members, slots_per_member = case
    slots = slots_for(num_rows, top_k, num_members * slots_per_member)
    want, got = (op(slots, slots_per_member, num_members) for op in (copies_for, device.copies_for))
    assert torch.equal(got.counts_WC, want.counts_WC)
    assert torch.equal(got.places_TP, want.places_TP)
    assert got.places_TP.dtype == want.places_TP.dtype == torch.int32
    # As the CPU's hops have it.
    hop = Hop(SingleRank(), members_wanted(slots // slots_per_member, num_members))
    assert torch.equal(spread(torch.arange(num_rows)[:, None], want, len(hop.rows_N))[:, 0], hop.rows_N)
    assert torch.equal(want.counts_WC[:, :1], hop.counts_WC)
    assert int(want.counts_WC[:, 1].sum()) == int((slots >= 0).sum())
    if num_rows > 1 and num_members > 1:
        other = device.copies_for(slots.flip(0).contiguous(), slots_per_member, num_members)
        assert not torch.equal(other.places_TP, want.places_TP)


def test_of_no_rows_there_are_no_copies() -> None:
    copies = device.copies_for(torch.empty(0, 8, dtype=torch.int64), 9, 4)
    assert torch.equal(copies.counts_WC, torch.zeros(4, 2, dtype=torch.int64))
    assert device.spread(torch.empty(0, 16), copies, 0).shape == (0, 16)
    assert device.total(torch.empty(0, 16), copies).shape == (0, 16)
    slots, weights = device.routing_here(torch.empty(0, 16, dtype=torch.int32), 0, 9)
    assert slots.shape == weights.shape == (0, 8)


@pytest.mark.parametrize("case", [(21, 4, 3, 2), (14, 8, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_rows_are_copied_to_the_bit(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    copies, num_copies = copies_of(case)
    for width in (24, 7, 1030):
        x = torch.randint(100, (case[0], width), generator=torch.Generator().manual_seed(1)).to(dtype)
        got, want = device.spread(x, copies, num_copies), spread_reference(x, copies, num_copies)
        assert got.dtype == dtype
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        assert not torch.equal(device.spread(x.flip(0), copies, num_copies).view(torch.uint8), want.view(torch.uint8))


def test_scales_that_lie_by_column_leave_row_by_row() -> None:
    copies, num_copies = copies_of(CASES[2])
    scales = torch.rand(56, 132).t()[:130]
    got = device.spread(scales, copies, num_copies)
    assert got.is_contiguous()
    assert torch.equal(got, spread_reference(scales.contiguous(), copies, num_copies))
    # Rows of a wider matrix whose bytes are no whole words.
    x = torch.randint(100, (130, 9), dtype=torch.uint8)[:, 1:5]
    assert torch.equal(device.spread(x, copies, num_copies), spread_reference(x, copies, num_copies))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_have_the_cpus_bits(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    num_rows, top_k, num_members, slots_per_member = case
    copies, num_copies = copies_of(case)
    y = torch.randn(num_copies, 70, generator=torch.Generator().manual_seed(2)).to(dtype)
    want = total_reference(y, copies)
    assert torch.equal(device.total(y, copies), want)
    assert (want[num_rows // 2] == 0).all()
    added = torch.randn(num_rows, 70, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(device.total(y, copies, added), want + added)
    assert num_rows == 1 or not torch.equal(device.total(y, copies, added.flip(0)), want + added)
    slots = slots_for(num_rows, top_k, num_members * slots_per_member)
    hop = Hop(SingleRank(), members_wanted(slots // slots_per_member, num_members))
    assert torch.equal(hop.total(y), want)
    assert num_rows == 1 or not torch.equal(total(y.flip(0), copies), want)


def test_what_is_added_has_as_many_rows_as_there_are_sums() -> None:
    copies, num_copies = copies_of(CASES[2])
    y = torch.randn(num_copies, 70)
    for added in (torch.zeros(129, 70), torch.zeros(1, 70), torch.zeros(130, 69)):
        with pytest.raises(AssertionError, match="added to 130 rows of 70"):
            device.total(y, copies, added)


def test_bf16_sums_are_rounded_once_as_the_cpus_are() -> None:
    num_rows, top_k, num_members, slots_per_member = CASES[3]
    copies, num_copies = copies_of(CASES[3])
    y = torch.randn(num_copies, 70, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    slots = slots_for(num_rows, top_k, num_members * slots_per_member)
    hop = Hop(SingleRank(), members_wanted(slots // slots_per_member, num_members))
    exact, got = total(y.float(), copies), total(y, copies)
    assert torch.equal(got, exact.to(torch.bfloat16))
    added = torch.randn(num_rows, 70, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    together = total(y, copies, added)
    assert torch.equal(together, (exact + added.float()).to(torch.bfloat16))
    assert not torch.equal(together, got + added)
    # PyTorch's sum on a CPU rounds what lies in the middle away from zero.
    other = hop.total(y)
    assert torch.equal((other - exact).abs(), (got - exact).abs())
    assert (other - got).abs().max() > 0


@pytest.mark.parametrize("first", [0, 4, 30])
def test_routing_names_the_slots_that_are_here(first: int) -> None:
    slots = slots_for(50, 8, 36)
    weights = torch.rand(50, 8)
    routing = routing_of(slots, weights)
    got_slots, got_weights = device.routing_here(routing, first, 9)
    assert torch.equal(got_weights, weights)
    here = (slots >= first) & (slots < first + 9)
    assert torch.equal(got_slots, torch.where(here, slots - first, -1))
    want_slots, want_weights = routing_here(routing, first, 9)
    assert torch.equal(got_slots, want_slots)
    assert torch.equal(got_weights, want_weights)
    assert not torch.equal(device.routing_here(routing, first + 1, 9)[0], want_slots)
