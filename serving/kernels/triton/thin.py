"""Products of one or two rows, x W^T in bf16 or fp32. Bound: the bytes of W.

W is what a step knows before it begins: a program has its rows of W under way in registers before it waits for the kernel
that makes x, so that what is left after it is a multiplication and a sum. fp32 sums, in one order whatever the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.triton.device import overlap

# Rows of x, with more of which the library is quicker; columns of them: a program's rows of W lie whole in its registers.
MOST_ROWS = 2
MOST_COLUMNS = 4096
# Bytes of W that a program holds.
_HELD_BYTES = 32 << 10


def thin_product(x_TK: Tensor, w_NK: Tensor, *, silu: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """x W^T [T, N] in `dtype` (that of x), or with `silu` silu(x gate^T) * (x up^T) [T, N / 2], W gate above up.

    `x` [T, K], T from 1 to MOST_ROWS, K up to MOST_COLUMNS; `w` [N, K]; rows of both contiguous. `w` must not
    come from a kernel that lets the next one start early: it is read before the wait.
    """
    num_rows, width = x_TK.shape
    num_columns = w_NK.shape[0] // 2 if silu else w_NK.shape[0]
    assert 0 < num_rows <= MOST_ROWS
    assert width <= MOST_COLUMNS
    assert x_TK.stride(1) == w_NK.stride(1) == 1, "rows must be contiguous"
    out = torch.empty(num_rows, num_columns, dtype=dtype or x_TK.dtype, device=x_TK.device)
    block_k = triton.next_power_of_2(width)
    block_n = max(1, min(16, _HELD_BYTES // (block_k * w_NK.element_size() * (2 if silu else 1))))
    thin_kernel[(triton.cdiv(num_columns, block_n),)](
        x_TK, w_NK, out, num_rows, num_columns, width, x_TK.stride(0), w_NK.stride(0), out.stride(0),
        SILU=silu, BLOCK_T=triton.next_power_of_2(num_rows), BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
        **overlap(out.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def thin_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    num_rows,
    num_columns,
    width,
    x_stride,
    w_stride,
    out_stride,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """BLOCK_N columns of the result."""
    if PDL:
        # The kernel behind this one waits for its end; if it is of this kind, it may load as well.
        gdc_launch_dependents()
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    mask = (column < num_columns)[:, None] & (k < width)[None, :]
    places = w_ptr + column.to(tl.int64)[:, None] * w_stride + k[None, :]
    w = tl.load(places, mask=mask, other=0.0)
    up = w
    if SILU:
        up = tl.load(places + num_columns * w_stride, mask=mask, other=0.0)
    if PDL:
        gdc_wait()
    for t in tl.static_range(BLOCK_T):
        x = tl.load(x_ptr + t * x_stride + k, mask=(k < width) & (t < num_rows), other=0.0).to(tl.float32)[None, :]
        y = tl.sum(w.to(tl.float32) * x, axis=1)
        if SILU:
            y = y / (1.0 + tl.exp(-y)) * tl.sum(up.to(tl.float32) * x, axis=1)
        tl.store(
            out_ptr + t * out_stride + column,
            y.to(out_ptr.dtype.element_ty),
            mask=(column < num_columns) & (t < num_rows),
        )
