"""A layer's tokens to the ranks that hold their experts, and the results back.

    send -> Sending.wait -> Arrived -> the local experts -> give_back -> Returning.wait -> sums [T, D]

Both ways are steps, of which each is issued when what the one before it sent has come: `send` and `give_back` issue the first,
`advance` the next, `wait` all that are left. How many there are depends on the kinds of dispatch and group alone, so all ranks call the same
collectives whatever their tokens. Which experts are where is not known here: slots are numbers, slot // slots_per_rank is a rank.

    DirectDispatch        counts, rows | rows back                       each row to the ranks of its experts
                          rows | rows back                               where rows bring their number along (`Exchanges`)
    HierarchicalDispatch  counts, rail, node | node back, rail back      to their nodes, there to their ranks
                          counts, rail and node | the same               on a GPU: the host learns both hops' counts at one time
    FixedDispatch         rows | rows back                               as many rows to every rank, nothing counted
    SymmetricDispatch     the same, through peer memory, and only what is wanted moves (`symmetric`)

Legend: T tokens, D width, K picks, W ranks of the EP group, R rows that arrive, M columns of routing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from serving.kernels.dispatch_rows import routing_here
from serving.parallel.collectives import Collectives, Exchanges, Handle
from serving.parallel.hops import (
    DeviceHop,
    FixedHop,
    Hop,
    X,
    counts_for,
    hop_to,
    members_wanted,
    payloads_of,
    routing_of,
    rows_like,
    slots_in,
)
from serving.parallel.host_counts import HostCounts, stream_beside

Result = TypeVar("Result")
Steps = Generator[Sequence[Handle], None, Result]
"""Yields the handles of what it has issued, and goes on when they have been waited for."""


class InFlight(Generic[Result]):
    """Steps of which the first has been issued. `num_more`: those that `advance` can still issue."""

    def __init__(self, steps: Steps[Result], num_more: int) -> None:
        self.num_more = num_more
        self._steps = steps
        self._handles = next(steps)
        self._results: list[Result] = []

    def advance(self) -> None:
        """Waits for what was issued and issues the next step, if there is one. Raises RanksMissing."""
        if self.num_more:
            self.num_more -= 1
            self._go_on()

    def wait(self) -> Result:
        """Returns when everything has come; again, the same. Raises RanksMissing."""
        while not self._results:
            self._go_on()
        return self._results[0]

    def _go_on(self) -> None:
        for handle in self._handles:
            handle.wait()
        try:
            self._handles = next(self._steps)
        except StopIteration as end:
            self._results.append(end.value)


@dataclass(frozen=True, kw_only=True)
class Arrived(Generic[X]):
    """What this rank's experts are to compute: each row once, however many of its experts are here.

    x_RD: of the kind that was sent. slots_RK: int64, slots of this rank from 0, -1: not here. weights_RK: fp32. fill: whether a row
    without a slot here needs a result, of zeros; else nobody reads it. num_used: about so many slots are not -1, max_used: never more
    than so many, where that is known.
    """

    x_RD: X
    slots_RK: Tensor
    weights_RK: Tensor
    fill: bool = True
    num_used: int | None = None
    max_used: int | None = None


class Sending(InFlight[Arrived[X]]):
    """`hops`: the ways that its rows took. `queues_rest`: what `advance` waits for comes whatever else is queued, and behind it the host has
    nothing to wait for, so that it may queue other work before and none between."""

    def __init__(
        self, hops: Sequence[Hop | FixedHop], steps: Steps[Arrived[X]], num_more: int, *, queues_rest: bool = False
    ) -> None:
        super().__init__(steps, num_more)
        self.hops = hops
        self.queues_rest = queues_rest


Returning = InFlight[Tensor]
"""Of the sums [T, D]."""


class Dispatch(Protocol):
    """One rank's end, for all layers; every rank of the EP group calls the same methods in the same order."""

    def send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Sending[X]:
        """x: [T, D], or FP8 rows, which then arrive as such. slots_TK: int64 slots of the EP group, -1: none. weights_TK: fp32.
        T may be 0 and differ from rank to rank. None of them may be changed until the wait has returned."""

    def give_back(self, sending: Sending[X], y_RD: Tensor, added_TD: Tensor | None = None) -> Returning:
        """y_RD: of each arrived row, the weighted sum over its experts here, in the dtype in which it is to travel. What
        returns is the sum over the ranks, in one order whatever the batch, rounded to that dtype at the end of each hop, and
        `added_TD`: by a `DeviceHop` before it rounds. Neither may be changed until the wait has returned."""


class DirectDispatch:
    """One all-to-all each way, behind one of counts where the group needs it. `ep`: the group whose rank r holds slots from r * slots_per_rank on."""

    def __init__(self, ep: Collectives, slots_per_rank: int) -> None:
        self._ep = ep
        self._exchanges = ep if isinstance(ep, Exchanges) else None
        self._slots_per_rank = slots_per_rank
        self._counts = CountsExchange()

    def send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Sending[X]:
        hop = hop_to(self._ep, slots_TK, self._slots_per_rank, self._counts.beside(slots_TK.device))
        routing_TM = routing_of(slots_TK, weights_TK)
        if self._exchanges is not None:
            return Sending([hop], self._send_uncounted(self._exchanges, hop, x, routing_TM), 0)
        return Sending([hop], self._send(hop, x, routing_TM), 1)

    def _send_uncounted(self, ep: Exchanges, hop: Hop, x: X, routing_TM: Tensor) -> Steps[Arrived[X]]:
        hop.load([*payloads_of(x), routing_TM])
        incoming = hop.go_uncounted(ep)
        yield [incoming]
        hop.received = incoming.received
        *payloads, routing_RM = incoming.outs
        return arrived(x, payloads, routing_RM, self._ep.rank * self._slots_per_rank, self._slots_per_rank)

    def _send(self, hop: Hop, x: X, routing_TM: Tensor) -> Steps[Arrived[X]]:
        counts = self._counts.go(self._ep, hop.counts_WC)
        hop.load([*payloads_of(x), routing_TM])
        yield [counts]
        (hop.sent, *_), (hop.received, *picks) = counts.numbers
        (*payloads, routing_RM), handle = hop.go()
        yield [handle]
        first = self._ep.rank * self._slots_per_rank
        return arrived(x, payloads, routing_RM, first, self._slots_per_rank, max_used=_num_picks(picks))

    def give_back(self, sending: Sending[X], y_RD: Tensor, added_TD: Tensor | None = None) -> Returning:
        return Returning(_return(sending.hops, [self._ep], y_RD, added_TD), 0)


class HierarchicalDispatch:
    """A row goes once to each node that holds experts of it, to the rank with this one's local index, and from there once to each
    of that node's ranks; on the way back a node's results are summed before they leave it.

    `rail`: the ranks with this local index, by node; `node`: the ranks of this node, by local index. Rank rail.rank *
    node.world_size + node.rank of the EP group holds slots from slots_per_rank times that on. `counted`, `returning`: the same two
    again, over which counts go, and what comes back. A GPU's group has a queue: a micro-batch's rows would wait in it behind the next
    one's counts, and those for its gate; the next one's rows behind what returns, and that for the experts.
    """

    def __init__(
        self,
        rail: Collectives,
        node: Collectives,
        slots_per_rank: int,
        counted: tuple[Collectives, Collectives] | None = None,
        returning: tuple[Collectives, Collectives] | None = None,
    ) -> None:
        self._rail = rail
        self._counted = counted or (rail, node)
        self._returning = returning or (rail, node)
        self._node = node
        self._slots_per_rank = slots_per_rank
        self._slots_per_node = slots_per_rank * node.world_size
        self._counts = CountsExchange()

    def send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Sending[X]:
        num_nodes, num_locals = self._rail.world_size, self._node.world_size
        beside = self._counts.beside(slots_TK.device)
        hops = [hop_to(self._rail, slots_TK, self._slots_per_node, beside)]
        counts_NLC = counts_for(slots_TK, self._slots_per_rank, num_nodes * num_locals).unflatten(0, (num_nodes, -1))
        routing_TM = routing_of(slots_TK, weights_TK)
        if beside is not None:
            steps = self._send_beside(beside, hops, counts_NLC, x, routing_TM)
            return Sending(hops, steps, 1, queues_rest=True)
        return Sending(hops, self._send(hops, counts_NLC, x, routing_TM), 2)

    def _send(self, hops: list[Hop], sent_NLC: Tensor, x: X, routing_TM: Tensor) -> Steps[Arrived[X]]:
        rail, node = self._rail, self._node
        # To each node: the rows, and how many of them each of its ranks gets in the end.
        counts = self._counts.go(self._counted[0], torch.cat([hops[0].counts_WC[:, :1], sent_NLC.flatten(1)], dim=1))
        hops[0].load([*payloads_of(x), routing_TM])
        yield [counts]
        (hops[0].sent, *_), (hops[0].received, *by_local) = counts.numbers
        forwarded_NLC = torch.tensor(by_local).t().reshape(sent_NLC.shape)
        counts = self._counts.go(self._counted[1], forwarded_NLC.sum(0))
        (*payloads, routing_AM), handle = hops[0].go()
        yield [handle, counts]
        (forwarded, *_), (expected, *picks) = counts.numbers
        on_node_AK = slots_in(routing_AM, rail.rank * self._slots_per_node, self._slots_per_node)
        hops.append(hop_to(node, on_node_AK, self._slots_per_rank, self._counts.beside(on_node_AK.device)))
        hops[1].sent, hops[1].received = forwarded, expected
        hops[1].load([*payloads, routing_AM])
        (*payloads, routing_RM), handle = hops[1].go()
        yield [handle]
        first = rail.rank * self._slots_per_node + node.rank * self._slots_per_rank
        return arrived(x, payloads, routing_RM, first, self._slots_per_rank, max_used=_num_picks(picks))

    def _send_beside(
        self, beside: torch.cuda.Stream, hops: list[Hop], sent_NLC: Tensor, x: X, routing_TM: Tensor
    ) -> Steps[Arrived[X]]:
        """On a GPU. The counts of both hops come to the host at one time; then both are queued, on a stream for which products queued
        meanwhile do not count."""
        rail, node = self._rail, self._node
        sent_NX = torch.cat([hops[0].counts_WC[:, :1], sent_NLC.flatten(1)], dim=1)
        counts = self._counts.go_through(*self._counted, sent_NX)
        hops[0].load([*payloads_of(x), routing_TM])
        yield [counts]
        (hops[0].sent, *_), (hops[0].received, *_), (forwarded, *_), (expected, *picks) = counts.numbers
        computes = torch.cuda.current_stream(beside.device)
        with torch.cuda.stream(beside):
            (*payloads, routing_AM), handle = hops[0].go()
            handle.wait()
            on_node_AK = slots_in(routing_AM, rail.rank * self._slots_per_node, self._slots_per_node)
            hop = DeviceHop(node, on_node_AK, self._slots_per_rank)
            hop.sent, hop.received = forwarded, expected
            hop.load([*payloads, routing_AM])
            hop.keep_for(computes)
            outs, handle = hop.go()
        for out in outs:
            out.record_stream(computes)
        hops.append(hop)
        yield [handle]
        *payloads, routing_RM = outs
        first = rail.rank * self._slots_per_node + node.rank * self._slots_per_rank
        return arrived(x, payloads, routing_RM, first, self._slots_per_rank, max_used=_num_picks(picks))

    def give_back(self, sending: Sending[X], y_RD: Tensor, added_TD: Tensor | None = None) -> Returning:
        return Returning(_return(sending.hops, self._returning, y_RD, added_TD), 1)


class FixedDispatch:
    """Every rank sends `capacity` rows to every rank, those that it has no use for marked: T up to `capacity` fits whatever the
    choice of experts, no shape depends on it and nothing is read on the host, so that a step can be captured.

    Row t of rank r arrives as row r * capacity + t, without slots where it has no expert here; its result has to be 0.
    """

    def __init__(self, ep: Collectives, slots_per_rank: int, capacity: int) -> None:
        self._ep = ep
        self._slots_per_rank = slots_per_rank
        self._capacity = capacity

    def send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Sending[X]:
        assert len(slots_TK) <= self._capacity, f"{len(slots_TK)} tokens where {self._capacity} fit"
        wanted_TW = None
        # On a GPU to tell costs more than to send what nobody reads.
        if not slots_TK.is_cuda:
            wanted_TW = members_wanted(slots_TK // self._slots_per_rank, self._ep.world_size)
        hop = FixedHop(self._ep, len(slots_TK), wanted_TW, self._capacity)
        return Sending([hop], self._send(hop, x, routing_of(slots_TK, weights_TK)), 0)

    def _send(self, hop: FixedHop, x: X, routing_TM: Tensor) -> Steps[Arrived[X]]:
        (*payloads, routing_RM), handle = hop.go([*payloads_of(x), routing_TM])
        yield [handle]
        first, top_k = self._ep.rank * self._slots_per_rank, routing_TM.shape[1] // 2
        came = arrived(x, payloads, routing_RM, first, self._slots_per_rank)
        return replace(came, num_used=self._capacity * top_k)

    def give_back(self, sending: Sending[X], y_RD: Tensor, added_TD: Tensor | None = None) -> Returning:
        return Returning(_return(sending.hops, [self._ep], y_RD, added_TD), 0)


def arrived(
    x: X, payloads: Sequence[Tensor], routing_RM: Tensor, first: int, num_slots: int, *, max_used: int | None = None
) -> Arrived[X]:
    """Of the rows that came, where slots from `first` on are here. x: what was sent."""
    slots_RK, weights_RK = routing_here(routing_RM, first, num_slots)
    return Arrived(x_RD=rows_like(x, payloads), slots_RK=slots_RK, weights_RK=weights_RK, max_used=max_used)


class CountsExchange:
    """Numbers from each member of a group for each, of which the host needs both ends."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._counting: torch.cuda.Stream | None = None

    def go(self, group: Collectives, sent_WC: Tensor) -> HostCounts:
        """Those sent and those received, on their way to the host."""
        received_WC = torch.empty_like(sent_WC)
        ones = [1] * group.world_size
        handle = group.all_to_all([received_WC], [sent_WC], ones, ones)
        return HostCounts(handle, [sent_WC, received_WC], self.beside(sent_WC.device))

    def go_through(self, rail: Collectives, node: Collectives, sent_NX: Tensor) -> HostCounts:
        """Of a GPU. Those to the nodes and from them, and what comes of those behind the first of each, over the ranks of this node: to
        its ranks and from them. The host has no part in it, and what is queued behind it meanwhile is not waited for."""
        received_NX = torch.empty_like(sent_NX)
        ones = [1] * rail.world_size
        handle = rail.all_to_all([received_NX], [sent_NX], ones, ones)
        # Rows of another micro-batch must not wait behind these.
        counting = self._counting = self._counting or stream_beside(sent_NX.device)
        assert counting is not None
        with torch.cuda.stream(counting):
            handle.wait()
            forwarded_LC = received_NX[:, 1:].sum(0).view(node.world_size, -1)
            expected_LC = torch.empty_like(forwarded_LC)
            ones = [1] * node.world_size
            handle = node.all_to_all([expected_LC], [forwarded_LC], ones, ones)
            return HostCounts(handle, [sent_NX, received_NX, forwarded_LC, expected_LC], counting)

    def beside(self, device: torch.device) -> torch.cuda.Stream | None:
        """A GPU's stream for what need not wait for products."""
        self._stream = self._stream or stream_beside(device)
        return self._stream


def _num_picks(picks_CW: list[list[int]]) -> int | None:
    """Of the rows from all members, where they say so."""
    return sum(picks_CW[0]) if picks_CW else None


def _return(
    hops: Sequence[Hop | FixedHop], groups: Sequence[Collectives], y: Tensor, added_TD: Tensor | None
) -> Steps[Tensor]:
    """Back along the hops, each over its group, summed at the near end of each; to the last sums `added_TD`."""
    for hop, group in reversed([*zip(hops, groups, strict=True)]):
        back, handle = hop.back(y, group)
        yield [handle]
        y = hop.total(back, added_TD if hop is hops[0] else None)
    return y
