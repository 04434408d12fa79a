"""Collectives between the ranks of a group: what they do, and how they fail.

Rows are the first dimension of a tensor; rows of one call are alike in width and dtype on every rank, their number may differ
from rank to rank and may be zero. Implementations: `distributed` (gloo, NCCL), `shared_memory` (processes of one CPU host),
`virtual` (all ranks in one process), and `SingleRank` below.

A call issues and returns a Handle. Until its `wait` has returned, `out` must not be read and inputs must not be changed. Handles
may be waited for in any order, but every rank of a group issues the same calls in the same order; groups are independent of one
another. An implementation may hold an issue back until an older call has completed.

Each wait has a deadline. When it expires, or a rank is known to be dead, the ranks that did not come are named (RanksMissing)
and the group is broken: the others of the group, and whoever comes late, get the same error from every later call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from serving.core.errors import BatonError


class RanksMissing(BatonError):
    """Ranks of a group did not come to a collective. `ranks` are ranks of the unit, not indices in the group."""

    def __init__(self, ranks: Sequence[int], group: str, reason: str) -> None:
        self.ranks = tuple(sorted(ranks))
        self.group = group
        self.reason = reason
        named = ", ".join(map(str, self.ranks))
        super().__init__(
            f"group {group}: {'rank' if len(self.ranks) == 1 else 'ranks'} {named} did not come to a collective ({reason}); "
            f"the logs of {named} say why, and the whole unit has to start again"
        )

    def __reduce__(self) -> tuple[type[RanksMissing], tuple[tuple[int, ...], str, str]]:
        """So that it can cross a process: exceptions are otherwise made anew from their text alone."""
        return type(self), (self.ranks, self.group, self.reason)


class Handle(Protocol):
    """One call in flight."""

    def wait(self) -> None:
        """Returns when `out` holds the result; a second wait does nothing. On CUDA it orders the current stream instead
        of stopping the host. Raises RanksMissing."""


class Collectives(Protocol):
    """One rank's end of one group. `rank` and every count and `src` are indices in `ranks`, which are ranks of the unit."""

    @property
    def rank(self) -> int:
        """This rank's index in `ranks`."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The group's members."""

    @property
    def world_size(self) -> int:
        """Members of the group."""

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        """out [sum(counts), ...] = the rows of all ranks in rank order; tensor [counts[rank], ...]. None: as many from each."""

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        """out [counts[rank], ...] = this rank's rows of the sum of all ranks' tensor [sum(counts), ...]. The sum runs over
        the ranks in order, in the tensor's own dtype, wherever it runs on a CPU: its bits do not depend on the implementation."""

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        """Payloads of several dtypes and widths travel together, row i of each belonging to the same token.

        tensors: [at least sum(send_counts), ...] each, rows for rank 0 first; outs: [at least sum(recv_counts), ...] each, rows
        from rank 0 first; rows beyond the counts are neither read nor written, so both may be buffers of a fixed size."""

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        """tensor, of the same shape everywhere, becomes what it is on rank `src`."""

    def barrier(self) -> None:
        """Returns when every rank has come."""

    def subgroup(self, ranks: Sequence[int], name: str, deadline_s: float | None = None) -> Collectives:
        """A group of some of the unit's ranks; called by its members alone, in the same order of names. `name` is new for
        these ranks. `deadline_s` None: this group's. A failure in one group leaves the others as they are."""

    def close(self) -> None:
        """Gives back what the group holds; its handles must have been waited for."""


class Incoming(Handle, Protocol):
    """An exchange in flight. When it has been waited for, `outs` are the rows from all ranks, `received` of them from each."""

    outs: list[Tensor]
    received: list[int]


@runtime_checkable
class Exchanges(Protocol):
    """Collectives that bring rows and their number in one call, where others need a call for the counts before it."""

    def exchange(self, tensors: Sequence[Tensor], send_counts: Sequence[int]) -> Incoming:
        """As `all_to_all`; outs are new, of the kinds of `tensors`."""


@runtime_checkable
class Presence(Protocol):
    """Collectives that know of their members also between calls, while these wait for something else. From any thread."""

    def advance(self) -> None:
        """This rank is one step further with what all of them do in one order, beside this group's calls."""

    def reach(self, far: int) -> None:
        """This rank has come as far as `far`, which means the same on all of them, and counts on from there."""

    def check(self) -> None:
        """Raises RanksMissing if a member's process has ended, or somebody was given up."""

    def give_up(self, ranks: Sequence[int] = ()) -> NoReturn:
        """What this rank waits for does not come, of `ranks` if that is known. Raises RanksMissing, here and from everybody's next
        call: those of them that are behind, for whom the rest may wait; where they are equally far, all of them but this one."""


class Done:
    """The handle of what is complete when it is issued."""

    def wait(self) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True, kw_only=True)
class SingleRank:
    """The group of one rank: every collective is the identity."""

    ranks: tuple[int, ...] = (0,)
    rank: int = field(default=0, init=False)
    world_size: int = field(default=1, init=False)

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        check_rows(out, tensor, counts or (len(tensor),), 0)
        out.copy_(tensor)
        return Done()

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        check_rows(tensor, out, counts or (len(tensor),), 0)
        out.copy_(tensor)
        return Done()

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        check_payloads(outs, tensors, recv_counts, send_counts, 1)
        assert tuple(recv_counts) == tuple(send_counts), f"{recv_counts} rows expected of oneself, {send_counts} sent"
        for out, tensor in zip(outs, tensors, strict=True):
            out[: recv_counts[0]].copy_(tensor[: send_counts[0]])
        return Done()

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        assert src == 0, f"rank {src} of 1"
        return Done()

    def barrier(self) -> None:
        """Everybody is here."""

    def subgroup(self, ranks: Sequence[int], name: str, deadline_s: float | None = None) -> SingleRank:
        assert tuple(ranks) == self.ranks, f"{name}: ranks {ranks} of a unit of one"
        return self

    def close(self) -> None:
        """There is nothing to give back."""


def even(num_rows: int, world_size: int) -> list[int]:
    """`num_rows` in equal parts."""
    assert num_rows % world_size == 0, f"{num_rows} rows in {world_size} parts need counts"
    return [num_rows // world_size] * world_size


def row_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes [rows, bytes a row]; what no transport understands (float8) travels so."""
    width = tensor.shape[1:].numel()
    if not tensor.numel():
        # Strides of an empty tensor may be anything.
        return tensor.new_empty((len(tensor), width * tensor.element_size()), dtype=torch.uint8)
    return tensor.view(len(tensor), width).view(torch.uint8)


def check_rows(whole: Tensor, part: Tensor, counts: Sequence[int], rank: int) -> None:
    """Our own bugs: `whole` holds all ranks' rows, `part` those of `rank`."""
    _check_alike(whole, part)
    rows = whole.size(0), part.size(0)
    assert rows == (sum(counts), counts[rank]), f"{rows} rows for counts {counts}"


def check_payloads(
    outs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    recv_counts: Sequence[int],
    send_counts: Sequence[int],
    world_size: int,
) -> None:
    """Our own bugs: each pair is alike in dtype and width and has the rows that the counts speak of."""
    assert len(recv_counts) == len(send_counts) == world_size, f"{len(recv_counts)}, {len(send_counts)} counts"
    received, sent = sum(recv_counts), sum(send_counts)
    for out, tensor in zip(outs, tensors, strict=True):
        _check_alike(out, tensor)
        assert out.size(0) >= received, f"{received} rows come into {len(out)}"
        assert tensor.size(0) >= sent, f"{sent} rows go out of {len(tensor)}"


def _check_alike(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype, f"rows of {one.dtype} and of {other.dtype}"
    assert one.shape[1:] == other.shape[1:], f"rows of {one.shape[1:]} and of {other.shape[1:]}"
    assert one.is_contiguous(), "rows in order have no gaps"
    assert other.is_contiguous(), "rows in order have no gaps"
