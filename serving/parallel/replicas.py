"""Which copy of a logical expert takes a token: the slots of the EP group, chosen evenly and without looking at other tokens.

Legend: L layers, E logical experts, S slots, C the most copies that one of them can have, T tokens, K picks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.kernels.route import physical_slots, route
from serving.parallel.placement import Placement


class Replicas:
    """The copies of every expert under a placement, as tables on `device`.

    `near`: GPUs whose copies come first; the others' are used for experts that have none there. None: all are alike.
    """

    def __init__(self, placement: Placement, device: torch.device, *, near: range | None = None) -> None:
        self._near = near
        self._most = placement.slots.shape[1] - placement.num_experts + 1
        slots_LEC, copies_LE = _tables(placement, near, self._most)
        self._slots_LEC = torch.from_numpy(slots_LEC).to(device)
        self._copies_LE = torch.from_numpy(copies_LE).to(device)

    def write(self, placement: Placement) -> None:
        """A placement of the same sizes, in place: captured steps see it."""
        slots_LEC, copies_LE = _tables(placement, self._near, self._most)
        self._slots_LEC.copy_(torch.from_numpy(slots_LEC))
        self._copies_LE.copy_(torch.from_numpy(copies_LE))

    def slots(self, layer: int, experts_TK: Tensor, first: int) -> Tensor:
        """int64 [T, K], a slot of each expert, -1 of -1. Row t's pick k takes copy (first + t + k) of its expert, counted round;
        ranks give different `first`, so that those with few tokens do not all choose the same copy."""
        return physical_slots(self._slots_LEC[layer], self._copies_LE[layer], experts_TK, first)

    def route(
        self,
        layer: int,
        experts_TK: Tensor,
        weights_TK: Tensor,
        nobody_T: Tensor | None,
        counts_E: Tensor,
        *,
        first: int,
        shared: int | None,
    ) -> tuple[Tensor, Tensor]:
        """`slots` and the weights that belong to them, as `serving.kernels.route.route`."""
        tables = self._slots_LEC[layer], self._copies_LE[layer]
        return route(experts_TK, weights_TK, nobody_T, *tables, counts_E, first=first, shared=shared)


def _tables(placement: Placement, near: range | None, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[L, E + 1, C], rising, -1 where there is no copy, and [L, E + 1] how many there are; row E, which index -1 finds, is of no expert."""
    num_layers = len(placement.slots)
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
    copies = np.maximum(copies, 1)
    return table.reshape(num_layers, num_rows, most), copies.reshape(num_layers, num_rows)
