"""What a dispatch sends, counted on the way and derived from the routing alone: payload, routing and padding by link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.kernels.quant import quantise_rows_fp8
from serving.kernels.topk import gate_topk
from serving.parallel.balance import global_placement, hierarchical_placement, single_placement
from serving.parallel.collectives import Collectives
from serving.parallel.dispatch import DirectDispatch, Dispatch, FixedDispatch, HierarchicalDispatch
from serving.parallel.groups import Groups, Link
from serving.parallel.placement import Placement
from serving.parallel.replicas import Replicas
from serving.parallel.traffic import Traffic
from serving.parallel.virtual import VirtualCollectives, VirtualUnit

WIDTH = 7168
IN, BACK = 7392, 14336
"""Bytes of a token in FP8 with its scales, and of its result in bf16 (report, section 3.4.1)."""
EXPERTS, NODE_GROUPS, TOP_K = 256, 8, 8
PREFILL = Groups(tp=4, dp=8, ep=32, ranks_per_node=8)
DECODE = Groups(tp=4, dp=80, ep=320, ranks_per_node=8)

Rows = Counter[tuple[str, Link]]
"""Copies of a row by group and link."""
Sums = dict[tuple[str, Link], Traffic]


@dataclass(frozen=True)
class Unit:
    """`picks[rank]`: slots [T, K]."""

    groups: Groups
    slots_per_rank: int
    picks: list[Tensor]

    def ranks(self, rank: int) -> list[list[int]]:
        """Of each token of `rank`, the ranks that hold an expert of it."""
        return [sorted({slot // self.slots_per_rank for slot in slots}) for slots in self.picks[rank].tolist()]

    def nodes(self, rank: int) -> list[set[int]]:
        return [{target // self.groups.ranks_per_node for target in ranks} for ranks in self.ranks(rank)]


def gated(num_tokens: list[int], placement: Placement, groups: Groups, *, shared: bool = False) -> Unit:
    """Tokens as the gate sends them, over the copies; with `shared`, the last logical expert is picked by all."""
    some = torch.Generator().manual_seed(3)
    replicas = Replicas(placement, torch.device("cpu"))
    picks = []
    for rank, count in enumerate(num_tokens):
        logits, bias = torch.randn(count, EXPERTS, generator=some), torch.zeros(EXPERTS)
        kept = {"num_groups": NODE_GROUPS, "num_groups_kept": 4, "top_k": TOP_K}
        experts, _ = gate_topk(logits, bias, **kept, renormalise=True, scaling=2.5)
        if shared:
            experts = torch.cat([experts, torch.full((count, 1), EXPERTS)], dim=1)
        picks.append(replicas.slots(0, experts, first=rank))
    return Unit(groups, placement.slots_per_gpu, picks)


def loads(num_experts: int = EXPERTS) -> np.ndarray:
    return np.random.default_rng(5).lognormal(sigma=1.0, size=(1, num_experts))


def carried(unit: Unit, make: Callable[[VirtualCollectives], Dispatch], width: int = WIDTH) -> Sums:
    """There in FP8, and back as if every row that is in use had a result."""
    virtual = VirtualUnit(unit.groups)

    def main(group: VirtualCollectives) -> None:
        with torch.inference_mode():
            picks, dispatch = unit.picks[group.rank], make(group)
            rows = quantise_rows_fp8(torch.ones(len(picks), width))
            sending = dispatch.send(rows, picks, torch.ones(picks.shape))
            used = (sending.wait().slots_RK >= 0).any(1, keepdim=True)
            dispatch.give_back(sending, used.expand(-1, width).to(torch.bfloat16)).wait()

    virtual.run(main)
    assert {operation for _, operation, _ in virtual.traffic} == {"all_to_all"}
    return {(group, link): traffic for (group, _, link), traffic in virtual.traffic.items()}


def direct(unit: Unit) -> Callable[[VirtualCollectives], Dispatch]:
    return lambda group: DirectDispatch(group, unit.slots_per_rank)


def hierarchical(unit: Unit, *, queues: bool = False) -> Callable[[VirtualCollectives], Dispatch]:
    """`queues`: counts and what returns go over groups of their own."""

    def make(group: VirtualCollectives) -> Dispatch:
        def ways(prefix: str) -> tuple[Collectives, Collectives]:
            rail, node = unit.groups.rail_group(group.rank), unit.groups.node_group(group.rank)
            return group.subgroup(rail, prefix + "rail"), group.subgroup(node, prefix + "node")

        apart = (ways("counts-"), ways("back-")) if queues else ()
        return HierarchicalDispatch(*ways(""), unit.slots_per_rank, *apart)

    return make


def rows_to_ranks(unit: Unit) -> Rows:
    """One copy for each rank that holds an expert of the token."""
    return Counter(
        ("world", unit.groups.link(rank, target))
        for rank in range(unit.groups.world_size)
        for targets in unit.ranks(rank)
        for target in targets
    )


def rows_by_nodes(unit: Unit) -> Rows:
    """One copy for each node, to the rank of the same local index, and from there one for each rank of the node."""
    rows: Rows = Counter()
    per_node = unit.groups.ranks_per_node
    for rank in range(unit.groups.world_size):
        for targets in unit.ranks(rank):
            for node in {target // per_node for target in targets}:
                proxy = node * per_node + rank % per_node
                rows["rail", unit.groups.link(rank, proxy)] += 1
                rows.update(
                    ("node", unit.groups.link(proxy, target)) for target in targets if target // per_node == node
                )
    return rows


def payload_rows(sums: Sums, width: int) -> Rows:
    return Counter({where: traffic.payload_rows[width] for where, traffic in sums.items() if traffic.payload_rows})


@pytest.fixture(scope="module")
def prefill() -> Unit:
    """288 slots on four nodes, each group's experts inside one; every fifth rank idle."""
    where = hierarchical_placement(loads(), num_slots=288, num_gpus=32, num_nodes=4, num_groups=NODE_GROUPS)
    return gated([rank % 5 for rank in range(32)], where, PREFILL)


@pytest.fixture(scope="module")
def prefill_sums(prefill: Unit) -> Sums:
    return carried(prefill, hierarchical(prefill))


def test_prefill_sends_a_token_once_to_each_node_and_there_once_to_each_rank(prefill: Unit, prefill_sums: Sums) -> None:
    want = rows_by_nodes(prefill)
    assert payload_rows(prefill_sums, IN) == payload_rows(prefill_sums, BACK) == want
    assert all(set(traffic.payload_rows) <= {IN, BACK} for traffic in prefill_sums.values())
    # What leaves a node: 7,392 bytes there and 14,336 back for each distinct remote node of each token.
    remote = sum(len(nodes - {rank // 8}) for rank in range(32) for nodes in prefill.nodes(rank))
    assert prefill_sums["rail", Link.IB].payload_bytes == remote * (IN + BACK)
    assert ("node", Link.IB) not in prefill_sums
    # Sent to the ranks directly, far more crosses.
    directly = carried(prefill, direct(prefill))["world", Link.IB].payload_bytes
    assert directly > 1.5 * prefill_sums["rail", Link.IB].payload_bytes


def test_prefill_routing_and_counts_stand_apart_from_payload(prefill: Unit, prefill_sums: Sums) -> None:
    rows = rows_by_nodes(prefill)
    pairs = Counter(
        (name, PREFILL.link(rank, target))
        for rank in range(32)
        for name, targets in (("rail", PREFILL.rail_group(rank)), ("node", PREFILL.node_group(rank)))
        for target in targets
    )
    for (name, link), traffic in prefill_sums.items():
        # With a row, slot and weight of each pick; before it, counts: of rows and of rows for each of eight ranks.
        counts = 8 * (1 + 8) if name == "rail" else 8
        assert traffic.routing_bytes == rows[name, link] * 8 * TOP_K + pairs[name, link] * counts
        assert traffic.padding_bytes == 0
        assert traffic.num_bytes == rows[name, link] * (IN + BACK) + traffic.routing_bytes


def test_counts_and_what_returns_go_over_groups_of_their_own_where_there_are(prefill: Unit, prefill_sums: Sums) -> None:
    """No row waits behind them in a group's queue then."""
    sums = carried(prefill, hierarchical(prefill, queues=True))
    assert {name for name, _ in sums} == {
        prefix + way for prefix in ("", "counts-", "back-") for way in ("rail", "node")
    }
    for (name, link), together in prefill_sums.items():
        rows, counts, back = (sums[prefix + name, link] for prefix in ("", "counts-", "back-"))
        number = together.payload_rows[IN]
        assert (rows.payload_rows, counts.payload_rows, back.payload_rows) == ({IN: number}, {}, {BACK: number})
        assert rows.num_bytes + counts.num_bytes + back.num_bytes == together.num_bytes
        assert counts.num_bytes > 0


def test_decode_sends_one_copy_to_the_gpu_of_each_selected_expert() -> None:
    """320 ranks with one expert each, the shared one among them."""
    busiest = loads(EXPERTS + 1)
    busiest[0, EXPERTS] = busiest.sum() / 8
    unit = gated([rank % 2 for rank in range(320)], single_placement(busiest, num_gpus=320), DECODE, shared=True)
    width = 128
    sums = carried(unit, direct(unit), width)
    rows = payload_rows(sums, width + 4)
    assert rows == payload_rows(sums, 2 * width) == rows_to_ranks(unit)
    assert rows.total() == 160 * 9
    assert {traffic.padding_bytes for traffic in sums.values()} == {0}


def test_a_fixed_step_sends_the_same_bytes_and_its_padding_is_told_apart() -> None:
    where = global_placement(loads(), num_slots=288, num_gpus=32)
    unit = gated([rank % 4 for rank in range(32)], where, PREFILL)
    capacity = 5
    sums = carried(unit, lambda group: FixedDispatch(group, unit.slots_per_rank, capacity), width=128)
    rows = rows_to_ranks(unit)
    # Some tokens have several experts on one rank, and go there once.
    assert rows.total() < sum(picks.numel() for picks in unit.picks)
    pairs = Counter(PREFILL.link(rank, target) for rank in range(32) for target in range(32))
    for link, num_pairs in pairs.items():
        traffic, used = sums["world", link], rows["world", link]
        assert traffic.payload_rows == {128 + 4: used, 256: used}
        whole = 128 + 4 + 8 * TOP_K + 256
        assert traffic.padding_bytes == (num_pairs * capacity - used) * whole
        assert traffic.num_bytes == num_pairs * capacity * whole


def test_a_token_goes_to_at_most_four_nodes_where_a_group_lives_on_one() -> None:
    """64 ranks on 8 nodes; experts anywhere break the limit."""
    groups = Groups(tp=4, dp=16, ep=64, ranks_per_node=8)
    sizes = {"num_slots": 320, "num_gpus": 64}
    together = hierarchical_placement(loads(), **sizes, num_nodes=8, num_groups=NODE_GROUPS)
    apart = global_placement(loads(), **sizes)
    most, copies = {}, {}
    for name, where in (("together", together), ("apart", apart)):
        unit = gated([2] * 64, where, groups)
        most[name] = max(len(nodes) for rank in range(64) for nodes in unit.nodes(rank))
        rows = payload_rows(carried(unit, hierarchical(unit), width=128), 128 + 4)
        assert rows == rows_by_nodes(unit)
        copies[name] = sum(count for (group, _), count in rows.items() if group == "rail")
    assert most["together"] == 4
    assert copies["together"] <= 4 * 128
    assert most["apart"] > 4
    assert copies["apart"] > 4 * 128
