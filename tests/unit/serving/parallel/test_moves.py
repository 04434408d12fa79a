"""What has to be copied for a placement to become another: as little as may be, from near by, within the budget."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from serving.parallel.balance import global_placement, hierarchical_placement, single_placement
from serving.parallel.moves import Move, fewest_moves, find_moves, rounds
from serving.parallel.placement import Ints, Placement, balance
from serving.parallel.redundancy import hosted_placement

NODES = 4


def placement_of(slots: list[list[int]] | Ints, num_gpus: int) -> Placement:
    return Placement(slots=np.array(slots), num_experts=int(np.max(slots)) + 1, num_gpus=num_gpus)


def drifting_loads(seed: int, num_layers: int = 3, num_experts: int = 64) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    loads = random.lognormal(0, 0.7, (num_layers, num_experts))
    return loads, loads * random.lognormal(0, 0.2, loads.shape)


def num_changed(present: Placement, target: Placement) -> int:
    return int((present.slots != target.slots).sum())


def shuffled(placement: Placement, random: np.random.Generator) -> Placement:
    """Nodes, GPUs of a node and slots of a GPU under other names."""
    per_gpu = placement.slots_per_gpu
    slots = placement.slots.reshape(len(placement.slots), NODES, -1, per_gpu)
    for axis in (1, 2, 3):
        slots = random.permutation(slots, axis=axis)
    return placement_of(slots.reshape(placement.slots.shape), placement.num_gpus)


def hierarchical(loads: np.ndarray) -> Placement:
    return hierarchical_placement(loads, num_slots=80, num_gpus=16, num_nodes=NODES, num_groups=8)


def test_other_names_for_the_same_placement_move_nothing() -> None:
    present = hierarchical(drifting_loads(0)[0])
    other = shuffled(present, np.random.default_rng(0))
    assert num_changed(present, other) > 100
    assert num_changed(present, fewest_moves(present, other, num_nodes=NODES)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_after_a_drift_less_moves_and_balance_and_company_stay(seed: int) -> None:
    before, after = drifting_loads(seed)
    present, target = hierarchical(before), hierarchical(after)
    named = fewest_moves(present, target, num_nodes=NODES)
    assert num_changed(present, named) < 0.9 * num_changed(present, target)
    assert np.allclose(balance(named, after), balance(target, after))
    for size in (80 // NODES, target.slots_per_gpu):
        company = [
            sorted(map(tuple, np.sort(slots.reshape(-1, size), axis=1).tolist()))
            for layer in range(3)
            for slots in (named.slots[layer], target.slots[layer])
        ]
        assert company[::2] == company[1::2]


def test_the_first_slots_of_a_gpu_stay_the_first() -> None:
    before, after = drifting_loads(3)
    sizes = {"num_slots": 96, "num_gpus": 8, "active": 8, "num_nodes": 2}
    present, target = hosted_placement(before, **sizes), hosted_placement(after, **sizes)
    named = fewest_moves(present, target, num_nodes=2, num_first=8)
    assert num_changed(present, named) < num_changed(present, target)
    for slots in (named.slots, fewest_moves(present, target, num_nodes=2).slots):
        first = slots.reshape(3, 8, 12)[:, :, :8]
        is_whole = all(set(layer.ravel()) == set(range(target.num_experts)) for layer in first)
        assert is_whole == (slots is named.slots)


def test_one_slot_a_gpu_moves_only_copies_that_come_or_go() -> None:
    before, after = drifting_loads(1)
    present, target = (single_placement(loads, num_gpus=96) for loads in (before, after))
    more = int(np.maximum(target.copies - present.copies, 0).sum())
    assert num_changed(present, fewest_moves(present, target)) == more < num_changed(present, target)


def test_an_expert_comes_from_its_own_gpu_then_its_node_then_whoever_sends_least() -> None:
    # Two nodes of two GPUs of two slots.
    present = placement_of([[0, 1, 2, 0, 1, 3, 0, 3]], 4)
    target = placement_of([[1, 0, 3, 0, 1, 0, 2, 3]], 4)
    assert find_moves(present, target, gpus_per_node=2) == [
        Move(layer=0, expert=1, source=1, target=0),
        Move(layer=0, expert=0, source=0, target=1),
        # From either GPU of the other node: the first.
        Move(layer=0, expert=3, source=5, target=2),
        Move(layer=0, expert=0, source=6, target=5),
        Move(layer=0, expert=2, source=2, target=6),
    ]


def test_rounds_carry_every_row_once_and_keep_to_the_budget() -> None:
    random = np.random.default_rng(2)
    for num_moves, num_rows, budget in random.integers((0, 1, 1), (30, 12, 20), (40, 3)).tolist():
        links = [(source, target) for source, target in random.integers(0, 5, (num_moves, 2)).tolist()]
        carried: dict[int, list[int]] = {move: [] for move in range(num_moves)}
        for pieces in rounds(links, num_rows=num_rows, budget_rows=budget):
            sent, received = Counter[int](), Counter[int]()
            for piece in pieces:
                source, target = links[piece.move]
                sent[source] += piece.end - piece.first
                received[target] += piece.end - piece.first
                carried[piece.move] += range(piece.first, piece.end)
            assert 0 < max(sent.values()) <= budget
            assert max(received.values()) <= budget
        assert carried == {move: list(range(num_rows)) for move in range(num_moves)}


def test_a_rank_with_much_to_receive_is_kept_busy() -> None:
    links = [(source, 0) for source in range(1, 5)]
    assert len(list(rounds(links, num_rows=8, budget_rows=8))) == 4
    assert len(list(rounds(links[:1] * 4, num_rows=8, budget_rows=32))) == 1


def test_a_global_placement_is_found_again_whatever_its_gpus_are_called() -> None:
    loads = drifting_loads(3)[0]
    present = global_placement(loads, num_slots=72, num_gpus=8)
    slots = present.slots.reshape(3, 8, 9)[:, ::-1, ::-1].reshape(3, -1)
    assert num_changed(present, fewest_moves(present, placement_of(slots, 8))) == 0
