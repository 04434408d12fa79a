"""A whole unit in one process: every rank is a thread, of which exactly one runs at a time.

A rank keeps the turn until it waits for a call that others have yet to come to; then the next rank that can go on gets it. The
last rank to come executes the call as one operation over all ranks. So the order of everything is the same in every run, and
a rank that never comes is known, not guessed: nobody can go on, and it is none of those who wait.

Time is virtual too: a rank's clock moves only by the delays that were asked for, and the deadline is held against it.

    ready -> running -> waiting, asleep -> ready ... -> ended

Gradients and inference mode are a thread's own in torch: `main` enters them. torch.set_num_threads(1) keeps each of hundreds
of threads from a pool of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from serving.parallel.collectives import Handle, RanksMissing, check_payloads, check_rows, even, row_bytes
from serving.parallel.groups import Groups, Link
from serving.parallel.traffic import Sent, Traffic, zero_rows

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Rank `rank` comes `delay_s` late to its collective number `call` (from 0, over all its groups); None: it dies there."""

    rank: int
    call: int
    delay_s: float | None = None


class _Killed(BaseException):
    """Ends a rank's thread as the end of its process would: no handler of exceptions sees it."""


class VirtualUnit:
    """The ranks of `groups`. `turn_s`: wall time after which a rank that does not give up its turn counts as hung."""

    def __init__(
        self, groups: Groups, *, deadline_s: float = 10.0, faults: Sequence[Fault] = (), turn_s: float = 120.0
    ) -> None:
        self.groups = groups
        self.traffic: dict[tuple[str, str, Link], Traffic] = {}
        """By group name, operation and link, as if each pair exchanged directly; what a rank has for itself is SAME_GPU."""
        self.errors: dict[int, BaseException] = {}
        """What ended a rank early."""
        self._deadline_s = deadline_s
        self._turn_s = turn_s
        self._faults = {(fault.rank, fault.call): fault for fault in faults}
        self._groups: dict[tuple[str, tuple[int, ...]], _Group] = {}
        world_size = groups.world_size
        self._clocks_s = [0.0] * world_size
        self._num_calls = [0] * world_size
        # Locked while it is not the rank's turn.
        self._turns = [threading.Lock() for _ in range(world_size)]
        for turn in self._turns:
            turn.acquire()
        self._ready: deque[int] = deque()
        self._waiting: dict[int, _Call] = {}
        self._asleep: dict[int, int] = {}
        """The ring that each of these ranks waits for."""
        self._rung = -1
        self._bell_broken: RanksMissing | None = None
        self._running = -1
        self._num_turns = 0
        self._done = threading.Event()

    def run(self, main: Callable[[VirtualCollectives], T]) -> list[T]:
        """`main` on every rank with the group "world"; its results by rank. Called once. Raises what ended a rank first of all:
        rather an error of its own than RanksMissing, which is what the others make of it."""
        assert not self._done.is_set(), "a unit lives once"
        world = range(self.groups.world_size)
        results: dict[int, T] = {}

        def live(rank: int) -> None:
            self._turns[rank].acquire()
            try:
                self._running = rank
                results[rank] = main(VirtualCollectives(self, self._group("world", tuple(world)), rank))
            except _Killed:
                self.errors[rank] = RanksMissing([rank], group="world", reason="it was killed")
            except BaseException as error:
                self.errors[rank] = error
            self._pass_turn()

        for rank in world:
            self._ready.append(rank)
            threading.Thread(target=live, args=(rank,), name=f"rank-{rank}", daemon=True).start()
        self._pass_turn()
        self._watch()
        if self.errors:
            # False sorts first.
            raise min(self.errors.values(), key=lambda error: isinstance(error, RanksMissing))
        return [results[rank] for rank in world]

    def _watch(self) -> None:
        seen = -1
        while not self._done.wait(self._turn_s):
            if seen == self._num_turns:
                raise RanksMissing([self._running], group="world", reason=f"it has run for {self._turn_s:g} s")
            seen = self._num_turns

    def _pass_turn(self) -> None:
        if not self._ready:
            self._break_waits()
        if self._ready:
            self._num_turns += 1
            self._turns[self._ready.popleft()].release()
        else:
            self._done.set()

    def _break_waits(self) -> None:
        """Nobody can go on: whoever did not come has ended, or waits for such a one elsewhere."""
        for call in {id(call): call for call in self._waiting.values()}.values():
            absent = [rank for rank in call.group.ranks if rank not in call.arrived_s]
            # All came if executing the call is what ended one of them.
            ended = [rank for rank in absent or call.group.ranks if rank not in self._waiting]
            call.group.broken = RanksMissing(ended or absent, group=call.group.name, reason="no rank can go on")
        if self._asleep:
            gone = [
                rank for rank in range(self.groups.world_size) if rank not in self._waiting and rank not in self._asleep
            ]
            self._bell_broken = RanksMissing(gone or list(self._asleep), group="bell", reason="nobody is left to ring")
        self._ready.extend(sorted([*self._waiting, *self._asleep]))
        self._waiting.clear()
        self._asleep.clear()

    def _wait(self, rank: int, call: _Call) -> None:
        if not call.is_done and call.group.broken is None:
            self._waiting[rank] = call
            self._pass_turn()
            self._turns[rank].acquire()
            self._running = rank
        if not call.is_done:
            assert call.group.broken is not None, "a rank goes on when its call is done or its group broken"
            raise call.group.broken
        self._clocks_s[rank] = max(self._clocks_s[rank], *call.arrived_s.values())

    def _ring(self, number: int) -> None:
        self._rung = max(self._rung, number)
        woken = sorted(rank for rank, awaited in self._asleep.items() if awaited <= self._rung)
        for rank in woken:
            del self._asleep[rank]
        self._ready.extend(woken)

    def _sleep(self, rank: int, number: int) -> None:
        if self._rung < number and self._bell_broken is None:
            self._asleep[rank] = number
            self._pass_turn()
            self._turns[rank].acquire()
            self._running = rank
        if self._bell_broken is not None:
            raise self._bell_broken

    def _arrive(self, rank: int, group: _Group, number: int, arguments: _Arguments) -> _Call:
        """`rank` comes to the group's call `number`, and executes it if it is the last."""
        fault = self._faults.get((rank, self._num_calls[rank]))
        self._num_calls[rank] += 1
        if fault is not None:
            if fault.delay_s is None:
                raise _Killed
            self._clocks_s[rank] += fault.delay_s
        if group.broken:
            raise group.broken
        call = group.calls.setdefault(number, _Call(group=group))
        index = group.ranks.index(rank)
        call.arguments[index] = arguments
        call.arrived_s[rank] = self._clocks_s[rank]
        if len(call.arguments) == len(group.ranks):
            self._execute(call)
            del group.calls[number]
        return call

    def _execute(self, call: _Call) -> None:
        group = call.group
        due_s = min(call.arrived_s.values()) + self._deadline_s
        if late := [rank for rank, arrived_s in call.arrived_s.items() if arrived_s > due_s]:
            group.broken = RanksMissing(late, group=group.name, reason=f"deadline {self._deadline_s:g} s")
        else:
            ordered = [call.arguments[index] for index in range(len(group.ranks))]
            names = {arguments.operation.__name__ for arguments in ordered}
            assert len(names) == 1, f"the ranks of {group.name} call {names} at once"
            self._count(group, names.pop().removeprefix("_"), ordered[0].operation(ordered))
            call.is_done = True
        call.arguments.clear()
        freed = [
            rank for rank, other in self._waiting.items() if other.group is group and (other is call or group.broken)
        ]
        for rank in sorted(freed):
            del self._waiting[rank]
            self._ready.append(rank)

    def _count(self, group: _Group, operation: str, sent: Sent) -> None:
        for link, seen in zip(Link, sent.by_link(group.on_link), strict=True):
            if seen.num_messages:
                traffic = self.traffic.setdefault((group.name, operation, link), Traffic())
                traffic.num_bytes += seen.num_bytes
                traffic.num_messages += seen.num_messages
                traffic.payload_rows += seen.payload_rows
                traffic.padding_bytes += seen.padding_bytes

    def _group(self, name: str, ranks: tuple[int, ...]) -> _Group:
        key = (name, ranks)
        if key not in self._groups:
            nodes = torch.tensor(ranks) // self.groups.ranks_per_node
            same_gpu = torch.eye(len(ranks), dtype=torch.int64)
            same_node = (nodes[:, None] == nodes[None, :]).to(torch.int64)
            on_link = torch.stack([same_gpu, same_node - same_gpu, 1 - same_node])
            self._groups[key] = _Group(name=name, ranks=ranks, on_link=on_link)
        return self._groups[key]


class VirtualCollectives:
    """One rank's end of one group of a VirtualUnit; only that rank's thread uses it."""

    def __init__(self, unit: VirtualUnit, group: _Group, global_rank: int) -> None:
        self.rank = group.ranks.index(global_rank)
        self.ranks = group.ranks
        self.world_size = len(group.ranks)
        self._unit = unit
        self._group = group
        self._num_issued = 0

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        sizes = list(counts) if counts else even(len(out), self.world_size)
        check_rows(out, tensor, sizes, self.rank)
        return self._issue(_all_gather, [out], [tensor], sizes)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        sizes = list(counts) if counts else even(len(tensor), self.world_size)
        check_rows(tensor, out, sizes, self.rank)
        return self._issue(_reduce_scatter, [out], [tensor], sizes)

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        check_payloads(outs, tensors, recv_counts, send_counts, self.world_size)
        return self._issue(_all_to_all, outs, tensors, send_counts, recv_counts)

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        return self._issue(_broadcast, [tensor], [], [src])

    def barrier(self) -> None:
        self._issue(_barrier, [], [], []).wait()

    def subgroup(self, ranks: Sequence[int], name: str, deadline_s: float | None = None) -> VirtualCollectives:
        """The unit's deadline holds for all groups, as its clock does."""
        assert deadline_s in (None, self._unit._deadline_s), "virtual groups share the unit's deadline"
        group = self._unit._group(name, tuple(ranks))
        return VirtualCollectives(self._unit, group, self.ranks[self.rank])

    def close(self) -> None:
        """The unit owns what there is."""

    def _issue(
        self,
        operation: _Operation,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        counts: Sequence[int],
        recv_counts: Sequence[int] = (),
    ) -> Handle:
        arguments = _Arguments(
            operation=operation, outs=outs, tensors=tensors, counts=list(counts), recv_counts=list(recv_counts)
        )
        number, rank = self._num_issued, self.ranks[self.rank]
        self._num_issued += 1
        return _Handle(self._unit, rank, self._unit._arrive(rank, self._group, number, arguments))


class VirtualBell:
    """One rank's end of the unit's bell (`serving.parallel.bell.Bell`); who waits gives up the turn."""

    def __init__(self, world: VirtualCollectives) -> None:
        self._unit = world._unit
        self._rank = world.ranks[world.rank]

    def ring(self, number: int) -> None:
        self._unit._ring(number)

    def wait(self, number: int, timeout_s: float | None) -> bool:
        """There is no clock to wait by: `timeout_s` is 0 or None."""
        assert not timeout_s, "a virtual rank waits until somebody rings, or not at all"
        if timeout_s is None:
            self._unit._sleep(self._rank, number)
        return self._unit._rung >= number

    def tell(self, rung: Callable[[], None]) -> None:
        """Who waits, waits for the bell alone."""

    def close(self) -> None:
        """The unit owns what there is."""


@dataclass(frozen=True)
class _Handle:
    unit: VirtualUnit
    rank: int
    call: _Call

    def wait(self) -> None:
        self.unit._wait(self.rank, self.call)


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """What one rank brings. `counts`: rows of each rank, or for each rank; a broadcast's source."""

    operation: _Operation
    outs: Sequence[Tensor]
    tensors: Sequence[Tensor]
    counts: list[int]
    recv_counts: list[int]


@dataclass(kw_only=True)
class _Group:
    """`on_link`: [link, source, target], 1 where that pair is joined by that link."""

    name: str
    ranks: tuple[int, ...]
    on_link: Tensor
    calls: dict[int, _Call] = field(default_factory=dict)
    broken: RanksMissing | None = None


@dataclass(kw_only=True)
class _Call:
    """One collective of a group: who has come with what, by index in the group, and when, by rank."""

    group: _Group
    arguments: dict[int, _Arguments] = field(default_factory=dict)
    arrived_s: dict[int, float] = field(default_factory=dict)
    is_done: bool = False


_Operation = Callable[[list[_Arguments]], Sent]
"""Over all ranks' arguments at once; returns what each rank sent to each."""


def _all_gather(all_ranks: list[_Arguments]) -> Sent:
    whole = torch.cat([row_bytes(arguments.tensors[0]) for arguments in all_ranks])
    torch._foreach_copy_([row_bytes(arguments.outs[0]) for arguments in all_ranks], [whole] * len(all_ranks))
    return Sent.of(_counts(all_ranks)[:, None].expand(-1, len(all_ranks)), all_ranks[0].tensors)


def _reduce_scatter(all_ranks: list[_Arguments]) -> Sent:
    total = all_ranks[0].tensors[0].clone()
    for arguments in all_ranks[1:]:
        total.add_(arguments.tensors[0])
    torch._foreach_copy_([arguments.outs[0] for arguments in all_ranks], total.split(all_ranks[0].counts))
    return Sent.of(_counts(all_ranks)[None, :].expand(len(all_ranks), -1), [total])


def _all_to_all(all_ranks: list[_Arguments]) -> Sent:
    """The rows of all ranks in a row, by source and then by target, taken by target and then by source."""
    counts = torch.from_numpy(np.array([arguments.counts for arguments in all_ranks]))
    expected = torch.from_numpy(np.array([arguments.recv_counts for arguments in all_ranks])).T
    assert torch.equal(counts, expected), (
        f"sent and expected rows differ at (source, target) {(counts != expected).nonzero().tolist()}"
    )
    lengths = counts.T.flatten()
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).T.flatten()
    ends = lengths.cumsum(0)
    order = torch.arange(int(ends[-1])) + (starts - ends + lengths).repeat_interleave(lengths)
    received = counts.sum(0).tolist()
    whole = []
    for payload in range(len(all_ranks[0].tensors)):
        whole.append(torch.cat([arguments.tensors[payload][: sum(arguments.counts)] for arguments in all_ranks]))
        parts = row_bytes(whole[-1])[order.to(whole[-1].device)].split(received)
        outs = [row_bytes(arguments.outs[payload][:rows]) for arguments, rows in zip(all_ranks, received, strict=True)]
        torch._foreach_copy_(outs, parts)
    return Sent.of(counts, whole, padding_ST=zero_rows(whole, counts))


def _broadcast(all_ranks: list[_Arguments]) -> Sent:
    (src,) = {arguments.counts[0] for arguments in all_ranks}
    tensor = all_ranks[src].outs[0]
    for arguments in all_ranks:
        if arguments is not all_ranks[src]:
            arguments.outs[0].copy_(tensor)
    rows_ST = torch.zeros((len(all_ranks), len(all_ranks)), dtype=torch.int64)
    rows_ST[src] = 1
    return Sent.of(rows_ST, [tensor[None]])


def _barrier(all_ranks: list[_Arguments]) -> Sent:
    return Sent.of(torch.zeros((len(all_ranks), len(all_ranks)), dtype=torch.int64), [])


def _counts(all_ranks: list[_Arguments]) -> Tensor:
    assert all(arguments.counts == all_ranks[0].counts for arguments in all_ranks), "the ranks' counts differ"
    return torch.tensor(all_ranks[0].counts)
