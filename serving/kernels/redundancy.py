"""Dynamic redundancy as a device op: which replicas compute a layer's tokens, without a read-back (DeepSeek-V3 report, section 3.4.1).

The contract is `serving.parallel.redundancy.assign`'s, the algorithm another one, made for one warp: several local searches side by side,
each from a start of its own, and the best counts. All of it integers, so every rank has the same answer, on a device or not. It stands with
the kernels and knows nothing of ranks or placement: what calls it brings the counts together and sends the tokens.

    start   every expert whole, on one of its hosts
    round   from the fullest GPU, a hand-over of so many tokens, over at most three others, to one with room for them; who is full hands
            one of his small shares on first. None found: half as many tokens; at the end again, and larger shares may be handed on.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_GPUS = 32
MOST_PICKS = (1 << 24) - 1
"""Tokens, each counted once for each of its experts, that all ranks bring to a layer: a load, a place and a rank among equals share 32 bits."""
NUM_STARTS, MAX_ROUNDS = 8, 48
HALVINGS, STAGES = 6, 3
"""Tokens to hand over at a time are halved so often, and shares that may be handed on are up to 1, 2, 4 times as large."""
GOAL, GOAL_STEP = 40, 8
"""Even enough: over the mean by one part in 40 (2.5 %) for the first two starts, in 48 for the next two, and so on; the even ones halve from a
half of the mean, the odd ones from a third. So they differ, and where one ends badly another does not."""
_MOST_HOPS = 4

Ints = NDArray[np.int64]


def assign_replicas(
    counts: Tensor,
    hosted: Tensor,
    *,
    active: int,
    gpus_per_node: int,
    num_starts: int = NUM_STARTS,
    max_rounds: int = MAX_ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Tokens of each slot, int32 [num_gpus, hosted_slots], at most `active` of a GPU with any; and each source rank's part of them,
    int32 [source ranks, num_gpus, hosted_slots].

    counts: integers [source ranks, experts], at most MOST_PICKS in all; ranks are spread evenly over the nodes, in order; of one alone no node is
    known. hosted: expert of each slot, integers [num_gpus <= 32, hosted_slots <= 32], no expert twice on a GPU, and, as `choose_hosted` makes
    them, all experts among the first `active` slots of the rows: a search begins there. Loads of GPUs are made as even as it can; among equals a replica
    on the tokens' own node is taken, and a node's tokens go to its own replicas first.
    """
    num_sources, num_gpus = counts.shape[0], hosted.shape[0]
    assert num_gpus <= MOST_GPUS, f"{num_gpus} GPUs; a set of them is the bits of one number"
    assert num_gpus % gpus_per_node == 0, f"{num_gpus} GPUs in nodes of {gpus_per_node}"
    assert num_sources == 1 or num_sources % (num_gpus // gpus_per_node) == 0, (
        f"{num_sources} source ranks do not divide over the nodes"
    )
    if counts.is_cuda:
        from serving.kernels.triton import redundancy as device

        return device.assign_replicas(
            counts,
            hosted,
            active=active,
            gpus_per_node=gpus_per_node,
            num_starts=num_starts,
            max_rounds=max_rounds,
        )
    return assign_replicas_reference(
        counts, hosted, active=active, gpus_per_node=gpus_per_node, num_starts=num_starts, max_rounds=max_rounds
    )


def assign_replicas_reference(
    counts: Tensor,
    hosted: Tensor,
    *,
    active: int,
    gpus_per_node: int,
    num_starts: int = NUM_STARTS,
    max_rounds: int = MAX_ROUNDS,
) -> tuple[Tensor, Tensor]:
    """The same integers, one search after the other."""
    by_source, experts = counts.numpy().astype(np.int64), hosted.numpy().astype(np.int64)
    num_nodes = len(experts) // gpus_per_node
    searches = [
        _Search(by_source, experts, active=active, gpus_per_node=gpus_per_node, start=start, num_starts=num_starts)
        for start in range(num_starts)
    ]
    tokens = min((search.run(max_rounds) for search in searches), key=lambda found: int(found.sum(axis=1).max()))
    sent = np.zeros((len(by_source), *experts.shape), dtype=np.int64)
    for expert in range(by_source.shape[1]):
        gpus, slots = np.nonzero(experts == expert)
        wanted, offered = tokens[gpus, slots], by_source[:, expert]
        part = np.zeros((len(offered), len(gpus)), dtype=np.int64)
        if len(by_source) > 1:
            for node in range(num_nodes):
                ranks = np.arange(len(offered)) * num_nodes // len(offered) == node
                own = gpus // gpus_per_node == node
                part += _overlap(np.where(ranks, offered, 0), np.where(own, wanted, 0))
        part += _overlap(offered - part.sum(axis=1), wanted - part.sum(axis=0))
        sent[:, gpus, slots] = part
    return torch.from_numpy(tokens).int(), torch.from_numpy(sent).int()


def _overlap(offered: Ints, wanted: Ints) -> Ints:
    """Tokens from rank to slot, [ranks, slots], when both stand in line."""
    rank_ends, slot_ends = offered.cumsum()[:, None], wanted.cumsum()[None]
    begins = np.maximum(rank_ends - offered[:, None], slot_ends - wanted[None])
    overlap: Ints = np.maximum(np.minimum(rank_ends, slot_ends) - begins, 0)
    return overlap


class _Search:
    """One start and its rounds. tokens [GPUs, slots]; a set of GPUs is the bits of a number, as on the device."""

    def __init__(
        self, counts: Ints, experts: Ints, *, active: int, gpus_per_node: int, start: int, num_starts: int
    ) -> None:
        num_gpus = len(experts)
        totals = counts.sum(axis=0)
        self.active, self.experts = active, experts
        self.gpus = np.arange(num_gpus)
        self.bits = 1 << self.gpus
        num_nodes = num_gpus // gpus_per_node
        by_node = counts.reshape(num_nodes, -1, counts.shape[1]).sum(axis=1) if len(counts) > 1 else 0 * counts
        self.local = by_node.T[:, self.gpus // gpus_per_node if len(counts) > 1 else 0 * self.gpus]
        hosts, homes = np.zeros_like(totals), np.zeros_like(totals)
        np.bitwise_or.at(hosts, experts, self.bits[:, None])
        np.bitwise_or.at(homes, experts[:, :active], self.bits[:, None])
        self.others = hosts[experts] & ~self.bits[:, None]
        # The first of them from a GPU on, which is another one in each start.
        behind = homes & (-1 << (start * num_gpus // num_starts))
        homes = np.where(behind != 0, behind, homes)
        homes &= -homes
        self.used = np.where(totals > 0, homes, 0)[experts]
        self.tokens = np.where(homes[experts] == self.bits[:, None], totals[experts], 0)
        self.mean = -(-int(totals.sum()) // num_gpus)
        self.goal = self.mean + self.mean // (GOAL + GOAL_STEP * (start // 2))
        self.unit = self.mean // (2 + start % 2)

    @property
    def load(self) -> Ints:
        load: Ints = self.tokens.sum(axis=1)
        return load

    def run(self, max_rounds: int) -> Ints:
        """The most even tokens that it came by."""
        best, level, rounds = self.tokens.copy(), 0, 0
        while (largest := int(self.load.max())) > self.goal and level < HALVINGS * STAGES and rounds < max_rounds:
            amount = max(self.unit >> (level % HALVINGS), 1)
            if amount > largest - self.mean:
                level += 1
                continue
            rounds += 1
            if self._hand_over(amount, small=amount << (level // HALVINGS)):
                level = level if level < HALVINGS else 0
            else:
                level += 1
            if self.load.max() < best.sum(axis=1).max():
                best = self.tokens.copy()
        return best

    def _set(self, holds: NDArray[np.bool_]) -> int:
        return int(self.bits[holds].sum())

    def _free(self) -> int:
        return self._set((self.tokens > 0).sum(axis=1) < self.active)

    def _takers(self, may: int, barred: int) -> Ints:
        """Of each slot: the GPUs `may` or that use its expert already, but for its own and the barred one."""
        takers: Ints = ((self.others & may) | (self.used & ~self.bits[:, None])) & ~barred
        return takers

    def _hand_over(self, amount: int, *, small: int) -> bool:
        """`amount` tokens and more from the fullest GPU, on the shortest path to one with room; who is full hands a share of at most `small` on."""
        load = self.load
        gpu = int(load.argmax())
        barred = 1 << gpu
        passing = (self.tokens > 0) & (self.tokens <= small) & (self._takers(self._free(), barred) != 0)
        arcs = self._takers(self._free() | self._set(passing.any(axis=1)), barred)
        arcs = np.where(self.tokens >= amount, arcs, 0)
        arcs_of_gpu = np.bitwise_or.reduce(arcs, axis=1)
        # Backwards from those with room for so many.
        layers = [self._set(self.goal - load >= amount) & ~barred]
        seen = layers[0]
        for _ in range(_MOST_HOPS):
            if arcs_of_gpu[gpu] & layers[-1]:
                break
            layers.append(self._set((arcs_of_gpu & layers[-1]) != 0) & ~seen)
            seen |= layers[-1]
        else:
            return False
        count = int(load[gpu]) - self.mean
        for index in reversed(range(len(layers))):
            hop = self._hop(gpu, arcs[gpu] & layers[index], count, small, barred, through=2 * amount if index else None)
            if hop is None:
                return index < len(layers) - 1
            gpu, count = hop
        return True

    def _hop(
        self, gpu: int, to: Ints, count: int, small: int, barred: int, *, through: int | None
    ) -> tuple[int, int] | None:
        """Up to `count` tokens to one of `to` [slots], which lets no more than that `through`, or has no more room; returns it and how many."""
        free, load = self._free(), self.load
        rank = np.where(to & self.used[gpu], 2, np.where(to & free, 1, 0))
        slot = int(np.where(to != 0, (rank << 29) + (self.tokens[gpu] << 5), -1).argmax())
        expert, there = int(self.experts[gpu, slot]), int(self.tokens[gpu, slot])
        room = self.goal - load
        value = (room + self.local[expert] // 2 + (1 << 24)) >> 2
        rank = np.where((self.used[gpu, slot] & self.bits) != 0, 2, np.where(free & self.bits, 1, 0))
        key = np.where((to[slot] & self.bits) != 0, (rank << 29) + (value << 5), -1)
        target = int(key.argmax())
        count = min(count, there, int(room[target]) if through is None else through)
        if count <= 0 or key[target] < 0:
            return None
        if not rank[target] and not self._pass_on(target, expert, small, barred):
            return None
        self._move(expert, gpu, target, count)
        return target, count

    def _pass_on(self, gpu: int, kept: int, small: int, barred: int) -> bool:
        """The largest small share of a full GPU, whole, to the least loaded that takes it."""
        takers = self._takers(self._free(), barred)[gpu]
        tokens = self.tokens[gpu]
        shares = np.where((tokens <= small) & (takers != 0) & (self.experts[gpu] != kept), tokens, 0)
        slot = int(shares.argmax())
        if not shares[slot]:
            return False
        taken_by = (takers[slot] & self.bits) != 0
        taker = int(np.where(taken_by, self.load, np.iinfo(np.int64).max).argmin())
        self._move(int(self.experts[gpu, slot]), gpu, taker, int(shares[slot]))
        return True

    def _move(self, expert: int, source: int, target: int, count: int) -> None:
        its = self.experts == expert
        left = self.tokens[source][its[source]].sum() - count
        self.tokens -= np.where(its & (self.gpus == source)[:, None], count, 0)
        self.tokens += np.where(its & (self.gpus == target)[:, None], count, 0)
        self.used = np.where(its, (self.used & ~(0 if left else 1 << source)) | 1 << target, self.used)
