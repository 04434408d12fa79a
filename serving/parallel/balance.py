"""Load to placement, as pure functions over all layers at once: how many copies each expert gets, and which GPU holds them.

    hierarchical     groups of experts onto nodes, copies inside the node, copies onto its GPUs: what limits a token to a few nodes stays so
    global           copies and packing over all GPUs
    single           one slot a GPU: only the number of copies is left to choose
    incremental      a bounded number of slots changed from the placement in force

Copies: give the next one to the expert whose copies are the heaviest. That minimises the heaviest copy, which with one slot a GPU is
the optimum. Packing: heaviest first onto the lightest GPU with a free slot, which with two slots a GPU is the optimal pairing
(heaviest with lightest); then the heaviest GPU exchanges one copy with another for as long as that makes the heavier of the two lighter.
No GPU gets two copies of one expert.

Legend: L layers, E logical experts, S slots, G GPUs, K slots a GPU (S / G); P independent packing problems (layers, or layers x nodes).
A load is any non-negative [L, E]; of a layer without any, all experts count the same. Every function raises ConfigError, with
what to change, if experts, slots, GPUs, nodes and groups do not fit together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serving.core.errors import ConfigError
from serving.parallel.placement import Floats, Ints, Placement

_NEGLIGIBLE = 1e-3
"""Of the heaviest GPU's load: what gains less for each slot that it changes is not done."""


def hierarchical_placement(
    loads: Floats, *, num_slots: int, num_gpus: int, num_nodes: int, num_groups: int
) -> Placement:
    """Every group, `num_experts / num_groups` consecutive experts, has all its copies on one node."""
    num_layers, num_experts = loads.shape
    _check_slots(num_experts, num_slots, num_gpus)
    _check_divides(num_experts, num_groups, "experts", "groups")
    _check_divides(num_groups, num_nodes, "groups", "nodes")
    _check_divides(num_gpus, num_nodes, "GPUs", "nodes")
    _check_slots(num_experts // num_nodes, num_slots // num_nodes, num_gpus // num_nodes)
    loads = _normalised(loads)
    group_loads = loads.reshape(num_layers, num_groups, -1).sum(axis=-1)
    # Groups are packed like copies: each is an expert with one copy, each node a GPU.
    groups = pack(group_loads, np.ones_like(group_loads, dtype=np.int64), num_nodes)
    experts = np.arange(num_experts).reshape(num_groups, -1)[groups].reshape(num_layers * num_nodes, -1)
    node_loads = np.take_along_axis(loads, experts.reshape(num_layers, -1), axis=1).reshape(experts.shape)
    local = _replicate_and_pack(node_loads, num_slots // num_nodes, num_gpus // num_nodes)
    slots = np.take_along_axis(experts, local, axis=1).reshape(num_layers, num_slots)
    return Placement(slots=slots, num_experts=num_experts, num_gpus=num_gpus)


def global_placement(loads: Floats, *, num_slots: int, num_gpus: int) -> Placement:
    """Groups are not regarded."""
    num_experts = loads.shape[1]
    _check_slots(num_experts, num_slots, num_gpus)
    slots = _replicate_and_pack(_normalised(loads), num_slots, num_gpus)
    return Placement(slots=slots, num_experts=num_experts, num_gpus=num_gpus)


def single_placement(loads: Floats, *, num_gpus: int) -> Placement:
    """One slot a GPU. GPU e holds expert e for good; the GPUs from E on hold what is to be had twice, in order of expert."""
    num_layers, num_experts = loads.shape
    _check_slots(num_experts, num_gpus, num_gpus)
    copies = _copies(_normalised(loads), num_gpus, max_copies=num_gpus)
    experts = np.broadcast_to(np.arange(num_experts), loads.shape)
    redundant = np.repeat(experts.ravel(), (copies - 1).ravel()).reshape(num_layers, -1)
    slots = np.concatenate([experts, redundant], axis=1)
    return Placement(slots=slots, num_experts=num_experts, num_gpus=num_gpus)


def incremental_placement(present: Placement, loads: Floats, *, max_changes: int, num_nodes: int = 1) -> Placement:
    """At most `max_changes` slots of a layer differ from `present`, and no layer's heaviest GPU gets heavier.

    Each step relieves the heaviest GPU of a layer, by whichever gains more for each slot that it changes: another copy of one of
    its experts in the place of a redundant copy elsewhere (one slot), or an exchange with another GPU (two). Both stay inside
    the node, so no expert appears on a node that did not have it.
    """
    _check_divides(present.num_gpus, num_nodes, "GPUs", "nodes")
    loads = _normalised(loads)
    slots = present.slots.copy()
    left = np.full(len(slots), max_changes)
    active = np.flatnonzero(left > 0)
    while len(active):
        part = Placement(slots=slots[active], num_experts=present.num_experts, num_gpus=present.num_gpus)
        shares = np.take_along_axis(loads[active] / part.copies, part.slots, axis=1)
        view = _View(part.slots, shares, present.num_gpus)
        exchange = np.where(left[active, None, None] > 1, view.exchange_gains() / 2, 0.0)
        copy = _copy_gains(view, part, loads[active])
        inside = _same_node(view.heaviest, present, num_nodes)
        rows, own, other = _best(np.maximum(exchange, copy) * inside, view.top)
        exchanged = exchange[rows, own, other] > copy[rows, own, other]
        active, own = active[rows], view.heaviest[rows] * present.slots_per_gpu + own
        expert = slots[active, own]
        slots[active, own] = np.where(exchanged, slots[active, other], expert)
        slots[active, other] = expert
        left[active] -= 1 + exchanged
        active = active[left[active] > 0]
    return Placement(slots=slots, num_experts=present.num_experts, num_gpus=present.num_gpus)


def check_choice(*, num_experts: int, num_slots: int, num_gpus: int) -> None:
    """Raises ConfigError where all placements are alike."""
    if num_slots == num_gpus == num_experts:
        raise ConfigError(
            f"experts cannot be balanced: each of {num_gpus} GPUs holds one of {num_experts} experts, so no place is better than "
            "another; give redundant_experts and as many GPUs more, a smaller ep, or set balance.period_s to 0"
        )
    if num_slots == num_experts * num_gpus:
        raise ConfigError(
            f"experts cannot be balanced: every GPU holds all {num_experts}; give fewer redundant_experts, or set balance.period_s to 0"
        )


def pack(loads: Floats, copies: Ints, num_gpus: int) -> Ints:
    """The expert in each slot, [P, S], for `loads` and `copies` [P, E] with sums of S and at most G copies of one expert.

    Loads sum up to at most 1 a problem.
    """
    assert (copies >= 1).all()
    assert (copies <= num_gpus).all()
    shares = loads / copies
    by_share = np.argsort(-shares, axis=1, kind="stable")
    experts = np.repeat(by_share.ravel(), np.take_along_axis(copies, by_share, axis=1).ravel()).reshape(len(loads), -1)
    shares = np.take_along_axis(shares, experts, axis=1)
    slots = _heaviest_first(experts, shares, num_gpus)
    experts, shares = np.take_along_axis(experts, slots, axis=1), np.take_along_axis(shares, slots, axis=1)
    _exchange_while_better(experts, shares, num_gpus)
    return experts


def _check_slots(num_experts: int, num_slots: int, num_gpus: int) -> None:
    _check_divides(num_slots, num_gpus, "slots", "GPUs")
    if num_slots < num_experts:
        raise ConfigError(
            f"{num_slots} slots on {num_gpus} GPUs cannot hold {num_experts} experts; give at least {num_experts - num_slots} redundant experts more"
        )
    if num_slots > num_experts * num_gpus:
        raise ConfigError(
            f"{num_slots // num_gpus} slots a GPU for {num_experts} experts would hold an expert twice on one GPU; "
            f"at most {num_experts * num_gpus} slots are of use on {num_gpus} GPUs"
        )


def _check_divides(num_things: int, num_places: int, things: str, places: str) -> None:
    if num_places < 1 or num_things < 1 or num_things % num_places:
        raise ConfigError(
            f"{num_things} {things} do not divide over {num_places} {places}; the number of {things} must be a multiple of that of {places}"
        )


def _normalised(loads: Floats) -> Floats:
    """Sums of 1 a layer. Experts that were never selected count a little, so that slots to spare spread evenly over them."""
    assert loads.ndim == 2
    assert np.isfinite(loads).all()
    assert (loads >= 0).all()
    total = loads.sum(axis=1, keepdims=True)
    counted = loads + np.where(total > 0, 1e-12 * total, 1.0)
    normalised: Floats = counted / counted.sum(axis=1, keepdims=True)
    return normalised


def _replicate_and_pack(loads: Floats, num_slots: int, num_gpus: int) -> Ints:
    """`loads` [P, E] to the expert in each slot [P, S]."""
    return pack(loads, _copies(loads, num_slots, max_copies=num_gpus), num_gpus)


def _copies(loads: Floats, num_slots: int, *, max_copies: int) -> Ints:
    """[P, E] with sums of `num_slots`, such that the largest `loads / copies` is as small as can be."""
    copies = np.ones(loads.shape, dtype=np.int64)
    shares = loads.copy()
    rows = np.arange(len(loads))
    for _ in range(num_slots - loads.shape[1]):
        heaviest = shares.argmax(axis=1)
        copies[rows, heaviest] += 1
        now = copies[rows, heaviest]
        shares[rows, heaviest] = np.where(now < max_copies, loads[rows, heaviest] / now, -1.0)
    return copies


def _heaviest_first(experts: Ints, shares: Floats, num_gpus: int) -> Ints:
    """Which of the copies `experts`, `shares` [P, S], sorted from heavy to light, comes into each slot [P, S]."""
    num_problems, num_slots = shares.shape
    slots_per_gpu = num_slots // num_gpus
    rows = np.arange(num_problems)
    slots = np.empty((num_problems, num_gpus, slots_per_gpu), dtype=np.int64)
    used = np.zeros((num_problems, num_gpus), dtype=np.int64)
    latest = np.full((num_problems, num_gpus), -1)
    # Loads sum up to at most 1: 2 keeps the copies of one expert apart if any other GPU is free, 4 closes a full GPU.
    on_gpus = np.zeros((num_problems, num_gpus))
    collided = np.zeros(num_problems, dtype=bool)
    for copy in range(num_slots):
        expert = experts[:, copy]
        # Copies of one expert follow each other, so a GPU that has one had it latest.
        cost = on_gpus + 2.0 * (latest == expert[:, None])
        gpu = cost.argmin(axis=1)
        collided |= cost[rows, gpu] >= 2.0
        slots[rows, gpu, used[rows, gpu]] = copy
        used[rows, gpu] += 1
        latest[rows, gpu] = expert
        on_gpus[rows, gpu] += np.where(used[rows, gpu] == slots_per_gpu, 4.0, shares[:, copy])
    # Not seen in a million problems with copies from `_copies`. Dealt like cards, at most G copies of one expert cannot meet.
    dealt = np.arange(num_slots).reshape(slots_per_gpu, num_gpus).T
    return np.where(collided[:, None, None], dealt, slots).reshape(num_problems, num_slots)


def _exchange_while_better(experts: Ints, shares: Floats, num_gpus: int) -> None:
    """In place, `experts` and `shares` [P, S]. The sum of squares of the GPUs' loads falls with each exchange, so it ends."""
    slots_per_gpu = shares.shape[1] // num_gpus
    active = np.arange(len(shares))
    while len(active):
        view = _View(experts[active], shares[active], num_gpus)
        rows, own, other = _best(view.exchange_gains(), view.top)
        active, own = active[rows], view.heaviest[rows] * slots_per_gpu + own
        for values in (experts, shares):
            values[active, own], values[active, other] = values[active, other], values[active, own]


class _View:
    """The slots of `P` problems as their heaviest GPU sees them: its own slots (first axis, K) against all (second, S)."""

    def __init__(self, experts: Ints, shares: Floats, num_gpus: int) -> None:
        num_problems, num_slots = shares.shape
        rows, slots_per_gpu = np.arange(num_problems), num_slots // num_gpus
        on_gpus = shares.reshape(num_problems, num_gpus, slots_per_gpu).sum(axis=-1)
        self.heaviest = on_gpus.argmax(axis=1)  # [P]
        self.top = on_gpus[rows, self.heaviest]  # [P]
        self.own_experts = experts.reshape(num_problems, num_gpus, -1)[rows, self.heaviest]  # [P, K]
        self.own_shares = shares.reshape(num_problems, num_gpus, -1)[rows, self.heaviest][:, :, None]
        self.shares = shares[:, None, :]
        self.gpu_load = on_gpus.repeat(slots_per_gpu, axis=1)[:, None, :]  # of the GPU that a slot belongs to
        same = self.own_experts[:, :, None] == experts[:, None, :]
        in_gpu = same.reshape(num_problems, slots_per_gpu, num_gpus, slots_per_gpu).any(axis=-1)
        self.own_is_there = in_gpu.repeat(slots_per_gpu, axis=-1)  # [P, K, S]; true of all the GPU's own slots
        self.other_is_here = same.any(axis=1)[:, None, :]

    def exchange_gains(self) -> Floats:
        """[P, K, S]: by how much the heavier of the two GPUs gets lighter. 0 where a GPU would hold an expert twice."""
        moved = self.own_shares - self.shares
        gains: Floats = np.minimum(moved, self.top[:, None, None] - self.gpu_load - moved)
        gains[self.own_is_there | self.other_is_here] = 0.0
        return gains


def _best(gains: Floats, top: Floats) -> tuple[Ints, Ints, Ints]:
    """Of `gains` [P, K, S]: problems whose largest is worth it, and where it stands on the two other axes."""
    flat = gains.reshape(len(gains), -1)
    where = flat.argmax(axis=1)
    rows = np.flatnonzero(np.take_along_axis(flat, where[:, None], axis=1)[:, 0] > _NEGLIGIBLE * top)
    own, other = np.divmod(where[rows], gains.shape[2])
    return rows, own, other


def _copy_gains(view: _View, placement: Placement, loads: Floats) -> Floats:
    """[P, K, S]: by how much the heaviest of all GPUs that it touches gets lighter if an expert of the heaviest GPU gets another
    copy in a redundant slot elsewhere. A lower bound: a GPU that loses a copy may count as one that takes over part of its load.
    """
    experts, copies = placement.slots, placement.copies
    # Over the GPUs that hold an expert, the largest load.
    peak = np.zeros_like(loads)
    np.maximum.at(peak, (np.arange(len(experts))[:, None], experts), view.gpu_load[:, 0])
    without = peak + loads / np.maximum(copies - 1, 1) - loads / copies
    own = view.own_experts
    copied = (np.take_along_axis(loads, own, axis=1) / (np.take_along_axis(copies, own, axis=1) + 1))[:, :, None]
    here = view.top[:, None, None] - view.own_shares + copied
    there = view.gpu_load - view.shares + copied
    others = np.take_along_axis(without, experts, axis=1)[:, None, :]
    gains: Floats = view.top[:, None, None] - np.maximum(np.maximum(here, there), others)
    gains[view.own_is_there | (np.take_along_axis(copies, experts, axis=1) < 2)[:, None, :]] = 0.0
    return gains


def _same_node(heaviest: Ints, placement: Placement, num_nodes: int) -> NDArray[np.bool_]:
    """[P, 1, S]: slots on the node of the heaviest GPU."""
    gpus_per_node = placement.num_gpus // num_nodes
    node = np.arange(placement.num_gpus).repeat(placement.slots_per_gpu) // gpus_per_node
    same: NDArray[np.bool_] = (heaviest // gpus_per_node)[:, None, None] == node
    return same
