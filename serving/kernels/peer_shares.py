"""A group's shares of rows, gathered or summed, through memory that its ranks keep for each other (`dispatch.Window`).

    push -> pull        all-gather: this rank's share to every rank; all shares in the ranks' order
    push -> pull_sum    reduce-scatter: to every rank its share; the sum of what came, in the ranks' order, in fp32 at least

Shares are runs of neighbours, as even as can be, the first ones longer. A rank's memory has a place for each rank, twice: what is written
in exchange n + 1 was read in n - 1, and whoever has all flags of n knows that every rank had then pulled n - 1.

Legend: N rows, S rows of this rank's share, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.kernels.dispatch import STEP, Window, wait_reference


@dataclass(frozen=True, kw_only=True)
class SharesLayout:
    """Bytes: flags int64 [W] from 0 on; at `places` uint8 [2, W, place_bytes]."""

    world_size: int
    place_bytes: int
    places: int
    num_bytes: int


def shares_layout(world_size: int, most_bytes: int) -> SharesLayout:
    """For shares of up to `most_bytes`."""
    place_bytes, places = -(-most_bytes // 256) * 256, -(-8 * world_size // 256) * 256
    num_bytes = places + 2 * world_size * place_bytes
    return SharesLayout(world_size=world_size, place_bytes=place_bytes, places=places, num_bytes=num_bytes)


def push(window: Window, layout: SharesLayout, x_NX: Tensor, *, whole: bool) -> None:
    """Contiguous rows of a multiple of 8 bytes: `whole`, all of them to every rank; else to each rank its share of them. Begins the next
    exchange, which ends with this rank's pull of it."""
    if x_NX.is_cuda:
        from serving.kernels.triton import peer_shares

        return peer_shares.push(window, layout, x_NX, whole=whole)
    return push_reference(window, layout, x_NX, whole=whole)


def push_reference(window: Window, layout: SharesLayout, x_NX: Tensor, *, whole: bool) -> None:
    window.state[STEP] += 1
    parts = [x_NX] * layout.world_size if whole else x_NX.split(share_sizes(len(x_NX), layout.world_size))
    for memory, place, part in zip(window.members, window.places.tolist(), parts, strict=True):
        _place(memory, layout, window, place, part).copy_(part)
        memory[: 8 * layout.world_size].view(torch.int64)[place] = window.state[STEP]


def pull(window: Window, layout: SharesLayout, out_NX: Tensor, *, limit_ns: int) -> None:
    """Waits as `dispatch.wait`; out: contiguous, all ranks' shares."""
    if out_NX.is_cuda:
        from serving.kernels.triton import peer_shares

        return peer_shares.pull(window, layout, out_NX, limit_ns=limit_ns)
    return pull_reference(window, layout, out_NX)


def pull_reference(window: Window, layout: SharesLayout, out_NX: Tensor) -> None:
    wait_reference(window, 0)
    for rank, part in enumerate(out_NX.split(share_sizes(len(out_NX), layout.world_size))):
        part.copy_(_place(window.own, layout, window, rank, part))


def pull_sum(window: Window, layout: SharesLayout, out_SX: Tensor, *, limit_ns: int) -> None:
    """The same; out: this rank's share of the sum, in its dtype."""
    if out_SX.is_cuda:
        from serving.kernels.triton import peer_shares

        return peer_shares.pull_sum(window, layout, out_SX, limit_ns=limit_ns)
    return pull_sum_reference(window, layout, out_SX)


def pull_sum_reference(window: Window, layout: SharesLayout, out_SX: Tensor) -> None:
    wait_reference(window, 0)
    total = torch.zeros_like(out_SX, dtype=torch.promote_types(out_SX.dtype, torch.float32))
    for rank in range(layout.world_size):
        total += _place(window.own, layout, window, rank, out_SX)
    out_SX.copy_(total)


def share_sizes(num_rows: int, world_size: int) -> list[int]:
    """Rows of each rank."""
    least, more = divmod(num_rows, world_size)
    return [least + (rank < more) for rank in range(world_size)]


def _place(memory: Tensor, layout: SharesLayout, window: Window, rank: int, like: Tensor) -> Tensor:
    half = int(window.state[STEP]) % 2
    begin = layout.places + (half * layout.world_size + rank) * layout.place_bytes
    return memory[begin : begin + like.nbytes].view(like.dtype).view(like.shape)
