"""Which expert each slot of a unit's GPUs holds, and how evenly a load falls on the GPUs then.

Legend: L layers, E logical experts, S slots (physical experts), G GPUs. Slots of one GPU are consecutive, GPUs of one node too.
Knows nothing of how a placement is found (`balance`) nor of how weights get there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from serving.core.errors import PeerError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """`slots` [L, S]: the logical expert in each slot; read-only, a copy of what was given.

    Raises PeerError if it is no placement: slots that do not divide over the GPUs, ids that are no experts, experts without a slot.
    """

    slots: Ints
    num_experts: int
    num_gpus: int

    def __post_init__(self) -> None:
        slots = np.array(self.slots, dtype=np.int64)
        slots.flags.writeable = False
        object.__setattr__(self, "slots", slots)
        if slots.ndim != 2 or slots.shape[1] % self.num_gpus:
            raise PeerError(
                f"a placement of shape {slots.shape} does not give each of {self.num_gpus} GPUs as many slots; send [layers, slots]"
            )
        if ((slots < 0) | (slots >= self.num_experts)).any():
            raise PeerError(
                f"a placement names experts {slots.min()} to {slots.max()}; of {self.num_experts} experts the last is {self.num_experts - 1}"
            )
        layers, experts = np.nonzero(self.copies == 0)
        if len(layers):
            raise PeerError(
                f"a placement has no slot for expert {experts[0]} of layer {layers[0]} ({len(layers)} such); give every expert one"
            )

    @property
    def slots_per_gpu(self) -> int:
        return int(self.slots.shape[1]) // self.num_gpus

    @cached_property
    def copies(self) -> Ints:
        """[L, E]: slots that hold the expert."""
        num_layers = len(self.slots)
        ids = np.arange(num_layers)[:, None] * self.num_experts + self.slots
        return np.bincount(ids.ravel(), minlength=num_layers * self.num_experts).reshape(num_layers, self.num_experts)


def gpu_loads(placement: Placement, loads: Floats) -> Floats:
    """[L, G], where the load of each expert [L, E] is shared evenly by its copies."""
    shares = np.take_along_axis(loads / placement.copies, placement.slots, axis=1)
    on_gpus: Floats = shares.reshape(len(shares), placement.num_gpus, -1).sum(axis=-1)
    return on_gpus


def balance(placement: Placement, loads: Floats) -> Floats:
    """[L]: mean over maximum of the GPUs' loads; 1 is even, and a layer without load is."""
    on_gpus = gpu_loads(placement, loads)
    heaviest = on_gpus.max(axis=1)
    figure: Floats = np.divide(on_gpus.mean(axis=1), heaviest, out=np.ones_like(heaviest), where=heaviest > 0)
    return figure
