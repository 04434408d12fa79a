"""Dynamic redundancy: who computes which tokens, from counts alone, and how near that is to the best there is."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving.bench.redundancy import assigned, between_nodes, drifting_steps, least_load, static_balance
from serving.core.errors import ConfigError
from serving.parallel.redundancy import Assignment, assign, choose_hosted, static_placement

Ints = NDArray[np.int64]


def unit(
    num_gpus: int, num_experts: int, *, seed: int, spare: int = 1, extra: int = 3, sources: int = 1
) -> tuple[Ints, Ints, int]:
    """(counts [sources, experts], hosted, active): steep loads, hosts chosen for other counts than those that come."""
    rng = np.random.default_rng(seed)
    active = -(-num_experts // num_gpus) + spare
    slots = min(active + extra, num_experts)
    share = rng.permutation(np.arange(1, num_experts + 1) ** -0.8)
    before, counts = (
        rng.multinomial(100 * num_gpus, share / share.sum()),
        rng.multinomial(100, share / share.sum(), size=sources),
    )
    counts[:, rng.integers(num_experts)] = 0
    return counts, choose_hosted(before, num_gpus=num_gpus, hosted_slots=slots, active=active, gpus_per_node=2), active


def optimum(totals: Ints, hosted: Ints, active: int) -> int:
    """By brute force: over all choices of active slots, the largest mean that experts cannot spread any further (Hall)."""
    used = [expert for expert, count in enumerate(totals) if count]
    subsets = [subset for size in range(1, len(used) + 1) for subset in itertools.combinations(used, size)]
    choices = [list(itertools.combinations(row, min(active, len(row)))) for row in hosted.tolist()]
    best = int(totals.sum())
    for choice in itertools.product(*choices):
        if set(used) <= set(itertools.chain.from_iterable(choice)):
            best = min(
                best,
                max(-(-int(totals[list(s)].sum()) // sum(any(e in gpu for e in s) for gpu in choice)) for s in subsets),
            )
    return best


def check(counts: Ints, hosted: Ints, active: int, result: Assignment) -> None:
    """Every token once, on a slot that hosts its expert, at most `active` slots of a GPU in use, sent by who has it."""
    assert (result.tokens >= 0).all()
    assert (result.sent >= 0).all()
    assert ((result.tokens > 0).sum(axis=1) <= active).all()
    assert (result.sent.sum(axis=0) == result.tokens).all()
    for rank, row in enumerate(np.atleast_2d(counts)):
        assert (np.bincount(hosted.ravel(), weights=result.sent[rank].ravel(), minlength=len(row)) == row).all()


shapes = st.tuples(
    st.sampled_from([2, 4, 6, 8]),
    st.integers(6, 40),
    st.integers(0, 2),
    st.integers(0, 4),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 10**6),
)


@settings(max_examples=120, deadline=None)
@given(shapes)
def test_every_token_has_one_replica_and_no_gpu_uses_more_slots_than_it_may(
    shape: tuple[int, int, int, int, int, int],
) -> None:
    num_gpus, num_experts, spare, extra, per_node, seed = shape
    counts, hosted, active = unit(
        num_gpus, num_experts, seed=seed, spare=spare, extra=extra, sources=num_gpus * per_node
    )
    check(counts, hosted, active, assign(counts, hosted, active=active, gpus_per_node=2))


def test_the_check_sees_a_token_too_many_and_a_slot_too_many() -> None:
    counts, hosted, active = unit(4, 12, seed=1, sources=4)
    result = assign(counts, hosted, active=active, gpus_per_node=2)
    result.sent[0, 0, 0] += 1
    with pytest.raises(AssertionError):
        check(counts, hosted, active, result)
    result.sent[0, 0, 0] -= 1
    check(counts, hosted, active, result)
    with pytest.raises(AssertionError):
        check(counts, hosted, int((result.tokens > 0).sum(axis=1).max()) - 1, result)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_the_order_of_slots_on_a_gpu_changes_no_answer(seed: int) -> None:
    counts, hosted, active = unit(6, 30, seed=seed, sources=6)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(hosted.shape[1]), (len(hosted), 1)), axis=1)
    result = assign(counts, hosted, active=active, gpus_per_node=2)
    permuted = assign(counts, np.take_along_axis(hosted, order, axis=1), active=active, gpus_per_node=2)
    assert (np.take_along_axis(result.tokens, order, axis=1) == permuted.tokens).all()
    assert (np.take_along_axis(result.sent, order[None], axis=2) == permuted.sent).all()
    assert not (result.tokens == permuted.tokens).all()


def test_totals_alone_give_the_loads_of_counts_without_a_leaning() -> None:
    counts, hosted, active = unit(4, 20, seed=5)
    by_source = np.repeat(counts, 4, axis=0)
    alone = assign(by_source.sum(axis=0), hosted, active=active, gpus_per_node=2)
    assert (alone.tokens == assign(by_source, hosted, active=active, gpus_per_node=2).tokens).all()
    assert alone.sent.shape == (1, *hosted.shape)


@pytest.mark.parametrize("seed", range(8))
def test_small_units_end_near_the_optimum(seed: int) -> None:
    num_gpus = 3 if seed % 4 else 4
    counts, hosted, active = unit(num_gpus, 6, seed=seed, extra=2, sources=num_gpus)
    totals = counts.sum(axis=0)
    largest = assign(counts, hosted, active=active, gpus_per_node=1).tokens.sum(axis=1).max()
    best = optimum(totals, hosted, active)
    assert best <= largest <= best * 1.05
    assert least_load(totals, hosted) <= best


def test_brute_force_and_the_bound_know_a_case_done_by_hand() -> None:
    hosted = np.array([[0, 1], [0, 2], [0, 3]])
    totals = np.array([90, 10, 20, 30])
    assert least_load(totals, hosted) == optimum(totals, hosted, 2) == 50
    assert assign(totals, hosted, active=2, gpus_per_node=3).tokens.tolist() == [[40, 10], [30, 20], [20, 30]]
    # With one slot each the four experts do not fit; without expert 3 each GPU has its one expert.
    with pytest.raises(AssertionError, match="no choice of active slots"):
        assign(totals, hosted, active=1, gpus_per_node=3)
    assert optimum(np.array([90, 10, 20, 0]), hosted, 1) == 90
    assert assign(np.array([90, 10, 20, 0]), hosted, active=1, gpus_per_node=3).tokens.tolist() == [
        [0, 10],
        [0, 20],
        [90, 0],
    ]


def test_room_is_made_where_all_hosts_of_an_expert_are_full() -> None:
    # Experts 0 and 1 would take both slots that expert 2 could have; only a chain of two moves makes room.
    hosted = np.array([[0, 2], [0, 1], [1, 3]])
    result = assign(np.array([30, 20, 10, 0]), hosted, active=1, gpus_per_node=3)
    assert (result.tokens > 0).tolist() == [[False, True], [True, False], [True, False]]


def test_no_tokens_use_no_slots() -> None:
    _, hosted, active = unit(4, 12, seed=0)
    result = assign(np.zeros((4, 12), dtype=np.int64), hosted, active=active, gpus_per_node=2)
    assert not result.tokens.any()
    assert result.balance == 1.0


@pytest.mark.parametrize("nodes", [(0, 1), (1, 0)])
def test_a_replica_on_the_tokens_own_node_is_taken(nodes: tuple[int, int]) -> None:
    # Each node hosts all experts, one GPU 0 and 1, the other 2 and 3; one slot a GPU. Tokens of 1 and 2 come from one node, of 0 and 3 from the other.
    hosted = np.array([[0, 1], [2, 3], [0, 1], [2, 3]])
    counts = (
        np.array([[0, 5, 5, 0], [0, 5, 5, 0], [5, 0, 0, 5], [5, 0, 0, 5]]).reshape(2, 2, 4)[list(nodes)].reshape(4, 4)
    )
    result = assign(counts, hosted, active=1, gpus_per_node=2)
    used = [[[0, 10], [10, 0]], [[10, 0], [0, 10]]]
    assert result.tokens.tolist() == [*used[nodes[0]], *used[nodes[1]]]
    assert not result.sent[:2, 2:].any()
    assert not result.sent[2:, :2].any()


def test_tokens_cross_only_when_their_nodes_replicas_have_enough() -> None:
    hosted = np.array([[0, 1], [1, 0]])
    counts = np.array([[10, 40], [40, 10]])
    result = assign(counts, hosted, active=2, gpus_per_node=1)
    for expert, slots in ((0, (0, 1)), (1, (1, 0))):
        for rank in (0, 1):
            assert result.sent[rank, rank, slots[rank]] == min(counts[rank, expert], result.tokens[rank, slots[rank]])


def test_hosted_experts_are_distinct_and_the_first_slots_hold_them_all() -> None:
    load = np.random.default_rng(3).zipf(1.8, size=256).clip(0, 10**6)
    hosted = choose_hosted(load, num_gpus=32, hosted_slots=16, active=9, gpus_per_node=8)
    assert hosted.shape == (32, 16)
    assert all(len(set(row)) == 16 for row in hosted.tolist())
    assert set(hosted[:, :9].ravel()) == set(range(256))
    copies = np.bincount(hosted.ravel())
    assert copies[load.argmax()] >= 12 > copies[load.argmin()]


def test_a_renewal_keeps_hosts_where_they_are_and_loses_little_by_it() -> None:
    sizes = {"active": 9, "gpus_per_node": 8}
    steps = [step.counts for step in drifting_steps(steps=101, tokens=4096, seed=1)]
    present = choose_hosted(steps[0].sum(axis=0), num_gpus=32, hosted_slots=16, **sizes)

    def renewed(counts: Ints, rows: Ints | None) -> tuple[float, int]:
        """Balance, and the slots whose expert was on that GPU already."""
        hosted = choose_hosted(counts.sum(axis=0), num_gpus=32, hosted_slots=16, present=rows, **sizes)
        assert all(len(set(row)) == 16 for row in hosted.tolist())
        assert set(hosted[:, :9].ravel()) == set(range(256))
        stays = sum(len(set(a) & set(b)) for a, b in zip(hosted.tolist(), present.tolist(), strict=True))
        return assign(counts, hosted, **sizes).balance, stays

    kept, anew = renewed(steps[100], present), renewed(steps[100], None)
    assert kept[0] > anew[0] - 0.01
    assert kept[1] > 0.8 * present.size > 4 * anew[1]
    # Loads that have nothing to do with those before: hosts have to move for them.
    others = steps[0][:, np.random.default_rng(0).permutation(256)]
    assert renewed(others, present)[0] > assign(others, present, **sizes).balance + 0.02


@pytest.mark.parametrize(("experts", "hosted_slots", "active"), [(256, 16, 7), (256, 8, 9), (12, 16, 9)])
def test_hosts_that_cannot_hold_the_experts_are_refused(experts: int, hosted_slots: int, active: int) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        choose_hosted(
            np.ones(experts, dtype=np.int64), num_gpus=32, hosted_slots=hosted_slots, active=active, gpus_per_node=8
        )


def test_a_static_placement_uses_every_slot_and_gives_hot_experts_copies() -> None:
    placement = static_placement(np.array([80, 10, 10, 20, 10, 10]), num_gpus=4, slots=2)
    assert np.bincount(placement.ravel()).tolist() == [3, 1, 1, 1, 1, 1]
    assert all(len(set(row)) == 2 for row in placement.tolist())


def test_the_gates_of_the_prefill_unit_hold_on_a_sample() -> None:
    steps = [step for step in drifting_steps(steps=150, tokens=1024, seed=1) if step.index % 15 == 14]
    results = []
    for step in steps:
        results.append(assigned(step))
        check(step.counts, step.hosted, 9, results[-1])
    balances = [result.balance for result in results]
    static = [static_balance(step.counts.sum(axis=0), step.static) for step in steps]
    assert statistics.fmean(balances) >= 0.95
    assert statistics.fmean(static) < 0.9
    over = [
        result.tokens.sum(axis=1).max() / least_load(step.counts.sum(axis=0), step.hosted)
        for step, result in zip(steps, results, strict=True)
    ]
    assert statistics.fmean(over) <= 1.03
    # A quarter of the pairs would stay on their node by chance.
    assert statistics.fmean(between_nodes(result.sent) for result in results) < 0.68
