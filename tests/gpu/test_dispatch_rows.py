"""What a counted dispatch does on the device: the definitions' bits; and a host that waits for counts alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.dispatch_rows import (
    Copies,
    copies_for,
    copies_for_reference,
    routing_here,
    routing_here_reference,
    spread,
    spread_reference,
    total,
    total_reference,
)
from serving.kernels.experts import grouped_mlp
from serving.kernels.quant import QuantisedRows, quantise_rows_fp8
from serving.parallel.collectives import SingleRank
from serving.parallel.dispatch import DirectDispatch, Dispatch, HierarchicalDispatch
from serving.parallel.hops import Hop, hop_to, members_wanted, routing_of
from serving.parallel.rehearsal import Rehearsal
from tests.gpu.graphs import replayed
from tests.gpu.test_experts import fp8_stack, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Rows, picks, members, slots of each.
CASES = [(2, 3, 2, 4), (130, 4, 3, 2), (5000, 8, 32, 9), (5000, 8, 4, 72), (700, 9, 320, 1), (300, 8, 1, 9)]


def slots_for(num_rows: int, top_k: int, num_slots: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    order = torch.rand(num_rows, max(num_slots, top_k), generator=generator, device="cuda").argsort(dim=1)[:, :top_k]
    taken = (torch.rand(num_rows, top_k, generator=generator, device="cuda") < 0.8) & (order < num_slots)
    taken[num_rows // 2] = False
    return torch.where(taken, order, -1).contiguous()


def copies_of(case: tuple[int, int, int, int]) -> tuple[Copies, int]:
    num_rows, top_k, num_members, slots_per_member = case
    slots = slots_for(num_rows, top_k, num_members * slots_per_member)
    copies = copies_for_reference(slots, slots_per_member, num_members)
    return copies, int(copies.counts_WC[:, 0].sum())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies_are_those_of_the_definition(case: tuple[int, int, int, int]) -> None:
    num_rows, top_k, num_members, slots_per_member = case
    slots = slots_for(num_rows, top_k, num_members * slots_per_member)
    want = copies_for_reference(slots, slots_per_member, num_members)
    for got in (
        copies_for(slots, slots_per_member, num_members),
        replayed(lambda: copies_for(slots, slots_per_member, num_members)),
    ):
        assert torch.equal(got.counts_WC, want.counts_WC)
        assert torch.equal(got.places_TP, want.places_TP)
    if num_members > 1:
        other = copies_for(slots.flip(0).contiguous(), slots_per_member, num_members)
        assert not torch.equal(other.places_TP, want.places_TP)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_copied_and_summed_to_the_bit(case: tuple[int, int, int, int]) -> None:
    copies, num_copies = copies_of(case)
    reverse = Copies(counts_WC=copies.counts_WC, places_TP=copies.places_TP.flip(0).contiguous())
    rows = quantise_rows_fp8(randn(case[0], 7168))
    routing = torch.randint(1 << 30, (case[0], 16), dtype=torch.int32, device="cuda")
    for x in (rows.values, rows.scales, routing, randn(case[0], 130), rows.values[:, 1:56]):
        got = spread(x, copies, num_copies)
        assert got.is_contiguous()
        assert got.dtype == x.dtype
        want = spread_reference(_plain(x), copies, num_copies)
        assert torch.equal(_plain(got), want)
        assert not torch.equal(_plain(spread(x, reverse, num_copies)), want)
    for y in (randn(num_copies, 7168), randn(num_copies, 70).float(), randn(num_copies, 33).double()):
        got, want = total(y, copies), total_reference(y, copies)
        assert torch.equal(got, want)
        assert torch.equal(replayed(lambda: total(y, copies)), want)  # noqa: B023
        assert not torch.equal(total(-y, copies), want)
        added = randn(case[0], y.shape[1], seed=1).to(y.dtype)
        both = total_reference(y, copies, added)
        assert torch.equal(total(y, copies, added), both)
        assert not torch.equal(total(y, copies, added.flip(0)), both)
    if case[2] <= 32:
        slots = slots_for(case[0], case[1], case[2] * case[3]).cpu()
        hop = Hop(SingleRank(), members_wanted(slots // case[3], case[2]))
        y = randn(num_copies, 70).float()
        assert torch.equal(total(y, copies).cpu(), hop.total(y.cpu()))


def _plain(x: Tensor) -> Tensor:
    """FP8 knows no choice of rows."""
    return x.contiguous().view(torch.uint8) if x.element_size() == 1 else x


def test_routing_names_the_slots_that_are_here() -> None:
    routing = routing_of(slots_for(5000, 8, 288), torch.rand(5000, 8, device="cuda"))
    for first, num_slots in ((0, 9), (81, 9), (216, 72)):
        got, want = (op(routing, first, num_slots) for op in (routing_here, routing_here_reference))
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        assert not torch.equal(routing_here(routing, first + 1, num_slots)[0], want[0])


@pytest.mark.parametrize("form", ["direct", "hierarchical"])
def test_a_dispatch_to_oneself_changes_nothing(form: str) -> None:
    one = DirectDispatch(SingleRank(), 16) if form == "direct" else HierarchicalDispatch(SingleRank(), SingleRank(), 16)
    experts = slots_for(900, 8, 16)
    weights = torch.rand(900, 8, device="cuda")
    gate, up, down = (randn(16, *shape, seed=i) / 16 for i, shape in enumerate([(256, 512), (256, 512), (512, 256)]))
    gate_up_fp8, down_fp8 = fp8_stack(gate, up), fp8_stack(down)
    rows = quantise_rows_fp8(randn(900, 512))
    want = grouped_mlp(rows, gate_up_fp8, down_fp8, experts, weights, partial=True)
    sending = one.send(rows, experts, weights)
    came = sending.wait()
    assert isinstance(came.x_RD, QuantisedRows)
    assert came.max_used == int((experts >= 0).sum())
    y = grouped_mlp(
        came.x_RD, gate_up_fp8, down_fp8, came.slots_RK, came.weights_RK, partial=True, max_used=came.max_used
    )
    assert torch.equal(one.give_back(sending, y).wait(), want)
    assert (want[450] == 0).all()
    assert want.abs().sum() > 0


def rehearsed(form: str) -> tuple[Dispatch, list[Rehearsal], int]:
    """One rank's dispatch where the others do what it does, its groups, and the ranks that send to it."""
    if form == "direct":
        group = Rehearsal(range(4), 1)
        return DirectDispatch(group, 9), [group], 4
    rail, node = Rehearsal(range(2), 0, name="rail"), Rehearsal(range(2), 1, name="node")
    return HierarchicalDispatch(rail, node, 9), [rail, node], 4


@pytest.mark.parametrize("form", ["direct", "hierarchical"])
def test_neither_the_host_nor_the_rows_wait_for_what_is_queued_meanwhile(form: str) -> None:
    """The host for the counts alone, and rows leave as soon as they are known."""
    one, groups, num_sources = rehearsed(form)
    slots, weights = slots_for(500, 8, 36), torch.rand(500, 8, device="cuda")
    rows = quantise_rows_fp8(randn(500, 512))
    first = one.send(rows, slots, weights)
    one.give_back(first, randn(len(first.wait().slots_RK), 512)).wait()
    torch.cuda.synchronize()
    sending = one.send(rows, slots, weights)
    # About a second of another's work on the stream that computes.
    torch.cuda._sleep(2_000_000_000)
    slept = torch.cuda.current_stream().record_event()
    sending.advance()
    assert groups[0]._stream is not None
    groups[0]._stream.synchronize()
    assert not slept.query(), "the rows waited for the stream"
    came = sending.wait()
    assert not slept.query(), "the host waited for the stream"
    here = ((slots >= 9) & (slots < 18)).any(1)
    want = (rows.values.view(torch.uint8)[here], rows.scales[here], slots[here], weights[here])
    assert isinstance(came.x_RD, QuantisedRows)
    got = (came.x_RD.values.view(torch.uint8), came.x_RD.scales)
    assert all(torch.equal(a, b.repeat(num_sources, 1)) for a, b in zip(got, want[:2], strict=True))
    want_slots = torch.where((want[2] >= 9) & (want[2] < 18), want[2] - 9, -1).repeat(num_sources, 1)
    assert torch.equal(came.slots_RK, want_slots)
    assert torch.equal(came.weights_RK, want[3].repeat(num_sources, 1))
    assert came.max_used == int((want_slots >= 0).sum()) > 0
    assert slept.query()


def test_rows_that_come_early_are_whole_while_others_are_freed_and_computed() -> None:
    one, _, num_sources = rehearsed("hierarchical")
    for seed in range(6):
        slots = slots_for(3000 + 100 * seed, 8, 36)
        x = randn(len(slots), 512, seed=seed)
        sending = one.send(x, slots, torch.rand(slots.shape, device="cuda"))
        # Memory of the stream that computes, given back while it is in use there.
        for _ in range(8):
            torch.cuda._sleep(200_000)
            del_me = torch.full((len(slots), 512), float("nan"), device="cuda", dtype=torch.bfloat16)
            del_me.add_(1)
            del del_me
        came = sending.wait()
        here = ((slots >= 9) & (slots < 18)).any(1)
        assert torch.equal(came.x_RD, x[here].repeat(num_sources, 1))
        sums = one.give_back(sending, came.x_RD.float()).wait()
        assert torch.isfinite(sums).all()
        del came, sending


def test_sums_of_a_hop_are_in_the_members_order() -> None:
    slots = slots_for(2000, 8, 36)
    hop = hop_to(SingleRank(), torch.zeros_like(slots), 1)
    x = randn(2000, 512)
    hop.load([x])
    hop.sent = hop.received = hop.counts_WC[:, 0].tolist()
    (came,), handle = hop.go()
    handle.wait()
    assert torch.equal(came, x)
    back, handle = hop.back(came, hop.group)
    handle.wait()
    assert torch.equal(hop.total(back), x)
