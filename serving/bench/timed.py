"""What collectives cost a rank: the time in which it issues calls and waits for them, whoever carries them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from serving.parallel.collectives import Collectives, Handle, Incoming
from serving.parallel.shared_memory import SharedMemoryCollectives


class Timed:
    """A group whose calls and waits are added up in `seconds[rank of the unit]`."""

    def __init__(self, group: Collectives, seconds: Any, rank: int) -> None:
        self.rank, self.ranks, self.world_size = group.rank, group.ranks, group.world_size
        self._group, self._seconds, self._of_unit = group, seconds, rank

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        return self._timed(time.perf_counter(), self._group.all_gather(out, tensor, counts))

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        return self._timed(time.perf_counter(), self._group.reduce_scatter(out, tensor, counts))

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        return self._timed(time.perf_counter(), self._group.all_to_all(outs, tensors, recv_counts, send_counts))

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        return self._timed(time.perf_counter(), self._group.broadcast(tensor, src))

    def barrier(self) -> None:
        begin = time.perf_counter()
        self._group.barrier()
        self.add(begin)

    def subgroup(self, ranks: Sequence[int], name: str, deadline_s: float | None = None) -> Collectives:
        return Timed(self._group.subgroup(ranks, name, deadline_s), self._seconds, self._of_unit)

    def close(self) -> None:
        self._group.close()

    def add(self, begin: float) -> None:
        """What has passed since."""
        self._seconds[self._of_unit] += time.perf_counter() - begin

    def _timed(self, begin: float, handle: Handle) -> Handle:
        """`begin`: before it was issued."""
        self.add(begin)
        return _TimedHandle(handle, self)


class TimedExchanges(Timed):
    """The same of a group that exchanges rows without counts."""

    def __init__(self, group: SharedMemoryCollectives, seconds: Any, rank: int) -> None:
        super().__init__(group, seconds, rank)
        self._exchanges = group

    def exchange(self, tensors: Sequence[Tensor], send_counts: Sequence[int]) -> Incoming:
        begin = time.perf_counter()
        incoming = self._exchanges.exchange(tensors, send_counts)
        self.add(begin)
        return _TimedIncoming(incoming, self)


class _TimedIncoming:
    def __init__(self, incoming: Incoming, group: Timed) -> None:
        self._incoming, self._group = incoming, group
        self.outs: list[Tensor] = []
        self.received: list[int] = []

    def wait(self) -> None:
        begin = time.perf_counter()
        self._incoming.wait()
        self._group.add(begin)
        self.outs, self.received = self._incoming.outs, self._incoming.received


@dataclass(frozen=True)
class _TimedHandle:
    handle: Handle
    group: Timed

    def wait(self) -> None:
        begin = time.perf_counter()
        self.handle.wait()
        self.group.add(begin)
