"""The kernels of dynamic redundancy in Triton's interpreter, and the search itself at the prefill unit's size."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.bench.redundancy import ACTIVE, GPUS_PER_NODE, between_nodes, drifting_steps
from serving.kernels.redundancy import MOST_PICKS, assign_replicas, assign_replicas_reference
from serving.parallel.redundancy import balance

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import redundancy as device

Ints = NDArray[np.int64]


def unit(
    num_gpus: int, num_experts: int, *, seed: int, active: int, slots: int, sources: int = 1, skew: float = 0.8
) -> tuple[Tensor, Tensor]:
    """(counts [sources, experts], hosted [GPUs, slots]): steep loads; every expert among the first `active` slots, other hosts drawn."""
    rng = np.random.default_rng(seed)
    share = rng.permutation(np.arange(1, num_experts + 1) ** -skew)
    counts = rng.multinomial(200, share / share.sum(), size=sources)
    rows: list[list[int]] = [[] for _ in range(num_gpus)]
    for index, expert in enumerate(rng.permutation(num_experts)):
        rows[index % num_gpus].append(int(expert))
    assert max(map(len, rows)) <= active
    for row in rows:
        row.extend(int(e) for e in rng.permutation(num_experts) if e not in row)
    return torch.from_numpy(counts), torch.from_numpy(np.array([row[:slots] for row in rows]))


def check(counts: Tensor, hosted: Tensor, active: int, found: tuple[Tensor, Tensor]) -> None:
    """Every token once, on a slot that hosts its expert, at most `active` slots of a GPU in use, sent by who has it."""
    tokens, sent = (tensor.long() for tensor in found)
    assert tokens.min() >= 0
    assert sent.min() >= 0
    assert (tokens > 0).sum(dim=1).max() <= active
    assert torch.equal(sent.sum(dim=0), tokens)
    for rank, row in enumerate(counts):
        there = torch.zeros_like(row).scatter_add_(0, hosted.flatten(), sent[rank].flatten())
        assert torch.equal(there, row)


# GPUs, experts, active, slots, GPUs a node, sources: odd numbers of each; one node; all 32 lanes, the sign bit's among them; a
# single source, whose node is not known; as many experts as slots that may be in use, where nothing can be handed over.
CASES = [
    (4, 11, 4, 6, 2, 4),
    (6, 13, 4, 7, 3, 2),
    (5, 9, 3, 5, 5, 3),
    (32, 33, 2, 4, 8, 8),
    (4, 10, 4, 5, 2, 1),
    (3, 6, 2, 6, 1, 6),
]


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_find_what_the_reference_finds(case: tuple[int, int, int, int, int, int]) -> None:
    num_gpus, num_experts, active, slots, per_node, sources = case
    counts, hosted = unit(num_gpus, num_experts, seed=sum(case), active=active, slots=slots, sources=sources)
    settings = {"active": active, "gpus_per_node": per_node, "num_starts": 3}
    found = device.assign_replicas(counts, hosted, **settings, max_rounds=16)
    check(counts, hosted, active, found)
    want = assign_replicas_reference(counts, hosted, **settings, max_rounds=16)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
    # Without a round every expert stands whole on one of its hosts, which is another answer.
    whole = assign_replicas_reference(counts, hosted, **settings, max_rounds=0)
    check(counts, hosted, active, whole)
    if num_experts < num_gpus * active:
        assert found[0].sum(dim=1).max() < whole[0].sum(dim=1).max()
    else:
        assert ((found[0] > 0).sum(dim=1) == active).all()


def test_idle_sources_and_idle_experts_send_nothing_and_use_no_slot() -> None:
    counts, hosted = unit(4, 9, seed=3, active=3, slots=5, sources=4)
    counts[1:3] = 0
    counts[:, 4] = 0
    tokens, sent = device.assign_replicas(counts, hosted, active=3, gpus_per_node=2, num_starts=2, max_rounds=8)
    check(counts, hosted, 3, (tokens, sent))
    assert not sent[1:3].any()
    assert not tokens[hosted == 4].any()
    assert sent[0].any()
    idle = device.assign_replicas(0 * counts, hosted, active=3, gpus_per_node=2, num_starts=2, max_rounds=8)
    assert not idle[0].any()
    assert not idle[1].any()


def test_other_strides_and_a_narrower_type_change_no_answer() -> None:
    counts, hosted = unit(4, 7, seed=5, active=2, slots=3, sources=4)
    settings = {"active": 2, "gpus_per_node": 2, "num_starts": 1, "max_rounds": 2}
    found = device.assign_replicas(counts, hosted, **settings)
    strided = device.assign_replicas(counts.int().T.contiguous().T, hosted.int().T.contiguous().T, **settings)
    assert torch.equal(found[0], strided[0])
    assert torch.equal(found[1], strided[1])


def test_the_check_sees_a_token_too_many_and_a_slot_too_many() -> None:
    counts, hosted = unit(4, 11, seed=1, active=4, slots=6, sources=4)
    tokens, sent = assign_replicas(counts, hosted, active=4, gpus_per_node=2)
    check(counts, hosted, 4, (tokens, sent))
    with pytest.raises(AssertionError):
        check(counts, hosted, int((tokens > 0).sum(dim=1).max()) - 1, (tokens, sent))
    sent[0, 0, 0] += 1
    with pytest.raises(AssertionError):
        check(counts, hosted, 4, (tokens, sent))


def test_tokens_of_a_node_go_to_its_own_replica_first() -> None:
    counts = torch.tensor([[10, 40], [40, 10]])
    hosted = torch.tensor([[0, 1], [1, 0]])
    tokens, sent = device.assign_replicas(counts, hosted, active=2, gpus_per_node=1, num_starts=1, max_rounds=8)
    slots = {0: (0, 1), 1: (1, 0)}
    for expert, of_gpu in slots.items():
        for rank in (0, 1):
            assert sent[rank, rank, of_gpu[rank]] == min(counts[rank, expert], tokens[rank, of_gpu[rank]])


def test_a_case_done_by_hand_ends_even() -> None:
    # 50 each: expert 0's 90 tokens fill up what the others leave.
    hosted = torch.tensor([[0, 1], [2, 0], [3, 0]])
    counts = torch.tensor([[90, 10, 20, 30]])
    tokens, _ = device.assign_replicas(counts, hosted, active=2, gpus_per_node=3, num_starts=8, max_rounds=16)
    assert tokens.sum(dim=1).max() <= 51
    assert tokens[:, 0].tolist()[1:] == [20, 30]


def test_as_many_tokens_as_a_number_holds_are_shared_as_by_the_reference() -> None:
    """Nearly all for one expert, on GPUs of as many slots as there may be; with eight times as many the bits of load, place and rank mix."""
    _, hosted = unit(2, 34, seed=2, active=18, slots=32, sources=2)
    settings = {"active": 18, "gpus_per_node": 1, "num_starts": 2, "max_rounds": 6}
    counts = torch.ones(2, 34, dtype=torch.int64)
    counts[0, 5] += MOST_PICKS - int(counts.sum())
    found = device.assign_replicas(counts, hosted, **settings)
    want = assign_replicas_reference(counts, hosted, **settings)
    check(counts, hosted, 18, found)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
    assert found[0].sum(dim=1).max() < 0.6 * MOST_PICKS
    counts[0, 5] *= 8
    want = assign_replicas_reference(counts, hosted, **settings)
    assert not torch.equal(device.assign_replicas(counts, hosted, **settings)[0], want[0])


def test_more_gpus_than_bits_are_refused() -> None:
    with pytest.raises(AssertionError, match="bits of one number"):
        assign_replicas(torch.zeros(1, 33).int(), torch.zeros(33, 1).int(), active=1, gpus_per_node=33)


def test_at_the_prefill_units_size_the_search_ends_as_even_as_it_must() -> None:
    steps = [step for step in drifting_steps(steps=200, tokens=1024, seed=1) if step.index % 20 == 19]
    balances, crossing = [], []
    for step in steps:
        counts, hosted = torch.from_numpy(step.counts), torch.from_numpy(step.hosted)
        found = assign_replicas(counts, hosted, active=ACTIVE, gpus_per_node=GPUS_PER_NODE)
        check(counts, hosted, ACTIVE, found)
        balances.append(balance(found[0].sum(dim=1).numpy()))
        crossing.append(between_nodes(found[1].numpy()))
    assert statistics.fmean(balances) >= 0.97
    assert min(balances) >= 1 / 1.03
    # A quarter of the pairs would stay on their node by chance.
    assert statistics.fmean(crossing) < 0.68
