"""Expert weights in plain memory, made up from (layer, expert), so that anybody can tell what a slot should hold."""

from __future__ import annotations

import functools
import zlib

import torch
from torch import Tensor

from serving.parallel.placement import Placement

NUM_BYTES = 16 * 40 * 4 + 40 * 3 * 2 + 7 * 4
"""Of one expert; three rows of a transaction."""


@functools.cache
def _made_up(layer: int, expert: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(1000 * layer + expert)
    gate_up, down, scales = (torch.randn(*shape, generator=random) for shape in ((16, 40), (40, 3), (7,)))
    return gate_up, down.to(torch.bfloat16), scales


def expert_weights(layer: int, expert: int) -> list[Tensor]:
    """A copy of what the expert is."""
    return [tensor.clone() for tensor in _made_up(layer, expert)]


def crc(tensors: list[Tensor]) -> int:
    """Without the code under test."""
    return zlib.crc32(b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors))


@functools.cache
def expected_crc(layer: int, expert: int) -> int:
    return crc(list(_made_up(layer, expert)))


class MemorySlots:
    """The slots of `rank` as `placement` fills them."""

    def __init__(self, placement: Placement, rank: int) -> None:
        self.num_layers = len(placement.slots)
        self.num_slots = placement.slots_per_gpu
        self.rank = rank
        self._weights = [
            [expert_weights(layer, expert) for expert in self._experts(placement, layer)]
            for layer in range(self.num_layers)
        ]

    def read(self, layer: int, slot: int) -> list[Tensor]:
        return self._weights[layer][slot]

    def write(self, layer: int, slot: int, tensors: list[Tensor]) -> None:
        torch._foreach_copy_(self._weights[layer][slot], tensors)

    def wrong(self, placement: Placement) -> list[tuple[int, int]]:
        """(layer, slot) of what is not what `placement` says."""
        return [
            (layer, slot)
            for layer in range(self.num_layers)
            for slot, expert in enumerate(self._experts(placement, layer))
            if crc(self.read(layer, slot)) != expected_crc(layer, expert)
        ]

    def _experts(self, placement: Placement, layer: int) -> list[int]:
        experts: list[int] = placement.slots[layer].reshape(placement.num_gpus, -1)[self.rank].tolist()
        return experts
