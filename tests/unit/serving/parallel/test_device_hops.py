"""The hops that a GPU takes, by their ops' definitions, where the CPU's are: the same rows come, and the same sums return."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.parallel import dispatch, hops
from serving.parallel.collectives import Collectives
from serving.parallel.dispatch import DirectDispatch, Dispatch, FixedDispatch, HierarchicalDispatch
from serving.parallel.virtual import VirtualCollectives, VirtualUnit
from tests.unit.serving.parallel.dispatch_cases import Layer

SLOTS_PER_RANK = 3
LAYER = Layer(
    num_tokens=(5, 0, 3, 8), slots=tuple(range(4 * SLOTS_PER_RANK)), top_k=3, routing="partial", dtype="float32"
)


def make(group: VirtualCollectives, form: str) -> Dispatch:
    if form == "direct":
        return DirectDispatch(group, SLOTS_PER_RANK)
    if form == "fixed":
        return FixedDispatch(group, SLOTS_PER_RANK, max(LAYER.num_tokens))
    rail = group.subgroup(LAYER.groups.rail_group(group.rank), "rail")
    return HierarchicalDispatch(rail, group.subgroup(LAYER.groups.node_group(group.rank), "node"), SLOTS_PER_RANK)


def dispatched(group: VirtualCollectives, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor, int | None]:
    """What arrived, its slots and weights, the sums of rows that are made of all three, and how many slots were announced."""
    with torch.inference_mode():
        x, slots, weights = LAYER.tokens(group.rank)
        one = make(group, form)
        sending = one.send(x, slots, weights)
        came = sending.wait()
        y_RD = came.x_RD * ((came.slots_RK + 2) * came.weights_RK * (came.slots_RK >= 0)).sum(1, keepdim=True)
        return came.x_RD, came.slots_RK, came.weights_RK, one.give_back(sending, y_RD).wait(), came.max_used


def added_up(group: VirtualCollectives, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums, what is added to them, both together, and what another wait returns."""
    with torch.inference_mode():
        x, slots, weights = LAYER.tokens(group.rank)
        one = make(group, form)
        sums, both = [], []
        for into, added in ((sums, None), (both, 3 * x)):
            sending = one.send(x, slots, weights)
            came = sending.wait()
            returning = one.give_back(sending, came.x_RD * (came.slots_RK >= 0).sum(1, keepdim=True), added)
            into += [returning.wait().clone(), returning.wait()]
        assert torch.equal(*sums)
        return sums[0], 3 * x, both[0], both[1]


def on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    def counts_for(slots_TK: Tensor, slots_per_member: int, num_members: int) -> Tensor:
        return hops.copies_for(slots_TK, slots_per_member, num_members).counts_WC

    def hop_to(group: Collectives, slots_TK: Tensor, slots_per_member: int, beside: None) -> hops.Hop:
        return hops.DeviceHop(group, slots_TK, slots_per_member)

    patch.setattr(dispatch, "counts_for", counts_for)
    patch.setattr(dispatch, "hop_to", hop_to)


@pytest.mark.parametrize("form", ["direct", "hierarchical"])
def test_they_bring_what_the_cpus_bring(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = VirtualUnit(LAYER.groups).run(lambda group: dispatched(group, form))
    on_a_gpu(monkeypatch)
    got = VirtualUnit(LAYER.groups).run(lambda group: dispatched(group, form))
    for (*tensors, num_used), (*others, unknown) in zip(got, want, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))
        assert num_used == int((tensors[1] >= 0).sum())
        assert unknown is None
    assert not torch.equal(got[0][3], got[3][3][:5])
    assert got[0][3].abs().sum() > 0


@pytest.mark.parametrize(
    ("form", "gpu"),
    [("direct", False), ("direct", True), ("hierarchical", False), ("hierarchical", True), ("fixed", False)],
)
def test_what_is_added_to_the_sums_is_added_once(form: str, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu:
        on_a_gpu(monkeypatch)
    for sums, added, both, again in VirtualUnit(LAYER.groups).run(lambda group: added_up(group, form)):
        assert torch.equal(both, sums + added)
        assert torch.equal(again, both)
        assert not len(sums) or not torch.equal(both, sums)
