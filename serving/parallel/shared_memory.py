"""Collectives between processes of one CPU host, through a file of shared memory.

Ranks join by a name that is new at every start: each opens and maps the file, marks itself present, and when all are there
the name is removed, so that nothing is left when they end, however they end.

    lane 0   a ring of _DEPTH slots, one a call: each rank posts its bytes in its part of the slot and every rank fetches
             what is for it
    lane 1   what does not fit in a part of lane 0 follows here in rounds, while the call is waited for

A rank counts, per lane, the slots that it has posted and fetched. Slot n is fetched once all have posted it, and n's memory is
posted to again once all have fetched n - _DEPTH. Issuing posts and returns; fetching is done in `wait`, in the order of issue.
A wait sleeps until the counter that it waits for is changed (futex), so that ranks may share cores. Each rank holds a lock on a
byte of the file, which the kernel releases with the process: a dead rank is known at once.

Data is written before its counter and read after it; nothing but the processor's order of stores (x86) stands between them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.core.errors import StartupError
from serving.parallel.collectives import Handle, RanksMissing, check_payloads, check_rows, even, row_bytes

_FOLDER = Path("/dev/shm")
_DEPTH = 4
_LANES = 2
_POSTED, _FETCHED, _PRESENT, _MISSING = range(4)
"""Words that a rank has in each lane; the last two in lane 0 alone. _MISSING[i] != 0: rank i was given up."""
_PROGRESS = _PRESENT
"""In lane 1: how far the rank is with what it does between its calls."""
_PROBE_S = 2e-3
"""How long a wait sleeps before it looks for dead processes."""
_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1
_EVERYBODY = 2**31 - 1

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Bytes from `start` of what a rank posts that belong in `into`; with `add`, summed as values of that dtype."""

    start: int
    into: Bytes
    add: torch.dtype | None = None


@dataclass(kw_only=True)
class _Call:
    """One collective. `table`: numbers that the others need to find their pieces in `posts`, the bytes that this rank posts.
    `begin`: is given everybody's before any piece is asked for."""

    number: int
    posts: list[Bytes]
    table: list[int]
    pieces: Callable[[int, list[int]], Iterable[_Piece]]
    begin: Callable[[list[list[int]]], None]

    @property
    def num_bytes(self) -> int:
        return sum(len(post) for post in self.posts)


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
        # Length, number of bytes, then a call's own table: at most one start for each rank and the end.
        self._table_words = -(-(self.world_size + 3) // 8) * 8
        self._open_calls: deque[_Call] = deque()
        self._num_issued = self._num_rounds = 0
        self._attach(_FOLDER / f"baton-{name}-{self.ranks[0]}-{self.ranks[-1]}-{self.world_size}")

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        sizes = list(counts) if counts else even(len(out), self.world_size)
        check_rows(out, tensor, sizes, self.rank)
        whole, starts = _flat(out), _starts(sizes, _width(out))
        return self._issue(
            [_flat(tensor)], [], lambda source, _: [_Piece(start=0, into=whole[starts[source] : starts[source + 1]])]
        )

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        sizes = list(counts) if counts else even(len(tensor), self.world_size)
        check_rows(tensor, out, sizes, self.rank)
        into, start = _flat(out), _starts(sizes, _width(out))[self.rank]
        return self._issue(
            [_flat(tensor)], [], lambda source, _: [_Piece(start=start, into=into, add=out.dtype if source else None)]
        )

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        check_payloads(outs, tensors, recv_counts, send_counts, self.world_size)
        into = [(_flat(out), _width(out)) for out in outs]
        recv_starts, sent = _starts(recv_counts, 1), sum(send_counts)
        return self._issue(
            [_flat(tensor[:sent]) for tensor in tensors],
            _starts(send_counts, 1),
            lambda source, starts: self._rows_from(source, starts, into, recv_starts),
        )

    def exchange(self, tensors: Sequence[Tensor], send_counts: Sequence[int]) -> _Incoming:
        """`all_to_all` whose receivers learn from what comes how many rows they get."""
        incoming = _Incoming(self, self._num_issued)
        into: list[tuple[Bytes, int]] = []
        recv_starts = [0]

        def begin(tables: list[list[int]]) -> None:
            received = [starts[self.rank + 1] - starts[self.rank] for starts in tables]
            recv_starts[:] = _starts(received, 1)
            outs = [tensor.new_empty(recv_starts[-1], *tensor.shape[1:]) for tensor in tensors]
            into[:] = [(_flat(out), _width(out)) for out in outs]
            incoming.outs, incoming.received = outs, received

        sent = sum(send_counts)
        self._issue(
            [_flat(tensor[:sent]) for tensor in tensors],
            _starts(send_counts, 1),
            lambda source, starts: self._rows_from(source, starts, into, recv_starts),
            begin,
        )
        return incoming

    def _rows_from(
        self, source: int, starts: list[int], into: list[tuple[Bytes, int]], recv_starts: list[int]
    ) -> Iterable[_Piece]:
        """This rank's rows of each payload; `starts`: where those for each rank begin in what `source` posted."""
        first, last, total = starts[self.rank], starts[self.rank + 1], starts[-1]
        begin, end = recv_starts[source], recv_starts[source + 1]
        assert last - first == end - begin, f"rank {source} sends {last - first} rows, {end - begin} are expected"
        base = 0
        for flat, width in into:
            yield _Piece(start=base + first * width, into=flat[begin * width : end * width])
            base += total * width

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        flat = _flat(tensor)
        if self.rank == src:
            return self._issue([flat], [], lambda source, _: [])
        return self._issue([], [], lambda source, _: [_Piece(start=0, into=flat)] if source == src else [])

    def barrier(self) -> None:
        self._issue([], [], lambda source, _: []).wait()

    def advance(self) -> None:
        self._words[self._word(1, _PROGRESS) + self.rank] += 1

    def check(self) -> None:
        dead = self._given_up() or [index for index in range(self.world_size) if self._is_dead(index)]
        if dead:
            self._fail(dead)

    def give_up(self) -> NoReturn:
        others = [index for index in range(self.world_size) if index != self.rank]
        self._fail(self._given_up() or self._least_far(range(self.world_size)) or others)

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
        control_bytes = -(-8 * _LANES * 4 * self.world_size // 4096) * 4096
        table_bytes = 8 * self._table_words
        slots_bytes = (_DEPTH + 1) * self.world_size * (table_bytes + self._part_bytes)
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(self._file, 0, control_bytes + slots_bytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            needed = (control_bytes + slots_bytes) >> 20
            raise StartupError(f"no room for {needed} MiB in {_FOLDER} ({error}); enlarge it, or use gloo") from error
        memory = mmap.mmap(self._file, control_bytes + slots_bytes)
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self.rank)
        self._words = memoryview(memory)[:control_bytes].cast("q")
        self._address = np.frombuffer(memory, np.uint8, 1).ctypes.data
        # [slot, rank, bytes]: the ring of lane 0, then the one slot of lane 1.
        slots = np.frombuffer(memory, np.uint8, slots_bytes, control_bytes)
        self._slots = slots.reshape(_DEPTH + 1, self.world_size, table_bytes + self._part_bytes)
        try:
            self._set(0, _PRESENT, 1)
            self._until(0, _PRESENT, 1)
        finally:
            path.unlink(missing_ok=True)

    def _issue(
        self,
        posts: list[Bytes],
        table: list[int],
        pieces: Callable[[int, list[int]], Iterable[_Piece]],
        begin: Callable[[list[list[int]]], None] = lambda _: None,
    ) -> Handle:
        if given_up := self._given_up():
            self._fail(given_up)
        call = _Call(number=self._num_issued, posts=posts, table=table, pieces=pieces, begin=begin)
        if call.number >= _DEPTH:
            self._complete(call.number - _DEPTH)
            self._until(0, _FETCHED, call.number - _DEPTH + 1)
        self._num_issued += 1
        self._open_calls.append(call)
        part = self._slots[call.number % _DEPTH, self.rank]
        words = part[: 8 * self._table_words].view(np.int64)
        words[: 2 + len(table)] = [len(table), call.num_bytes, *table]
        self._post(call, part, 0)
        self._set(0, _POSTED, call.number + 1)
        return _Handle(self, call.number)

    def _complete(self, number: int) -> None:
        """Fetch every call up to `number` that is still open."""
        while self._open_calls and self._open_calls[0].number <= number:
            call = self._open_calls[0]
            self._until(0, _POSTED, call.number + 1)
            parts = self._slots[call.number % _DEPTH]
            tables = [part[: 8 * self._table_words].view(np.int64).tolist() for part in parts]
            of_ranks = [table[2 : 2 + table[0]] for table in tables]
            call.begin(of_ranks)
            pieces = [list(call.pieces(source, of_rank)) for source, of_rank in enumerate(of_ranks)]
            self._fetch(pieces, parts, 0)
            self._set(0, _FETCHED, call.number + 1)
            for start in range(self._part_bytes, max(table[1] for table in tables), self._part_bytes):
                self._round(call, pieces, start)
            self._open_calls.popleft()

    def _round(self, call: _Call, pieces: list[list[_Piece]], start: int) -> None:
        """The bytes from `start` of all ranks, through lane 1."""
        self._until(1, _FETCHED, self._num_rounds)
        self._num_rounds += 1
        self._post(call, self._slots[_DEPTH, self.rank], start)
        self._set(1, _POSTED, self._num_rounds)
        self._until(1, _POSTED, self._num_rounds)
        self._fetch(pieces, self._slots[_DEPTH], start)
        self._set(1, _FETCHED, self._num_rounds)

    def _post(self, call: _Call, part: Bytes, start: int) -> None:
        data, base = part[8 * self._table_words :], 0
        for post in call.posts:
            low, high = max(base, start), min(base + len(post), start + self._part_bytes)
            if low < high:
                data[low - start : high - start] = post[low - base : high - base]
            base += len(post)

    def _fetch(self, pieces: list[list[_Piece]], parts: Bytes, start: int) -> None:
        for part, of_source in zip(parts, pieces, strict=True):
            data = part[8 * self._table_words :]
            for piece in of_source:
                low, high = max(piece.start, start), min(piece.start + len(piece.into), start + self._part_bytes)
                if low >= high:
                    continue
                into, what = piece.into[low - piece.start : high - piece.start], data[low - start : high - start]
                if piece.add is None:
                    into[:] = what
                else:
                    torch.from_numpy(into).view(piece.add).add_(torch.from_numpy(what).view(piece.add))

    def _until(self, lane: int, word: int, count: int) -> None:
        """Returns when every rank's `word` has come to `count`. Raises RanksMissing."""
        first = self._word(lane, word)
        words = self._words[first : first + self.world_size]
        begin_s = time.monotonic()
        while min(words) < count:
            waited_s = time.monotonic() - begin_s
            given_up = self._given_up()
            late = [(index, value) for index, value in enumerate(words) if value < count]
            if not given_up and waited_s > _PROBE_S:
                given_up = [index for index, _ in late if self._is_dead(index)]
            if given_up:
                self._fail(given_up)
            if waited_s > self._deadline_s and late:
                behind = [index for index, _ in late]
                self._fail(self._least_far(behind) or behind)
            if late:
                index, value = late[0]
                _sleep_while(self._address + 8 * (first + index), value, _PROBE_S)

    def _least_far(self, indices: Iterable[int]) -> list[int]:
        """Those that are behind the others of `indices`, which wait for them; none, if all are equally far."""
        first = self._word(1, _PROGRESS)
        progress = {index: self._words[first + index] for index in indices}
        least = min(progress.values())
        return [index for index, far in progress.items() if far == least] if max(progress.values()) > least else []

    def _given_up(self) -> list[int]:
        first = self._word(0, _MISSING)
        words = self._words[first : first + self.world_size]
        return [index for index, word in enumerate(words) if word] if any(words) else []

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
            self._words[self._word(0, _MISSING) + index] = 1
        ranks = [self.ranks[index] for index in missing]
        raise RanksMissing(ranks, group=self._name, reason=f"deadline {self._deadline_s:g} s, or its process ended")

    def _set(self, lane: int, word: int, value: int) -> None:
        place = self._word(lane, word) + self.rank
        self._words[place] = value
        _wake(self._address + 8 * place)

    def _word(self, lane: int, word: int) -> int:
        return (lane * 4 + word) * self.world_size


@dataclass(frozen=True)
class _Handle:
    group: SharedMemoryCollectives
    number: int

    def wait(self) -> None:
        self.group._complete(self.number)


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


def _sleep_while(address: int, value: int, most_s: float) -> None:
    """While the word there is `value`, whose lower half is what the kernel compares; may return early."""
    most = _Time(0, int(most_s * 1e9))
    _system_call(_FUTEX, address, _FUTEX_WAIT, value & 0xFFFFFFFF, ctypes.addressof(most))


def _wake(address: int) -> None:
    """Whoever sleeps on the word there."""
    _system_call(_FUTEX, address, _FUTEX_WAKE, _EVERYBODY, None)


def _flat(tensor: Tensor) -> Bytes:
    """The tensor's own memory."""
    flat: Bytes = row_bytes(tensor.detach()).view(-1).numpy()
    return flat


def _width(tensor: Tensor) -> int:
    """Bytes of a row."""
    return tensor.shape[1:].numel() * tensor.element_size()


def _starts(counts: Sequence[int], width: int) -> list[int]:
    """Where each rank's bytes begin, and where the last one's end."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count * width)
    return starts
