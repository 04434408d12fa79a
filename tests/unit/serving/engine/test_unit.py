"""The lockstep of a unit on virtual ranks: followers do what their leaders do, groups without work come along, and all leave together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.request import SamplingParams
from serving.engine.plan import DecodeRow, Launched, PrefillChunk, SlotSpec, StepPlan, StepResult, StepShape
from serving.engine.unit import Follower, Header, Leader, Leaving, Lockstep, MicroBatches, agree
from serving.engine.watch import DeviceWatch
from serving.parallel.collectives import Collectives, RanksMissing, SingleRank
from serving.parallel.groups import Groups
from serving.parallel.virtual import Fault, VirtualBell, VirtualCollectives, VirtualUnit

SIZES = [Groups(tp=2, dp=2, ep=4, ranks_per_node=2), Groups(tp=1, dp=4, ep=4, ranks_per_node=4)]
MICRO_BATCHES = MicroBatches(prefill_tokens=6, rows=3)


@dataclass(frozen=True)
class InFlight:
    plan: StepPlan


@dataclass
class RecordingRunner:
    """An executor that notes what it is asked, and whose steps are collectives of all ranks."""

    model: Collectives
    log: list[Any] = field(default_factory=list)
    in_flight: deque[InFlight] = field(default_factory=deque)

    def open_slot(self, slot: int, spec: SlotSpec) -> None:
        self.log.append(("open", slot, spec))

    def close_slot(self, slot: int) -> None:
        self.log.append(("close", slot))

    def launch(self, plan: StepPlan, shape: StepShape | None = None) -> Launched:
        assert shape is not None
        assert len(self.in_flight) < 2
        for _ in range(shape.num_micro_batches):
            self.model.barrier()
        self.log.append(("launch", plan, shape))
        self.in_flight.append(InFlight(plan))
        return self.in_flight[-1]

    def settle(self, launched: Launched) -> StepResult:
        assert isinstance(launched, InFlight)
        self.in_flight.remove(launched)
        return StepResult(tokens=())

    @property
    def steps(self) -> list[tuple[StepPlan, StepShape]]:
        return [(entry[1], entry[2]) for entry in self.log if entry[0] == "launch"]


@dataclass
class Sleeper:
    """What the leaders of a test know of one another: the round in which each will have work again."""

    due: dict[int, int] = field(default_factory=dict)

    def is_first(self, rank: int) -> bool:
        return rank in self.due and min((round, other) for other, round in self.due.items())[1] == rank


def _lead(leader: Leader, lockstep: Lockstep, work: list[tuple[int, StepPlan]], rank: int, others: Sleeper) -> None:
    """A step loop with run-ahead. `work`: plans, and the round before which each does not come."""
    waiting, in_flight = deque(work), deque[Launched]()
    while True:
        others.due.pop(rank, None)
        if waiting:
            others.due[rank] = waiting[0][0]
        if leader.turned(stopping=False, drained=not waiting and not in_flight):
            return
        is_due = bool(waiting) and (
            waiting[0][0] <= lockstep.number or (not leader.awake and not in_flight and others.is_first(rank))
        )
        if is_due:
            plan = waiting.popleft()[1]
            slot = plan.rows[0].slot if plan.rows else plan.chunks[0].slot
            leader.open_slot(slot, _spec(slot))
            in_flight.append(leader.launch(plan))
        if in_flight and (not is_due or len(in_flight) > 1):
            step = in_flight.popleft()
            leader.settle(step)
            leader.close_slot(step.plan.rows[0].slot if step.plan.rows else step.plan.chunks[0].slot)
        elif not is_due and not leader.awake and not others.is_first(rank):
            lockstep.bell.wait(lockstep.number, None)


def _spec(slot: int) -> SlotSpec:
    sampling = SamplingParams(temperature=0.5, logit_bias={3: 1.0}, seed=slot)
    return SlotSpec(sampling=sampling, token_ids=[1, 2], num_prompt_tokens=2, page_ids=[slot], hidden=b"\x00\xff")


def _plan(num_tokens: int, num_rows: int, slot: int) -> StepPlan:
    chunk = PrefillChunk(
        slot=slot, token_ids=list(range(num_tokens)), start=0, store_from=0, page_ids=[slot], sample=True
    )
    rows = tuple(DecodeRow(slot=slot + i, position=9, new_page_id=None if i else 4) for i in range(num_rows))
    return StepPlan(chunks=(chunk,) if num_tokens else (), rows=rows)


def _run(
    groups: Groups,
    work: list[list[tuple[int, StepPlan]]],
    *,
    faults: list[Fault] | None = None,
    make_runner: Callable[[int, Collectives], RecordingRunner] = lambda _, model: RecordingRunner(model),
) -> tuple[VirtualUnit, list[RecordingRunner]]:
    """`work` by DP group. The runners by rank."""
    unit = VirtualUnit(groups, faults=faults or [])
    others = Sleeper({dp * groups.tp: plans[0][0] for dp, plans in enumerate(work) if plans})
    runners: dict[int, RecordingRunner] = {}

    def main(world: VirtualCollectives) -> None:
        rank, at = world.rank, groups.coordinates(world.rank)
        tp = world.subgroup(groups.tp_group(rank), "control-tp")
        model = world.subgroup(range(groups.world_size), "model")
        lockstep = Lockstep(world, tp, VirtualBell(world), micro_batches=MICRO_BATCHES)
        runners[rank] = make_runner(rank, model)
        if at.tp_rank:
            Follower(runners[rank], lockstep).run()
        else:
            _lead(Leader(runners[rank], lockstep), lockstep, work[at.dp_rank], rank, others)

    try:
        unit.run(main)
    except RanksMissing:
        if not faults:
            raise
    return unit, [runners[rank] for rank in sorted(runners)]


def _check_alike(groups: Groups, runners: list[RecordingRunner]) -> None:
    for rank, runner in enumerate(runners):
        assert runner.log == runners[groups.tp_group(rank)[0]].log, f"rank {rank} did something else than its leader"
        assert [shape for _, shape in runner.steps] == [shape for _, shape in runners[0].steps]


_GAPS_AND_SIZES = st.tuples(st.integers(0, 9), st.integers(0, 8), st.integers(0, 4)).filter(lambda t: t[1] + t[2] > 0)


@given(groups=st.sampled_from(SIZES), data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_rank_runs_the_same_steps_whoever_has_work(groups: Groups, data: st.DataObject) -> None:
    work = []
    for dp_rank in range(groups.dp):
        at, plans = 0, []
        for gap, num_tokens, num_rows in data.draw(st.lists(_GAPS_AND_SIZES, max_size=25)):
            at += gap
            plans.append((at, _plan(num_tokens, num_rows, slot=dp_rank)))
        work.append(plans)
    _, runners = _run(groups, work)
    _check_alike(groups, runners)
    for dp_rank, plans in enumerate(work):
        own = [plan for plan, _ in runners[dp_rank * groups.tp].steps if plan.num_tokens]
        assert own == [plan for _, plan in plans]
    leaders = [runner.steps for runner in runners[:: groups.tp]]
    for of_all in zip(*leaders, strict=True):
        plans_of_step, shape = [plan for plan, _ in of_all], of_all[0][1]
        assert shape.prefill_tokens == max(plan.num_prefill_tokens for plan in plans_of_step)
        assert shape.rows == max(len(plan.rows) for plan in plans_of_step)
        assert shape.num_micro_batches == 1 + (shape.prefill_tokens >= 6 or shape.rows >= 3)


def test_commands_of_any_size_arrive() -> None:
    plans = [(0, _plan(20_000, 0, 0)), (0, _plan(1, 0, 0)), (0, _plan(0, 3, 0))]
    _, runners = _run(SIZES[0], [plans, []])
    _check_alike(SIZES[0], runners)
    assert len(runners[1].steps) == 3


def test_followers_hear_what_their_leader_announces_and_then_its_commands() -> None:
    groups = SIZES[0]
    heard: dict[int, bytes] = {}
    computed: list[int] = []

    def main(world: VirtualCollectives) -> None:
        at = groups.coordinates(world.rank)
        tp = world.subgroup(groups.tp_group(world.rank), "control-tp")
        lockstep = Lockstep(world, tp, VirtualBell(world))
        heard[world.rank] = lockstep.announce(None if at.tp_rank else f"group {at.dp_rank}".encode())
        runner = RecordingRunner(world.subgroup(range(4), "model"))
        if at.tp_rank:
            Follower(runner, lockstep, computed.append if world.rank == 1 else lambda number: None).run()
            return
        leader = Leader(runner, lockstep)
        for _ in range(3 if at.dp_rank == 0 else 0):
            leader.open_slot(0, _spec(0))
            leader.settle(leader.launch(_plan(0, 1, 0)))
            leader.close_slot(0)
            leader.turned(stopping=False, drained=False)
        while not leader.turned(stopping=False, drained=True):
            pass

    VirtualUnit(groups).run(main)
    assert heard == {0: b"group 0", 1: b"group 0", 2: b"group 1", 3: b"group 1"}
    assert computed == list(range(1, len(computed) + 1))
    assert len(computed) >= 3


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_follower_says_that_a_step_is_computed_when_it_has_settled_it(run_ahead: bool) -> None:
    groups = SIZES[0]
    heard: list[tuple[int, int, int]] = []

    class Settling(RecordingRunner):
        num_launched = num_settled = 0

        def launch(self, plan: StepPlan, shape: StepShape | None = None) -> Launched:
            self.num_launched += 1
            assert self.num_launched - self.num_settled <= 2
            return super().launch(plan, shape)

        def settle(self, launched: Launched) -> StepResult:
            self.num_settled += 1
            return super().settle(launched)

    def main(world: VirtualCollectives) -> None:
        at = groups.coordinates(world.rank)
        lockstep = Lockstep(world, world.subgroup(groups.tp_group(world.rank), "control-tp"), VirtualBell(world))
        runner = Settling(world.subgroup(range(4), "model"))

        def computed(number: int) -> None:
            if world.rank == 1:
                heard.append((number, runner.num_settled, lockstep.number))

        if at.tp_rank:
            Follower(runner, lockstep, computed, run_ahead=run_ahead).run()
            return
        leader = Leader(runner, lockstep)
        for _ in range(4 if at.dp_rank == 0 else 0):
            leader.settle(leader.launch(_plan(0, 1, 0)))
            leader.turned(stopping=False, drained=False)
        while not leader.turned(stopping=False, drained=True):
            pass

    VirtualUnit(groups).run(main)
    numbers, settled, rounds = zip(*heard, strict=True)
    assert list(numbers) == sorted(set(numbers))
    assert numbers[-1] == rounds[-1]
    assert all(done >= number for number, done in zip(numbers[:4], settled, strict=False))
    assert any(number < round_ for number, _, round_ in heard) == run_ahead


def test_a_follower_that_drops_a_command_is_found_out() -> None:
    class Forgetful(RecordingRunner):
        def close_slot(self, slot: int) -> None:
            """What the comparison is for."""

    plans = [(0, _plan(0, 1, 0)), (0, _plan(0, 1, 0))]
    _, runners = _run(
        SIZES[0], [plans, []], make_runner=lambda rank, m: (Forgetful if rank == 1 else RecordingRunner)(m)
    )
    with pytest.raises(AssertionError, match="rank 1 did something else"):
        _check_alike(SIZES[0], runners)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("call", [0, 1, 4, 11])
def test_whoever_does_not_come_is_named_by_all_and_nobody_waits(rank: int, call: int) -> None:
    work = [[(0, _plan(0, 1, dp))] * 9 for dp in range(2)]
    unit, _ = _run(SIZES[0], work, faults=[Fault(rank=rank, call=call)])
    named = {other: error.ranks for other, error in unit.errors.items() if isinstance(error, RanksMissing)}
    assert named == dict.fromkeys(range(4), (rank,))


def test_a_rank_that_leaves_a_parked_unit_ends_the_others_sleep() -> None:
    groups = SIZES[0]

    def main(world: VirtualCollectives) -> None:
        tp = world.subgroup(groups.tp_group(world.rank), "control-tp")
        lockstep = Lockstep(world, tp, VirtualBell(world))
        if world.rank == 3:
            raise RuntimeError("a bug")
        if world.rank % 2:
            Follower(RecordingRunner(world), lockstep).run()
        else:
            lockstep.bell.wait(lockstep.number, None)

    unit = VirtualUnit(groups)
    with pytest.raises(RuntimeError, match="a bug"):
        unit.run(main)
    assert [error.ranks for rank, error in sorted(unit.errors.items()) if isinstance(error, RanksMissing)] == [(3,)] * 3


def test_a_stop_of_one_ends_all_after_the_step() -> None:
    groups = SIZES[0]
    runners: dict[int, RecordingRunner] = {}

    def main(world: VirtualCollectives) -> int:
        rank = world.rank
        lockstep = Lockstep(world, world.subgroup(groups.tp_group(rank), "control-tp"), VirtualBell(world))
        runners[rank] = RecordingRunner(world.subgroup(range(4), "model"))
        if rank % 2:
            Follower(runners[rank], lockstep).run()
            return lockstep.number
        leader = Leader(runners[rank], lockstep)
        while not leader.turned(stopping=rank == 2 and lockstep.number == 5, drained=False):
            leader.settle(leader.launch(_plan(0, 1, rank)))
        return lockstep.number

    assert VirtualUnit(groups).run(main) == [6, 6, 6, 6]
    assert [len(runner.steps) for runner in runners.values()] == [6, 6, 6, 6]


@pytest.mark.parametrize(
    ("leaving", "rows", "ended"),
    [
        ([0, 0], 0, False),
        ([1, 0], 0, False),
        ([1, 1], 0, True),
        ([1, 1], 1, False),
        ([2, 0], 1, True),
        ([2, 1], 0, True),
    ],
)
def test_a_unit_ends_when_all_are_drained_or_one_stops(leaving: list[int], rows: int, ended: bool) -> None:
    most, least = Header(rows=rows, leaving=max(leaving)), Header(leaving=min(leaving))
    agreed = agree(most, least, MicroBatches())
    assert agreed.ended is ended
    assert (agreed.step is None) == (rows == 0)
    assert Leaving.STOPS == 2


@pytest.mark.parametrize("differs", [False, True])
def test_between_steps_every_rank_is_asked_and_its_group_has_one_placement(differs: bool) -> None:
    groups = Groups(tp=1, dp=4, ep=2, ranks_per_node=4)

    @dataclass
    class Counting:
        """Placements of the two EP groups have versions of their own."""

        placement_version: int
        num_calls: int = 0

        def advance(self) -> None:
            self.num_calls += 1

    def main(world: VirtualCollectives) -> tuple[int, int]:
        lockstep = Lockstep(world, SingleRank(ranks=(world.rank,)), VirtualBell(world))
        counting = Counting(7 + (world.rank // 2) + (differs and world.rank == 3))
        lockstep.attach(counting, groups.ep_group(world.rank))
        runner = RecordingRunner(world.subgroup(range(4), "model"))
        leader = Leader(runner, lockstep)
        num_left = 3 if world.rank == 1 else 0
        while not leader.turned(stopping=False, drained=not num_left):
            if num_left:
                num_left -= 1
                leader.settle(leader.launch(_plan(0, 1, 0)))
            elif not leader.awake:
                lockstep.bell.wait(lockstep.number, None)
        return counting.num_calls, len(runner.steps)

    unit = VirtualUnit(groups)
    if not differs:
        assert unit.run(main) == [(3, 3)] * 4
        return
    with pytest.raises(AssertionError, match="at once"):
        unit.run(main)


def test_a_watch_hears_which_step_is_launched_before_it_is_and_when_all_of_it_was() -> None:
    heard: list[Any] = []

    class Watch:
        def launching(self, number: int) -> None:
            heard.append(("launching", number))

        def launched(self, number: int) -> None:
            heard.append(("launched", number))

        def on_device(self, deadline_s: float | None = None) -> AbstractContextManager[None]:
            return nullcontext()

    def main(world: VirtualCollectives) -> None:
        lockstep = Lockstep(world, SingleRank(), VirtualBell(world), watch=cast("DeviceWatch", Watch()))
        runner = RecordingRunner(world)
        runner.log = heard
        leader = Leader(runner, lockstep)
        for _ in range(2):
            leader.settle(leader.launch(_plan(0, 1, 0)))

    VirtualUnit(Groups(tp=1, dp=1, ep=1, ranks_per_node=1)).run(main)
    assert [entry[:2] if entry[0] != "launch" else "launch" for entry in heard] == [
        ("launching", 1),
        "launch",
        ("launched", 1),
        ("launching", 2),
        "launch",
        ("launched", 2),
    ]
