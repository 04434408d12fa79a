"""The experts that a rank holds, by layer and slot, as whoever moves them reads and writes them: always plain tensors.

Layers are those with experts, the MTP layer last. On a GPU a slot is written where it lies; on a CPU it is packed anew.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from serving.kernels.quant import Fp8Weight
from serving.model.experts import Moe
from serving.model.weight import Weight


class ModelExpertSlots:
    """Implements `serving.parallel.transaction.ExpertSlots` over a model's MoE halves."""

    def __init__(self, layers: Sequence[Moe]) -> None:
        self._layers = layers

    @property
    def num_layers(self) -> int:
        """Layers with experts."""
        return len(self._layers)

    @property
    def num_slots(self) -> int:
        """Slots of this rank in a layer."""
        return len(self._layers[0].experts_here) if self._layers else 0

    def read(self, layer: int, slot: int) -> list[Tensor]:
        """gate_up [2I, D] and down [D, I], contiguous; of FP8 weights their scales behind them. Views or copies."""
        weights = self._layers[layer].expert(slot)
        values = [weight.quantised if isinstance(weight, Fp8Weight) else _plain(weight) for weight in weights]
        return values + [weight.scales for weight in weights if isinstance(weight, Fp8Weight)]

    @torch.inference_mode()
    def write(self, layer: int, slot: int, tensors: list[Tensor]) -> None:
        """Copies in what `read` gave of another slot; between two steps."""
        gate_up, down, *scales = tensors
        self._layers[layer].write_expert(slot, gate_up, down, scales)

    def checksum(self, layer: int, slot: int) -> int:
        """CRC-32 of what `read` gives, whatever memory it is in."""
        crc = 0
        for tensor in self.read(layer, slot):
            crc = zlib.crc32(tensor.cpu().view(torch.uint8).numpy().tobytes(), crc)
        return crc


def _plain(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.to_dense() if weight.is_mkldnn else weight
