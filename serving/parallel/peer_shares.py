"""A TP group on GPUs of one node whose small collectives go through memory that its ranks keep for each other.

An all-gather or reduce-scatter of shares as even as can be, of up to `MOST_BYTES` in all, is two launches (`serving.kernels.peer_shares`);
whatever is larger or of another kind goes over the group that is given. What decides is alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.kernels import peer_shares as kernels
from serving.kernels.dispatch import Window, late_ranks
from serving.kernels.peer_shares import SharesLayout, share_sizes, shares_layout
from serving.parallel.collectives import Collectives, Handle, RanksMissing
from serving.parallel.peer_memory import CudaDriver, PeerMemory
from serving.parallel.symmetric import new_window

MOST_BYTES = 1 << 20


class PeerShares:
    """`Collectives` in front of `group`. It has one call through peer memory in flight at a time. `issued` is called with each of these, as
    `group` calls its own with its."""

    def __init__(
        self,
        group: Collectives,
        window: Window,
        *,
        deadline_s: float,
        issued: Callable[[], None] = lambda: None,
        close_memory: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank, self.ranks, self.world_size = group.rank, group.ranks, group.world_size
        self.window = window
        self.layout = layout_of(group.world_size)
        self.close_memory = close_memory
        """Together with the others, when no step that has it is replayed any more. Raises RanksMissing."""
        self.in_flight = False
        self._group = group
        self._deadline_s = deadline_s
        self._tell_issued = issued

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        if not self._takes(out, counts):
            return self._group.all_gather(out, tensor, counts)
        return self._push(tensor.contiguous(), kernels.pull, out, whole=True)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        if not self._takes(tensor, counts):
            return self._group.reduce_scatter(out, tensor, counts)
        return self._push(tensor.contiguous(), kernels.pull_sum, out, whole=False)

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        return self._group.all_to_all(outs, tensors, recv_counts, send_counts)

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        return self._group.broadcast(tensor, src)

    def barrier(self) -> None:
        self._group.barrier()

    def subgroup(self, ranks: Sequence[int], name: str, deadline_s: float | None = None) -> Collectives:
        return self._group.subgroup(ranks, name, deadline_s)

    def close(self) -> None:
        self._group.close()

    def check(self) -> None:
        """After a step; reads host memory alone. Raises RanksMissing if a wait of it gave up."""
        if late := late_ranks(self.window):
            ranks = [self.ranks[index] for index in late]
            raise RanksMissing(ranks, group="tp", reason=f"deadline {self._deadline_s:g} s, peer memory")

    def abort(self) -> None:
        """As `Symmetric.abort`."""
        self.window.given_up.numpy()[0] = -1

    def _takes(self, whole: Tensor, counts: Sequence[int] | None) -> bool:
        row_bytes = whole.shape[1:].numel() * whole.element_size()
        sizes = share_sizes(len(whole), self.world_size)
        even = list(counts) == sizes if counts else len(whole) % self.world_size == 0
        return even and row_bytes % 8 == 0 and row_bytes * sizes[0] * self.world_size <= MOST_BYTES

    def _push(self, rows: Tensor, pull: Callable[..., None], out: Tensor, *, whole: bool) -> Handle:
        assert not self.in_flight, "one call through peer memory ends before the next one begins"
        self.in_flight = True
        self._tell_issued()
        kernels.push(self.window, self.layout, rows, whole=whole)
        return _Pull(self, pull, out, int(self._deadline_s * 1e9))


@dataclass(eq=False)
class _Pull:
    shares: PeerShares
    pull: Callable[..., None]
    out: Tensor
    limit_ns: int
    done: bool = False

    def wait(self) -> None:
        if self.done:
            return
        self.done = True
        self.pull(self.shares.window, self.shares.layout, self.out, limit_ns=self.limit_ns)
        self.shares.in_flight = False


def layout_of(world_size: int) -> SharesLayout:
    return shares_layout(world_size, MOST_BYTES // world_size)


def open_peer_shares(
    group: Collectives,
    control: Collectives,
    device: torch.device,
    *,
    deadline_s: float,
    issued: Callable[[], None] = lambda: None,
) -> PeerShares:
    """All ranks of `group` at once; `control`: the same ranks, whose tensors are in host memory. Raises PeersUnreachable on all of them, RanksMissing."""
    memory = PeerMemory(control, layout_of(group.world_size).num_bytes, CudaDriver(device))
    window = new_window(memory.own, memory.addresses, [group.rank] * group.world_size)
    # Nobody writes before all have zeros in their flags.
    control.barrier()
    return PeerShares(group, window, deadline_s=deadline_s, issued=issued, close_memory=memory.close)
