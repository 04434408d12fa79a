"""Rows to FP8, and SiLU-mul with or without it. Bound: bytes; each element is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.quant import BLOCK, QuantisedRows, empty_rows
from serving.kernels.triton.device import overlap

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def quantise(x_R128):
    """e4m3 of each row by its own scale, and the scale; rows of zeros have scale 1."""
    largest_R = tl.max(tl.abs(x_R128), axis=1)
    scale_R = tl.where(largest_R > 0, largest_R / FP8_MAX, 1.0)
    return (x_R128 / scale_R[:, None]).to(tl.float8e4nv), scale_R


@triton.jit(do_not_specialize=["num_rows", "scale_stride"])
def rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    width,
    x_stride,
    out_stride,
    scale_stride,
    SILU: tl.constexpr,
    QUANTISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """BLOCK_T rows of BLOCK_G groups of 128 columns; a line of the tile is one group."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.arange(0, BLOCK_T * BLOCK_G)
    row = tl.program_id(0) * BLOCK_T + line // BLOCK_G
    group = tl.program_id(1) * BLOCK_G + line % BLOCK_G
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = (row < num_rows)[:, None] & (column < width)
    source = x_ptr + row.to(tl.int64)[:, None] * x_stride + column
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        up = tl.load(source + width, mask=mask, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
    target = out_ptr + row.to(tl.int64)[:, None] * out_stride + column
    if QUANTISE:
        values, scales = quantise(x)
        tl.store(target, values, mask=mask)
        tl.store(scale_ptr + group * scale_stride + row, scales, mask=(row < num_rows) & (group * 128 < width))
    else:
        tl.store(target, x.to(out_ptr.dtype.element_ty), mask=mask)


def _run(x: Tensor, out: Tensor, scales: Tensor, *, silu: bool, quantise: bool) -> None:
    num_rows, width = out.shape
    assert x.stride(1) == 1, "rows must be contiguous"
    if not num_rows:
        return
    block_t, block_g, num_warps = _tile(num_rows, width)
    rows_kernel[(triton.cdiv(num_rows, block_t), triton.cdiv(width, BLOCK * block_g))](
        x, out, scales, num_rows, width, x.stride(0), out.stride(0), scales.stride(1),
        SILU=silu, QUANTISE=quantise, BLOCK_T=block_t, BLOCK_G=block_g, num_warps=num_warps, **overlap(x.device),
    )  # fmt: skip


def _tile(num_rows: int, width: int) -> tuple[int, int, int]:
    """Rows and column groups of a program, and its warps: few where little work must spread over the device."""
    block_g = min(8, triton.next_power_of_2(triton.cdiv(width, BLOCK)))
    return (1, block_g, 4) if num_rows * width < 1 << 21 else (4, block_g, 8)


def quantise_rows_fp8(x_TD: Tensor) -> QuantisedRows:
    rows = empty_rows(x_TD.shape[0], x_TD.shape[1], x_TD.device)
    _run(x_TD, rows.values, rows.scales, silu=False, quantise=True)
    return rows


def silu_mul(gate_up: Tensor) -> Tensor:
    flat = gate_up.flatten(0, -2)
    out = torch.empty(flat.shape[0], flat.shape[1] // 2, dtype=flat.dtype, device=flat.device)
    _run(flat, out, out, silu=True, quantise=False)
    return out.view(*gate_up.shape[:-1], out.shape[1])


def silu_mul_quantise(gate_up_TI: Tensor) -> QuantisedRows:
    rows = empty_rows(gate_up_TI.shape[0], gate_up_TI.shape[1] // 2, gate_up_TI.device)
    _run(gate_up_TI, rows.values, rows.scales, silu=True, quantise=True)
    return rows
