"""The copy of an expert that takes a token: a slot that holds it, in turn, near ones first."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from serving.parallel.placement import Placement
from serving.parallel.replicas import Replicas

CPU = torch.device("cpu")
LAYERS, EXPERTS, GPUS, SLOTS = 3, 12, 8, 24


def placement(seed: int = 0) -> Placement:
    """Each expert once and the other half of the slots at random, shuffled."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation([*range(EXPERTS), *rng.integers(EXPERTS, size=SLOTS - EXPERTS)]) for _ in range(LAYERS)]
    return Placement(slots=np.array(rows), num_experts=EXPERTS, num_gpus=GPUS)


def picks(num_tokens: int, top_k: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :top_k]


@pytest.mark.parametrize("near", [None, range(2, 4)])
def test_the_slot_holds_the_expert_that_was_picked(near: range | None) -> None:
    where, experts = placement(), picks(200)
    replicas = Replicas(where, CPU, near=near)
    for layer in range(LAYERS):
        slots = replicas.slots(layer, experts, first=5)
        assert (where.slots[layer][slots.numpy()] == experts.numpy()).all()
        assert (where.slots[(layer + 1) % LAYERS][slots.numpy()] != experts.numpy()).any()
        assert torch.equal(slots, replicas.slots(layer, experts, first=5))


def test_copies_take_turns_by_token_pick_and_rank() -> None:
    where = placement()
    replicas = Replicas(where, CPU)
    copies = np.flatnonzero(where.slots[0] == 7).tolist()
    assert len(copies) > 1
    experts = torch.full((5, 2), 7)
    slots = replicas.slots(0, experts, first=3).tolist()
    assert slots == [[copies[(3 + t + k) % len(copies)] for k in range(2)] for t in range(5)]


@pytest.mark.parametrize("num_tokens", [1, 120])
def test_all_copies_of_what_every_token_picks_get_as_much(num_tokens: int) -> None:
    """As the shared expert among the routed ones, of 24 ranks with few tokens or with many."""
    where = placement()
    replicas = Replicas(where, CPU)
    num_copies = int(where.copies[1, 4])
    counts: Counter[int] = Counter()
    for rank in range(24):
        experts = picks(num_tokens, seed=rank)
        experts[:, -1] = 4
        counts.update(replicas.slots(1, experts, first=rank)[:, -1].tolist())
    assert len(counts) == num_copies > 1
    assert max(counts.values()) - min(counts.values()) <= 1


def test_copies_on_the_own_node_come_first_and_others_only_without_them() -> None:
    where, experts = placement(), picks(300)
    near, far = Replicas(where, CPU, near=range(2, 4)), Replicas(where, CPU)
    on_node = set(range(2 * SLOTS // GPUS, 4 * SLOTS // GPUS))
    for layer in range(LAYERS):
        at_home = {expert for slot, expert in enumerate(where.slots[layer].tolist()) if slot in on_node}
        assert 0 < len(at_home) < EXPERTS
        chosen = list(zip(near.slots(layer, experts, 0).flatten().tolist(), experts.flatten().tolist(), strict=True))
        assert all((slot in on_node) == (expert in at_home) for slot, expert in chosen)
        # Who asks for no node goes elsewhere too.
        elsewhere = zip(far.slots(layer, experts, 0).flatten().tolist(), experts.flatten().tolist(), strict=True)
        assert not all((slot in on_node) == (expert in at_home) for slot, expert in elsewhere)


def test_no_expert_has_no_slot() -> None:
    experts = torch.tensor([[3, -1], [-1, -1]])
    slots = Replicas(placement(), CPU).slots(2, experts, first=1)
    assert torch.equal(slots < 0, experts < 0)


def test_without_copies_an_expert_has_its_one_slot() -> None:
    slots = np.random.default_rng(1).permutation(EXPERTS)
    where = Placement(slots=slots[None], num_experts=EXPERTS, num_gpus=4)
    chosen = Replicas(where, CPU).slots(0, torch.tensor([[*range(EXPERTS), -1]]), first=9)
    assert chosen.tolist() == [[*np.argsort(slots).tolist(), -1]]


def test_a_new_placement_is_in_force_where_the_old_tables_lay() -> None:
    old, new, experts = placement(), placement(seed=1), picks(100)
    replicas = Replicas(old, CPU)
    before = replicas.slots(0, experts, first=0)
    addresses = replicas._slots_LEC.data_ptr(), replicas._copies_LE.data_ptr()
    replicas.write(new)
    after = replicas.slots(0, experts, first=0)
    assert (new.slots[0][after.numpy()] == experts.numpy()).all()
    assert not torch.equal(before, after)
    assert addresses == (replicas._slots_LEC.data_ptr(), replicas._copies_LE.data_ptr())
