"""The sum of equal parts of one tensor: what a reduce-scatter adds up where every rank's part is at hand."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_parts(whole_SX: Tensor, num_parts: int, out_TX: Tensor) -> None:
    """Into out [T, ...] the sum of `num_parts` runs of T rows of whole [S, ...], which begin evenly spread and may overlap; fp32 sums, rounded once.

    Both contiguous, T <= S; rows that no run reaches are not read. Bound: the bytes of the parts and of the sum.
    """
    if whole_SX.is_cuda:
        from serving.kernels.triton import part_sums as device

        device.sum_parts(whole_SX, num_parts, _step(whole_SX, num_parts, out_TX), out_TX)
    else:
        sum_parts_reference(whole_SX, num_parts, out_TX)


def sum_parts_reference(whole_SX: Tensor, num_parts: int, out_TX: Tensor) -> None:
    step = _step(whole_SX, num_parts, out_TX)
    parts = whole_SX.as_strided((num_parts, *out_TX.shape), (step * whole_SX.stride(0), *whole_SX.stride()))
    torch.sum(parts, dim=0, out=out_TX)


def _step(whole_SX: Tensor, num_parts: int, out_TX: Tensor) -> int:
    """Rows from the beginning of a run to that of the next."""
    return (len(whole_SX) - len(out_TX)) // max(num_parts - 1, 1)
