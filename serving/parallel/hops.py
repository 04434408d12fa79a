"""Rows to some of a group's members and back: one exchange of a dispatch, and what its rows are made of.

    rows [T] -> a copy for each member that wants it [N], by member -> arrived [R], by source
    sums [T] <- added in the members' order [N]                     <- results [R]

A copy is a payload (plain, or FP8 values and scales) and its routing: int32 [2K], slots + 1 (0: none), then the weights' bits.
So payloads alone are floating point, and a row that nobody uses is all zeros.

Legend: T rows here, W members, N copies sent, R rows arrived, K picks, M = 2K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.dispatch_rows import copies_for, routing_here, spread, total
from serving.parallel.collectives import Collectives, Exchanges, Handle, Incoming, row_bytes


class ScaledRows(Protocol):
    """A dataclass of FP8 rows: values [T, D] and scales [T, B] with strides (1, T rounded up to a multiple of 4); on a GPU rows that
    have arrived have their scales as they came, row by row, which the experts take as well."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def values(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...


X = TypeVar("X", bound=Tensor | ScaledRows)


def payloads_of(x: Tensor | ScaledRows) -> list[Tensor]:
    """What travels of rows [T, ...]."""
    return [x] if isinstance(x, Tensor) else [x.values, x.scales]


def rows_like(x: X, payloads: Sequence[Tensor]) -> X:
    """Rows of x's kind out of what arrived."""
    if isinstance(x, Tensor):
        return cast(X, payloads[0])
    values, scales_RB = payloads
    if values.is_cuda:
        return cast(X, replace(x, values=values, scales=scales_RB))
    num_rows, num_blocks = scales_RB.shape
    scales = scales_RB.new_empty((num_blocks, -(-num_rows // 4) * 4)).t()[:num_rows].copy_(scales_RB)
    return cast(X, replace(x, values=values, scales=scales))


def routing_of(slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """int32 [T, M] from slots int64, -1: none, and weights fp32."""
    assert weights_TK.dtype == torch.float32, f"weights travel as fp32, not {weights_TK.dtype}"
    return torch.cat([slots_TK.to(torch.int32).add_(1), weights_TK.contiguous().view(torch.int32)], dim=1)


def slots_in(routing_RM: Tensor, first: int, num_slots: int) -> Tensor:
    """int64 [R, K]: slots counted from `first` on; -1 where they are none of the `num_slots` there."""
    return routing_here(routing_RM, first, num_slots)[0]


def members_wanted(targets_TK: Tensor, world_size: int) -> Tensor:
    """bool [T, W]: which of the members each row's picks name; -1 names none."""
    wanted_TW = targets_TK.new_zeros((len(targets_TK), world_size + 1), dtype=torch.bool)
    return wanted_TW.scatter_(1, targets_TK + 1, True)[:, 1:]


class Hop:
    """Row t goes once to each member with wanted_TW[t, member]. Whoever makes it has `sent` and `received`, the rows for and from
    each member, set before anything goes. counts_WC: int64, rows for each member."""

    sent: list[int] | None = None
    received: list[int]

    def __init__(self, group: Collectives, wanted_TW: Tensor) -> None:
        self.group = group
        self.wanted_TW = wanted_TW
        self.counts_WC = wanted_TW.sum(0)[:, None]
        self.rows_N = wanted_TW.t().nonzero()[:, 1].contiguous()

    def load(self, rows: Sequence[Tensor]) -> None:
        """What is to go, each [T, ...]; also before anybody knows how many copies that will be."""
        self._rows = rows

    def go(self) -> tuple[list[Tensor], Handle]:
        """Each to [R, ...], to be read when the handle has been waited for."""
        return _exchange(self.group, self._copies(), self.received, self._sent)

    def go_uncounted(self, group: Exchanges) -> Incoming:
        """The same where nobody knows yet how many will come; `sent` is set here, `received` by whoever has waited."""
        self.sent = self.counts_WC[:, 0].tolist()
        return group.exchange(self._copies(), self._sent)

    def back(self, y_RD: Tensor, group: Collectives) -> tuple[Tensor, Handle]:
        """[N, D] for `total`, once the handle has been waited for. `group`: the hop's, or the same members with another queue."""
        (y_ND,), handle = _exchange(group, [y_RD], self._sent, self.received)
        return y_ND, handle

    def total(self, y_ND: Tensor, added_TD: Tensor | None = None) -> Tensor:
        """[T, D]: over the members in their order, summed in fp32 at least; rows that nobody wanted are 0; and `added_TD`."""
        counts_T = self.wanted_TW.sum(1)
        by_row = self.rows_N.argsort(stable=True)
        return plus(F.embedding_bag(by_row, y_ND, counts_T.cumsum(0) - counts_T, mode="sum"), added_TD)

    def _copies(self) -> list[Tensor]:
        return [row.index_select(0, self.rows_N) for row in self._rows]

    @property
    def _sent(self) -> list[int]:
        assert self.sent is not None, "nobody knows how many go"
        return self.sent


class DeviceHop(Hop):
    """The same on a GPU, from the members that hold a row's slots; counts_WC also has the picks that the rows have at each member.

    Copies are made when rows are loaded, for the device is idle while the host learns how many there are: until that is known,
    into memory for the most that there may be. They leave when they are made, over the stream `beside` if there is one: what has
    been queued meanwhile on the stream that computes is not waited for. `total` adds what it is given before it rounds."""

    def __init__(
        self, group: Collectives, slots_TK: Tensor, slots_per_member: int, beside: torch.cuda.Stream | None = None
    ) -> None:
        self.group = group
        self._beside = beside
        self._where = copies_for(slots_TK.contiguous(), slots_per_member, group.world_size)
        self.counts_WC = self._where.counts_WC

    def load(self, rows: Sequence[Tensor]) -> None:
        most = self._where.places_TP.numel() if self.sent is None else sum(self.sent)
        self._loaded = [spread(row, self._where, most) for row in rows]
        if self._beside is not None:
            self._made = torch.cuda.current_stream(self._beside.device).record_event()

    def keep_for(self, stream: torch.cuda.Stream) -> None:
        """Of a hop that was made and loaded on another stream than `stream`, which will wait for what it brings and use it for `total`."""
        for tensor in (*self._loaded, self._where.places_TP):
            tensor.record_stream(stream)

    def go(self) -> tuple[list[Tensor], Handle]:
        if self._beside is None:
            return super().go()
        copies = self._copies()
        for rows in copies:
            # Whoever waits for what comes may do so there alone.
            rows.record_stream(self._beside)
        self._beside.wait_event(self._made)
        with torch.cuda.stream(self._beside):
            outs, handle = _exchange(self.group, copies, self.received, self._sent)
            issued = self._beside.record_event()
        for out in outs:
            out.record_stream(torch.cuda.current_stream(self._beside.device))
        return outs, _Departed(handle, issued, copies)

    def total(self, y_ND: Tensor, added_TD: Tensor | None = None) -> Tensor:
        return total(y_ND, self._where, added_TD)

    def _copies(self) -> list[Tensor]:
        loaded, self._loaded = self._loaded, []
        return [copies[: sum(self._sent)] for copies in loaded]


class _Departed:
    """Rows that left over another stream than the one that waits for what comes; kept until then."""

    def __init__(self, handle: Handle, issued: torch.cuda.Event, rows: list[Tensor]) -> None:
        self._handle = handle
        self._issued = issued
        self._rows = rows

    def wait(self) -> None:
        self._handle.wait()
        self._issued.wait()
        self._rows = []


def _exchange(
    group: Collectives, rows: list[Tensor], received: list[int], sent: list[int]
) -> tuple[list[Tensor], Handle]:
    num_rows = sum(received)
    outs = [row.new_empty((num_rows, *row.shape[1:])) for row in rows]
    return outs, group.all_to_all(outs, rows, received, sent)


def plus(sums_TD: Tensor, added_TD: Tensor | None) -> Tensor:
    """The sums, and in place what is to be added to them."""
    return sums_TD if added_TD is None else sums_TD.add_(added_TD)


def hop_to(group: Collectives, slots_TK: Tensor, slots_per_member: int, beside: torch.cuda.Stream | None = None) -> Hop:
    """To the members of the picks' slots, of which -1 is none. `beside`: of a GPU, for rows that leave."""
    if slots_TK.is_cuda:
        return DeviceHop(group, slots_TK, slots_per_member, beside)
    return Hop(group, members_wanted(slots_TK // slots_per_member, group.world_size))


def counts_for(slots_TK: Tensor, slots_per_member: int, num_members: int) -> Tensor:
    """`counts_WC` of a hop to so many members."""
    if slots_TK.is_cuda:
        return copies_for(slots_TK.contiguous(), slots_per_member, num_members).counts_WC
    return members_wanted(slots_TK // slots_per_member, num_members).sum(0)[:, None]


class FixedHop:
    """`capacity` rows to every member: row t of `num_rows` of rank r arrives as r * capacity + t, as zeros where there is no row t or
    wanted_TW[t, member] is false (None: every member has a use for every row). Whoever has no use for a row answers zeros."""

    def __init__(self, group: Collectives, num_rows: int, wanted_TW: Tensor | None, capacity: int) -> None:
        self.group = group
        self._num_rows = num_rows
        self._capacity = capacity
        self._counts = [capacity] * group.world_size
        self._wanted_WT1 = None if wanted_TW is None else wanted_TW.t()[:, :, None]

    def go(self, rows: Sequence[Tensor]) -> tuple[list[Tensor], Handle]:
        """Each [T, ...] to [W * capacity, ...], to be read when the handle has been waited for."""
        return self._exchange(self.group, [self._spread(row) for row in rows])

    def back(self, y_RD: Tensor, group: Collectives) -> tuple[Tensor, Handle]:
        """[W * capacity, D] for `total`, once the handle has been waited for. `group`: as of `Hop.back`."""
        (y,), handle = self._exchange(group, [y_RD])
        return y, handle

    def total(self, y: Tensor, added_TD: Tensor | None = None) -> Tensor:
        """[T, D]: over the members in one order, summed in fp32 at least; and `added_TD`."""
        y_WCD = y.view(self.group.world_size, self._capacity, *y.shape[1:])
        return plus(y_WCD[:, : self._num_rows].sum(0), added_TD)

    def _spread(self, row_TX: Tensor) -> Tensor:
        # FP8 knows no choice between values.
        values = row_bytes(row_TX) if row_TX.element_size() == 1 else row_TX
        spread_WCX = values.new_empty((self.group.world_size, self._capacity, *values.shape[1:]))
        spread_WCX[:, self._num_rows :].zero_()
        into = spread_WCX[:, : self._num_rows]
        into.copy_(values if self._wanted_WT1 is None else values.where(self._wanted_WT1, 0))
        return spread_WCX.flatten(0, 1).view(row_TX.dtype)

    def _exchange(self, group: Collectives, rows: list[Tensor]) -> tuple[list[Tensor], Handle]:
        outs = [torch.empty_like(row) for row in rows]
        return outs, group.all_to_all(outs, rows, self._counts, self._counts)
