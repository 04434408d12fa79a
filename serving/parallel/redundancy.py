"""Dynamic redundancy: which replicas compute a layer's tokens, decided anew at every step (DeepSeek-V3 report, section 3.4.1).

A GPU hosts more experts than it may use in a step. Before a layer's dispatch the ranks exchange their token counts, and each of
them computes for itself who takes what: no rank tells another. Hence integers alone and every tie broken by index, so that the
same counts give the same answer everywhere. Whoever moves weights to the hosts (placement) and tokens to the replicas (dispatch)
is not known here.

    counts -> first shares -> large hand-overs along paths -> the fullest GPU relieved again and again -> parts of the source ranks
              (further starts, from pieces of another size, where the first does not end even enough)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from serving.core.errors import ConfigError
from serving.parallel.placement import Floats, Placement
from serving.parallel.shares import Shares

Ints = NDArray[np.int64]

_PIECES = (8, 11, 14, 6, 20, 10, 7, 12, 9, 13)
"""An expert is first split into pieces of about so many sixteenths of the mean load; start after start, until one ends well; mostly the first does."""
_ACCEPTED = 36
"""Over the mean by at most one part in so many (2.8 %): no further start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """tokens int64 [num_gpus, hosted_slots]: what each slot computes; a slot with 0 is not in use.

    sent int64 [sources, num_gpus, hosted_slots]: the part of it that each source rank sends.
    """

    tokens: Ints
    sent: Ints

    @property
    def balance(self) -> float:
        """Mean over largest load of a GPU; 1 where there are no tokens."""
        return balance(self.tokens.sum(axis=1))


def balance(load: Ints) -> float:
    """Mean over largest of `load` [num_gpus]; 1 where there is none."""
    return float(load.mean() / load.max()) if load.any() else 1.0


def assign(counts: Ints, hosted: Ints, *, active: int, gpus_per_node: int) -> Assignment:
    """Tokens for replicas: the largest load of a GPU as small as a local search makes it, at most `active` slots of a GPU in use.

    counts: tokens of each expert, integers [experts] or [source ranks, experts]; source ranks are spread evenly over the nodes,
    in order; of one row alone no node is known.
    hosted: expert of each slot, integers [num_gpus, hosted_slots], as `choose_hosted` makes them: no expert twice on a GPU, and `active`
    slots a GPU can hold all. Among equals a replica on the node with most of its tokens is taken, and a node's tokens go to its own replicas first.
    """
    by_source = np.atleast_2d(np.asarray(counts, dtype=np.int64))
    num_gpus, num_experts = hosted.shape[0], by_source.shape[1]
    num_nodes = num_gpus // gpus_per_node
    located = len(by_source) > 1
    assert not located or len(by_source) % num_nodes == 0, f"{len(by_source)} source ranks on {num_nodes} nodes"
    totals: list[int] = by_source.sum(axis=0).tolist()
    local = _by_node(by_source, num_nodes).T.tolist() if located else [[0] * num_nodes] * num_experts
    hosts: list[list[int]] = [[] for _ in range(num_experts)]
    for gpu, row in enumerate(hosted.tolist()):
        for expert in row:
            hosts[expert].append(gpu)
    mean = -(-sum(totals) // num_gpus)
    best: Shares | None = None
    for sixteenths in _PIECES:
        shares = Shares(hosts, num_gpus=num_gpus, active=active, mean=mean)
        shares.start(totals, piece=max(mean * sixteenths // 16, 1), local=local, gpus_per_node=gpus_per_node)
        shares.even_out()
        if best is None or max(shares.load) < max(best.load):
            best = shares
        if max(best.load) <= mean + mean // _ACCEPTED:
            break
    assert best is not None
    tokens = np.array(
        [[held.get(expert, 0) for expert in row] for held, row in zip(best.held, hosted.tolist(), strict=True)]
    )
    return Assignment(tokens=tokens, sent=_split(by_source, hosted, tokens, num_nodes))


def _by_node(by_source: Ints, num_nodes: int) -> Ints:
    """[sources, experts] -> [num_nodes, experts]."""
    nodes: Ints = by_source.reshape(num_nodes, -1, by_source.shape[1]).sum(axis=1)
    return nodes


def _split(by_source: Ints, hosted: Ints, tokens: Ints, num_nodes: int) -> Ints:
    """Parts of the source ranks in each slot's tokens: first within each node, then what is left, both in the order of ranks and slots."""
    gpus, slots = np.nonzero(tokens)
    experts, wanted = hosted[gpus, slots], tokens[gpus, slots]
    order = np.argsort(experts, kind="stable")
    gpus, slots, experts, wanted = gpus[order], slots[order], experts[order], wanted[order]
    num_sources = len(by_source)
    flat = np.zeros((num_sources, len(experts)), dtype=np.int64)
    left = by_source.copy()
    if num_sources > 1:
        for node in range(num_nodes):
            ranks = slice(node * num_sources // num_nodes, (node + 1) * num_sources // num_nodes)
            here = np.flatnonzero(gpus * num_nodes // len(hosted) == node)
            offered = by_source[ranks]
            flat[ranks, here] = _overlap(offered, experts[here], wanted[here])
            capacity = np.bincount(experts[here], wanted[here], minlength=by_source.shape[1]).astype(np.int64)
            left[ranks] -= np.clip(capacity - (offered.cumsum(axis=0) - offered), 0, offered)
    flat += _overlap(left, experts, wanted - flat.sum(axis=0))
    sent = np.zeros((num_sources, *hosted.shape), dtype=np.int64)
    sent[:, gpus, slots] = flat
    return sent


def _overlap(offered: Ints, experts: Ints, wanted: Ints) -> Ints:
    """Tokens from rank to slot, [ranks, slots], when both stand in line, expert by expert.

    offered [ranks, experts]; experts, wanted [slots], sorted by expert. Where the two sides differ, the end of the longer line is left over.
    """
    rank_ends = offered.cumsum(axis=0)[:, experts]
    slot_ends = wanted.cumsum()
    line_begins = np.searchsorted(experts, experts)
    slot_ends = slot_ends - (slot_ends - wanted)[line_begins]
    begins = np.maximum(rank_ends - offered[:, experts], slot_ends - wanted)
    sent: Ints = np.maximum(np.minimum(rank_ends, slot_ends) - begins, 0)
    return sent


def choose_hosted(
    load: Ints, *, num_gpus: int, hosted_slots: int, active: int, gpus_per_node: int, present: Ints | None = None
) -> Ints:
    """Experts that each GPU hosts until the next renewal, int64 [num_gpus, hosted_slots]; no GPU hosts one twice.

    load: tokens of each expert, integers [experts]. Copies go by load^(7/8), so that experts about to become hot have some, to other nodes
    first, and to no more than half the GPUs. The first `active` slots of the rows hold every expert: there always is an assignment.
    present: such rows, of which as much as can be stays where it is: who takes what is decided in each step, so nothing is lost by it.
    ConfigError: the experts do not fit.
    """
    num_experts = len(load)
    if not (active <= hosted_slots <= num_experts <= num_gpus * active):
        raise ConfigError(
            f"{num_experts} experts do not fit {num_gpus} GPUs with hosted_slots = {hosted_slots}, {active} of them active: "
            f"set at least {-(-num_experts // num_gpus)} active, no more than are hosted, and host at most {num_experts}"
        )
    tokens = [int(count) for count in load]
    slots = num_gpus * hosted_slots
    weights = [_less_steep(count) for count in tokens]
    copies = _copies(weights, total=slots, most=max(num_gpus // 2, -(-slots // num_experts)))
    share, order = _by_share(tokens, copies)
    first = [(expert, active) for expert in order]
    further = [(expert, hosted_slots) for expert in order for _ in range(copies[expert] - 1)]
    return _pack(
        [*first, *further],
        share,
        num_gpus=num_gpus,
        slots=hosted_slots,
        gpus_per_node=gpus_per_node,
        present=[[]] * num_gpus if present is None else present.tolist(),
    )


def hosted_placement(
    loads: Floats,
    *,
    num_slots: int,
    num_gpus: int,
    active: int,
    num_nodes: int,
    present: Placement | None = None,
) -> Placement:
    """`choose_hosted` for the loads [L, E] of every layer. As it does, the first `active` slots of the GPUs hold all experts of a layer, where a
    search for replicas begins. Raises ConfigError."""
    shape = len(loads), num_gpus, num_slots // num_gpus
    before = [None] * len(loads) if present is None else list(present.slots.reshape(shape))
    hosted = [
        choose_hosted(
            load,
            num_gpus=num_gpus,
            hosted_slots=shape[2],
            active=active,
            gpus_per_node=num_gpus // num_nodes,
            present=of_layer,
        )
        for load, of_layer in zip(_in_tokens(loads), before, strict=True)
    ]
    slots = np.stack(hosted).reshape(len(loads), num_slots)
    return Placement(slots=slots, num_experts=loads.shape[1], num_gpus=num_gpus)


def hosted_balance(placement: Placement, loads: Floats, *, active: int, num_nodes: int) -> Floats:
    """[L]: mean over largest load of a GPU where replicas are chosen for just these loads [L, E], as `assign` does."""
    hosted = placement.slots.reshape(len(loads), placement.num_gpus, -1)
    gpus_per_node = placement.num_gpus // num_nodes
    return np.array(
        [
            assign(load, of_layer, active=active, gpus_per_node=gpus_per_node).balance
            for load, of_layer in zip(_in_tokens(loads), hosted, strict=True)
        ]
    )


def _in_tokens(loads: Floats) -> Ints:
    """As whole tokens, some million a layer, and one at least of each expert; without any load, all alike."""
    totals = loads.sum(axis=1, keepdims=True)
    parts = np.divide(loads, totals, out=np.zeros_like(loads), where=totals > 0)
    tokens: Ints = 1 + np.rint(parts * (1 << 20)).astype(np.int64)
    return tokens


def static_placement(load: Ints, *, num_gpus: int, slots: int) -> Ints:
    """What stands beside it: all slots in use and replicas sharing evenly, int64 [num_gpus, slots]; copies go by load [experts]."""
    tokens = [int(count) for count in load]
    copies = _copies(tokens, total=num_gpus * slots, most=num_gpus)
    share, order = _by_share(tokens, copies)
    placed = [(expert, slots) for expert in order for _ in range(copies[expert])]
    return _pack(placed, share, num_gpus=num_gpus, slots=slots, gpus_per_node=num_gpus, present=[[]] * num_gpus)


def _less_steep(count: int) -> int:
    """count^(7/8), up to a factor and in integers."""
    count <<= 16
    return isqrt(count * isqrt(count * isqrt(count)))


def _copies(weights: Sequence[int], *, total: int, most: int) -> list[int]:
    """Copies of each expert: one, and each further one to the largest weight a copy."""
    copies = [1] * len(weights)
    heap = [(-(weight << 32), expert) for expert, weight in enumerate(weights)]
    heapq.heapify(heap)
    for _ in range(total - len(weights)):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < most:
            heapq.heappush(heap, (-((weights[expert] << 32) // copies[expert]), expert))
    return copies


def _by_share(tokens: Sequence[int], copies: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens a copy, and the experts by it, heaviest first."""
    share = [count // number for count, number in zip(tokens, copies, strict=True)]
    return share, sorted(range(len(tokens)), key=lambda expert: (-share[expert], expert))


def _pack(
    placed: Iterable[tuple[int, int]],
    share: Sequence[int],
    *,
    num_gpus: int,
    slots: int,
    gpus_per_node: int,
    present: Sequence[Sequence[int]],
) -> Ints:
    """A GPU for each (expert, slots of a row that it may take part in): the node with fewest copies of it, there one that has it among as many
    slots at present, else the least loaded.

    A copy that no GPU can take any more is left out; slots that stay empty keep what they have, or take the first experts that their GPU lacks.
    """
    rows: list[list[int]] = [[] for _ in range(num_gpus)]
    load = [0] * num_gpus
    on_node = [[0] * -(-num_gpus // gpus_per_node) for _ in share]
    for expert, room in placed:
        copies = on_node[expert]
        free = [gpu for gpu, row in enumerate(rows) if len(row) < room and expert not in row]
        if free:
            key = [
                (copies[gpu // gpus_per_node], expert not in present[gpu][:room], load[gpu], len(rows[gpu]))
                for gpu in free
            ]
            gpu = free[key.index(min(key))]
            rows[gpu].append(expert)
            load[gpu] += share[expert]
            copies[gpu // gpus_per_node] += 1
    by_share = sorted(range(len(share)), key=lambda expert: (-share[expert], expert))
    for row, before in zip(rows, present, strict=True):
        missing = [expert for expert in dict.fromkeys([*before, *by_share]) if expert not in row]
        row.extend(missing[: slots - len(row)])
    return np.array(rows, dtype=np.int64)
