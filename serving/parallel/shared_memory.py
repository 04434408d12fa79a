"""Collectives between processes of one CPU host, through a file of shared memory.

Ranks join by a name that is new at every start: each opens and maps the file, marks itself present, and when all are there
the name is removed, so that nothing is left when they end, however they end.

    lane 0   a ring of _DEPTH slots, one a call: each rank posts its bytes in its part of the slot and every rank fetches
             what is for it
    lane 1   what does not fit in a part of lane 0 follows here in rounds, while the call is waited for

A rank counts, per lane, the slots that it has posted and fetched. Slot n is fetched once all have posted it, and n's memory is
posted to again once all have fetched n - _DEPTH. Issuing posts and returns; fetching is done in `wait`, in the order of issue.
A wait yields its core for a moment and then sleeps until the counter that it waits for is changed (futex), so that ranks may share
cores; it says so, since a call of the kernel that would wake nobody costs as much as the rest of a barrier. Each rank holds a lock on a byte of the file, which the kernel
releases with the process: a dead rank is known at once.

Ranks that share cores come here with cold caches, where every operation on a tensor or an array costs several times what it does
otherwise. So bytes are copied from address to address.

Data is written before its counter and read after it; nothing but the processor's order of stores (x86) stands between them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from serving.core.errors import StartupError
from serving.parallel.collectives import Handle, RanksMissing, check_payloads, check_rows, even

_FOLDER = Path("/dev/shm")
_DEPTH = 4
_LANES = 2
_WORDS = 4
_POSTED, _FETCHED, _PRESENT, _MISSING = range(_WORDS)
"""Words that a rank has in each lane; the last two in lane 0 alone. _MISSING[i] != 0: rank i was given up. Behind those of all
lanes, for each rank: who sleeps until a word of it changes."""
_PROGRESS = _PRESENT
"""In lane 1: how far the rank is with what it does between its calls."""
_YIELD_S = 2e-4
"""How long a wait only yields its core, before it sleeps: to the very rank that it waits for, where ranks share cores, and without the
kernel calls of sleeping and waking. No longer, for whoever else wants the core has it for a millisecond at a time."""
_PROBE_S = 2e-3
"""How long a wait sleeps before it looks for dead processes."""
_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1
_EVERYBODY = 2**31 - 1


class _Piece(NamedTuple):
    """`num_bytes` from `start` of what a rank posts that belong at the address `into`; with `add`, added to these values there."""

    start: int
    into: int
    num_bytes: int
    add: Tensor | None = None


class _Post(NamedTuple):
    """The first bytes of a tensor."""

    tensor: Tensor
    num_bytes: int


Pieces = list[list[_Piece]]
"""By the rank that posts them."""


@dataclass(kw_only=True, slots=True)
class _Call:
    """One collective. `most_bytes`: what the rank that posts most does; None: each posts a table that begins with its number of
    bytes. `pieces`: asked once, when all have posted; it is given everybody's table."""

    number: int
    posts: Sequence[_Post]
    most_bytes: int | None
    pieces: Callable[[list[list[int]]], Pieces]


class SharedMemoryCollectives:
    """Joins the group `name` of `ranks` as its member number `rank`, the only one of this process; returns or raises within
    the deadline.

    `name` is new at every start; `part_bytes` is what a rank posts at once, a multiple of 64: calls of more take rounds."""

    def __init__(
        self, *, name: str, ranks: Sequence[int], rank: int, deadline_s: float, part_bytes: int = 1 << 20
    ) -> None:
        if platform.machine() not in ("x86_64", "AMD64") or not _FOLDER.is_dir():
            raise StartupError("collectives over shared memory need Linux on x86-64; use gloo on this machine")
        assert part_bytes % 64 == 0, "values of a part lie aligned"
        self.rank = rank
        self.ranks = tuple(ranks)
        self.world_size = len(self.ranks)
        self._name = name
        self._deadline_s = deadline_s
        self._part_bytes = part_bytes
        # Number of bytes, then the first row for each rank and the end.
        self._table_words = -(-(self.world_size + 2) // 8) * 8
        self._order = threading.Lock()
        self._open_calls: deque[_Call] = deque()
        self._num_issued = self._num_rounds = 0
        self._attach(_FOLDER / f"baton-{name}-{self.ranks[0]}-{self.ranks[-1]}-{self.world_size}")

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        sizes = list(counts) if counts else even(out.size(0), self.world_size)
        check_rows(out, tensor, sizes, self.rank)
        width = _width(out)
        starts = _starts(sizes, width)

        def pieces(_: list[list[int]]) -> Pieces:
            address = out.data_ptr()
            return [[_Piece(0, address + start, size * width)] for start, size in zip(starts, sizes, strict=False)]

        return self._issue([_Post(tensor, sizes[self.rank] * width)], max(sizes) * width, pieces)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        sizes = list(counts) if counts else even(tensor.size(0), self.world_size)
        check_rows(tensor, out, sizes, self.rank)
        starts = _starts(sizes, _width(out))
        start, size, into = starts[self.rank], starts[self.rank + 1] - starts[self.rank], out.detach().view(-1)

        def pieces(_: list[list[int]]) -> Pieces:
            others = [[_Piece(start, 0, size, into)] for _ in range(self.world_size - 1)]
            return [[_Piece(start, into.data_ptr(), size)], *others]

        return self._issue([_Post(tensor, starts[-1])], starts[-1], pieces)

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        check_payloads(outs, tensors, recv_counts, send_counts, self.world_size)
        starts = _starts(recv_counts, 1)
        return self._issue(
            _posts(tensors, sum(send_counts)),
            None,
            lambda tables: self._rows_from(tables, outs, starts),
            table=_starts(send_counts, 1),
        )

    def exchange(self, tensors: Sequence[Tensor], send_counts: Sequence[int]) -> _Incoming:
        """`all_to_all` whose receivers learn from what comes how many rows they get."""
        incoming = _Incoming(self, self._num_issued)

        def pieces(tables: list[list[int]]) -> Pieces:
            incoming.received = [starts[self.rank + 1] - starts[self.rank] for starts in tables]
            starts = _starts(incoming.received, 1)
            incoming.outs = [tensor.new_empty(starts[-1], *tensor.shape[1:]) for tensor in tensors]
            return self._rows_from(tables, incoming.outs, starts)

        self._issue(_posts(tensors, sum(send_counts)), None, pieces, table=_starts(send_counts, 1))
        return incoming

    def _rows_from(self, tables: list[list[int]], outs: Sequence[Tensor], recv_starts: list[int]) -> Pieces:
        """This rank's rows of each payload. `tables`: where those for each rank begin in what a source posted; `recv_starts`: where
        those from each source belong in `outs`."""
        rank, into = self.rank, [(out.data_ptr(), _width(out)) for out in outs]
        of_sources: Pieces = []
        for source, starts in enumerate(tables):
            first, num_rows, begin = starts[rank], starts[rank + 1] - starts[rank], recv_starts[source]
            expected = recv_starts[source + 1] - begin
            assert num_rows == expected, f"rank {source} sends {num_rows} rows, {expected} are expected"
            pieces, base = [], 0
            for address, width in into:
                pieces.append(_Piece(base + first * width, address + begin * width, num_rows * width))
                base += starts[-1] * width
            of_sources.append(pieces)
        return of_sources

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        assert tensor.is_contiguous()
        size = tensor.numel() * tensor.element_size()

        def pieces(_: list[list[int]]) -> Pieces:
            into = [_Piece(0, tensor.data_ptr(), size)] if self.rank != src else []
            return [into if source == src else [] for source in range(self.world_size)]

        return self._issue([_Post(tensor, size)] if self.rank == src else [], size, pieces)

    def barrier(self) -> None:
        self._issue([], 0, lambda _: []).wait()

    def advance(self) -> None:
        self._words[self._word(1, _PROGRESS) + self.rank] += 1

    def reach(self, far: int) -> None:
        self._words[self._word(1, _PROGRESS) + self.rank] = far

    def check(self) -> None:
        dead = self._given_up() or [index for index in range(self.world_size) if self._is_dead(index)]
        if dead:
            self._fail(dead)

    def give_up(self, ranks: Sequence[int] = ()) -> NoReturn:
        among = [self.ranks.index(rank) for rank in ranks] or range(self.world_size)
        others = [index for index in among if index != self.rank]
        self._fail(self._given_up() or self._least_far(among) or others)

    def subgroup(self, ranks: Sequence[int], name: str, deadline_s: float | None = None) -> SharedMemoryCollectives:
        return SharedMemoryCollectives(
            name=f"{self._name}-{name}",
            ranks=ranks,
            rank=tuple(ranks).index(self.ranks[self.rank]),
            deadline_s=deadline_s or self._deadline_s,
            part_bytes=self._part_bytes,
        )

    def close(self) -> None:
        """The memory goes with the last rank's last reference to it."""
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _attach(self, path: Path) -> None:
        num_words = self.world_size * (_LANES * _WORDS + self.world_size)
        control_bytes = -(-8 * num_words // 4096) * 4096
        table_bytes = 8 * self._table_words
        self._slot_bytes = table_bytes + self._part_bytes
        slots_bytes = (_DEPTH + 1) * self.world_size * self._slot_bytes
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(self._file, 0, control_bytes + slots_bytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            needed = (control_bytes + slots_bytes) >> 20
            raise StartupError(f"no room for {needed} MiB in {_FOLDER} ({error}); enlarge it, or use gloo") from error
        memory = mmap.mmap(self._file, control_bytes + slots_bytes)
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self.rank)
        self._words = memoryview(memory).cast("B").cast("q")
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._address = whole.data_ptr()
        # The ring of lane 0, then the one slot of lane 1; of each rank its table and then its part.
        self._first_table = control_bytes // 8
        slots = whole[control_bytes:].view(_DEPTH + 1, self.world_size, self._slot_bytes)
        self._parts = [[part[table_bytes:] for part in slot] for slot in slots]
        self._addresses = [[part.data_ptr() for part in slot] for slot in self._parts]
        given_up = self._word(0, _MISSING)
        self._given_up_words = self._words[given_up : given_up + self.world_size]
        self._sleepers = self.world_size * _LANES * _WORDS
        mine = self._sleepers + self.rank * self.world_size
        self._sleepers_on_mine = self._words[mine : mine + self.world_size]
        try:
            self._set(0, _PRESENT, 1)
            self._until(0, _PRESENT, 1)
        finally:
            path.unlink(missing_ok=True)

    def _issue(
        self,
        posts: Sequence[_Post],
        most_bytes: int | None,
        pieces: Callable[[list[list[int]]], Pieces],
        *,
        table: list[int] | None = None,
    ) -> Handle:
        """`table`: numbers that the others need to find their pieces."""
        if any(self._given_up_words):
            self._fail(self._given_up())
        number = self._num_issued
        if number >= _DEPTH:
            self._complete(number - _DEPTH)
            self._until(0, _FETCHED, number - _DEPTH + 1)
        self._num_issued += 1
        self._open_calls.append(_Call(number=number, posts=posts, most_bytes=most_bytes, pieces=pieces))
        slot = number % _DEPTH
        if table is not None:
            words = [sum(post.num_bytes for post in posts), *table]
            first = self._table(slot, self.rank)
            self._words[first : first + len(words)] = array("q", words)
        self._post(posts, slot, 0)
        self._set(0, _POSTED, number + 1)
        return _Handle(self, number)

    def _complete(self, number: int) -> None:
        """Fetch every call up to `number` that is still open."""
        while self._open_calls and self._open_calls[0].number <= number:
            call = self._open_calls[0]
            self._until(0, _POSTED, call.number + 1)
            slot, tables, most_bytes = call.number % _DEPTH, [], call.most_bytes
            if most_bytes is None:
                places = [self._table(slot, source) for source in range(self.world_size)]
                most_bytes = max(self._words[place] for place in places)
                tables = [self._words[place + 1 : place + self.world_size + 2].tolist() for place in places]
            pieces = call.pieces(tables)
            self._fetch(pieces, slot, 0)
            self._set(0, _FETCHED, call.number + 1)
            for start in range(self._part_bytes, most_bytes, self._part_bytes):
                self._round(call, pieces, start)
            self._open_calls.popleft()

    def _round(self, call: _Call, pieces: Pieces, start: int) -> None:
        """The bytes from `start` of all ranks, through lane 1."""
        self._until(1, _FETCHED, self._num_rounds)
        self._num_rounds += 1
        self._post(call.posts, _DEPTH, start)
        self._set(1, _POSTED, self._num_rounds)
        self._until(1, _POSTED, self._num_rounds)
        self._fetch(pieces, _DEPTH, start)
        self._set(1, _FETCHED, self._num_rounds)

    def _post(self, posts: Sequence[_Post], slot: int, start: int) -> None:
        part, base = self._addresses[slot][self.rank], 0
        for tensor, num_bytes in posts:
            low, high = max(base, start), min(base + num_bytes, start + self._part_bytes)
            if low < high:
                ctypes.memmove(part + low - start, tensor.data_ptr() + low - base, high - low)
            base += num_bytes

    def _fetch(self, pieces: Pieces, slot: int, start: int) -> None:
        for source, of_source in enumerate(pieces):
            part = self._addresses[slot][source]
            for begin, into, num_bytes, add in of_source:
                low, high = max(begin, start), min(begin + num_bytes, start + self._part_bytes)
                if low >= high:
                    continue
                if add is None:
                    ctypes.memmove(into + low - begin, part + low - start, high - low)
                else:
                    what = self._parts[slot][source][low - start : high - start].view(add.dtype)
                    if high - low < num_bytes:
                        width = add.element_size()
                        add = add[(low - begin) // width : (high - begin) // width]
                    add.add_(what)

    def _until(self, lane: int, word: int, count: int) -> None:
        """Returns when every rank's `word` has come to `count`. Raises RanksMissing."""
        first = self._word(lane, word)
        words = self._words[first : first + self.world_size]
        if min(words) >= count:
            return
        begin_s = time.monotonic()
        while time.monotonic() - begin_s < _YIELD_S:
            os.sched_yield()
            if min(words) >= count:
                return
        while late := [(index, value) for index, value in enumerate(words) if value < count]:
            waited_s = time.monotonic() - begin_s
            given_up = self._given_up()
            if not given_up and waited_s > _PROBE_S:
                given_up = [index for index, _ in late if self._is_dead(index)]
            if given_up:
                self._fail(given_up)
            if waited_s > self._deadline_s:
                behind = [index for index, _ in late]
                self._fail(self._least_far(behind) or behind)
            index, value = late[0]
            asleep = self._sleepers + index * self.world_size + self.rank
            self._words[asleep] = 1
            _sleep_while(self._address + 8 * (first + index), value)
            self._words[asleep] = 0

    def _least_far(self, indices: Iterable[int]) -> list[int]:
        """Those that are behind the others of `indices`, which wait for them; none, if all are equally far."""
        first = self._word(1, _PROGRESS)
        progress = {index: self._words[first + index] for index in indices}
        least = min(progress.values())
        return [index for index, far in progress.items() if far == least] if max(progress.values()) > least else []

    def _given_up(self) -> list[int]:
        return [index for index, word in enumerate(self._given_up_words) if word]

    def _is_dead(self, index: int) -> bool:
        """A present rank's lock is free. Two that ask at once see each other's lock, and ask again."""
        if not self._words[self._word(0, _PRESENT) + index] or index == self.rank:
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, index)
        return True

    def _fail(self, missing: list[int]) -> NoReturn:
        for index in missing:
            self._given_up_words[index] = 1
        ranks = [self.ranks[index] for index in missing]
        raise RanksMissing(ranks, group=self._name, reason=f"deadline {self._deadline_s:g} s, or its process ended")

    def _set(self, lane: int, word: int, value: int) -> None:
        place = self._word(lane, word) + self.rank
        self._words[place] = value
        # The processor may read who sleeps before others see the value; the lock's atomic operation keeps it from that.
        with self._order:
            pass
        if any(self._sleepers_on_mine):
            _wake(self._address + 8 * place)

    def _word(self, lane: int, word: int) -> int:
        return (lane * _WORDS + word) * self.world_size

    def _table(self, slot: int, rank: int) -> int:
        return self._first_table + (slot * self.world_size + rank) * (self._slot_bytes // 8)


class _Handle:
    __slots__ = ("_group", "_number")

    def __init__(self, group: SharedMemoryCollectives, number: int) -> None:
        self._group = group
        self._number = number

    def wait(self) -> None:
        self._group._complete(self._number)


class _Incoming:
    """What an exchange brings. After `wait`: `outs`, of the kinds that were sent, and the rows `received` from each rank."""

    def __init__(self, group: SharedMemoryCollectives, number: int) -> None:
        self._group = group
        self._number = number
        self.outs: list[Tensor] = []
        self.received: list[int] = []

    def wait(self) -> None:
        self._group._complete(self._number)


class _Time(ctypes.Structure):
    """The kernel's timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_system_call = ctypes.CDLL(None).syscall
_system_call.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p]


_probe = _Time(0, int(_PROBE_S * 1e9))


def _sleep_while(address: int, value: int) -> None:
    """While the word there is `value`, whose lower half is what the kernel compares; may return early."""
    _system_call(_FUTEX, address, _FUTEX_WAIT, value & 0xFFFFFFFF, ctypes.addressof(_probe))


def _wake(address: int) -> None:
    """Whoever sleeps on the word there."""
    _system_call(_FUTEX, address, _FUTEX_WAKE, _EVERYBODY, None)


def _posts(tensors: Sequence[Tensor], num_rows: int) -> list[_Post]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [_Post(tensor, num_rows * _width(tensor)) for tensor in tensors]


def _width(tensor: Tensor) -> int:
    """Bytes of a row."""
    return tensor.shape[1:].numel() * tensor.element_size()


def _starts(counts: Sequence[int], width: int) -> list[int]:
    """Where each rank's bytes begin, and where the last one's end."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count * width)
    return starts
