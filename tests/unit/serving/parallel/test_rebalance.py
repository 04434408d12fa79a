"""When and where experts are placed anew: the trigger, what a shape allows, and ranks that go from loads to a better placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from serving.core.errors import ConfigError
from serving.metrics import Metrics
from serving.parallel.groups import Groups
from serving.parallel.loads import with_shared_expert
from serving.parallel.placement import balance
from serving.parallel.rebalance import Figures, Policy, Rebalancer, Trigger
from serving.parallel.staging import ROW_BYTES
from serving.parallel.transaction import LivePlacement, Phase
from serving.parallel.virtual import VirtualCollectives, VirtualUnit
from tests.unit.serving.parallel.expert_slots import NUM_BYTES, MemorySlots

LAYERS, EXPERTS, RANKS = 3, 12, 4
POLICY = Policy(num_experts=EXPERTS, num_slots=16, num_gpus=RANKS, num_nodes=2, num_groups=6)
NEVER = Trigger(period_s=1e9, threshold=0.0)
LOOK_EVERY = 4


@dataclass(frozen=True)
class _Rank:
    live: LivePlacement
    rebalancer: Rebalancer
    slots: MemorySlots
    rank: int

    def steps(self, num_steps: int, *, first_s: float = 0.0, at_step: Callable[[], None] = lambda: None) -> None:
        """One a second."""
        for number in range(num_steps):
            self.rebalancer.step(now_s=first_s + number)
            at_step()


def loads_of(rank: int) -> np.ndarray:
    """What each rank counts differs; their sum is uneven."""
    random = np.random.default_rng(rank)
    return (100 * np.arange(1, EXPERTS + 1) ** -0.8 * random.lognormal(0, 0.6, (LAYERS, EXPERTS))).astype(np.int64)


TOTAL = np.sum([loads_of(rank) for rank in range(RANKS)], axis=0).astype(float)


def run(
    main: Callable[[_Rank], Any],
    *,
    policy: Policy = POLICY,
    trigger: Trigger = NEVER,
    staged_layers: int = 1,
    routed_top_k: int | None = None,
) -> tuple[list[Any], VirtualUnit]:
    unit = VirtualUnit(Groups(tp=1, dp=RANKS, ep=RANKS, ranks_per_node=2))

    def live_on(group: VirtualCollectives) -> Any:
        present = policy.initial(LAYERS)
        slots = MemorySlots(present, group.rank)
        live = LivePlacement(
            control=group,
            data=group,
            slots=slots,
            placement=present,
            budget_bytes=8 * ROW_BYTES,
            ranks_per_node=2,
            staged_layers=staged_layers,
            on_commit=lambda _: None,
        )
        rebalancer = Rebalancer(
            live=live,
            policy=policy,
            trigger=trigger,
            half_life_s=1e9,
            look_every=LOOK_EVERY,
            now_s=0.0,
            routed_top_k=routed_top_k,
        )
        rebalancer.count(loads_of(group.rank), now_s=0.0)
        result = main(_Rank(live, rebalancer, slots, group.rank))
        assert slots.wrong(live.placement) == []
        return result

    return unit.run(live_on), unit


def test_the_trigger_fires_by_period_or_balance_and_not_twice_for_what_cannot_be_had() -> None:
    trigger = Trigger(period_s=600, threshold=0.8, min_gain=0.05)
    assert not trigger.wishes(balance=0.8, achieved=1.0, age_s=599)
    assert trigger.wishes(balance=0.8, achieved=1.0, age_s=600)
    assert trigger.wishes(balance=0.79, achieved=1.0, age_s=0)
    # 0.6 is the best there is: 0.56 is no reason yet, 0.54 is.
    assert not trigger.wishes(balance=0.56, achieved=0.6, age_s=0)
    assert trigger.wishes(balance=0.54, achieved=0.6, age_s=0)


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"period_s": 0.0}, "above 0"),
        ({"threshold": 1.5}, "between 0"),
        ({"min_gain": 0.0}, "above 0 and below 1"),
    ],
)
def test_a_trigger_that_makes_no_sense_is_refused(wrong: dict[str, float], fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        Trigger(**wrong)


@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ({"num_experts": 8, "num_slots": 8, "num_gpus": 1}, "raise ep"),
        ({"num_experts": 8, "num_slots": 8, "num_gpus": 8}, "give redundant_experts"),
        ({"num_experts": 4, "num_slots": 8, "num_gpus": 2}, "fewer redundant_experts"),
        ({"num_experts": 8, "num_slots": 6, "num_gpus": 2}, "at least 2 redundant experts more"),
        ({"num_experts": 8, "num_slots": 12, "num_gpus": 4, "num_nodes": 2, "num_groups": 3}, "groups"),
        ({"num_experts": 8, "num_slots": 12, "num_gpus": 4, "max_changes": 0}, "at least 1"),
    ],
)
def test_start_up_says_why_a_shape_cannot_be_balanced(shape: dict[str, int], fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        Policy(**shape)


def test_the_policy_goes_by_the_shape() -> None:
    loads = np.random.default_rng(0).lognormal(0, 1, (2, 16))
    hierarchical = Policy(num_experts=16, num_slots=24, num_gpus=4, num_nodes=2, num_groups=4)
    nodes = hierarchical.place(hierarchical.initial(2), loads).slots.reshape(2, 2, -1) // 4
    assert all(len(np.unique(node)) == 2 for layer in nodes for node in layer), "groups stay together"
    anywhere = Policy(num_experts=16, num_slots=24, num_gpus=4, num_nodes=2)
    assert balance(anywhere.place(anywhere.initial(2), loads), loads).mean() > 0.9
    one_each = Policy(num_experts=16, num_slots=20, num_gpus=20)
    assert (one_each.place(one_each.initial(2), loads).slots[:, :16] == np.arange(16)).all()
    few = Policy(num_experts=16, num_slots=24, num_gpus=4, max_changes=3)
    changed = few.place(few.initial(2), loads).slots != few.initial(2).slots
    assert set(changed.sum(axis=1)) <= {1, 2, 3}


@pytest.mark.parametrize("staged_layers", [1, 2, 3])
def test_uneven_loads_lead_all_ranks_to_the_same_better_placement(staged_layers: int) -> None:
    def main(rank: _Rank) -> tuple[Figures, list[float], bytes]:
        seen: list[float] = []
        rank.steps(60, at_step=lambda: seen.append(rank.rebalancer.figures().balance))
        return rank.rebalancer.figures(), seen, rank.live.placement.slots.tobytes()

    # A look, its wish, and the look that has it come true.
    results, _ = run(main, trigger=Trigger(threshold=0.95, period_s=1e9), staged_layers=staged_layers)
    assert results == [results[0]] * RANKS
    figures, seen, slots = results[0]
    before = float(balance(POLICY.initial(LAYERS), TOTAL).mean())
    wanted = POLICY.place(POLICY.initial(LAYERS), TOTAL)
    assert seen[0] == 1.0
    assert before in seen
    assert figures.balance == pytest.approx(float(balance(wanted, TOTAL).mean()))
    assert figures.balance > before + 0.08
    assert slots == wanted.slots.tobytes()
    assert figures.version == 1 + -(-LAYERS // staged_layers)
    num_moves = int((wanted.slots != POLICY.initial(LAYERS).slots).sum())
    assert figures.num_bytes_moved == num_moves * -(-NUM_BYTES // ROW_BYTES) * ROW_BYTES
    assert figures.last_error == ""


def test_a_shared_expert_among_the_logical_ones_has_every_token() -> None:
    policy = Policy(num_experts=EXPERTS + 1, num_slots=16, num_gpus=RANKS)

    def main(rank: _Rank) -> bytes:
        rank.rebalancer.ask()
        rank.steps(60)
        return rank.live.placement.slots.tobytes()

    loads = with_shared_expert(TOTAL, experts_per_token=2)
    wanted = policy.place(policy.initial(LAYERS), loads)
    assert wanted.copies[:, -1].min() > 1
    results, _ = run(main, policy=policy, routed_top_k=2)
    assert results == [wanted.slots.tobytes()] * RANKS
    assert run(main, policy=policy, routed_top_k=EXPERTS)[0] != results


def test_hosts_are_placed_for_what_can_be_chosen_of_them() -> None:
    hosted = Policy(num_experts=EXPERTS, num_slots=20, num_gpus=RANKS, num_nodes=2, active=4)

    def main(rank: _Rank) -> tuple[Figures, list[float], bytes]:
        seen: list[float] = []
        rank.rebalancer.ask()
        rank.steps(80, at_step=lambda: seen.append(rank.rebalancer.figures().balance))
        return rank.rebalancer.figures(), seen, rank.live.placement.slots.tobytes()

    results, _ = run(main, policy=hosted)
    assert results == [results[0]] * RANKS
    figures, seen, slots = results[0]
    initial = hosted.initial(LAYERS)
    planned = hosted.place(initial, TOTAL)
    before, after = (hosted.balance(placed, TOTAL) for placed in (initial, planned))
    worth = after - before >= NEVER.min_gain
    assert 0 < worth.sum() < LAYERS
    assert float(before.mean()) in seen
    assert figures.balance == pytest.approx(np.where(worth, after, before).mean())
    assert slots == np.where(worth[:, None], planned.slots, initial.slots).tobytes()
    # Every copy taking its even part would be another figure.
    assert after.mean() > balance(planned, TOTAL).mean() + 0.03
    assert all(set(layer.reshape(RANKS, -1)[:, :4].ravel()) == set(range(EXPERTS)) for layer in planned.slots)


def test_a_layer_that_gains_little_is_left_alone() -> None:
    def main(rank: _Rank) -> list[int]:
        rank.rebalancer.ask()
        rank.steps(40)
        return (rank.live.placement.slots != POLICY.initial(LAYERS).slots).sum(axis=1).tolist()

    changes = run(main, trigger=Trigger(threshold=0.0, period_s=1e9, min_gain=0.08))[0][0]
    assert changes[0] > 0 == changes[1] < changes[2]
    assert min(run(main)[0][0]) > 0


def test_what_cannot_be_had_is_tried_once() -> None:
    def main(rank: _Rank) -> tuple[int, int]:
        rank.steps(60)
        version, num_bytes = rank.live.version, rank.live.num_bytes_moved
        rank.steps(60, first_s=60)
        assert rank.rebalancer.figures().balance < 0.999
        return rank.live.version - version, rank.live.num_bytes_moved - num_bytes

    assert run(main, trigger=Trigger(threshold=1.0, period_s=1e9))[0] == [(0, 0)] * RANKS


def test_the_first_clock_that_has_gone_round_counts_for_all() -> None:
    def main(rank: _Rank) -> int:
        # Only rank 1 has come so far in time.
        rank.steps(40, first_s=100.0 if rank.rank == 1 else 0.0)
        return rank.live.version

    trigger = Trigger(threshold=0.0, period_s=100.0)
    assert run(main, trigger=trigger)[0] == [1 + LAYERS] * RANKS
    assert run(lambda rank: rank.steps(40) or rank.live.version, trigger=trigger)[0] == [1] * RANKS


def test_without_a_reason_a_step_has_no_collective_but_a_looks() -> None:
    counts = []
    for num_looks in (1, 3):
        _, unit = run(lambda rank, num_looks=num_looks: rank.steps(num_looks * (LOOK_EVERY + 2) + 1))
        counts.append(unit._num_calls)
    # At start-up the exchange of checksums; a look is a reduce-scatter and an all-gather.
    assert counts == [[1 + 2] * RANKS, [1 + 6] * RANKS]


def test_without_any_load_there_is_nothing_to_balance() -> None:
    def main(rank: _Rank) -> int:
        rank.rebalancer.count(-loads_of(rank.rank), now_s=0.0)
        rank.rebalancer.ask()
        rank.steps(40)
        return rank.live.version

    assert run(main)[0] == [1] * RANKS


def test_an_abort_ends_the_sweep_and_is_reported_and_asking_tries_again() -> None:
    def main(rank: _Rank) -> Figures:
        def at_step() -> None:
            if rank.rank == 2 and rank.live.version == 2 and rank.live.phase is Phase.PREPARING:
                rank.live.abort()

        if rank.rank == 3:
            rank.rebalancer.ask()
        rank.steps(60, at_step=at_step)
        metrics = Metrics("worker", worker="decode-0")
        for _ in range(2):
            rank.rebalancer.report(metrics, unit="decode-0")
        figures = rank.rebalancer.figures()
        assert metrics.value("baton_placement_version", unit="decode-0") == figures.version == 2
        assert metrics.value("baton_expert_balance", unit="decode-0") == figures.balance
        assert metrics.value("baton_placement_age_seconds", unit="decode-0") == figures.age_s > 0
        assert metrics.value("baton_placement_moved_bytes_total", unit="decode-0") == figures.num_bytes_moved > 0
        assert metrics.value("baton_placement_aborts_total", unit="decode-0", reason="asked") == 1
        rank.rebalancer.ask()
        rank.steps(60, first_s=60)
        assert rank.live.version == 1 + LAYERS
        return figures

    results, _ = run(main)
    assert results == [results[0]] * RANKS
    assert results[0].num_aborts == {"asked": 1}
    assert "rank 2 was asked to abort; version 2 stays in force" in results[0].last_error
