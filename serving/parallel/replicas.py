"""Which copy of a logical expert takes a token: the slots of the EP group, chosen evenly and without looking at other tokens.

Legend: L layers, E logical experts, S slots, C the most copies that one of them can have, T tokens, K picks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.parallel.placement import Placement


class Replicas:
    """The copies of every expert under a placement, as tables on `device`.

    `near`: GPUs whose copies come first; the others' are used for experts that have none there. None: all are alike.
    """

    def __init__(self, placement: Placement, device: torch.device, *, near: range | None = None) -> None:
        self._near = near
        # One row more than there are experts: of -1, no expert.
        num_layers, num_slots = placement.slots.shape
        most = num_slots - placement.num_experts + 1
        kind = {"dtype": torch.int64, "device": device}
        self._slots_LEC = torch.empty((num_layers, placement.num_experts + 1, most), **kind)
        self._copies_LE = torch.empty((num_layers, placement.num_experts + 1), **kind)
        self.write(placement)

    def write(self, placement: Placement) -> None:
        """A placement of the same sizes, in place: captured steps see it."""
        slots_LEC, copies_LE = _tables(placement, self._near, self._slots_LEC.shape[2])
        self._slots_LEC.copy_(torch.from_numpy(slots_LEC))
        self._copies_LE.copy_(torch.from_numpy(copies_LE))

    def slots(self, layer: int, experts_TK: Tensor, first: int) -> Tensor:
        """int64 [T, K], a slot of each expert, -1 of -1. Row t's pick k takes copy (first + t + k) of its expert, counted round;
        ranks give different `first`, so that those with few tokens do not all choose the same copy."""
        return physical_slots(self._slots_LEC[layer], self._copies_LE[layer], experts_TK, first)


def physical_slots(slots_EC: Tensor, copies_E: Tensor, experts_TK: Tensor, first: int) -> Tensor:
    """As `Replicas.slots`. slots_EC: int64, expert e's slots are its first copies_E[e]; the last row is what -1 takes."""
    if slots_EC.shape[1] == 1:
        return slots_EC[:, 0][experts_TK]
    num_tokens, top_k = experts_TK.shape
    turn_TK = torch.arange(first, first + num_tokens, device=experts_TK.device)[:, None] + torch.arange(
        top_k, device=experts_TK.device
    )
    return slots_EC[experts_TK, turn_TK.remainder_(copies_E[experts_TK])]


def _tables(placement: Placement, near: range | None, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[L, E + 1, C], rising, -1 where there is no copy, and [L, E + 1] how many there are."""
    num_layers, num_slots = placement.slots.shape
    num_rows = placement.num_experts + 1
    order = np.argsort(placement.slots, axis=1, kind="stable")
    rows = (np.take_along_axis(placement.slots, order, axis=1) + np.arange(num_layers)[:, None] * num_rows).ravel()
    slots = order.ravel()
    if near is not None:
        gpus = slots // placement.slots_per_gpu
        is_near = (gpus >= near.start) & (gpus < near.stop)
        has_near = np.zeros(num_layers * num_rows, dtype=bool)
        has_near[rows[is_near]] = True
        kept = is_near | ~has_near[rows]
        rows, slots = rows[kept], slots[kept]
    copies = np.bincount(rows, minlength=num_layers * num_rows)
    table = np.full((num_layers * num_rows, most), -1, dtype=np.int64)
    table[rows, np.arange(len(rows)) - (copies.cumsum() - copies)[rows]] = slots
    # What -1 takes: its only copy is -1.
    copies = np.maximum(copies, 1)
    return table.reshape(num_layers, num_rows, most), copies.reshape(num_layers, num_rows)
