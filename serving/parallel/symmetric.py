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
from serving.parallel.hops import X, plus
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
    """One rank's end, for all layers and captured sizes; every rank begins the same exchanges in the same order, and launches on one stream.

    Of its windows each has one exchange in flight at a time: as many as a step has micro-batches.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        exchanged: Exchanged,
        *,
        ranks: tuple[int, ...],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.windows = tuple(windows)
        self.exchanged = exchanged
        self.layout = exchanged.layout(len(ranks))
        self.close = close
        """Together with the others, when nothing of this is in flight any more and no step of it is replayed. Raises RanksMissing."""
        self._ranks = ranks
        self._free = list(self.windows)

    def dispatch(self, capacity: int) -> SymmetricDispatch:
        """For up to `capacity` rows a rank."""
        assert capacity <= self.exchanged.capacity, f"{capacity} rows where {self.exchanged.capacity} fit"
        return SymmetricDispatch(self, capacity)

    def check(self) -> None:
        """After a step, before its results are used; reads host memory alone. Raises RanksMissing if a wait of it gave up."""
        late = sorted({self._ranks[index] for window in self.windows for index in kernels.late_ranks(window)})
        if late:
            raise RanksMissing(late, group="ep", reason=f"deadline {self.exchanged.deadline_s:g} s, peer memory")

    def abort(self) -> None:
        """Ends what waits on the device, now and from now on; from any thread. What is computed is worth nothing from then on."""
        for window in self.windows:
            # Past autograd, whatever mode the thread is in.
            window.given_up.numpy()[0] = -1

    def take(self) -> Window:
        assert self._free, "an exchange ends before another one begins, but for those of micro-batches"
        return self._free.pop(0)

    def wait(self, window: Window, flags: int) -> None:
        kernels.wait(window, flags, limit_ns=int(self.exchanged.deadline_s * 1e9))

    def give(self, window: Window) -> None:
        """The first window first, so that all ranks and all replays take the same."""
        self._free = [each for each in self.windows if each in self._free or each is window]


class SymmetricDispatch:
    """A `Dispatch` whose arrived rows are views of what the others wrote, until results have been given back.

    Row t of rank r arrives as row r * capacity + t; where it has no expert here it holds anything, and its result is not read."""

    def __init__(self, symmetric: Symmetric, capacity: int) -> None:
        self._symmetric = symmetric
        self._capacity = capacity

    def send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Sending[X]:
        slots_TK, weights_TK = slots_TK.contiguous(), weights_TK.contiguous()
        window = self._symmetric.take()
        return _Sent(self._send(window, x, slots_TK, weights_TK), window, slots_TK)

    def _send(self, window: Window, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Steps[Arrived[X]]:
        symmetric, capacity = self._symmetric, self._capacity
        layout, exchanged = symmetric.layout, symmetric.exchanged
        assert isinstance(x, Tensor | QuantisedRows)
        slots_per_rank = exchanged.slots_per_rank
        kernels.send(window, layout, x, slots_TK, weights_TK, slots_per_rank=slots_per_rank, capacity=capacity)
        yield [_Flags(symmetric, window, layout.sent)]
        rows = kernels.arrived_rows(window, layout, x, capacity)
        # Of all ranks' picks the mean of a rank.
        num_used = capacity * exchanged.top_k
        return Arrived(
            x_RD=cast(X, rows.x), slots_RK=rows.slots_RM, weights_RK=rows.weights_RM, fill=False, num_used=num_used
        )

    def give_back(self, sending: Sending[X], y_RD: Tensor, added_TD: Tensor | None = None) -> Returning:
        assert isinstance(sending, _Sent)
        return Returning(self._give_back(sending.window, sending.slots_TK, y_RD, added_TD), 0)

    def _give_back(self, window: Window, slots_TK: Tensor, y_RD: Tensor, added_TD: Tensor | None) -> Steps[Tensor]:
        symmetric, capacity = self._symmetric, self._capacity
        layout, exchanged = symmetric.layout, symmetric.exchanged
        assert y_RD.element_size() <= exchanged.itemsize, f"results of {y_RD.dtype} do not fit"
        kernels.give_back(window, layout, y_RD, capacity=capacity)
        yield [_Flags(symmetric, window, layout.returned)]
        total_TD = kernels.add_up(
            window,
            layout,
            slots_TK,
            slots_per_rank=exchanged.slots_per_rank,
            capacity=capacity,
            width=y_RD.shape[1],
            dtype=y_RD.dtype,
        )
        symmetric.give(window)
        return plus(total_TD, added_TD)


class _Sent(Sending[X]):
    def __init__(self, steps: Steps[Arrived[X]], window: Window, slots_TK: Tensor) -> None:
        super().__init__([], steps, 0)
        self.window = window
        self.slots_TK = slots_TK


@dataclass(frozen=True, eq=False)
class _Flags:
    """Orders the current stream behind all ranks' flags."""

    symmetric: Symmetric
    window: Window
    at: int

    def wait(self) -> None:
        self.symmetric.wait(self.window, self.at)


def open_symmetric(
    group: Collectives, device: torch.device, exchanged: Exchanged, *, num_windows: int = 1
) -> Symmetric:
    """All ranks of `group`, whose tensors are in host memory, at once. Raises PeersUnreachable on all of them, RanksMissing."""
    num_bytes = exchanged.layout(group.world_size).num_bytes
    memory = PeerMemory(group, num_windows * num_bytes, CudaDriver(device))
    places = [group.rank] * group.world_size
    windows = [
        new_window(memory.own[begin : begin + num_bytes], [base + begin for base in memory.addresses], places)
        for begin in range(0, num_windows * num_bytes, num_bytes)
    ]
    # Nobody writes before all have zeros in their flags.
    group.barrier()
    return Symmetric(windows, exchanged, ranks=group.ranks, close=memory.close)


def rehearse_symmetric(
    ranks: tuple[int, ...], device: torch.device, exchanged: Exchanged, *, num_windows: int = 1
) -> Symmetric:
    """A rank alone in the place of all `ranks`: every other one does to it what it does to that one, in its own memory. So as many rows and
    results move as in the unit, and rows for rank w's slots arrive from rank w, for this rank's slots of the same numbers."""
    world_size = len(ranks)
    windows = []
    for _ in range(num_windows):
        own = torch.zeros(exchanged.layout(world_size).num_bytes, dtype=torch.uint8, device=device)
        windows.append(new_window(own, [own.data_ptr()] * world_size, range(world_size), members=[own] * world_size))
    return Symmetric(windows, exchanged, ranks=ranks)


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
