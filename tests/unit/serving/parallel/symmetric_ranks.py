"""All ranks of an EP group in one process and on one device, each with memory that all others write."""

from __future__ import annotations

import torch

from serving.kernels.dispatch import Window
from serving.parallel.symmetric import Exchanged, Symmetric, new_window


def symmetric_ranks(
    world_size: int, exchanged: Exchanged, device: torch.device, *, num_windows: int = 1
) -> list[Symmetric]:
    """By rank. Each call has to be made for all of them before the next one is: nobody waits long."""
    num_bytes = exchanged.layout(world_size).num_bytes
    of_ranks: list[list[Window]] = [[] for _ in range(world_size)]
    for _ in range(num_windows):
        members = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(world_size)]
        addresses = [memory.data_ptr() for memory in members]
        for rank, windows in enumerate(of_ranks):
            windows.append(new_window(members[rank], addresses, [rank] * world_size, members=members))
    return [Symmetric(windows, exchanged, ranks=tuple(range(world_size))) for windows in of_ranks]
