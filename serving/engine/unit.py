"""The lockstep of a unit's ranks: round by round they agree on a step and all run it, or all park.

    parked --a leader has work, and rings--> round -> round -> ... --nobody has work--> parked
    round    every rank's header to every rank; a leader's commands to its followers; then the step that follows from the headers
    ended    a rank wants to stop: after the round's step; all are drained: at once

A DP group's leader is its TP rank 0. It has the scheduler, which sees an Executor; what it asks of that, the followers, the other TP
ranks, replay on their own runners. All of them sample from the same whole logits, so tokens are the same, and a follower drops them.
A group without work runs the step without tokens, so that every rank calls the same collectives. The groups of the lockstep are
the host's own: while the device computes a step, the host is in the round of the next one.

A rank that does not come to a round or a step is named by RanksMissing on all others, which ends each of them; where steps are on a
GPU, a `DeviceWatch` sees to that. Must not know schedulers, requests or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import msgspec
import torch

from serving.engine.plan import Executor, Launched, SlotSpec, StepPlan, StepResult, StepShape
from serving.engine.watch import DeviceWatch
from serving.parallel.bell import Bell
from serving.parallel.collectives import Collectives

_INLINE_BYTES = 8192
"""Commands up to here travel in one broadcast: a decode step's of some 200 rows."""
_LENGTH_BYTES = 8
_MAX_IN_FLIGHT = 2
_NOTHING = StepPlan()


class UnitRunner(Executor, Protocol):
    """An Executor that can run the shape of other ranks' steps beside its own plan."""

    def launch(self, plan: StepPlan, shape: StepShape | None = None) -> Launched: ...


class Unit(Protocol):
    """What a worker's step loop sees of its unit."""

    @property
    def executor(self) -> Executor: ...

    @property
    def awake(self) -> bool:
        """Whether the others count on this rank: then the loop must come to `turned` without waiting for anything."""

    def tell(self, wake: Callable[[], None]) -> None:
        """`wake` is called, from any thread, when the loop should turn although it has nothing to do itself."""

    def turned(self, *, stopping: bool, drained: bool) -> bool:
        """Before each turn of the loop. True: leave it. Raises RanksMissing."""

    def close(self) -> None:
        """The loop has been left: if too early, the others' are told."""


class Leaving(IntEnum):
    """Whether a rank wants to go on. A follower leaves as soon as all leaders do."""

    STAYS = 0
    DRAINED = 1
    STOPS = 2


class Header(NamedTuple):
    """What a rank says of the next step: its own tokens, and the placement of the experts that it would run with."""

    prefill_tokens: int = 0
    rows: int = 0
    leaving: int = Leaving.STAYS
    placement_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What follows from the headers of all ranks, the same on each. `step` None: nobody has work."""

    step: StepShape | None
    ended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """When a step is computed in two parts: if some rank has so many tokens of either kind; 0: never."""

    prefill_tokens: int = 0
    rows: int = 0

    def number(self, prefill_tokens: int, rows: int) -> int:
        splits = 0 < self.prefill_tokens <= prefill_tokens or 0 < self.rows <= rows
        return 2 if splits else 1


def agree(most: Header, least: Header, micro_batches: MicroBatches) -> Agreed:
    """From the largest and the smallest of each of the headers' fields. Pure, so that all ranks come to the same."""
    prefill_tokens, rows = most.prefill_tokens, most.rows
    number = micro_batches.number(prefill_tokens, rows)
    has_work = prefill_tokens > 0 or rows > 0
    return Agreed(
        step=StepShape(prefill_tokens=prefill_tokens, rows=rows, num_micro_batches=number) if has_work else None,
        ended=most.leaving == Leaving.STOPS or (least.leaving == Leaving.DRAINED and not has_work),
    )


class OpenSlot(msgspec.Struct, frozen=True, tag="open", array_like=True):
    slot: int
    spec: SlotSpec


class CloseSlot(msgspec.Struct, frozen=True, tag="close", array_like=True):
    slot: int


class Commands(msgspec.Struct, frozen=True, array_like=True):
    """What a leader asked of its Executor since the round before, in order, and last of all the plan, which may be empty."""

    slots: list[OpenSlot | CloseSlot]
    plan: StepPlan


class BetweenSteps(Protocol):
    """What every rank does at the border of every step of the unit: experts that change their slots, loads that are gathered."""

    @property
    def placement_version(self) -> int:
        """Of the placement in force, the same on all ranks of an EP group."""

    def advance(self) -> None:
        """Called on all ranks before the same steps, so it may call collectives of its own."""


class Lockstep:
    """One rank's part in the rounds. `world`: all ranks of the unit; `tp`: those of its DP group, the leader first; both of CPU tensors.

    `start`: all ranks again, for what comes before the first round and may take longer; None: `world`. `watch`: of steps on a GPU.
    """

    def __init__(
        self,
        world: Collectives,
        tp: Collectives,
        bell: Bell,
        *,
        start: Collectives | None = None,
        micro_batches: MicroBatches | None = None,
        watch: DeviceWatch | None = None,
    ) -> None:
        self.bell = bell
        self.watch = watch
        self.number = 0
        """Rounds so far. While parked it is the number of the ring that ends it."""
        self.parked = True
        self.ended = False
        self.tp_rank, self.tp = tp.rank, tp.world_size
        self._world, self._tp, self._start = world, tp, start or world
        self.micro_batches = micro_batches or MicroBatches()
        self._between_steps: BetweenSteps | None = None
        self._ep_ranks: list[int] = []
        self._headers = torch.zeros(world.world_size, len(Header._fields), dtype=torch.int64)
        self._block = torch.zeros(_LENGTH_BYTES + _INLINE_BYTES, dtype=torch.uint8)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Commands)

    def attach(self, between_steps: BetweenSteps, ep_ranks: Sequence[int]) -> None:
        """Before the first round, on all ranks of the EP group."""
        self._between_steps, self._ep_ranks = between_steps, list(ep_ranks)

    def least(self, number: int) -> int:
        """The smallest of what the ranks bring; all of them call it."""
        numbers = torch.empty(self._start.world_size, dtype=torch.int64)
        self._start.all_gather(numbers, torch.tensor([number])).wait()
        return int(numbers.min())

    def announce(self, data: bytes | None) -> bytes:
        """Before the first round, what the leader has for its followers; None on these."""
        if data is not None:
            assert len(data) <= _INLINE_BYTES
            self._block[: _LENGTH_BYTES + len(data)] = torch.frombuffer(
                bytearray(len(data).to_bytes(_LENGTH_BYTES, "little") + data), dtype=torch.uint8
            )
        self._tp.broadcast(self._block, 0).wait()
        said = self._block.numpy().tobytes()
        return said[_LENGTH_BYTES:][: int.from_bytes(said[:_LENGTH_BYTES], "little")]

    def meet(self) -> None:
        """Returns when every rank is ready for the first round."""
        self._start.barrier()

    def round(self, header: Header, commands: Commands | None) -> tuple[StepShape | None, Commands | None]:
        """`commands` None on a follower, which gets its leader's. Raises RanksMissing."""
        version = self._between_steps.placement_version if self._between_steps is not None else 0
        mine = torch.tensor([header._replace(placement_version=version)])
        exchanged = self._world.all_gather(self._headers, mine)
        if self.tp > 1:
            commands = self._tell(commands)
        exchanged.wait()
        most, least = Header(*self._headers.amax(0).tolist()), Header(*self._headers.amin(0).tolist())
        agreed = agree(most, least, self.micro_batches)
        self.number += 1
        self.parked, self.ended = agreed.step is None, agreed.ended
        if self._between_steps is not None and agreed.step is not None:
            versions = {
                row[Header._fields.index("placement_version")] for row in self._headers[self._ep_ranks].tolist()
            }
            assert len(versions) == 1, f"placements {versions} are in force at once"
            with self.on_device():
                self._between_steps.advance()
        return agreed.step, commands

    def on_device(self, deadline_s: float | None = None) -> AbstractContextManager[None]:
        """Around what may wait for the device, and there for other ranks; within the deadline of a step if there is no other."""
        return nullcontext() if self.watch is None else self.watch.on_device(deadline_s)

    def launch(self, runner: UnitRunner, plan: StepPlan, step: StepShape) -> Launched:
        """Raises RanksMissing."""
        if self.watch is not None:
            self.watch.launching(self.number)
        with self.on_device():
            launched = runner.launch(plan, step)
        if self.watch is not None:
            self.watch.launched(self.number)
        return launched

    def settle(self, runner: UnitRunner, launched: Launched) -> StepResult:
        """Raises RanksMissing."""
        with self.on_device():
            return runner.settle(launched)

    def close(self) -> None:
        """This rank comes to no round any more."""
        if self.watch is not None:
            self.watch.close()
        self.bell.close()

    def _tell(self, commands: Commands | None) -> Commands | None:
        """One broadcast, and if the length that it begins with says so, one more."""
        data = b"" if commands is None else self._encoder.encode(commands)
        if commands is not None:
            head = len(data).to_bytes(_LENGTH_BYTES, "little") + data[:_INLINE_BYTES]
            self._block[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._tp.broadcast(self._block, 0).wait()
        head = self._block.numpy().tobytes()
        num_bytes = int.from_bytes(head[:_LENGTH_BYTES], "little")
        rest = torch.empty(max(0, num_bytes - _INLINE_BYTES), dtype=torch.uint8)
        if len(rest):
            if commands is not None:
                rest = torch.frombuffer(bytearray(data[_INLINE_BYTES:]), dtype=torch.uint8)
            self._tp.broadcast(rest, 0).wait()
        if commands is not None:
            return commands
        return self._decoder.decode(head[_LENGTH_BYTES:][:num_bytes] + rest.numpy().tobytes())


class Leader:
    """TP rank 0 of a DP group: an Executor, and the Unit of the step loop that calls it."""

    def __init__(self, runner: UnitRunner, lockstep: Lockstep) -> None:
        self._runner = runner
        self._lockstep = lockstep
        self._slots: list[OpenSlot | CloseSlot] = []
        self._num_in_flight = 0
        self._idle_steps: deque[Launched] = deque()
        self._leaving = self._told_leaving = Leaving.STAYS
        self._took_part = False

    @property
    def executor(self) -> Executor:
        return self

    @property
    def awake(self) -> bool:
        return not self._lockstep.parked

    def open_slot(self, slot: int, spec: SlotSpec) -> None:
        self._runner.open_slot(slot, spec)
        if self._lockstep.tp > 1:
            self._slots.append(OpenSlot(slot, spec))

    def close_slot(self, slot: int) -> None:
        self._runner.close_slot(slot)
        if self._lockstep.tp > 1:
            self._slots.append(CloseSlot(slot))

    def launch(self, plan: StepPlan) -> Launched:
        assert plan.num_tokens > 0, "an empty plan is nothing to launch"
        if self._lockstep.parked:
            self._lockstep.bell.ring(self._lockstep.number)
        launched = self._round(plan)
        assert launched is not None, "a unit whose leader has work does not park"
        self._num_in_flight += 1
        return launched

    def settle(self, launched: Launched) -> StepResult:
        self._num_in_flight -= 1
        return self._lockstep.settle(self._runner, launched)

    def tell(self, wake: Callable[[], None]) -> None:
        self._lockstep.bell.tell(wake)

    def close(self) -> None:
        self._lockstep.close()

    def turned(self, *, stopping: bool, drained: bool) -> bool:
        """A turn in which nothing was launched takes part in the unit's round all the same, with a step without tokens."""
        self._leaving = Leaving.STOPS if stopping else Leaving.DRAINED if drained else Leaving.STAYS
        took_part, self._took_part = self._took_part, False
        if not self._lockstep.ended and not took_part and self._is_called():
            launched = self._round(_NOTHING)
            if launched is not None:
                self._idle_steps.append(launched)
            self._took_part = False
        return self._lockstep.ended

    def _is_called(self) -> bool:
        lockstep = self._lockstep
        if lockstep.parked and self._leaving > self._told_leaving:
            lockstep.bell.ring(lockstep.number)
            return True
        return not lockstep.parked or lockstep.bell.wait(lockstep.number, 0.0)

    def _round(self, plan: StepPlan) -> Launched | None:
        """None: the unit parks, or ends without a step."""
        slots, self._slots = self._slots, []
        self._took_part, self._told_leaving = True, self._leaving
        header = Header(plan.num_prefill_tokens, len(plan.rows), self._leaving)
        step, _ = self._lockstep.round(header, Commands(slots, plan))
        if step is None:
            return None
        if self._num_in_flight + len(self._idle_steps) == _MAX_IN_FLIGHT and self._idle_steps:
            self._lockstep.settle(self._runner, self._idle_steps.popleft())
        return self._lockstep.launch(self._runner, plan, step)


class Follower:
    """Another TP rank of a DP group: does what its leader's Executor does, until the unit ends."""

    def __init__(
        self,
        runner: UnitRunner,
        lockstep: Lockstep,
        on_computed: Callable[[int], None] = lambda number: None,
        *,
        run_ahead: bool = False,
    ) -> None:
        """`on_computed` hears of each round whose step has been computed here, and with it those before. `run_ahead`: a step is settled
        when the next has been launched, as a GPU wants it."""
        self._runner = runner
        self._lockstep = lockstep
        self._on_computed = on_computed
        self._most_ahead = int(run_ahead)
        self._in_flight: deque[tuple[int, Launched]] = deque()
        self._stopping = False

    def run(self) -> None:
        """Raises RanksMissing."""
        lockstep = self._lockstep
        while not lockstep.ended:
            if lockstep.parked and not self._stopping:
                lockstep.bell.wait(lockstep.number, None)
            leaving = Leaving.STOPS if self._stopping else Leaving.DRAINED
            step, commands = lockstep.round(Header(leaving=leaving), None)
            assert commands is not None, "a follower has a leader"
            self._replay(commands, step)

    def stop(self) -> None:
        """From any thread: the unit ends after a round."""
        self._stopping = True
        self._lockstep.bell.ring(self._lockstep.number)

    def close(self) -> None:
        self._lockstep.close()

    def _replay(self, commands: Commands, step: StepShape | None) -> None:
        for command in commands.slots:
            if isinstance(command, OpenSlot):
                self._runner.open_slot(command.slot, command.spec)
            else:
                self._runner.close_slot(command.slot)
        if step is None:
            self._settle_all_but(0)
            self._on_computed(self._lockstep.number)
            return
        self._in_flight.append((self._lockstep.number, self._lockstep.launch(self._runner, commands.plan, step)))
        # With the last round's step nothing comes that it would wait for.
        self._settle_all_but(0 if self._lockstep.ended else self._most_ahead)

    def _settle_all_but(self, most: int) -> None:
        while len(self._in_flight) > most:
            number, launched = self._in_flight.popleft()
            self._lockstep.settle(self._runner, launched)
            self._on_computed(number)


class Alone:
    """The Unit of one rank."""

    awake = False

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def tell(self, wake: Callable[[], None]) -> None:
        """Nobody else has work for it."""

    def close(self) -> None:
        """Nobody else waits for it."""

    def turned(self, *, stopping: bool, drained: bool) -> bool:
        return stopping or drained
