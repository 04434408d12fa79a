"""Expert dispatch of captured decode steps through memory that the ranks of a node keep for each other (`serving.kernels.dispatch`).

    send      launch: rows and routing to the ranks that want them, flags
      wait    launch of one program: until all flags are here
    give_back launch: results to the ranks that they are for, flags
      wait    the same, and a launch that adds up

As `FixedDispatch` nothing is counted or read on the host, and no shape depends on the choice of experts; other than there a row
moves only to ranks that hold an expert of it, and the experts compute only rows that came. A wait ends at its deadline: `check` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from serving.kernels import dispatch as kernels
from serving.kernels.dispatch import GIVEN_UP, Layout, Window, layout_for
from serving.kernels.quant import QuantisedRows
from serving.parallel.collectives import Collectives, RanksMissing
from serving.parallel.dispatch import Arrived, Returning, Sending, Steps
from serving.parallel.hops import X
from serving.parallel.peer_memory import CudaDriver, PeerMemory


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What the exchanges of an EP group are made for, alike on all its ranks: up to `capacity` rows a rank of `width` elements, FP8 or
    of `itemsize` bytes, of which each picks `top_k` slots; rank r holds those from r * slots_per_rank on. Waits end after `deadline_s`."""

    slots_per_rank: int
    capacity: int
    width: int
    top_k: int
    deadline_s: float
    itemsize: int = 2

    def layout(self, world_size: int) -> Layout:
        columns = min(self.top_k, self.slots_per_rank)
        return layout_for(world_size, self.capacity, width=self.width, columns=columns, itemsize=self.itemsize)


class Symmetric:
    """One rank's end, for all layers and captured sizes. It has one exchange in flight at a time, and every rank begins the same ones in
    the same order; micro-batches whose exchanges overlap have one each."""

    def __init__(
        self,
        window: Window,
        exchanged: Exchanged,
        *,
        ranks: tuple[int, ...],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.window = window
        self.exchanged = exchanged
        self.layout = exchanged.layout(len(ranks))
        self.close = close
        """Together with the others, when nothing of this is in flight or captured any more."""
        self.in_flight = False
        self._ranks = ranks

    def dispatch(self, capacity: int) -> SymmetricDispatch:
        """For up to `capacity` rows a rank."""
        assert capacity <= self.exchanged.capacity, f"{capacity} rows where {self.exchanged.capacity} fit"
        return SymmetricDispatch(self, capacity)

    def check(self) -> None:
        """After a step, before its results are used; reads host memory alone. Raises RanksMissing if a wait of it gave up."""
        late = kernels.late_ranks(self.window)
        if late:
            ranks = [self._ranks[index] for index in late]
            raise RanksMissing(ranks, group="ep", reason=f"deadline {self.exchanged.deadline_s:g} s, peer memory")

    def wait(self, flags: int) -> None:
        kernels.wait(self.window, flags, limit_ns=int(self.exchanged.deadline_s * 1e9))


class SymmetricDispatch:
    """A `Dispatch` whose arrived rows are views of what the others wrote, until results have been given back.

    Row t of rank r arrives as row r * capacity + t; where it has no expert here it holds anything, and its result is not read."""

    def __init__(self, symmetric: Symmetric, capacity: int) -> None:
        self._symmetric = symmetric
        self._capacity = capacity

    def send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Sending[X]:
        symmetric = self._symmetric
        assert not symmetric.in_flight, "an exchange ends before the next one begins"
        symmetric.in_flight = True
        return _Sent(self._send(x, slots_TK, weights_TK), slots_TK)

    def _send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Steps[Arrived[X]]:
        symmetric, capacity = self._symmetric, self._capacity
        window, layout = symmetric.window, symmetric.layout
        assert isinstance(x, Tensor | QuantisedRows)
        slots_per_rank = symmetric.exchanged.slots_per_rank
        kernels.send(window, layout, x, slots_TK, weights_TK, slots_per_rank=slots_per_rank, capacity=capacity)
        yield [_Flags(symmetric, layout.sent)]
        rows = kernels.arrived_rows(window, layout, x, capacity)
        # Of all ranks' picks the mean of a rank.
        num_used = capacity * symmetric.exchanged.top_k
        return Arrived(
            x_RD=cast(X, rows.x), slots_RK=rows.slots_RM, weights_RK=rows.weights_RM, fill=False, num_used=num_used
        )

    def give_back(self, sending: Sending[X], y_RD: Tensor) -> Returning:
        assert isinstance(sending, _Sent)
        return Returning(self._give_back(sending.slots_TK, y_RD), 0)

    def _give_back(self, slots_TK: Tensor, y_RD: Tensor) -> Steps[Tensor]:
        symmetric, capacity = self._symmetric, self._capacity
        window, layout, exchanged = symmetric.window, symmetric.layout, symmetric.exchanged
        assert y_RD.element_size() <= exchanged.itemsize, f"results of {y_RD.dtype} do not fit"
        kernels.give_back(window, layout, y_RD, capacity=capacity)
        yield [_Flags(symmetric, layout.returned)]
        total_TD = kernels.add_up(
            window,
            layout,
            slots_TK,
            slots_per_rank=exchanged.slots_per_rank,
            capacity=capacity,
            width=y_RD.shape[1],
            dtype=y_RD.dtype,
        )
        symmetric.in_flight = False
        return total_TD


class _Sent(Sending[X]):
    def __init__(self, steps: Steps[Arrived[X]], slots_TK: Tensor) -> None:
        super().__init__([], steps, 0)
        self.slots_TK = slots_TK


@dataclass(frozen=True)
class _Flags:
    """Orders the current stream behind all ranks' flags."""

    symmetric: Symmetric
    at: int

    def wait(self) -> None:
        self.symmetric.wait(self.at)


def open_symmetric(group: Collectives, device: torch.device, exchanged: Exchanged) -> Symmetric:
    """All ranks of `group`, whose tensors are in host memory, at once. Raises PeersUnreachable on all of them, RanksMissing."""
    memory = PeerMemory(group, exchanged.layout(group.world_size).num_bytes, CudaDriver(device))
    window = new_window(memory.own, memory.addresses, [group.rank] * group.world_size)
    # Nobody writes before all have zeros in their flags.
    group.barrier()
    return Symmetric(window, exchanged, ranks=group.ranks, close=memory.close)


def rehearse_symmetric(ranks: tuple[int, ...], device: torch.device, exchanged: Exchanged) -> Symmetric:
    """A rank alone in the place of all `ranks`: every other one does to it what it does to that one, in its own memory. So as many rows and
    results move as in the unit, and rows for rank w's slots arrive from rank w, for this rank's slots of the same numbers."""
    world_size = len(ranks)
    own = torch.zeros(exchanged.layout(world_size).num_bytes, dtype=torch.uint8, device=device)
    window = new_window(own, [own.data_ptr()] * world_size, range(world_size), members=[own] * world_size)
    return Symmetric(window, exchanged, ranks=ranks)


def new_window(
    own: Tensor, addresses: Sequence[int], places: Sequence[int], *, members: Sequence[Tensor] = ()
) -> Window:
    """Of a rank that has begun nothing; `own` is zeros."""
    device = own.device
    return Window(
        own=own,
        bases=torch.tensor(addresses, dtype=torch.int64, device=device),
        places=torch.tensor(places, dtype=torch.int64, device=device),
        state=torch.zeros(GIVEN_UP + 1, dtype=torch.int64, device=device),
        given_up=torch.zeros(1 + len(addresses), dtype=torch.int64, pin_memory=device.type == "cuda"),
        members=tuple(members),
    )
