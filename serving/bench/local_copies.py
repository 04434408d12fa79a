"""The collectives of an EP group behind a switch: as they are, or the same rows from this rank's own memory; and counted bytes.

A step whose rows go nowhere takes as long as it would if nothing had to travel, and computes as many rows: those that this rank has for
its own experts stand for what the others would have sent. What it computes means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from serving.parallel.collectives import Collectives, Done, Handle


class Switched:
    """One rank's end. `group` may be changed between steps, on all ranks alike. `sent_bytes`: to other ranks, by `all_to_all`."""

    def __init__(self, group: Collectives) -> None:
        self.group = group
        self.local = False
        self.sent_bytes = 0

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.group.ranks

    @property
    def world_size(self) -> int:
        return self.group.world_size

    def all_gather(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        return self.group.all_gather(out, tensor, counts)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        return self.group.reduce_scatter(out, tensor, counts)

    def all_to_all(
        self,
        outs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
    ) -> Handle:
        if not self.local:
            num_rows = sum(send_counts) - send_counts[self.rank]
            self.sent_bytes += num_rows * sum(t.shape[1:].numel() * t.element_size() for t in tensors)
            return self.group.all_to_all(outs, tensors, recv_counts, send_counts)
        first = sum(send_counts[: self.rank])
        begins = accumulate(recv_counts, initial=0)
        for begin, count in zip(begins, recv_counts, strict=False):
            for out, tensor in zip(outs, tensors, strict=True):
                _repeat(tensor[first : first + send_counts[self.rank]], out[begin : begin + count])
        return Done()

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        return self.group.broadcast(tensor, src)

    def barrier(self) -> None:
        self.group.barrier()

    def subgroup(self, ranks: Sequence[int], name: str, deadline_s: float | None = None) -> Collectives:
        return self.group.subgroup(ranks, name, deadline_s)

    def close(self) -> None:
        self.group.close()


def _repeat(rows: Tensor, out: Tensor) -> None:
    """`out` gets the rows over and over; zeros, which say that nothing is wanted, where there are none."""
    if not len(rows):
        out.view(torch.uint8).zero_()
        return
    for begin in range(0, len(out), len(rows)):
        part = out[begin : begin + len(rows)]
        part.copy_(rows[: len(part)])
