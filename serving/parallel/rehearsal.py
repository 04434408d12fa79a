"""One rank of a unit without the others: each of them is taken to do what this one does, so what they would send is here already.

    all_gather       this rank's rows, once for each rank
    reduce_scatter   the sum of as many parts of this rank's rows as there are ranks
    all_to_all       from each rank, what this one has for itself; where other counts are expected, those rows taken round

So shapes, counts and bytes of a step are those of the whole unit, in any layout, and rows that arrive name slots that are here. What is
computed is no answer to anything: it is for measuring one rank of a unit that is not at hand.

On a GPU a collective is local copies on a stream of the group's own, as a transport's would be; what waits for it is the stream that
computes. No step of several ranks that disagree can be had: counts follow from this rank alone.

Legend: W ranks of the group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from serving.kernels.part_sums import sum_parts
from serving.parallel.collectives import Done, Handle, check_payloads, check_rows, even, row_bytes

# A copy of so many bytes is quickest alone; of fewer, those for several ranks share a launch.
_LARGE_BYTES = 16 << 20


class Rehearsal:
    """This rank's end of a group. `arrived_bytes`: by group and operation, its own share among them; one for a rank's groups together."""

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        *,
        name: str = "world",
        arrived_bytes: Counter[tuple[str, str]] | None = None,
    ) -> None:
        """`rank`: this one's index in `ranks`."""
        self.ranks = tuple(ranks)
        self.rank = rank
        self.world_size = len(self.ranks)
        self.arrived_bytes: Counter[tuple[str, str]] = Counter() if arrived_bytes is None else arrived_bytes
        self._name = name
        self._stream: torch.cuda.Stream | None = None

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        sizes = list(counts) if counts else even(len(out), self.world_size)
        check_rows(out, tensor, sizes, self.rank)
        return self._issue("all_gather", [out], [tensor], lambda: _spread(out, tensor, sizes))

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        check_rows(tensor, out, list(counts) if counts else even(len(tensor), self.world_size), self.rank)
        return self._issue("reduce_scatter", [tensor], [out], lambda: sum_parts(tensor, self.world_size, out))

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        check_payloads(outs, tensors, recv_counts, send_counts, self.world_size)
        first, received = sum(send_counts[: self.rank]), sum(recv_counts)
        arriving = [out[:received] for out in outs]
        own = [tensor[first : first + send_counts[self.rank]] for tensor in tensors]

        def copy() -> None:
            for out, rows in zip(arriving, own, strict=True):
                _spread(out, rows, recv_counts)

        return self._issue("all_to_all", arriving, own, copy)

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        return self._issue("broadcast", [tensor], [], lambda: None)

    def barrier(self) -> None:
        """The others are where this one is."""

    def subgroup(self, ranks: Sequence[int], name: str, deadline_s: float | None = None) -> Rehearsal:
        """Nobody is late."""
        own = tuple(ranks).index(self.ranks[self.rank])
        return Rehearsal(ranks, own, name=name, arrived_bytes=self.arrived_bytes)

    def close(self) -> None:
        """There is nothing to give back."""

    def _issue(
        self, operation: str, arriving: Sequence[Tensor], others: Sequence[Tensor], copy: Callable[[], None]
    ) -> Handle:
        """`others`: what must not be given back while `copy` runs, beside what arrives."""
        self.arrived_bytes[self._name, operation] += sum(tensor.nbytes for tensor in arriving)
        if not arriving[0].is_cuda:
            copy()
            return Done()
        if self._stream is None:
            self._stream = torch.cuda.Stream(arriving[0].device)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copy()
        return _Copying(self._stream.record_event(), [*arriving, *others])


class _Copying:
    """Keeps memory from being used anew while the copies run."""

    def __init__(self, done: torch.cuda.Event, tensors: Sequence[Tensor]) -> None:
        self._done: torch.cuda.Event | None = done
        self._tensors = list(tensors)

    def wait(self) -> None:
        if self._done is not None:
            self._done.wait()
        self._done, self._tensors = None, []


def _spread(out: Tensor, rows: Tensor, counts: Sequence[int]) -> None:
    """Into each rank's segment of `out`, as many rows as `counts` says: `rows` from the first on, taken round; zeros if there are none."""
    if not out.numel():
        return
    into, source = _words(out), _words(rows)
    if not len(source):
        into.zero_()
    elif source.nbytes >= _LARGE_BYTES and max(counts) <= len(source):
        for segment in into.split(list(counts)):
            segment.copy_(source if len(segment) == len(source) else source[: len(segment)])
    else:
        _spread_small(into, source, counts)


def _spread_small(into: Tensor, source: Tensor, counts: Sequence[int]) -> None:
    """Neighbours of one size together."""
    first = 0
    for size, alike in groupby(counts):
        number = len(list(alike))
        segments = into[first : first + number * size].unflatten(0, (number, size))
        first += number * size
        whole, rest = divmod(size, len(source))
        if whole:
            segments[:, : whole * len(source)].unflatten(1, (whole, len(source))).copy_(source)
        if rest:
            segments[:, -rest:].copy_(source[:rest])


def _words(rows: Tensor) -> Tensor:
    """The same memory in as wide words as its rows allow: what is not contiguous is copied word by word."""
    whole = row_bytes(rows)
    return whole.view(torch.int64) if whole.shape[1] % 8 == 0 and whole.storage_offset() % 8 == 0 else whole
