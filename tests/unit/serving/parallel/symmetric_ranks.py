"""All ranks of an EP group in one process and on one device, each with memory that all others write."""

from __future__ import annotations

import torch

from serving.parallel.symmetric import Exchanged, Symmetric, new_window


def symmetric_ranks(world_size: int, exchanged: Exchanged, device: torch.device) -> list[Symmetric]:
    """By rank. Each call has to be made for all of them before the next one is: nobody waits long."""
    num_bytes = exchanged.layout(world_size).num_bytes
    members = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(world_size)]
    addresses = [memory.data_ptr() for memory in members]
    return [
        Symmetric(
            new_window(members[rank], addresses, [rank] * world_size, members=members),
            exchanged,
            ranks=tuple(range(world_size)),
        )
        for rank in range(world_size)
    ]
