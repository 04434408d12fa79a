"""Products of many rows on Hopper: x W^T dense or by expert, FP8 block-scaled or bf16, in Gluon.

One persistent program an SM: a warp feeds a ring of shared tiles by the copy engine, two warpgroups of 64 rows each
multiply. Neither waits for the other, so the tensor cores compute for one while the other scales its products into its
fp32 sums, which FP8 wants every 128 columns (the tensor cores add FP8 products with 14 bits only).

Each warpgroup keeps two sums of [64, 128]: neighbouring column blocks, or gate and up of the same columns, whose
SiLU product then leaves quantised. Bound: the fp8 or bf16 rate of the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from serving.kernels.quant import Fp8Weight, QuantisedRows
from serving.kernels.triton.device import num_programs
from serving.kernels.triton.gemm import Tiles, empty_product, operands, sum_splits

# Rows and columns of a tile, and columns of a sum.
TILE_M = 128
TILE_N = 256
HALF_N = 128
FP8_MAX = gl.constexpr(448.0)


@gluon.jit
def _unit(index, num_m, num_n, num_k, num_splits, GROUP_M: gl.constexpr):
    """A unit of work: its row tile, column tile, split and range of k steps; neighbours share weights and rows in L2."""
    num_tiles = num_m * num_n
    split = index // num_tiles
    index = index % num_tiles
    width = GROUP_M * num_n
    first_m = index // width * GROUP_M
    size = gl.minimum(num_m - first_m, GROUP_M)
    m = first_m + index % width % size
    n = index % width // size
    return m, n, split, split * num_k // num_splits, (split + 1) * num_k // num_splits


@gluon.jit
def _load(
    x_desc,
    w_desc,
    x_smem,
    w_smem,
    ready,
    free,
    tile_expert_ptr,
    num_m,
    num_n,
    num_k,
    num_splits,
    expert_rows,
    second,
    step_n: gl.constexpr,
    WIDE: gl.constexpr,
    GROUPED: gl.constexpr,
    GROUP_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    num_w: gl.constexpr = 2 if WIDE else 1
    step_bytes: gl.constexpr = x_desc.block_type.nbytes + num_w * w_desc.block_type.nbytes
    count = 0
    for index in range(gl.program_id(0), num_m * num_n * num_splits, gl.num_programs(0)):
        m, n, _, first_k, last_k = _unit(index, num_m, num_n, num_k, num_splits, GROUP_M)
        row = n * step_n
        if GROUPED:
            row += gl.load(tile_expert_ptr + m) * expert_rows
        for k in range(first_k, last_k):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
            full = ready.index(stage)
            mbarrier.expect(full, step_bytes)
            tma.async_copy_global_to_shared(w_desc, [row, k * BLOCK_K], full, w_smem.index(num_w * stage))
            if WIDE:
                tma.async_copy_global_to_shared(w_desc, [row + second, k * BLOCK_K], full, w_smem.index(2 * stage + 1))
            tma.async_copy_global_to_shared(x_desc, [m * 128, k * BLOCK_K], full, x_smem.index(stage))
            count += 1


@gluon.jit
def _scale_add(part, scale, total):
    """total + part * scale. Volatile: the compiler would move it past the next product, and spill for it."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [part, scale, total], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _scale_pointers(
    x_scale_ptr, w_scale_ptr, tile_expert_ptr, rows, m, n, num_columns, num_k, expert_scale_rows, second_scale_row,
    step_n: gl.constexpr, SILU: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """Where a tile's scales of step 0 are: of its rows, of its first and of its second block of columns."""
    scale_row = n * step_n // 128
    if GROUPED:
        scale_row += gl.load(tile_expert_ptr + m) * expert_scale_rows
    first = w_scale_ptr + scale_row.to(gl.int64) * num_k
    # A second block past the last column is computed, by any scale, and not stored.
    has_second = SILU or n * step_n + 128 < num_columns
    return x_scale_ptr + rows, first, first + gl.where(has_second, second_scale_row, 0).to(gl.int64) * num_k


@gluon.jit
def _times(total, factor, dtype: gl.constexpr):
    """Rounded before and after, as rows that are stored and multiplied later."""
    return (total.to(dtype).to(gl.float32) * factor).to(dtype)


@gluon.jit
def _store_rows(smem, out_ptr, place_ptr, out_stride, first_column, num_columns):
    """[64, 128] to rows that lie apart, 16 bytes at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    place = gl.load(place_ptr + row).to(gl.int64)
    values = smem.load(layout)
    gl.store(out_ptr + place[:, None] * out_stride + column[None, :], values, mask=(column < num_columns)[None, :])


@gluon.jit
def _multiply(
    half: gl.constexpr,
    out_desc,
    x_smem,
    w_smem,
    out_smem,
    ready,
    free,
    x_scale_ptr,
    w_scale_ptr,
    out_ptr,
    out_scale_ptr,
    place_ptr,
    factor_ptr,
    tile_expert_ptr,
    num_rows,
    num_columns,
    num_m,
    num_n,
    num_k,
    num_splits,
    x_scale_stride,
    expert_scale_rows,
    second_scale_row,
    step_n: gl.constexpr,
    out_stride,
    out_scale_stride,
    FP8: gl.constexpr,
    SILU: gl.constexpr,
    SPLIT: gl.constexpr,
    PLACED: gl.constexpr,
    WIDE: gl.constexpr,
    GROUPED: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    num_w: gl.constexpr = 2 if WIDE else 1
    instr_k: gl.constexpr = 32 if FP8 else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, instr_k]
    )
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    num_units = num_m * num_n * num_splits
    # False, but not to the compiler: products go through one set of registers, where it would keep two and spill the sums.
    never = num_k < 0
    part = gl.zeros([64, 128], gl.float32, layout)
    count = 0
    # The grid is made for the most units there may be; of none at all the first is looked up too.
    num_m = gl.maximum(num_m, 1)
    first_index = gl.maximum(gl.minimum(gl.program_id(0), num_units - 1), 0)
    m, n, split, first_k, last_k = _unit(first_index, num_m, num_n, num_k, num_splits, GROUP_M)
    rows = m * 128 + half * 64 + gl.arange(0, 64, row_layout)
    if FP8:
        x_scales, w_scales_0, w_scales_1 = _scale_pointers(
            x_scale_ptr, w_scale_ptr, tile_expert_ptr, rows, m, n, num_columns, num_k, expert_scale_rows, second_scale_row,
            step_n, SILU, GROUPED,
        )  # fmt: skip
        x_scale = gl.load(x_scales + first_k * x_scale_stride, mask=rows < num_rows, other=0.0)
        w_scale_0 = gl.load(w_scales_0 + first_k)
        w_scale_1 = gl.load(w_scales_1 + first_k)
    for index in range(gl.program_id(0), num_units, gl.num_programs(0)):
        sum_0 = gl.zeros([64, 128], gl.float32, layout)
        sum_1 = gl.zeros([64, 128], gl.float32, layout)
        for k in range(first_k, last_k):
            stage = count % STAGES
            x_tile = x_smem.index(stage).slice(half * 64, 64)
            w_tile_0 = w_smem.index(num_w * stage).permute((1, 0))
            w_tile_1 = w_smem.index(num_w * stage + num_w - 1).permute((1, 0))
            mbarrier.wait(ready.index(stage), count // STAGES & 1)
            if FP8:
                part = warpgroup_mma(x_tile, w_tile_0, part, use_acc=never, is_async=True)
                scale_0 = x_scale * w_scale_0
                scale_1 = x_scale * w_scale_1
                next_k = gl.minimum(k + 1, last_k - 1)
                x_scale = gl.load(x_scales + next_k * x_scale_stride, mask=rows < num_rows, other=0.0)
                w_scale_0 = gl.load(w_scales_0 + next_k)
                w_scale_1 = gl.load(w_scales_1 + next_k)
                part = warpgroup_mma_wait(0, deps=[part])
                if WIDE:
                    sum_0 = _scale_add(part, scale_0[:, None], sum_0)
                    part = warpgroup_mma(x_tile, w_tile_1, part, use_acc=never, is_async=True)
                    part = warpgroup_mma_wait(0, deps=[part])
                    mbarrier.arrive(free.index(stage), count=1)
                    sum_1 = _scale_add(part, scale_1[:, None], sum_1)
                else:
                    mbarrier.arrive(free.index(stage), count=1)
                    sum_0 = _scale_add(part, scale_0[:, None], sum_0)
            else:
                part_0 = warpgroup_mma(x_tile, w_tile_0, sum_0, is_async=True)
                if WIDE:
                    part_1 = warpgroup_mma(x_tile, w_tile_1, sum_1, is_async=True)
                    sum_0, sum_1 = warpgroup_mma_wait(0, deps=[part_0, part_1])
                else:
                    sum_0 = warpgroup_mma_wait(0, deps=[part_0])
                mbarrier.arrive(free.index(stage), count=1)
            count += 1
        done_rows, done_n, done_split, first_row = rows, n, split, m * 128 + half * 64
        # The next tile's first scales arrive while this one is stored.
        next_index = gl.minimum(index + gl.num_programs(0), num_units - 1)
        m, n, split, first_k, last_k = _unit(next_index, num_m, num_n, num_k, num_splits, GROUP_M)
        rows = m * 128 + half * 64 + gl.arange(0, 64, row_layout)
        if FP8:
            x_scales, w_scales_0, w_scales_1 = _scale_pointers(
                x_scale_ptr, w_scale_ptr, tile_expert_ptr, rows, m, n, num_columns, num_k, expert_scale_rows, second_scale_row,
                step_n, SILU, GROUPED,
            )  # fmt: skip
            x_scale = gl.load(x_scales + first_k * x_scale_stride, mask=rows < num_rows, other=0.0)
            w_scale_0 = gl.load(w_scales_0 + first_k)
            w_scale_1 = gl.load(w_scales_1 + first_k)
        if SPLIT:
            columns = done_n * step_n + gl.arange(0, 128, column_layout)
            out = out_ptr + (done_split * num_rows + done_rows).to(gl.int64)[:, None] * out_stride + columns[None, :]
            in_rows = (done_rows < num_rows)[:, None]
            gl.store(out, sum_0, mask=in_rows & (columns < num_columns)[None, :])
            if WIDE:
                gl.store(out + 128, sum_1, mask=in_rows & (columns + 128 < num_columns)[None, :])
        elif SILU:
            hidden = sum_0 / (1.0 + gl.exp(-sum_0)) * sum_1
            if FP8:
                # Columns past the last belong to another matrix.
                columns = done_n * 128 + gl.arange(0, 128, column_layout)
                hidden = gl.where((columns < num_columns)[None, :], hidden, 0.0)
                largest = gl.max(gl.abs(hidden), axis=1)
                scale = gl.where(largest > 0, largest / FP8_MAX, 1.0)
                hidden = hidden * (1.0 / scale)[:, None]
                gl.store(out_scale_ptr + done_n * out_scale_stride + done_rows, scale, mask=done_rows < num_rows)
            tma.store_wait(0)
            out_smem.index(half).store(hidden.to(out_desc.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [first_row, done_n * 128], out_smem.index(half))
        elif PLACED:
            place = gl.load(place_ptr + done_rows)
            factor = gl.load(factor_ptr + done_rows, mask=place >= num_rows, other=1.0)[:, None]
            first_column = done_n * step_n
            out_smem.index(half).store(_times(sum_0, factor, out_desc.dtype))
            if WIDE:
                out_smem.index(half + 2).store(_times(sum_1, factor, out_desc.dtype))
            _store_rows(out_smem.index(half), out_ptr, place_ptr + first_row, out_stride, first_column, num_columns)
            if WIDE:
                _store_rows(
                    out_smem.index(half + 2), out_ptr, place_ptr + first_row, out_stride, first_column + 128, num_columns
                )  # fmt: skip
        else:
            tma.store_wait(0)
            out_smem.index(half).store(sum_0.to(out_desc.dtype))
            if WIDE:
                out_smem.index(half + 2).store(sum_1.to(out_desc.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [first_row, done_n * step_n], out_smem.index(half))
            if WIDE:
                tma.async_copy_shared_to_global(out_desc, [first_row, done_n * step_n + 128], out_smem.index(half + 2))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "x_scale_stride", "out_scale_stride"])
def product_kernel(
    x_desc,
    w_desc,
    out_desc,
    x_scale_ptr,
    w_scale_ptr,
    out_ptr,
    out_scale_ptr,
    place_ptr,
    factor_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    num_rows,
    num_columns,
    num_k,
    num_splits,
    expert_rows,
    second_row,
    x_scale_stride,
    expert_scale_rows,
    second_scale_row,
    out_stride,
    out_scale_stride,
    FP8: gl.constexpr,
    SILU: gl.constexpr,
    SPLIT: gl.constexpr,
    PLACED: gl.constexpr,
    WIDE: gl.constexpr,
    GROUPED: gl.constexpr,
    GROUP_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    step_n: gl.constexpr = 256 if WIDE and not SILU else 128
    num_n = (num_columns + step_n - 1) // step_n
    num_m = gl.load(num_tiles_ptr) if GROUPED else (num_rows + 127) // 128
    num_w: gl.constexpr = 2 if WIDE else 1
    num_staged: gl.constexpr = 1 if SPLIT else 4 if WIDE and not SILU else 2
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 128, BLOCK_K], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [num_w * STAGES, 128, BLOCK_K], w_desc.layout)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [num_staged, 64, 128], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), out_desc, x_smem, w_smem, out_smem, ready, free, x_scale_ptr, w_scale_ptr, out_ptr, out_scale_ptr,
                         place_ptr, factor_ptr, tile_expert_ptr, num_rows, num_columns, num_m, num_n, num_k, num_splits, x_scale_stride,
                         expert_scale_rows, second_scale_row, step_n, out_stride, out_scale_stride,
                         FP8, SILU, SPLIT, PLACED, WIDE, GROUPED, GROUP_M, STAGES)),
            (_multiply, (gl.constexpr(1), out_desc, x_smem, w_smem, out_smem, ready, free, x_scale_ptr, w_scale_ptr, out_ptr, out_scale_ptr,
                         place_ptr, factor_ptr, tile_expert_ptr, num_rows, num_columns, num_m, num_n, num_k, num_splits, x_scale_stride,
                         expert_scale_rows, second_scale_row, step_n, out_stride, out_scale_stride,
                         FP8, SILU, SPLIT, PLACED, WIDE, GROUPED, GROUP_M, STAGES)),
            (_load, (x_desc, w_desc, x_smem, w_smem, ready, free, tile_expert_ptr, num_m, num_n, num_k, num_splits,
                     expert_rows, second_row, step_n, WIDE, GROUPED, GROUP_M, BLOCK_K, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ManyRows:
    """How `many_rows` is cut: tiles of 128 rows and 256 columns, or half as many; `num_splits` parts of K; `group_m` row tiles share columns."""

    wide: bool = True
    num_splits: int = 1
    group_m: int = 8


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where rows [S, N] of a product go in `into` [S + T, N]. `place_S`: int32, whose row of S and more is multiplied by its `factor_S`,
    fp32, after it was rounded, and rounded again."""

    into: Tensor
    place_S: Tensor
    factor_S: Tensor


def many_rows(
    x: Tensor | QuantisedRows,
    w: Tensor | Fp8Weight,
    cut: ManyRows,
    *,
    silu: bool = False,
    tiles: Tiles | None = None,
    places: Places | None = None,
) -> Tensor | QuantisedRows:
    """x W^T, or with `silu` silu(x gate^T) * (x up^T), quantised if FP8; FP8 or bf16. `x` [S, K]; `w` [N, K], or [E, N, K] with
    `tiles` of 128 rows."""
    op = operands(x, w, silu=silu)
    out = empty_product(op, silu=silu) if places is None else places.into
    split = cut.num_splits > 1
    assert places is None or (tiles is not None and not silu and not split), "whole sums of rows by expert go to places"
    fused_silu = silu and not split
    assert cut.wide or not fused_silu
    assert tiles is None or tiles.num_rows == TILE_M
    num_columns = op.expert_rows if split else op.num_columns
    target = out.values if isinstance(out, QuantisedRows) else out
    parts = target
    if split:
        parts = torch.empty(cut.num_splits * op.num_rows, num_columns, dtype=torch.float32, device=op.x_SK.device)
    out_scales = out.scales if isinstance(out, QuantisedRows) else op.w_scales
    # What shared memory holds beside the tiles that wait to be stored.
    stages = (4 if split or fused_silu else 3) if cut.wide else 6
    num_n = triton.cdiv(num_columns, TILE_N if cut.wide and not fused_silu else HALF_N)
    max_units = (tiles.max_tiles if tiles else triton.cdiv(op.num_rows, TILE_M)) * num_n * cut.num_splits
    product_kernel[(min(num_programs(parts.device), max_units),)](
        _descriptor(op.x_SK, [TILE_M, op.block_k]), _descriptor(op.w_EK, [HALF_N, op.block_k]), _descriptor(target, [64, HALF_N]),
        op.x_scales, op.w_scales, parts, out_scales, out_scales if places is None else places.place_S, out_scales if places is None else places.factor_S,
        tiles.expert if tiles else out_scales, tiles.num_used if tiles else out_scales,
        op.num_rows, num_columns, op.num_k, cut.num_splits, op.expert_rows, op.num_columns if fused_silu else HALF_N,
        op.x_scales.stride(-1), op.expert_scale_rows, op.second_scale_row if fused_silu else 1, parts.stride(0), out_scales.stride(-1),
        FP8=op.fp8, SILU=fused_silu, SPLIT=split, PLACED=places is not None, WIDE=cut.wide, GROUPED=tiles is not None, GROUP_M=cut.group_m, BLOCK_K=op.block_k,
        STAGES=stages, num_warps=4,
    )  # fmt: skip
    if split:
        sum_splits(parts, out, num_splits=cut.num_splits, silu=silu, tiles=tiles)
    return out


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    dtype = gl.float8e4nv if x.dtype == torch.float8_e4m3fn else gl.bfloat16
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, dtype))
