"""Products of few rows, x W^T dense or by expert, in FP8 (block-scaled), bf16 or fp32. Bound: the bytes of W.

The rows of W are the M dimension of the tensor cores, which is never less than 64, and the few rows of x the N dimension.
W streams through the copy engine; where its rows alone would not fill the device, the columns are split and the parts
summed by a second kernel in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from serving.kernels.quant import BLOCK, Fp8Weight, QuantisedRows, empty_rows
from serving.kernels.triton.device import num_processors, overlap
from serving.kernels.triton.quant import quantise


@triton.jit(do_not_specialize=["num_rows", "x_scale_quads", "out_scale_stride"])
def few_rows_kernel(
    x_desc,
    w_desc,
    x_scale_ptr,
    w_scale_ptr,
    out_ptr,
    out_scale_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    num_rows,
    num_columns,
    num_k,
    num_splits,
    expert_rows,
    second_row,
    x_scale_quads,
    expert_scale_rows,
    second_scale_row,
    out_stride,
    out_scale_stride,
    FP8: tl.constexpr,
    SILU: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """BLOCK_T rows, one of the PARTS of a tile, by BLOCK_N columns (128, or a divisor); with SILU of gate and up, quantised if FP8."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # By expert, what is read at one time should lie together: the columns of a tile before the next tile.
    part = tl.program_id(1 if GROUPED else 0)
    column = tl.program_id(0 if GROUPED else 1) * BLOCK_N
    split = tl.program_id(2)
    w_row = column
    w_scales = w_scale_ptr + (column // 128).to(tl.int64) * num_k
    if GROUPED:
        if part >= tl.load(num_tiles_ptr) * PARTS:
            return
        expert = tl.load(tile_expert_ptr + part // PARTS)
        w_row += expert * expert_rows
        w_scales += (expert * expert_scale_rows).to(tl.int64) * num_k
    second_w_scales = w_scales + second_scale_row * num_k
    row = part * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = row < num_rows
    # Masked by fours, so that four are copied at once; what pads the scales meets rows that are not stored.
    x_scale_stride = x_scale_quads * 4
    in_scales = row < x_scale_stride
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    second_total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    first_k = split * num_k // (num_splits * UNROLL) * UNROLL
    last_k = tl.where(split + 1 < num_splits, (split + 1) * num_k // (num_splits * UNROLL) * UNROLL, num_k)
    for start in tl.range(first_k, last_k, UNROLL, num_stages=STAGES):
        for step in tl.static_range(UNROLL):
            k = start + step
            x = x_desc.load([part * BLOCK_T, k * BLOCK_K]).T
            w = w_desc.load([w_row, k * BLOCK_K])
            if FP8:
                # Past the last step the tiles are zeros, and so must the scales be numbers.
                x_scale = tl.load(x_scale_ptr + k * x_scale_stride + row, mask=in_scales & (k < num_k), other=0.0)
                total += tl.dot(w, x) * (x_scale * tl.load(w_scales + k, mask=k < num_k, other=0.0))[None, :]
            else:
                total = tl.dot(w, x, total, input_precision="ieee")
            if SILU:
                w = w_desc.load([w_row + second_row, k * BLOCK_K])
                if FP8:
                    w_scale = tl.load(second_w_scales + k, mask=k < num_k, other=0.0)
                    second_total += tl.dot(w, x) * (x_scale * w_scale)[None, :]
                else:
                    second_total = tl.dot(w, x, second_total, input_precision="ieee")
    columns = column + tl.arange(0, BLOCK_N)
    in_columns = columns < num_columns
    mask = in_columns[:, None] & in_rows[None, :]
    out_row = (split * num_rows + row).to(tl.int64) if SPLIT else row.to(tl.int64)
    out = out_ptr + out_row[None, :] * out_stride + columns[:, None]
    if SILU:
        total = total / (1.0 + tl.exp(-total)) * second_total
        if FP8:
            # Columns past the last belong to another matrix.
            values, scale = quantise(tl.where(in_columns[:, None], total, 0.0).T)
            tl.store(out, values.T, mask=mask)
            tl.store(out_scale_ptr + column // 128 * out_scale_stride + row, scale, mask=in_rows)
        else:
            tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits(
    part_ptr,
    out_ptr,
    out_scale_ptr,
    row_block,
    column_block,
    num_rows,
    num_columns,
    rows_apart,
    part_stride,
    out_stride,
    out_scale_stride,
    NUM_SPLITS: tl.constexpr,
    SILU: tl.constexpr,
    QUANTISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of BLOCK_T rows and 128 columns."""
    row = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = column_block * 128 + tl.arange(0, 128)
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    total = tl.zeros([BLOCK_T, 128], tl.float32)
    second_total = tl.zeros([BLOCK_T, 128], tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        part = part_ptr + (split * rows_apart + row).to(tl.int64)[:, None] * part_stride + column[None, :]
        total += tl.load(part, mask=mask, other=0.0)
        if SILU:
            second_total += tl.load(part + num_columns, mask=mask, other=0.0)
    out = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    if SILU:
        total = total / (1.0 + tl.exp(-total)) * second_total
    if QUANTISE:
        values, scale = quantise(total)
        tl.store(out, values, mask=mask)
        tl.store(out_scale_ptr + column_block * out_scale_stride + row, scale, mask=row < num_rows)
    else:
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_apart", "out_scale_stride"])
def sum_splits_kernel(
    part_ptr,
    out_ptr,
    out_scale_ptr,
    num_tiles_ptr,
    num_rows,
    num_columns,
    rows_apart,
    part_stride,
    out_stride,
    out_scale_stride,
    NUM_SPLITS: tl.constexpr,
    SILU: tl.constexpr,
    QUANTISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Sum over splits of BLOCK_T rows and 128 columns; with SILU of gate and up, num_columns apart. With a TILE of rows, of those in use alone."""
    if PDL:
        # Before it waits: the product before has waited itself, so whatever a kernel behind reads early is older than that.
        gdc_launch_dependents()
        gdc_wait()
    column_block = tl.program_id(1)
    if TILE:
        num_blocks = tl.load(num_tiles_ptr, cache_modifier=".cg") * (TILE // BLOCK_T)
        for row_block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
            _sum_splits(
                part_ptr, out_ptr, out_scale_ptr, row_block, column_block, num_rows, num_columns, rows_apart,
                part_stride, out_stride, out_scale_stride, NUM_SPLITS, SILU, QUANTISE, BLOCK_T,
            )  # fmt: skip
    else:
        _sum_splits(
            part_ptr, out_ptr, out_scale_ptr, tl.program_id(0), column_block, num_rows, num_columns, rows_apart,
            part_stride, out_stride, out_scale_stride, NUM_SPLITS, SILU, QUANTISE, BLOCK_T,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Which expert each tile of `num_rows` rows meets: int32 [max_tiles], of which the first `num_used` (int32 [1]) count.

    `num_expected`: about so many will count, by which products are cut. `expert` has a number also where none counts. `done`: int32
    [tiles of shared experts + max_tiles], zeros: the ring's first product notes there what it has of each tile, so that the second
    takes a tile's rows while other tiles are still computed. For one pair of products: who places the rows makes the zeros.
    """

    expert: Tensor
    num_used: Tensor
    max_tiles: int
    num_rows: int
    num_expected: int
    done: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Operands:
    """A product's tensors as the kernels take them: weights stacked over E; absent scales replaced by something to point at."""

    x_SK: Tensor
    x_scales: Tensor
    w_EK: Tensor
    w_scales: Tensor
    expert_rows: int
    expert_scale_rows: int
    num_columns: int
    fp8: bool

    @property
    def num_rows(self) -> int:
        return self.x_SK.shape[0]

    @property
    def block_k(self) -> int:
        """Columns of a step: 128 bytes of a row, which for FP8 share a scale."""
        return 128 // self.x_SK.element_size()

    @property
    def num_k(self) -> int:
        return -(-self.x_SK.shape[1] // self.block_k)

    @property
    def second_scale_row(self) -> int:
        """Where the scales of an expert's up begin, behind its gate's."""
        return -(-self.num_columns // BLOCK)


def operands(x: Tensor | QuantisedRows, w: Tensor | Fp8Weight, *, silu: bool) -> Operands:
    """`x` [S, K]; `w` [N, K] or [E, N, K]; with `silu` N is 2I, gate above up. ValueError where rows of W do not begin on 16 bytes."""
    x_SK = x.values if isinstance(x, QuantisedRows) else x
    w_ENK = w.quantised if isinstance(w, Fp8Weight) else w
    expert_rows, width = w_ENK.shape[-2:]
    if width * w_ENK.element_size() % 16:
        raise ValueError(f"on a GPU rows of a weight must be multiples of 16 bytes; {width} of {w_ENK.dtype} are not")
    assert isinstance(x, QuantisedRows) == isinstance(w, Fp8Weight)
    assert not isinstance(w, Fp8Weight) or w.scales.is_contiguous()
    assert not isinstance(x, QuantisedRows) or (x.scales.stride(0) == 1 and x.scales.stride(1) % 4 == 0)
    return Operands(
        x_SK=x_SK,
        x_scales=x.scales if isinstance(x, QuantisedRows) else x_SK,
        w_EK=w_ENK.view(-1, width),
        w_scales=w.scales if isinstance(w, Fp8Weight) else w_ENK,
        expert_rows=expert_rows,
        expert_scale_rows=w.scales.shape[-2] if isinstance(w, Fp8Weight) else 0,
        num_columns=expert_rows // 2 if silu else expert_rows,
        fp8=isinstance(w, Fp8Weight),
    )


def empty_product(
    op: Operands, *, silu: bool, num_rows: int | None = None, dtype: torch.dtype | None = None
) -> Tensor | QuantisedRows:
    """What a product fills, if not said as many rows as x: FP8 from FP8 with `silu`, bf16 from FP8 without, else the dtype of x."""
    num_rows = op.num_rows if num_rows is None else num_rows
    if silu and op.fp8:
        return empty_rows(num_rows, op.num_columns, op.x_SK.device)
    dtype = dtype or (torch.bfloat16 if op.fp8 else op.x_SK.dtype)
    return torch.empty(num_rows, op.num_columns, dtype=dtype, device=op.x_SK.device)


@dataclass(frozen=True, kw_only=True)
class FewRows:
    """How `few_rows` is cut: tiles of `block_t` rows and `block_n` columns, `num_splits` parts of K, `unroll` steps a turn."""

    block_t: int
    block_n: int = 128
    num_splits: int = 1
    unroll: int = 1
    stages: int = 3
    num_warps: int = 4


def few_rows(
    x: Tensor | QuantisedRows, w: Tensor | Fp8Weight, cut: FewRows, *, silu: bool = False, tiles: Tiles | None = None
) -> Tensor | QuantisedRows:
    """x W^T, or with `silu` silu(x gate^T) * (x up^T), quantised if FP8. `x` [S, K]; `w` [N, K], or [E, N, K] with `tiles`."""
    op = operands(x, w, silu=silu)
    out = empty_product(op, silu=silu)
    split = cut.num_splits > 1
    fused_silu = silu and not split
    assert not (fused_silu and op.fp8) or cut.block_n == BLOCK
    num_columns = op.expert_rows if split else op.num_columns
    parts = out.values if isinstance(out, QuantisedRows) else out
    if split:
        parts = torch.empty(cut.num_splits * op.num_rows, num_columns, dtype=torch.float32, device=op.x_SK.device)
    out_scales = out.scales if isinstance(out, QuantisedRows) else parts
    # Parts of a tile: a tile of many rows may be multiplied a few at a time.
    num_parts = tiles.num_rows // cut.block_t if tiles else 1
    num_t = tiles.max_tiles * num_parts if tiles else triton.cdiv(op.num_rows, cut.block_t)
    num_n = triton.cdiv(num_columns, cut.block_n)
    few_rows_kernel[(*((num_n, num_t) if tiles else (num_t, num_n)), cut.num_splits)](
        TensorDescriptor.from_tensor(op.x_SK, [cut.block_t, op.block_k]), TensorDescriptor.from_tensor(op.w_EK, [cut.block_n, op.block_k]),
        op.x_scales, op.w_scales, parts, out_scales, tiles.expert if tiles else parts, tiles.num_used if tiles else parts,
        op.num_rows, num_columns, op.num_k, cut.num_splits, op.expert_rows, op.num_columns, op.x_scales.stride(-1) // 4,
        op.expert_scale_rows, op.second_scale_row, parts.stride(0), out_scales.stride(-1),
        FP8=op.fp8, SILU=fused_silu, SPLIT=split, GROUPED=tiles is not None, BLOCK_T=cut.block_t, BLOCK_N=cut.block_n, BLOCK_K=op.block_k,
        PARTS=num_parts, UNROLL=cut.unroll, STAGES=cut.stages, num_warps=cut.num_warps, **overlap(parts.device),
    )  # fmt: skip
    if split:
        sum_splits(parts, out, num_splits=cut.num_splits, silu=silu)
    return out


def sum_splits(
    parts: Tensor,
    out: Tensor | QuantisedRows,
    *,
    num_splits: int,
    silu: bool,
    rows_apart: int | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Fill `out` [M, N] from fp32 [num_splits * M, N], or with `silu` [num_splits * M, 2N]; parts may lie more rows apart than M.

    `tiles`: of M; where few of them are expected, only the rows in use are filled.
    """
    target = out.values if isinstance(out, QuantisedRows) else out
    out_scales = out.scales if isinstance(out, QuantisedRows) else target
    num_rows, num_columns = target.shape
    block_t = 4
    num_t, num_n = triton.cdiv(num_rows, block_t), triton.cdiv(num_columns, BLOCK)
    tile = 0
    if tiles is not None and tiles.num_expected < tiles.max_tiles:
        tile = tiles.num_rows
        num_t = min(num_t, triton.cdiv(8 * num_processors(target.device), num_n))
    sum_splits_kernel[(num_t, num_n)](
        parts, target, out_scales, tiles.num_used if tiles else out_scales, num_rows, num_columns, rows_apart or num_rows, parts.stride(0), target.stride(0), out_scales.stride(-1),
        NUM_SPLITS=num_splits, SILU=silu, QUANTISE=isinstance(out, QuantisedRows), BLOCK_T=block_t, TILE=tile,
        **overlap(target.device),
    )  # fmt: skip
