"""Replicas chosen on the device: where each of 32 ranks sends its tokens equals the reference, eager and captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.bench.redundancy import ACTIVE, GPUS_PER_NODE, HOSTED, NUM_EXPERTS, NUM_GPUS, TOP_K
from serving.kernels.redundancy import assign_replicas_reference
from serving.model.hosting import HostedReplicas, slots_by_share
from serving.model.parallel import Hosting
from serving.parallel.collectives import Done, Handle
from serving.parallel.placement import Placement
from serving.parallel.redundancy import hosted_placement
from tests.gpu.graphs import replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
LAYER = 1


@dataclass
class Group:
    """One rank's end of an EP group whose others' counts are known beforehand."""

    rank: int
    counts_WE: Tensor
    world_size: int = NUM_GPUS

    def all_gather(self, out: Tensor, tensor: Tensor) -> Handle:
        out.copy_(self.counts_WE)
        out[self.rank] = tensor[0]
        return Done()


def placement(seed: int) -> Placement:
    loads = np.random.default_rng(seed).lognormal(0, 1, (2, NUM_EXPERTS))
    return hosted_placement(
        loads, num_slots=NUM_GPUS * HOSTED, num_gpus=NUM_GPUS, active=ACTIVE, num_nodes=NUM_GPUS // GPUS_PER_NODE
    )


def picks(num_tokens: Sequence[int], seed: int) -> list[Tensor]:
    """Of each rank, steep; every ninth token has no expert."""
    generator = torch.Generator().manual_seed(seed)
    heights = torch.randperm(NUM_EXPERTS, generator=generator).log1p() * -0.8
    drawn = []
    for count in num_tokens:
        noise = -torch.rand(count, NUM_EXPERTS, generator=generator).log().neg().log()
        drawn.append((heights + noise).topk(TOP_K, dim=1).indices)
        drawn[-1][::9] = -1
    return drawn


def counts_of(experts: Sequence[Tensor]) -> Tensor:
    counts = [torch.bincount(its[its >= 0], minlength=NUM_EXPERTS) for its in experts]
    return torch.stack(counts).int()


def wanted(placed: Placement, experts: Sequence[Tensor]) -> list[Tensor]:
    """The slots of every rank's picks, from the reference's shares."""
    hosted = torch.from_numpy(placed.slots[LAYER].reshape(NUM_GPUS, HOSTED).copy())
    _, sent = assign_replicas_reference(counts_of(experts), hosted, active=ACTIVE, gpus_per_node=GPUS_PER_NODE)
    by_expert = torch.cat([hosted.flatten().argsort(stable=True), torch.tensor([-1])])
    return [slots_by_share(its, sent[rank].flatten(), by_expert, NUM_EXPERTS) for rank, its in enumerate(experts)]


def replicas_of(placed: Placement, rank: int, counts_WE: Tensor) -> HostedReplicas:
    group: object = Group(rank, counts_WE)
    hosting = Hosting(counts=group, active=ACTIVE, ranks_per_node=GPUS_PER_NODE)  # type: ignore[arg-type]
    return HostedReplicas(placed, hosting, torch.device("cuda"))


def chosen(replicas: HostedReplicas, experts_TK: Tensor) -> Tensor:
    """As a forward pass does it."""
    counting = replicas.count(experts_TK)
    counting.wait()
    return replicas.slots(LAYER, experts_TK, counting.counts_WE)


@pytest.mark.parametrize("num_tokens", [[4096] * NUM_GPUS, [26, 25, 0, 1] * (NUM_GPUS // 4)], ids=["prefill", "decode"])
def test_every_ranks_slots_equal_the_reference_eager_and_captured(num_tokens: list[int]) -> None:
    placed, experts = placement(0), picks(num_tokens, seed=1)
    counts, want = counts_of(experts).cuda(), wanted(placed, experts)
    for rank in range(NUM_GPUS):
        replicas, its = replicas_of(placed, rank, counts), experts[rank].cuda()
        assert torch.equal(chosen(replicas, its).cpu(), want[rank])
        if rank % 8 == 0:
            assert torch.equal(replayed(lambda replicas=replicas, its=its: chosen(replicas, its)).cpu(), want[rank])
    slots = torch.cat([of_rank.flatten() for of_rank in want])
    used = torch.bincount(slots[slots >= 0], minlength=NUM_GPUS * HOSTED).view(NUM_GPUS, HOSTED)
    assert int((used > 0).sum(1).max()) <= ACTIVE
    assert (placed.slots[LAYER][slots[slots >= 0]] == torch.cat([its[its >= 0] for its in experts]).numpy()).all()


def test_a_graph_follows_other_tokens_and_other_hosts_without_a_read_back() -> None:
    before, after = placement(0), placement(1)
    first, second = (picks([512] * NUM_GPUS, seed=seed) for seed in (2, 3))
    counts, its = counts_of(first).cuda(), first[5].cuda()
    replicas = replicas_of(before, 5, counts)
    chosen(replicas, its)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = chosen(replicas, its)
    answers = []
    for placed, experts in ((before, first), (before, second), (after, second)):
        counts.copy_(counts_of(experts))
        its.copy_(experts[5])
        replicas.write(placed)
        graph.replay()
        answers.append(slots.cpu())
        assert torch.equal(answers[-1], wanted(placed, experts)[5])
    assert not torch.equal(answers[1], answers[2])
