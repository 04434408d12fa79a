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
from serving.parallel.virtual import VirtualCollectives, VirtualUnit
from tests.gpu.graphs import replayed
from tests.gpu.test_experts import fp8_stack, randn
from tests.unit.serving.parallel.dispatch_cases import Layer

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


@pytest.mark.parametrize("form", ["direct", "hierarchical"])
def test_ranks_on_the_device_get_what_ranks_on_a_cpu_get(form: str) -> None:
    layer = Layer(num_tokens=(5, 0, 3, 8), slots=tuple(range(12)), top_k=3, routing="partial", dtype="float32")

    def dispatched(group: VirtualCollectives, device: str) -> list[Tensor]:
        with torch.inference_mode():
            x, slots, weights = (part.to(device) for part in layer.tokens(group.rank))
            one: Dispatch = DirectDispatch(group, 3)
            if form == "hierarchical":
                rail = group.subgroup(layer.groups.rail_group(group.rank), "rail")
                one = HierarchicalDispatch(rail, group.subgroup(layer.groups.node_group(group.rank), "node"), 3)
            sending = one.send(x, slots, weights)
            came = sending.wait()
            y_RD = came.x_RD * (came.slots_RK.clamp(min=0) * came.weights_RK).sum(1, keepdim=True)
            return [part.cpu() for part in (came.x_RD, came.slots_RK, one.give_back(sending, y_RD).wait())]

    want, got = (
        VirtualUnit(layer.groups).run(lambda group: dispatched(group, device))  # noqa: B023
        for device in ("cpu", "cuda")
    )
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        torch.testing.assert_close(ours[2], theirs[2])
    assert not torch.equal(got[0][2], got[3][2][:5])


def test_the_host_waits_for_counts_and_not_for_what_is_queued_behind_them() -> None:
    group = Rehearsal(range(4), 1)
    one = DirectDispatch(group, 9)
    slots, weights = slots_for(500, 8, 36), torch.rand(500, 8, device="cuda")
    x = randn(500, 512)
    one.send(x, slots, weights).wait()
    torch.cuda.synchronize()
    sending = one.send(x, slots, weights)
    # About a second of another's work on the stream that computes.
    torch.cuda._sleep(2_000_000_000)
    slept = torch.cuda.current_stream().record_event()
    sending.advance()
    assert not slept.query(), "the host waited for the stream"
    came = sending.wait()
    assert came.max_used == 4 * int(((slots >= 9) & (slots < 18)).sum())
    assert int((came.slots_RK >= 0).sum()) == came.max_used
    assert slept.query()


def test_sums_of_a_hop_are_in_the_members_order() -> None:
    slots = slots_for(2000, 8, 36)
    hop = hop_to(SingleRank(), torch.zeros_like(slots), 1)
    x = randn(2000, 512)
    hop.load([x])
    hop.sent = hop.received = hop.counts_WC[:, 0].tolist()
    (came,), handle = hop.go()
    handle.wait()
    assert torch.equal(came, x)
    back, handle = hop.back(came)
    handle.wait()
    assert torch.equal(hop.total(back), x)
