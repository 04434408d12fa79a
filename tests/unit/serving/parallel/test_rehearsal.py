"""A rank without its unit: alone it is the identity, and among ranks that do alike it sees what a real one sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.quant import quantise_rows_fp8
from serving.parallel.collectives import Collectives
from serving.parallel.dispatch import DirectDispatch, Dispatch, FixedDispatch, HierarchicalDispatch
from serving.parallel.groups import Groups
from serving.parallel.hops import Hop, payloads_of
from serving.parallel.rehearsal import Rehearsal
from serving.parallel.virtual import VirtualCollectives, VirtualUnit

NODES, LOCALS, SLOTS = 3, 2, 4
WORLD = NODES * LOCALS
GROUPS = Groups(tp=1, dp=WORLD, ep=WORLD, ranks_per_node=LOCALS)
FORMS = ["direct", "hierarchical", "fixed"]
TOKENS, TOP_K, WIDTH = 24, 4, 128


def dispatch_of(form: str, group: Collectives) -> Dispatch:
    if form == "direct":
        return DirectDispatch(group, SLOTS)
    if form == "fixed":
        return FixedDispatch(group, SLOTS, TOKENS + 1)
    rail = group.subgroup(GROUPS.rail_group(group.rank), "rail")
    return HierarchicalDispatch(rail, group.subgroup(GROUPS.node_group(group.rank), "node"), SLOTS)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    some = torch.Generator().manual_seed(1)
    slots = torch.rand(TOKENS, WORLD * SLOTS, generator=some).argsort(1)[:, :TOP_K].contiguous()
    return torch.randn(TOKENS, WIDTH, generator=some), slots, torch.rand(TOKENS, TOP_K, generator=some)


def alike_everywhere() -> tuple[Tensor, Tensor, Tensor]:
    """Each token goes to every rank, there to the same slot."""
    x, _, weights = tokens()
    local = torch.arange(TOKENS)[:, None] % SLOTS
    return x, local + torch.arange(WORLD) * SLOTS, weights[:, :1].expand(-1, WORLD).contiguous()


def arrived_at(group: Collectives, form: str, x: Tensor, slots: Tensor, weights: Tensor, fp8: bool) -> list[Tensor]:
    rows = quantise_rows_fp8(x) if fp8 else x
    arrived = dispatch_of(form, group).send(rows, slots, weights).wait()
    return [
        *(payload.float() for payload in payloads_of(arrived.x_RD)),
        arrived.slots_RK.clone(),
        arrived.weights_RK.clone(),
    ]


def sums_at(group: Collectives, form: str, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    dispatch = dispatch_of(form, group)
    sending = dispatch.send(x, slots, weights)
    arrived = sending.wait()
    used = arrived.slots_RK >= 0
    factors = ((arrived.slots_RK + 1) * arrived.weights_RK * used).sum(1, keepdim=True)
    return dispatch.give_back(sending, arrived.x_RD * factors).wait()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_arrives_is_what_arrives_among_ranks_with_the_same_tokens(form: str, fp8: bool, rank: int) -> None:
    def main(world: VirtualCollectives) -> list[Tensor]:
        return arrived_at(world, form, *tokens(), fp8)

    real = VirtualUnit(GROUPS).run(main)
    rehearsed = arrived_at(Rehearsal(range(WORLD), rank), form, *tokens(), fp8)
    assert len(rehearsed[0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(rehearsed, real[rank], strict=True))
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(rehearsed, real[1], strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_what_returns_is_what_returns_where_ranks_are_alike(form: str) -> None:
    real = VirtualUnit(GROUPS).run(lambda world: sums_at(world, form, *alike_everywhere()))
    rehearsed = sums_at(Rehearsal(range(WORLD), 3), form, *alike_everywhere())
    assert torch.equal(rehearsed, real[3])
    x, slots, weights = alike_everywhere()
    assert not torch.equal(rehearsed, sums_at(Rehearsal(range(WORLD), 3), form, x, slots, weights * 2))


@pytest.mark.parametrize("form", FORMS)
def test_sums_are_finite_and_whole_whatever_the_counts(form: str) -> None:
    sums = sums_at(Rehearsal(range(WORLD), 2), form, *tokens())
    assert sums.shape == (TOKENS, WIDTH)
    assert sums.isfinite().all()


def test_alone_it_is_the_identity() -> None:
    group, x = Rehearsal([5], 0), tokens()[0]
    for out, call in (
        (torch.empty_like(x), group.all_gather),
        (torch.empty_like(x), group.reduce_scatter),
    ):
        call(out, x).wait()
        assert torch.equal(out, x)
    out = torch.empty_like(x)
    group.all_to_all([out], [x], [TOKENS], [TOKENS]).wait()
    assert torch.equal(out, x)


def test_gathered_rows_are_its_own_in_parts_of_any_size() -> None:
    x = torch.arange(6.0).view(3, 2)
    out = torch.empty(10, 2)
    Rehearsal(range(4), 1).all_gather(out, x, [3, 3, 2, 2]).wait()
    assert torch.equal(out, torch.cat([x, x, x[:2], x[:2]]))
    out = torch.empty(7, 2)
    Rehearsal(range(3), 0).all_gather(out, x[:2], [2, 5, 0]).wait()
    assert torch.equal(out, torch.cat([x[:2], x[:2], x[:2], x[:1]]))


def test_a_sum_reads_as_many_parts_as_there_are_ranks() -> None:
    whole = torch.arange(8.0).view(4, 2)
    out = torch.empty(1, 2)
    Rehearsal(range(4), 2).reduce_scatter(out, whole).wait()
    assert torch.equal(out, whole.sum(0, keepdim=True))
    out = torch.empty(2, 2)
    Rehearsal(range(3), 0).reduce_scatter(out, whole, [2, 1, 1]).wait()
    assert torch.equal(out, whole[:2] + whole[1:3] + whole[2:4])
    real = VirtualUnit(Groups(tp=1, dp=4, ep=4, ranks_per_node=4)).run(lambda world: summed(world, whole[:2]))
    assert torch.equal(summed(Rehearsal(range(4), 0), whole[:2]), real[0])


def summed(group: Collectives, share: Tensor) -> Tensor:
    out = torch.empty_like(share)
    group.reduce_scatter(out, share.repeat(4, 1)).wait()
    return out


def test_rows_expected_of_nobody_are_zeros() -> None:
    out = torch.ones(4, 2)
    Rehearsal(range(2), 0).all_to_all([out], [torch.ones(3, 2)], [3, 0], [0, 3]).wait()
    assert torch.equal(out, torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 1.0]]))


def test_bytes_are_those_that_arrive() -> None:
    group = Rehearsal(range(WORLD), 0)
    dispatch = dispatch_of("hierarchical", group)
    sending = dispatch.send(*tokens())
    arrived = sending.wait()
    dispatch.give_back(sending, arrived.x_RD).wait()
    rail, node = sending.hops
    assert isinstance(rail, Hop)
    assert isinstance(node, Hop)
    row, routing, counts = 4 * WIDTH, 4 * 2 * TOP_K, 8
    assert group.arrived_bytes["node", "all_to_all"] == (
        len(arrived.x_RD) * (row + routing) + LOCALS * counts + sum(node.sent) * row
    )
    assert group.arrived_bytes["rail", "all_to_all"] == (
        sum(rail.received) * (row + routing) + NODES * (1 + LOCALS) * counts + sum(rail.sent) * row
    )
