"""RMSNorm in Triton: with the residual's addition before it and the FP8 quantise of the next product after it.

One pass: a row is read once, held in registers, and written once in each form that is wanted. The bound is memory: in bf16
2 D bytes a token in, 2 D out, twice that with a residual, 1.03 D out where only FP8 is wanted.
T tokens, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.quant import BLOCK, QuantisedRows, empty_rows
from serving.kernels.triton.device import overlap


def norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, *, keep: bool, quantise: bool
) -> tuple[Tensor | None, Tensor | None, QuantisedRows | None]:
    """Of x + residual, rounded to their dtype: the norm if `keep`, the sum if there is a residual, the norm as FP8.

    What is quantised is the rounded norm: the same numbers as of the norm first and the quantise after it.
    """
    num_tokens, width = x_TD.shape
    assert x_TD.stride(1) == 1, "rows must be contiguous"
    assert residual_TD is None or residual_TD.stride(1) == 1, "rows must be contiguous"
    out_TD = torch.empty(num_tokens, width, dtype=x_TD.dtype, device=x_TD.device) if keep else None
    sum_TD = torch.empty(num_tokens, width, dtype=x_TD.dtype, device=x_TD.device) if residual_TD is not None else None
    rows = empty_rows(num_tokens, width, x_TD.device) if quantise else None
    if num_tokens:
        _norm_kernel[(num_tokens,)](
            x_TD,
            residual_TD,
            weight_D,
            out_TD,
            sum_TD,
            None if rows is None else rows.values,
            None if rows is None else rows.scales,
            x_TD.stride(0),
            0 if residual_TD is None else residual_TD.stride(0),
            0 if rows is None else rows.scales.stride(1),
            width,
            eps,
            GROUPS=triton.next_power_of_2(triton.cdiv(width, BLOCK)),
            WIDTH=BLOCK,
            ADD=residual_TD is not None,
            KEEP=keep,
            QUANTISE=quantise,
            num_warps=warps_for(width, quantise),
            **overlap(x_TD.device),
        )
    return out_TD, sum_TD, rows


def warps_for(width: int, quantise: bool) -> int:
    return 1 if width <= 512 else 8 if quantise and width > 2048 else 4


@triton.jit
def scale_of(largest):
    """What the largest value of a group is 448 times of; 1 for a group of zeros."""
    return tl.where(largest > 0, largest * (1 / 448.0), 1.0)


@triton.jit
def inverse_scale_of(largest):
    """One division a group instead of one a value. Not beyond what keeps a group of denormals finite."""
    return tl.where(largest > 0, 448.0 / tl.maximum(largest, 1.5e-36), 1.0)


@triton.jit(do_not_specialize=["scales_stride_g"])
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    values_ptr,
    scales_ptr,
    x_stride_t,
    residual_stride_t,
    scales_stride_g,
    width,
    eps,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
    QUANTISE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A row a program, as [GROUPS, 128]."""
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + token * x_stride_t + column, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + token * residual_stride_t + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + token * width + column, x, mask=inside)
    wide = x.to(tl.float32)
    mean = tl.sum(tl.sum(wide * wide, axis=1), axis=0) / width
    normed = (wide * tl.rsqrt(mean + eps) * weight).to(x.dtype)
    if KEEP:
        tl.store(out_ptr + token * width + column, normed, mask=inside)
    if QUANTISE:
        wide = normed.to(tl.float32)
        largest = tl.max(tl.abs(wide), axis=1)
        tl.store(
            scales_ptr + group.to(tl.int64) * scales_stride_g + token, scale_of(largest), mask=group * WIDTH < width
        )
        values = (wide * inverse_scale_of(largest)[:, None]).to(tl.float8e4nv)
        tl.store(values_ptr + token * width + column, values, mask=inside)
