"""From one placement to the next: which slots are written, from where, and which rows of them in each step.

    fewest_moves   the next placement under other names: nodes, GPUs of a node and slots of a GPU are alike among themselves, so
                   what is somewhere already may stay
    find_moves     one copy for each slot that changes, from a slot that holds the expert now
    rounds         the copies cut into steps in which no GPU sends or receives more than its budget

Pure: every rank computes the same from the same two placements. Slots are those of the whole EP group, slot = GPU * K + local slot.
Legend: L layers, G GPUs, K slots a GPU, S slots (G * K); P independent problems, M members that may be exchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from serving.parallel.placement import Ints, Placement


@dataclass(frozen=True, kw_only=True)
class Move:
    """`expert` of `layer` from slot `source` to slot `target`."""

    layer: int
    expert: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows [first, end) of the expert that move number `move` carries."""

    move: int
    first: int
    end: int


def fewest_moves(
    present: Placement, target: Placement, *, num_nodes: int = 1, num_first: int | None = None
) -> Placement:
    """`target` with its nodes, the GPUs inside a node and the slots inside a GPU in an order in which much of `present` stays
    where it is. Every node, GPU and slot keeps its company, so balance and locality are those of `target`. The first `num_first`
    slots of a GPU stay the first, where that says something of the experts in them.

    Those that have most in common are matched first: the most slots that can stay on a GPU do, of GPUs and nodes nearly so.
    """
    num_gpus, slots_per_gpu = target.num_gpus, target.slots_per_gpu
    slots = target.slots
    for num_groups, num_members in ((1, num_nodes), (num_nodes, num_gpus // num_nodes)):
        slots = _matched(present.slots, slots, num_groups, num_members)
    here, there = (of.reshape(-1, slots_per_gpu) for of in (present.slots, slots))
    first = slots_per_gpu if num_first is None else num_first
    parts = [slice(0, first), slice(first, slots_per_gpu)] if first < slots_per_gpu else [slice(0, first)]
    matched = [_matched(here[:, part], there[:, part], 1, part.stop - part.start) for part in parts]
    slots = np.concatenate(matched, axis=1).reshape(slots.shape)
    return Placement(slots=slots, num_experts=target.num_experts, num_gpus=num_gpus)


def find_moves(present: Placement, target: Placement, *, gpus_per_node: int) -> list[Move]:
    """By layer and target. An expert comes from the nearest GPU that has it: its own, one of its node, any; of equally near ones
    from that which has fewest to send."""
    slots_per_gpu = present.slots_per_gpu
    num_sent: Counter[int] = Counter()
    found = []
    for layer, slot in np.argwhere(present.slots != target.slots).tolist():
        expert = int(target.slots[layer, slot])
        gpu = slot // slots_per_gpu

        def cost(holder: int, gpu: int = gpu) -> tuple[bool, bool, int, int]:
            other = holder // slots_per_gpu
            return other != gpu, other // gpus_per_node != gpu // gpus_per_node, num_sent[other], holder

        source = min(np.flatnonzero(present.slots[layer] == expert).tolist(), key=cost)
        num_sent[source // slots_per_gpu] += 1
        found.append(Move(layer=layer, expert=expert, source=source, target=slot))
    return found


def rounds(links: Sequence[tuple[int, int]], *, num_rows: int, budget_rows: int) -> Iterator[list[Piece]]:
    """The pieces of each step, until every move has had its `num_rows` rows. `links`: for each move the GPU that sends and the GPU
    that receives; neither does more than `budget_rows` of it in a step."""
    assert budget_rows > 0
    done = [0] * len(links)
    pending = list(range(len(links)))
    while pending:
        sent: Counter[int] = Counter()
        received: Counter[int] = Counter()
        pieces = []
        for move in pending:
            source, target = links[move]
            count = min(num_rows - done[move], budget_rows - sent[source], budget_rows - received[target])
            if count > 0:
                pieces.append(Piece(move=move, first=done[move], end=done[move] + count))
                done[move] += count
                sent[source] += count
                received[target] += count
        pending = [move for move in pending if done[move] < num_rows]
        yield pieces


def _matched(present: Ints, target: Ints, num_groups: int, num_members: int) -> Ints:
    """[L, S]: `target` with the members of each group in the order in which they fit `present` best."""
    shape = (len(present) * num_groups, num_members, -1)
    here, there = present.reshape(shape), target.reshape(shape)
    # [P, M here, M there]: pairs of equal experts. Narrow, since the largest of all is looked for M times.
    common = (here[:, :, None, :, None] == there[:, None, :, None, :]).sum(axis=(-1, -2), dtype=np.int16)
    order = np.empty(here.shape[:2], dtype=np.int64)
    problems = np.arange(len(here))
    for _ in range(num_members):
        own, other = np.divmod(common.reshape(len(here), -1).argmax(axis=1), num_members)
        order[problems, own] = other
        common[problems, own] = common[problems, :, other] = -1
    return np.take_along_axis(there, order[:, :, None], axis=1).reshape(present.shape)
