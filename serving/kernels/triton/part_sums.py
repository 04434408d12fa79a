"""Sums of equal parts of a tensor. Bound: bytes; each part is read once, all of a value's parts before they are added."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_VALUES = 2048


@triton.jit
def sum_parts_kernel(whole_ptr, out_ptr, num_values, step, PARTS: tl.constexpr, VALUES: tl.constexpr):
    """VALUES sums, of parts that begin `step` values apart."""
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    mask = at < num_values
    total = tl.zeros([VALUES], tl.float32)
    for _ in tl.static_range(PARTS):
        total += tl.load(whole_ptr + at, mask=mask, other=0.0).to(tl.float32)
        whole_ptr += step
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_parts(whole_SX: Tensor, num_parts: int, step: int, out_TX: Tensor) -> None:
    """One launch; runs begin `step` rows apart."""
    num_values = out_TX.numel()
    if num_values:
        sum_parts_kernel[(triton.cdiv(num_values, _VALUES),)](
            whole_SX, out_TX, num_values, step * whole_SX.stride(0), PARTS=num_parts, VALUES=_VALUES
        )
