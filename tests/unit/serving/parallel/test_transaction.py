"""Placements that change as a whole or not at all: whoever aborts, whatever is corrupted, whichever rank dies, at any phase."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.core.errors import ConfigError, PeerError
from serving.kernels.experts import grouped_mlp
from serving.parallel import transaction
from serving.parallel.balance import global_placement, incremental_placement
from serving.parallel.collectives import Collectives, Handle, RanksMissing, SingleRank
from serving.parallel.groups import Groups
from serving.parallel.moves import find_moves
from serving.parallel.placement import Placement
from serving.parallel.shared_memory import SharedMemoryCollectives
from serving.parallel.staging import ROW_BYTES
from serving.parallel.transaction import Failure, LivePlacement, Phase
from serving.parallel.virtual import Fault, VirtualCollectives, VirtualUnit
from tests.unit.serving.parallel.expert_slots import MemorySlots, expert_weights

PHASES = [Phase.PLANNED, Phase.PREPARING, Phase.PREPARED]


@dataclass(frozen=True, kw_only=True)
class _Shape:
    num_gpus: int = 4
    num_layers: int = 2
    num_experts: int = 8
    slots_per_gpu: int = 3
    staged_layers: int = 1
    budget_bytes: int = 4 * ROW_BYTES
    from_host: bool = False

    def place(self, seed: int) -> Placement:
        loads = np.random.default_rng(seed).lognormal(0, 1, (self.num_layers, self.num_experts))
        return global_placement(loads, num_slots=self.num_gpus * self.slots_per_gpu, num_gpus=self.num_gpus)

    def unit(self, faults: Sequence[Fault] = ()) -> VirtualUnit:
        groups = Groups(
            tp=1, dp=self.num_gpus, ep=self.num_gpus, ranks_per_node=2 if self.num_gpus % 2 == 0 else self.num_gpus
        )
        return VirtualUnit(groups, faults=faults)


@dataclass
class _FlippingHandle:
    handle: Handle
    flip: Callable[[], None]

    def wait(self) -> None:
        self.handle.wait()
        self.flip()


class _Flipping:
    """A group for weights. While `is_armed`, one bit of the first row that arrives is another; `arrived` says that it happened."""

    def __init__(self, group: Collectives) -> None:
        self.ranks, self.world_size = group.ranks, group.world_size
        self.is_armed = self.arrived = False
        self._group = group

    def all_to_all(
        self, outs: list[Tensor], tensors: list[Tensor], recv_counts: list[int], send_counts: list[int]
    ) -> Handle:
        def flip() -> None:
            if self.is_armed and sum(recv_counts):
                outs[0][0, 5] ^= 8
                self.is_armed, self.arrived = False, True

        return _FlippingHandle(self._group.all_to_all(outs, tensors, recv_counts, send_counts), flip)


@dataclass
class _Rank:
    """One rank with all that a test looks at."""

    slots: MemorySlots
    live: LivePlacement
    data: _Flipping
    is_source_broken: bool = False
    committed: list[Placement] = field(default_factory=list)

    def wrong(self) -> list[tuple[int, int]]:
        return self.slots.wrong(self.live.placement)


def _rank(group: VirtualCollectives, shape: _Shape, present: Placement) -> _Rank:
    slots, data = MemorySlots(present, group.rank), _Flipping(group)

    def load_expert(layer: int, expert: int) -> list[Tensor]:
        if rank.is_source_broken:
            raise OSError("the disk is gone")
        return expert_weights(layer, expert)

    committed: list[Placement] = []
    live = LivePlacement(
        control=group,
        data=data,  # type: ignore[arg-type]
        slots=slots,
        placement=present,
        budget_bytes=shape.budget_bytes,
        ranks_per_node=2,
        staged_layers=shape.staged_layers,
        load_expert=load_expert if shape.from_host else None,
        on_commit=committed.append,
    )
    rank = _Rank(slots=slots, live=live, data=data, committed=committed)
    return rank


def _drive(live: LivePlacement, target: Placement, at_step: Callable[[], None] = lambda: None) -> bool:
    """Whether it was made. `at_step` is what the step computes."""
    steps = live.change(target)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return bool(end.value)
        at_step()


def _changed(present: Placement, target: Placement, num_layers: int) -> Placement:
    """`present` with the first layers of `target`."""
    slots = present.slots.copy()
    slots[:num_layers] = target.slots[:num_layers]
    return Placement(slots=slots, num_experts=present.num_experts, num_gpus=present.num_gpus)


def _run(shape: _Shape, main: Callable[[_Rank, Placement], Any]) -> list[Any]:
    """`main(rank, target)` on every rank."""
    present = shape.place(0)
    target = _changed(present, shape.place(1), shape.staged_layers)
    return shape.unit().run(lambda group: main(_rank(group, shape, present), target))


@pytest.mark.parametrize("from_host", [False, True], ids=["peers", "host"])
@pytest.mark.parametrize("budget_rows", [1, 4, 1000])
def test_a_change_goes_through_its_phases_and_leaves_the_right_weights(budget_rows: int, from_host: bool) -> None:
    def main(rank: _Rank, target: Placement) -> list[Phase]:
        phases: list[Phase] = []
        before = rank.live.placement

        def at_step() -> None:
            phases.append(rank.live.phase)
            # Until the commit, nothing of the version in force is touched.
            assert rank.slots.wrong(target if rank.live.version == 2 else before) == []

        assert _drive(rank.live, target, at_step)
        assert (rank.live.phase, rank.live.version, rank.committed) == (Phase.RECLAIMED, 2, [target])
        assert rank.wrong() == []
        assert rank.slots.wrong(before) != [], "the control: nothing has changed"
        return phases

    phases = _run(_Shape(budget_bytes=budget_rows * ROW_BYTES, from_host=from_host), main)
    assert phases == [phases[0]] * 4
    assert list(dict.fromkeys(phases[0])) == [*PHASES, Phase.COMMITTED]
    assert Counter(phases[0])[Phase.PREPARING] == _busiest_rank_rows(from_host, budget_rows)


def _busiest_rank_rows(from_host: bool, budget_rows: int) -> int:
    """Steps that the rank with most to send or to receive needs, at three rows an expert."""
    present = _Shape().place(0)
    moves = find_moves(present, _changed(present, _Shape().place(1), 1), gpus_per_node=2)
    ends = [Counter(move.target // 3 for move in moves), Counter(move.source // 3 for move in moves)]
    return -(-3 * max(max(end.values()) for end in (ends[:1] if from_host else ends)) // budget_rows)


def test_every_rank_and_step_has_the_same_collectives_and_the_bytes_keep_to_the_budget() -> None:
    shape = _Shape(budget_bytes=2 * ROW_BYTES)
    present = shape.place(0)
    unit = shape.unit()

    def main(group: VirtualCollectives) -> tuple[int, int]:
        rank = _rank(group, shape, present)
        num_steps = 0

        def at_step() -> None:
            nonlocal num_steps
            num_steps += rank.live.phase is Phase.PREPARING

        assert _drive(rank.live, _changed(present, shape.place(1), 1), at_step)
        return num_steps, rank.live.num_bytes_moved

    results = unit.run(main)
    assert results == [results[0]] * 4
    num_steps, num_bytes = results[0]
    moved = sum(traffic.num_bytes for (_, what, _), traffic in unit.traffic.items() if what == "all_to_all")
    assert 0 < moved <= num_bytes <= 4 * num_steps * 2 * ROW_BYTES
    # One of them is the exchange of checksums at start-up, three are the votes on the plan, the arrival and the commit.
    assert unit._num_calls == [4 + 2 * num_steps] * 4


@pytest.mark.parametrize("phase", PHASES)
def test_an_abort_that_one_rank_asks_for_leaves_the_version_in_force(phase: Phase) -> None:
    def main(rank: _Rank, target: Placement) -> str:
        def at_step() -> None:
            if rank.slots.rank == 2 and rank.live.phase is phase:
                rank.live.abort()

        made = _drive(rank.live, target, at_step)
        # Having voted for the commit, nobody can go back on it.
        assert made is (phase is Phase.PREPARED)
        assert (rank.live.version, rank.wrong()) == (2 if made else 1, [])
        assert rank.live.phase is (Phase.RECLAIMED if made else Phase.ABORTED)
        error = rank.live.last_error
        assert _drive(rank.live, target if not made else _changed(target, _Shape().place(2), 1)), (
            "the next goes through"
        )
        assert rank.wrong() == []
        return error

    errors = _run(_Shape(), main)
    assert errors == [errors[0]] * 4
    assert errors[0] == ("" if phase is Phase.PREPARED else errors[0])
    assert phase is Phase.PREPARED or "rank 2 was asked to abort; version 1 stays in force" in errors[0]


def test_an_expert_that_arrives_otherwise_than_it_was_sent_ends_the_change() -> None:
    def main(rank: _Rank, target: Placement) -> tuple[Failure, str]:
        rank.data.is_armed = rank.slots.rank == 1
        assert not _drive(rank.live, target)
        assert (rank.live.version, rank.wrong(), rank.committed) == (1, [], [])
        return rank.live.last_failure, rank.live.last_error

    results = _run(_Shape(), main)
    assert [failure for failure, _ in results] == [Failure.CHECKSUM] * 4
    assert "while prepared: rank 1 received an expert whose checksum" in results[0][1]
    assert "instead of" in results[1][1], "who it happened to says more"


def test_a_slot_that_has_rotted_is_not_copied() -> None:
    def main(rank: _Rank, target: Placement) -> Failure:
        # Every slot of rank 0; whatever it sends is not what it was at start-up.
        if rank.slots.rank == 0:
            for layer in range(2):
                for slot in range(3):
                    rank.slots.read(layer, slot)[0][0, 0] += 1
        assert not _drive(rank.live, target)
        return rank.live.last_failure

    assert set(_run(_Shape(), main)) == {Failure.CHECKSUM}


def test_a_source_that_fails_or_has_another_shape_costs_the_change_and_not_the_unit() -> None:
    def main(rank: _Rank, target: Placement) -> str:
        rank.is_source_broken = rank.slots.rank == 3
        assert not _drive(rank.live, target)
        error = rank.live.last_error
        rank.is_source_broken = False
        rank.live._load_expert = lambda layer, expert: expert_weights(layer, expert)[:2]
        assert not _drive(rank.live, target)
        assert rank.live.last_failure is Failure.SOURCE
        rank.live._load_expert = expert_weights
        assert _drive(rank.live, target)
        assert rank.wrong() == []
        return error

    errors = _run(_Shape(from_host=True), main)
    assert "could not load an expert" in errors[0]
    assert "OSError: the disk is gone" in errors[3]


def test_a_rank_that_dies_at_any_call_is_named_and_the_version_in_force_is_whole() -> None:
    shape = _Shape()
    present = shape.place(0)
    target = _changed(present, shape.place(1), 1)
    versions, call = [], 0
    while True:
        # Call 0 is the exchange of checksums at start-up; then come the votes, and two calls a step of preparing.
        call += 1
        unit, ranks = shape.unit([Fault(rank=2, call=call)]), {}

        def main(group: VirtualCollectives, ranks: dict[int, _Rank] = ranks) -> bool:
            ranks[group.rank] = _rank(group, shape, present)
            return _drive(ranks[group.rank].live, target)

        with contextlib.suppress(RanksMissing):
            assert all(unit.run(main))
            break
        assert {
            rank: error.ranks for rank, error in unit.errors.items() if isinstance(error, RanksMissing)
        } == dict.fromkeys(range(4), (2,))
        del ranks[2]
        assert_alike_and_right(ranks)
        versions.append(ranks[0].live.version)
    # Only the vote after the commit finds the new version, on all who are left.
    assert versions == [1] * (len(versions) - 1) + [2]
    assert len(versions) == 3 + 2 * _busiest_rank_rows(False, 4)


def test_ranks_that_plan_different_changes_make_none() -> None:
    def main(rank: _Rank, target: Placement) -> tuple[bool, Failure]:
        other = _changed(target, _Shape().place(2), 1)
        made = _drive(rank.live, other if rank.slots.rank == 2 else target)
        return made, rank.live.last_failure

    assert _run(_Shape(), main) == [(False, Failure.DISAGREEMENT)] * 4


def test_a_target_without_a_difference_is_no_version() -> None:
    def main(rank: _Rank, target: Placement) -> tuple[bool, int, Phase]:
        return _drive(rank.live, rank.live.placement), rank.live.version, rank.live.phase

    assert _run(_Shape(), main) == [(False, 1, Phase.RECLAIMED)] * 4


def test_a_rank_out_of_step_is_found_out() -> None:
    def main(rank: _Rank, target: Placement) -> None:
        rank.live.version += rank.slots.rank == 1
        _drive(rank.live, target)

    with pytest.raises(PeerError, match="not in lockstep"):
        _run(_Shape(), main)


def test_copies_that_differ_at_start_up_are_refused() -> None:
    # Expert 0 has a copy on every GPU.
    present = Placement(slots=np.array([[0, 1, 0, 2, 0, 3]]), num_experts=4, num_gpus=3)

    def main(group: VirtualCollectives, is_wrong: bool) -> None:
        slots = MemorySlots(present, group.rank)
        if group.rank == 1 and is_wrong:
            slots.read(0, 0)[1][3, 1] *= 2
        LivePlacement(
            control=group,
            data=group,
            slots=slots,
            placement=present,
            budget_bytes=ROW_BYTES,
            ranks_per_node=3,
            on_commit=lambda _: None,
        )

    _Shape(num_gpus=3).unit().run(lambda group: main(group, False))
    with pytest.raises(PeerError, match="two copies of expert 0 of layer 0 differ"):
        _Shape(num_gpus=3).unit().run(lambda group: main(group, True))


def test_a_budget_that_moves_nothing_is_refused() -> None:
    present = Placement(slots=np.array([[0, 1]]), num_experts=2, num_gpus=1)
    with pytest.raises(ConfigError, match="give at least 1024"):
        LivePlacement(
            control=SingleRank(),
            data=SingleRank(),
            slots=MemorySlots(present, 0),
            placement=present,
            budget_bytes=1023,
            ranks_per_node=1,
            on_commit=lambda _: None,
        )


# A thousand random ones.


@dataclass(frozen=True, kw_only=True)
class _Deed:
    """What happens to one transaction, drawn alike by every rank."""

    target: Placement
    kind: str
    rank: int
    phase: Phase


def _random_shape(draw: random.Random) -> _Shape:
    num_gpus, slots_per_gpu = draw.choice([2, 3, 4]), draw.choice([1, 2, 3])
    most = num_gpus * slots_per_gpu
    num_layers = draw.choice([1, 2])
    return _Shape(
        num_gpus=num_gpus,
        num_layers=num_layers,
        num_experts=draw.randint(max(2, slots_per_gpu, most // 2), most),
        slots_per_gpu=slots_per_gpu,
        staged_layers=draw.randint(1, num_layers),
        budget_bytes=draw.choice([1, 2, 5, 9, 50]) * ROW_BYTES + draw.randrange(ROW_BYTES),
        from_host=draw.random() < 0.2,
    )


def _random_deed(draw: random.Random, shape: _Shape, present: Placement) -> _Deed:
    return _Deed(
        target=_random_target(draw, shape, present),
        kind=draw.choice(["none", "none", "abort", "corrupt"]),
        rank=draw.randrange(shape.num_gpus),
        phase=draw.choice(PHASES),
    )


def _random_target(draw: random.Random, shape: _Shape, present: Placement) -> Placement:
    """One that differs: what balancing would do for some load, or any order of the slots."""
    while True:
        seed = draw.randrange(1 << 30)
        match draw.choice(["anew", "incremental", "shuffled", "shuffled"]):
            case "anew":
                target = shape.place(seed)
            case "incremental":
                loads = np.random.default_rng(seed).lognormal(0, 1, present.copies.shape)
                target = incremental_placement(present, loads, max_changes=draw.randint(1, 4))
            case _:
                slots = np.random.default_rng(seed).permuted(present.slots, axis=1)
                target = Placement(slots=slots, num_experts=present.num_experts, num_gpus=present.num_gpus)
        target = _changed(present, target, draw.randint(1, shape.staged_layers))
        if (target.slots != present.slots).any():
            return target


def _do(rank: _Rank, deed: _Deed) -> bool:
    is_meant = rank.slots.rank == deed.rank
    version = rank.live.version
    rank.data.is_armed = rank.is_source_broken = is_meant and deed.kind == "corrupt"
    rank.data.arrived = False

    def at_step() -> None:
        if is_meant and deed.kind == "abort" and rank.live.phase is deed.phase:
            rank.live.abort()

    made = _drive(rank.live, deed.target, at_step)
    rank.data.is_armed = rank.is_source_broken = False
    assert rank.live.version == version + made
    assert not made or not rank.data.arrived, "corrupt weights are in force"
    if deed.kind == "none" or (deed.kind, deed.phase) == ("abort", Phase.PREPARED):
        assert made
    if deed.kind == "abort" and deed.phase is not Phase.PREPARED:
        assert not made
    return made


def _campaign(seed: int, num_deeds: int, death: bool) -> Counter[str]:
    """A unit's life of `num_deeds` random transactions. Whether all is right is looked at from outside, at its end."""
    draw = random.Random(seed)
    shape = _random_shape(draw)
    present = shape.place(seed)
    fault = Fault(rank=draw.randrange(shape.num_gpus), call=draw.randrange(2, 8 * num_deeds))
    unit, ranks, outcomes = shape.unit([fault] if death else []), {}, Counter[str]()

    def main(group: VirtualCollectives) -> None:
        rank = ranks[group.rank] = _rank(group, shape, present)
        chance = random.Random(seed)
        for _ in range(num_deeds):
            deed = _random_deed(chance, shape, rank.live.placement)
            made = _do(rank, deed)
            if group.rank == 0:
                outcomes[f"{deed.kind} {'made' if made else rank.live.last_failure.name}"] += 1

    if death:
        with contextlib.suppress(RanksMissing):
            unit.run(main)
        # If it came to that many calls; all others are told who it was.
        assert {getattr(error, "ranks", error) for error in unit.errors.values()} <= {(fault.rank,)}
        outcomes["death"] += bool(unit.errors)
        # The dead have no say.
        ranks.pop(fault.rank, None)
    else:
        unit.run(main)
    assert_alike_and_right(ranks)
    return outcomes


def assert_alike_and_right(ranks: dict[int, _Rank]) -> None:
    """Every rank has the same version of the same placement, and every slot holds what it says."""
    assert len({(rank.live.version, rank.live.placement.slots.tobytes()) for rank in ranks.values()}) <= 1
    assert [rank.wrong() for rank in ranks.values()] == [[]] * len(ranks)


@pytest.mark.parametrize("part", range(5))
def test_random_transactions_leave_every_rank_with_the_same_version_and_the_right_weights(part: int) -> None:
    outcomes = Counter[str]()
    for number in range(14):
        outcomes += _campaign(100 * part + number, num_deeds=18, death=number % 4 == 3)
    assert sum(outcomes.values()) - outcomes["death"] >= 200, "five parts are a thousand"
    assert min(outcomes[kind] for kind in ("none made", "abort ASKED", "abort made", "corrupt CHECKSUM", "death")) > 0


def test_the_look_at_the_end_sees_a_check_that_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transaction, "checksums", lambda experts: [0 for _ in experts])

    def main(rank: _Rank, target: Placement) -> _Rank:
        rank.data.is_armed = rank.slots.rank == 1
        _drive(rank.live, target)
        return rank

    ranks = dict(enumerate(_run(_Shape(), main)))
    with pytest.raises(AssertionError):
        assert_alike_and_right(ranks)


def test_the_look_at_the_end_sees_a_commit_on_one_rank_alone() -> None:
    def main(rank: _Rank, target: Placement) -> _Rank:
        steps = rank.live.change(target)
        while rank.live.phase is not Phase.PREPARED:
            next(steps)
        if rank.slots.rank == 1:
            next(steps)
        return rank

    ranks = dict(enumerate(_run(_Shape(), main)))
    assert [rank.wrong() for rank in ranks.values()] == [[]] * 4
    with pytest.raises(AssertionError):
        assert_alike_and_right(ranks)


# What is computed meanwhile.


class _MoeSlots:
    """One layer of experts [K, ...] in fp64, as grouped_mlp takes them."""

    def __init__(self, gate_up_EID: Tensor, down_EDI: Tensor, experts: list[int]) -> None:
        self.num_layers, self.num_slots = 1, len(experts)
        self.gate_up, self.down = gate_up_EID[experts].clone(), down_EDI[experts].clone()

    def read(self, layer: int, slot: int) -> list[Tensor]:
        return [self.gate_up[slot], self.down[slot]]

    def write(self, layer: int, slot: int, tensors: list[Tensor]) -> None:
        self.gate_up[slot], self.down[slot] = tensors


def _moe(ep: Collectives, slots: _MoeSlots, placement: Placement, x_TD: Tensor, experts_TK: Tensor) -> Tensor:
    """[T, D] of one layer: each rank computes for all tokens those of its slots that are their replica, and the sum is shared out."""
    order = torch.from_numpy(placement.slots[0].argsort(kind="stable"))
    copies = torch.from_numpy(placement.copies[0])
    firsts = copies.cumsum(0) - copies
    tokens = torch.arange(len(x_TD) * ep.world_size)[:, None]
    all_TD = x_TD.new_empty(len(tokens), x_TD.shape[1])
    ep.all_gather(all_TD, x_TD).wait()
    slots_TK = order[firsts[experts_TK] + tokens % copies[experts_TK]]
    local_TK = slots_TK - ep.rank * slots.num_slots
    is_ours = (local_TK >= 0) & (local_TK < slots.num_slots)
    y_TD = grouped_mlp(all_TD, slots.gate_up, slots.down, local_TK.where(is_ours, 0), is_ours.to(torch.float32))
    out_TD = torch.empty_like(x_TD)
    ep.reduce_scatter(out_TD, y_TD).wait()
    return out_TD


def _moe_case() -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """Weights of 8 experts, 12 tokens, each one's 3 experts, and what comes of them."""
    torch.manual_seed(0)
    weights = torch.randn(8, 10, 6, dtype=torch.float64), torch.randn(8, 6, 5, dtype=torch.float64)
    x_TD, experts_TK = torch.randn(12, 6, dtype=torch.float64), torch.rand(12, 8).topk(3, dim=1).indices
    return weights, x_TD, experts_TK, grouped_mlp(x_TD, *weights, experts_TK, torch.ones(12, 3))


@pytest.mark.parametrize("phase", [None, *PHASES])
def test_what_a_moe_layer_computes_does_not_change_across_a_swap_or_an_abort(phase: Phase | None) -> None:
    shape = _Shape(num_layers=1, budget_bytes=ROW_BYTES)
    present, target = shape.place(0), shape.place(1)
    weights, x_TD, experts_TK, expected_TD = _moe_case()

    def main(group: VirtualCollectives, is_renewed: bool = True) -> tuple[bool, list[bool]]:
        slots = _MoeSlots(*weights, present.slots.reshape(4, -1)[group.rank].tolist())
        tables = [present]
        live = LivePlacement(
            control=group.subgroup(range(4), "control"),
            data=group.subgroup(range(4), "weights"),
            slots=slots,
            placement=present,
            budget_bytes=shape.budget_bytes,
            ranks_per_node=2,
            on_commit=tables.append,
        )
        same = []

        def at_step() -> None:
            if group.rank == 3 and live.phase is phase:
                live.abort()
            own = slice(3 * group.rank, 3 * group.rank + 3)
            out_TD = _moe(group, slots, tables[-1 if is_renewed else 0], x_TD[own], experts_TK)
            same.append(torch.allclose(out_TD, expected_TD[own], rtol=1e-12, atol=1e-12))

        made = _drive(live, target, at_step)
        at_step()
        return made, same

    for made, same in shape.unit().run(main):
        assert made is (phase in (None, Phase.PREPARED))
        assert all(same)
        assert len(same) >= 3
    # Swapped weights under the routing of before are seen at once.
    made_and_same = shape.unit().run(lambda group: main(group, is_renewed=False))
    assert all(not all(same) for made, same in made_and_same if made)


@dataclass
class _Torn:
    """A group whose `torn` rank does not hear the last vote before the commit, which all others hear."""

    group: VirtualCollectives
    live: list[LivePlacement]
    is_torn: bool

    def __post_init__(self) -> None:
        self.rank, self.ranks, self.world_size = self.group.rank, self.group.ranks, self.group.world_size

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        def lose() -> None:
            if self.is_torn and self.live and self.live[0].phase is Phase.PREPARED:
                raise RanksMissing([2], group="control", reason="it died while it sent")

        return _FlippingHandle(self.group.all_gather(out, tensor, counts), lose)


@pytest.mark.parametrize("goes_on", [False, True], ids=["ends", "control: goes on"])
def test_a_vote_that_not_all_survivors_hear_ends_the_unit_before_a_step_is_done_on_two_versions(goes_on: bool) -> None:
    """Rank 2 dies after its vote has reached ranks 0 and 3, and before it reaches rank 1."""
    shape = _Shape(num_layers=1, budget_bytes=ROW_BYTES)
    present, target = shape.place(0), shape.place(1)
    weights, x_TD, experts_TK, expected_TD = _moe_case()
    lives: dict[int, LivePlacement] = {}
    steps: dict[int, list[tuple[int, bool]]] = {rank: [] for rank in range(4)}

    def main(group: VirtualCollectives) -> None:
        slots = _MoeSlots(*weights, present.slots.reshape(4, -1)[group.rank].tolist())
        own: list[LivePlacement] = []
        live = LivePlacement(
            control=_Torn(group.subgroup(range(4), "control"), own, is_torn=group.rank == 1),  # type: ignore[arg-type]
            data=group.subgroup(range(4), "weights"),
            slots=slots,
            placement=present,
            budget_bytes=shape.budget_bytes,
            ranks_per_node=2,
            on_commit=lambda _: None,
        )
        own.append(live)
        lives[group.rank] = live

        def at_step() -> None:
            if live.version == 2 and group.rank == 2 and not goes_on:
                raise RanksMissing([2], group="world", reason="it is dead")
            mine = slice(3 * group.rank, 3 * group.rank + 3)
            out_TD = _moe(group, slots, live.placement, x_TD[mine], experts_TK)
            steps[group.rank].append((live.version, torch.allclose(out_TD, expected_TD[mine], rtol=1e-12, atol=1e-12)))

        try:
            _drive(live, target, at_step)
        except RanksMissing:
            if not (goes_on and group.rank == 1):
                raise
            at_step()

    unit = shape.unit()
    with pytest.raises(RanksMissing):
        unit.run(main)
    # Over such collectives the two versions are a fact.
    assert [lives[rank].version for rank in range(4)] == [2, 1, 2, 2]
    assert all(isinstance(unit.errors[rank], RanksMissing) for rank in (0, 3))
    after = [right for done in steps.values() for version, right in done[len(steps[1]) - goes_on :]]
    if goes_on:
        assert not all(after), "who went on all the same would have computed with experts of both"
    else:
        assert after == []
        assert all(right for done in steps.values() for _, right in done)
        assert {version for done in steps.values() for version, _ in done} == {1}


# Real processes.


def _serve(pipe: Connection, rank: int, name: str) -> None:
    torch.set_num_threads(1)
    shape = _Shape(num_gpus=2, num_layers=2, num_experts=5, slots_per_gpu=4)
    group = SharedMemoryCollectives(name=name, ranks=range(2), rank=rank, deadline_s=20.0, part_bytes=1024)
    present = shape.place(0)
    slots = MemorySlots(present, rank)
    live = LivePlacement(
        control=group,
        data=group,
        slots=slots,
        placement=present,
        budget_bytes=shape.budget_bytes,
        ranks_per_node=2,
        on_commit=lambda _: None,
    )
    made = [_drive(live, _changed(live.placement, shape.place(seed), 1)) for seed in range(1, 21)]
    steps = live.change(_changed(live.placement, shape.place(99), 1))
    next(steps)
    if rank == 1:
        live.abort()
    made += [True for _ in steps][:0] or [live.phase is not Phase.ABORTED]
    pipe.send((made, live.version, slots.wrong(live.placement), slots.wrong(present) == []))
    group.close()


def test_two_processes_over_shared_memory_change_together(tmp_path_factory: pytest.TempPathFactory) -> None:
    context = multiprocessing.get_context("forkserver")
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        name = tmp_path_factory.getbasetemp().name + "-change"
        processes.append(context.Process(target=_serve, args=(theirs, rank, name), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        results = [pipe.recv() if pipe.poll(60.0) else None for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert results[0] is not None
    assert results[0] == results[1]
    made, version, wrong, is_as_before = results[0]
    assert made == [True] * 20 + [False]
    assert (version, wrong, is_as_before) == (21, [], False)
