"""Replicas chosen for a layer's tokens: every pick goes to a slot that holds its expert, as many as were assigned, and few slots are used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.core.errors import ConfigError
from serving.model.hosting import HostedReplicas, slots_by_share
from serving.model.parallel import Hosting
from serving.parallel.collectives import SingleRank
from serving.parallel.groups import Groups
from serving.parallel.placement import Ints, Placement
from serving.parallel.redundancy import hosted_placement
from serving.parallel.replicas import Replicas
from serving.parallel.virtual import VirtualCollectives, VirtualUnit

CPU = torch.device("cpu")
EXPERTS, RANKS, HOSTED, ACTIVE, TOP_K = 24, 8, 6, 4, 3
NUM_TOKENS = [40, 0, 7, 300, 1, 64, 64, 128]


def placement(seed: int = 0) -> Placement:
    loads = np.random.default_rng(seed).lognormal(0, 1, (2, EXPERTS))
    return hosted_placement(loads, num_slots=RANKS * HOSTED, num_gpus=RANKS, active=ACTIVE, num_nodes=2)


def picks(rank: int, *, skew: float = 1.2) -> Tensor:
    """Of this rank's tokens, steep; every ninth token has no expert at all."""
    random = np.random.default_rng(rank)
    scores = np.log(np.arange(1, EXPERTS + 1.0)) * -skew + random.gumbel(size=(NUM_TOKENS[rank], EXPERTS))
    experts = torch.from_numpy(np.argsort(-scores, axis=1)[:, :TOP_K].copy())
    experts[::9] = -1
    return experts


def chosen(placed: Placement, experts: Sequence[Tensor], layer: int = 0) -> tuple[list[Tensor], list[Ints]]:
    """Slots that each rank chooses for its picks, and the tokens of every slot that it computed."""
    seen: list[Ints] = []

    def main(world: VirtualCollectives) -> Tensor:
        hosting = Hosting(
            counts=world, active=ACTIVE, ranks_per_node=4, watch=lambda _, tokens: seen.append(tokens.numpy())
        )
        replicas = HostedReplicas(placed, hosting, CPU)
        counting = replicas.count(experts[world.rank])
        counting.wait()
        return replicas.slots(layer, experts[world.rank], counting.counts_WE)

    slots = VirtualUnit(Groups(tp=1, dp=RANKS, ep=RANKS, ranks_per_node=4)).run(main)
    return slots, seen


def balance(slots: Ints) -> float:
    """Mean over largest load of a rank."""
    loads = np.bincount(slots // HOSTED, minlength=RANKS)
    return float(loads.mean() / loads.max())


@pytest.mark.parametrize("layer", [0, 1])
def test_every_pick_has_a_slot_of_its_expert_and_no_rank_uses_more_than_it_may(layer: int) -> None:
    placed, experts = placement(), [picks(rank) for rank in range(RANKS)]
    slots, seen = chosen(placed, experts, layer)
    used = np.zeros(RANKS * HOSTED, dtype=np.int64)
    for of_rank, its in zip(slots, experts, strict=True):
        assert of_rank.shape == its.shape
        assert torch.equal(of_rank < 0, its < 0)
        there = of_rank[of_rank >= 0].numpy()
        assert (placed.slots[layer][there] == its[its >= 0].numpy()).all()
        used += np.bincount(there, minlength=len(used))
    in_use = (used.reshape(RANKS, HOSTED) > 0).sum(axis=1)
    assert in_use.max() == ACTIVE < HOSTED
    busiest, its = slots[3].numpy(), experts[3].numpy()
    assert (placed.slots[1 - layer][busiest] != its)[its >= 0].any(), "another layer's hosts are others"
    assert all((tokens.ravel() == used).all() for tokens in seen), "every rank computed what came"
    replicas = Replicas(placed, CPU)
    in_turn = torch.cat([replicas.slots(layer, its, rank) for rank, its in enumerate(experts)]).flatten()
    assert balance(in_turn[in_turn >= 0].numpy()) + 0.1 < balance(np.repeat(np.arange(len(used)), used))


def test_what_a_step_does_not_use_another_does() -> None:
    placed = placement()
    steep, other = ([picks(rank, skew=skew) for rank in range(RANKS)] for skew in (1.2, -1.2))
    used = [{slot for of in chosen(placed, experts)[0] for slot in of.flatten().tolist()} for experts in (steep, other)]
    assert used[0] - used[1]
    assert used[1] - used[0]


def test_shares_are_served_in_the_order_of_tokens_and_slots() -> None:
    # Slots 0 to 4 hold experts 2, 0, 1, 0, 2.
    by_expert = torch.tensor([1, 3, 2, 0, 4, -1])
    share = torch.tensor([1, 2, 0, 1, 2])
    experts = torch.tensor([[0, 2], [2, 0], [-1, 0], [2, -1]])
    assert slots_by_share(experts, share, by_expert, 3).tolist() == [[1, 0], [4, 1], [-1, 3], [4, -1]]
    none = torch.empty(0, 2, dtype=torch.int64)
    assert slots_by_share(none, 0 * share, by_expert, 3).shape == (0, 2)


def test_new_hosts_are_in_force_where_the_old_tables_lay() -> None:
    old, new = placement(), placement(seed=1)
    hosting = Hosting(counts=SingleRank(), active=ACTIVE, ranks_per_node=4)
    replicas = HostedReplicas(old, hosting, CPU)
    addresses = replicas._hosted_LWH.data_ptr(), replicas._by_expert_LS.data_ptr()
    replicas.write(new)
    assert (replicas._hosted_LWH.numpy().reshape(2, -1) == new.slots).all()
    assert (np.take_along_axis(new.slots, replicas._by_expert_LS.numpy()[:, :-1], axis=1)[:, 0] == 0).all()
    assert addresses == (replicas._hosted_LWH.data_ptr(), replicas._by_expert_LS.data_ptr())


def test_more_ranks_than_the_kernel_knows_are_refused_on_a_gpu() -> None:
    placed = hosted_placement(np.ones((1, 64)), num_slots=128, num_gpus=64, active=1, num_nodes=8)
    hosting = Hosting(counts=SingleRank(), active=1, ranks_per_node=8)
    with pytest.raises(ConfigError, match=r"hosted_slots = 2 with ep = 64.* up to 32 ranks"):
        HostedReplicas(placed, hosting, torch.device("cuda"))
    HostedReplicas(placed, hosting, CPU)
