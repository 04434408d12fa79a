"""Replicas chosen on the device: where each rank of a unit sends its tokens equals the reference, eager and captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of an EP group. `num_tokens`: of each rank."""

    num_tokens: tuple[int, ...]
    gpus_per_node: int = GPUS_PER_NODE
    num_experts: int = NUM_EXPERTS
    hosted: int = HOSTED
    active: int = ACTIVE
    top_k: int = TOP_K

    @property
    def num_gpus(self) -> int:
        return len(self.num_tokens)

    def placement(self, seed: int) -> Placement:
        return hosted_placement(
            np.random.default_rng(seed).lognormal(0, 1, (2, self.num_experts)),
            num_slots=self.num_gpus * self.hosted,
            num_gpus=self.num_gpus,
            active=self.active,
            num_nodes=self.num_gpus // self.gpus_per_node,
        )


REPORT = Sizes(num_tokens=(512,) * NUM_GPUS)
UNITS = {
    "prefill": replace(REPORT, num_tokens=(4096,) * NUM_GPUS),
    "decode": replace(REPORT, num_tokens=(26, 25, 0, 1) * (NUM_GPUS // 4)),
    "two ranks": Sizes(num_tokens=(40, 300), gpus_per_node=2, num_experts=16, hosted=12, active=8, top_k=4),
    "nothing": replace(REPORT, num_tokens=(0,) * NUM_GPUS),
}


@dataclass
class Group:
    """One rank's end of an EP group whose others' counts are known beforehand."""

    rank: int
    counts_WE: Tensor

    @property
    def world_size(self) -> int:
        return len(self.counts_WE)

    def all_gather(self, out: Tensor, tensor: Tensor) -> Handle:
        out.copy_(self.counts_WE)
        out[self.rank] = tensor[0]
        return Done()


def picks(sizes: Sizes, seed: int) -> list[Tensor]:
    """Of each rank, steep; every ninth token has no expert."""
    generator = torch.Generator().manual_seed(seed)
    heights = torch.randperm(sizes.num_experts, generator=generator).log1p() * -0.8
    drawn = []
    for count in sizes.num_tokens:
        noise = -torch.rand(count, sizes.num_experts, generator=generator).log().neg().log()
        drawn.append((heights + noise).topk(sizes.top_k, dim=1).indices)
        drawn[-1][::9] = -1
    return drawn


def counts_of(sizes: Sizes, experts: Sequence[Tensor]) -> Tensor:
    counts = [torch.bincount(its[its >= 0], minlength=sizes.num_experts) for its in experts]
    return torch.stack(counts).int()


def wanted(sizes: Sizes, placed: Placement, experts: Sequence[Tensor]) -> list[Tensor]:
    """The slots of every rank's picks, from the reference's shares."""
    hosted = torch.from_numpy(placed.slots[LAYER].reshape(sizes.num_gpus, -1).copy())
    counts = counts_of(sizes, experts)
    _, sent = assign_replicas_reference(counts, hosted, active=sizes.active, gpus_per_node=sizes.gpus_per_node)
    by_expert = torch.cat([hosted.flatten().argsort(stable=True), torch.tensor([-1])])
    return [slots_by_share(its, sent[rank].flatten(), by_expert, sizes.num_experts) for rank, its in enumerate(experts)]


def replicas_of(sizes: Sizes, placed: Placement, rank: int, counts_WE: Tensor) -> HostedReplicas:
    group: object = Group(rank, counts_WE)
    hosting = Hosting(counts=group, active=sizes.active, ranks_per_node=sizes.gpus_per_node)  # type: ignore[arg-type]
    return HostedReplicas(placed, hosting, torch.device("cuda"))


def chosen(replicas: HostedReplicas, experts_TK: Tensor) -> Tensor:
    """As a forward pass does it."""
    counting = replicas.count(experts_TK)
    counting.wait()
    return replicas.slots(LAYER, experts_TK, counting.counts_WE)


@pytest.mark.parametrize("name", UNITS)
def test_every_ranks_slots_equal_the_reference_eager_and_captured(name: str) -> None:
    sizes = UNITS[name]
    placed, experts = sizes.placement(0), picks(sizes, seed=1)
    counts, want = counts_of(sizes, experts).cuda(), wanted(sizes, placed, experts)
    for rank in range(sizes.num_gpus):
        replicas, its = replicas_of(sizes, placed, rank, counts), experts[rank].cuda()
        assert torch.equal(chosen(replicas, its).cpu(), want[rank])
        if rank % 8 == 0:
            assert torch.equal(replayed(partial(chosen, replicas, its)).cpu(), want[rank])
    slots, of_picks = (torch.cat([of_rank.flatten() for of_rank in parts]) for parts in (want, experts))
    assert (placed.slots[LAYER][slots[slots >= 0]] == of_picks[of_picks >= 0].numpy()).all()
    used = torch.bincount(slots[slots >= 0], minlength=placed.slots.shape[1]).view(sizes.num_gpus, -1)
    assert int((used > 0).sum(1).max()) <= sizes.active


def test_a_graph_follows_other_tokens_and_other_hosts_without_a_read_back() -> None:
    before, after = REPORT.placement(0), REPORT.placement(1)
    first, second = (picks(REPORT, seed=seed) for seed in (2, 3))
    counts, its = counts_of(REPORT, first).cuda(), first[5].cuda()
    replicas = replicas_of(REPORT, before, 5, counts)
    chosen(replicas, its)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = chosen(replicas, its)
    answers = []
    for placed, experts in ((before, first), (before, second), (after, second)):
        counts.copy_(counts_of(REPORT, experts))
        its.copy_(experts[5])
        replicas.write(placed)
        graph.replay()
        answers.append(slots.cpu())
        assert torch.equal(answers[-1], wanted(REPORT, placed, experts)[5])
    assert not torch.equal(answers[1], answers[2])
