"""Products of few rows on Hopper, x W^T dense or by expert, FP8 block-scaled or bf16, in Gluon. Bound: the bytes of W.

    weights -> a ring of tiles    one warp, bulk copies; it waits for the kernel before only where that says which weights
    rows    -> the same ring      one warp, once the kernel that makes them has ended, or has noted their tile (`Tiles.done`)
    ring    -> sums -> out        four warps; rows of W are the M of each product, the few rows of x its N

One persistent program an SM with a ring of 200 KB: the memory is busy from before the kernel that makes the rows has ended
until the last tile, through the ends of tiles too. The shared experts of a layer are computed beside the routed ones and
first: their weights are known before the gate has chosen. Where a matrix has columns for few SMs, parts of K are units of
their own (`num_splits`): its weights then lie in the rings whole when the rows come. Heads with a matrix each are units too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.gluon.mla_segments import next_slot
from serving.kernels.quant import BLOCK, Fp8Weight, QuantisedRows, empty_rows
from serving.kernels.triton.device import num_processors
from serving.kernels.triton.gemm import Operands, Tiles, empty_product, operands, sum_splits

FP8_MAX = gl.constexpr(448.0)
# Of the 227 KB of shared memory, what the ring may have.
_RING_BYTES = 219 << 10
# Each costs the sum behind it a row of fp32 more. And steps of two blocks of K that a ring holds for 64 columns and 16 rows: a part
# that is longer is read no sooner (16 x 4096 x 7168: 13.5 us for 10.9).
_MOST_SPLITS = 16
_HELD_STEPS = 10


@gluon.jit
def _copy_unit(
    desc, w_smem, full, free, slot, phase, row, second, first_k, num_steps,
    SILU: gl.constexpr, UNROLL: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The weights of one unit; returns where the ring stands behind them."""
    HALVES: gl.constexpr = 2 if SILU else 1
    for step in range(num_steps):
        mbarrier.wait(free.index(slot), phase)
        bar = full.index(slot)
        mbarrier.expect(bar, UNROLL * HALVES * desc.block_type.nbytes)
        for u in gl.static_range(UNROLL):
            k = (first_k + step * UNROLL + u) * BLOCK_K
            at = (slot * UNROLL + u) * HALVES
            tma.async_copy_global_to_shared(desc, [row, k], bar, w_smem.index(at))
            if SILU:
                tma.async_copy_global_to_shared(desc, [row + second, k], bar, w_smem.index(at + 1))
        slot, phase = next_slot(slot, phase, full.shape[0])
    return slot, phase


@gluon.jit
def _fetch_ahead(ptr, step, num, LANES: gl.constexpr):
    """Bring what lies at `ptr`, LANES times `step` on and at the last of `num` into the first cache; for one warp."""
    lane = gl.arange(0, LANES, layout=gl.BlockedLayout([1], [32], [1], [0]))
    at = ptr + gl.minimum(lane * step, num - 1)
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _lanes(values):
    """`values` for each thread of the partition."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.full([32 * gl.num_warps()], 0, gl.int32, layout) + values


@gluon.jit
def _fence():
    """Bulk copies behind it see what this thread has written or has seen written."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [_lanes(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _note(done_ptr):
    """One more unit of the tile lies in memory."""
    _fence()
    gl.thread_barrier()
    gl.atomic_add(done_ptr, 1, sem="release", scope="gpu")


@gluon.jit
def _wait_for_tile(done_ptr, num_units):
    """Until so many units of the tile are noted by the kernel before, which may still be at others."""
    missing = num_units
    while missing > 0:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l", [done_ptr + _lanes(0)], dtype=gl.int32, is_pure=False, pack=1
        )
        missing = num_units - gl.min(seen, axis=0)
    _fence()


@gluon.jit
def _wait_for_rows(full, phase):
    """Where rows are copied their scales are there too."""
    mbarrier.wait(full, phase)


@gluon.jit
def _place(index, num_shared, num_n):
    """Of a unit: its tile, its column tile, and whether it is a shared expert's.

    Columns of a tile before the next tile: what the device reads at one time then lies together. Beginning all experts at
    once, which lie megabytes apart, costs 4 to 9 % of the memory's rate.
    """
    at = index - num_shared * num_n
    is_shared = at < 0
    at = gl.where(is_shared, index, at)
    return at // num_n, at % num_n, is_shared


@gluon.jit
def _order(tiles, before, num_shared, AWAITS: gl.constexpr):
    """How units are dealt out: the first `head` of them to the first `early` programs, the rest to all.

    Of the kernel before some programs have one unit more than the others. The others' SMs are free first, so this kernel's first
    programs are there, and have as many units more as last as long as that one.
    """
    head = 0
    early = gl.num_programs(0)
    if AWAITS:
        num_units, num_programs, lasts = before
        left_over = (num_shared + gl.load(tiles[1], cache_modifier=".cg")) * num_units % num_programs
        if left_over > 0:
            early = gl.minimum(num_programs - left_over, early)
            head = early * lasts
    return head, early


@gluon.jit
def _first_unit(order):
    head, early = order
    program = gl.program_id(0)
    return gl.where(program < early, program, head + program)


@gluon.jit
def _next_unit(index, order):
    head, early = order
    ahead = index + early
    return gl.where(index < head, gl.where(ahead < head, ahead, head + gl.program_id(0)), index + gl.num_programs(0))


@gluon.jit
def _expert_of(tiles, index, num_shared, num_n, end, AWAITS: gl.constexpr):
    """Of a routed unit, read."""
    tile, _, is_shared = _place(index, num_shared, num_n)
    return gl.load(
        tiles[0] + tile, mask=(index < end) & (is_shared == 0), other=0, cache_modifier=".cg" if AWAITS else ""
    )


@gluon.jit
def _copy_weights(
    descs, w_smem, full, free, tiles, before, grid, routed, shared, scales, shared_scales, num_k,
    FP8: gl.constexpr, SILU: gl.constexpr, GROUPED: gl.constexpr, SHARED: gl.constexpr, KNOWN: gl.constexpr, SPLIT: gl.constexpr,
    HEADS: gl.constexpr, AWAITS: gl.constexpr, BLOCK_N: gl.constexpr, UNROLL: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    tile_expert_ptr, num_tiles_ptr, num_dense = tiles
    num_n, num_steps = grid
    w_scale_ptr, expert_scale_rows, second_scale_row = scales
    slot = 0
    phase = 1
    order = _order(tiles, before, shared[0] if SHARED else 0, AWAITS)
    index = _first_unit(order)
    first = 0
    if SHARED:
        num_shared, per_expert, row_step, k_step, second = shared
        first = num_shared * num_n
        while index < first:
            n = index % num_n
            expert = index // num_n // per_expert
            row = expert * row_step + n * BLOCK_N
            if FP8:
                sw_scale_ptr, scale_row_step, scale_second, scale_width, scale_k_step = shared_scales
                at = sw_scale_ptr + (expert * scale_row_step + n * BLOCK_N // 128) * scale_width + expert * scale_k_step
                _fetch_ahead(at, 32, num_k, 32)
                if SILU:
                    _fetch_ahead(at + scale_second * scale_width, 32, num_k, 32)
            slot, phase = _copy_unit(
                descs[1], w_smem, full, free, slot, phase, row, second, expert * k_step, num_steps, SILU, UNROLL, BLOCK_K
            )  # fmt: skip
            index = _next_unit(index, order)
    expert_rows, second_row = routed
    if GROUPED:
        if not KNOWN:
            gdc_wait()
        # Not from the first cache: it may hold what the launch before the last one knew.
        num_tiles = gl.load(num_tiles_ptr, cache_modifier=".cg")
        end = first + num_tiles * num_n
        at = tile_expert_ptr + (index - first) // num_n
        expert = gl.load(at, mask=index < end, other=0, cache_modifier=".cg")
        while index < end:
            n = (index - first) % num_n
            row = expert * expert_rows + n * BLOCK_N
            if FP8:
                at = w_scale_ptr + (expert * expert_scale_rows + n * BLOCK_N // 128).to(gl.int64) * num_k
                _fetch_ahead(at, 32, num_k, 32)
                if SILU:
                    _fetch_ahead(at + second_scale_row * num_k, 32, num_k, 32)
            index = _next_unit(index, order)
            at = tile_expert_ptr + (index - first) // num_n
            expert = gl.load(at, mask=index < end, other=0, cache_modifier=".cg")
            slot, phase = _copy_unit(
                descs[0], w_smem, full, free, slot, phase, row, second_row, 0, num_steps, SILU, UNROLL, BLOCK_K
            )  # fmt: skip
    else:
        end = first + num_dense * num_n
        while index < end:
            row = (index - first) % num_n * BLOCK_N
            first_k = 0
            if FP8:
                at = w_scale_ptr + (row // 128).to(gl.int64) * num_k
                _fetch_ahead(at, 32, num_k, 32)
                if SILU:
                    _fetch_ahead(at + second_scale_row * num_k, 32, num_k, 32)
            if SPLIT:
                first_k = index // num_n * num_steps * UNROLL
            if HEADS:
                row += index // num_n * expert_rows
            slot, phase = _copy_unit(
                descs[0], w_smem, full, free, slot, phase, row, second_row, first_k, num_steps, SILU, UNROLL, BLOCK_K
            )  # fmt: skip
            index += gl.num_programs(0)


@gluon.jit
def _copy_rows(
    descs, x_smem, full, free, tiles, done_ptr, before, grid, shared, shared_rows, scales, num_k,
    FP8: gl.constexpr, GROUPED: gl.constexpr, SHARED: gl.constexpr, ONE_TILE: gl.constexpr, AWAITS: gl.constexpr, BLOCK_T: gl.constexpr,
    UNROLL: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    if not AWAITS:
        gdc_wait()
    gdc_launch_dependents()
    num_n, num_steps = grid
    num_shared = shared[0] if SHARED else 0
    first_row, row_tiles = shared_rows
    num_tiles = gl.load(tiles[1], cache_modifier=".cg" if AWAITS else "") if GROUPED else tiles[2]
    slot = 0
    phase = 1
    order = _order(tiles, before, num_shared, AWAITS)
    index = _first_unit(order)
    while index < (num_shared + num_tiles) * num_n:
        tile, _, is_shared = _place(index, num_shared, num_n)
        if AWAITS:
            _wait_for_tile(done_ptr + index // num_n, before[0])
        row = gl.where(is_shared, first_row + tile % row_tiles * BLOCK_T, tile * BLOCK_T)
        first_step = 0
        if ONE_TILE:
            row = 0
            first_step = tile * num_steps
        if FP8:
            x_scale_ptr, x_scale_stride, sx_scale_ptr, sx_scale_stride = scales
            if is_shared:
                _fetch_ahead(sx_scale_ptr + row, sx_scale_stride, num_k * sx_scale_stride - row, 128)
            else:
                _fetch_ahead(x_scale_ptr + row, x_scale_stride, num_k * x_scale_stride - row, 128)
        for step in range(num_steps):
            mbarrier.wait(free.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, UNROLL * descs[0].block_type.nbytes)
            for u in gl.static_range(UNROLL):
                k = ((first_step + step) * UNROLL + u) * BLOCK_K
                to = x_smem.index(slot * UNROLL + u)
                if SHARED:
                    tma.async_copy_global_to_shared(descs[0], [row, k], bar, to, pred=is_shared == 0)
                    tma.async_copy_global_to_shared(descs[1], [row, k], bar, to, pred=is_shared)
                else:
                    tma.async_copy_global_to_shared(descs[0], [row, k], bar, to)
            slot, phase = next_slot(slot, phase, full.shape[0])
        index = _next_unit(index, order)


@gluon.jit
def _step_scales(
    x_scales, x_step, has_scale, w_scales, second_scales, step, num_k, SILU: gl.constexpr, UNROLL: gl.constexpr
):  # fmt: skip
    """Of each of the UNROLL parts of a step: the rows' scales, the weights', and with SILU up's. Multiplied where they are used:
    an instruction that needs them would wait here."""
    scales = ()
    for u in gl.static_range(UNROLL):
        k = step * UNROLL + u
        x_by = gl.load(x_scales + k * x_step, mask=has_scale & (k < num_k), other=0.0)
        w_by = gl.load(w_scales + k, mask=k < num_k, other=0.0)
        scales = scales + (x_by, w_by)  # type: ignore[assignment]  # noqa: RUF005
        if SILU:
            scales = scales + (gl.load(second_scales + k, mask=k < num_k, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return scales


@gluon.jit
def _multiply(
    x_smem, w_smem, full, free, scales, outputs, tiles, done_ptr, before, grid, shared, shared_rows, shared_scales, sizes,
    FP8: gl.constexpr, SILU: gl.constexpr, QUANTISE: gl.constexpr, GROUPED: gl.constexpr, SHARED: gl.constexpr,
    SPLIT: gl.constexpr, HEADS: gl.constexpr, NOTES: gl.constexpr, AWAITS: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr,
    UNROLL: gl.constexpr,
):  # fmt: skip
    if not AWAITS:
        gdc_wait()
    out_ptr, out_scale_ptr, out_stride, out_scale_stride, shared_out_row = outputs
    x_scale_ptr, w_scale_ptr, x_scale_stride, expert_scale_rows, second_scale_row = scales
    x_rows, shared_x_rows, num_rows, num_columns, num_k = sizes
    num_n, num_steps = grid
    num_shared = shared[0] if SHARED else 0
    num_tiles = gl.load(tiles[1], cache_modifier=".cg" if AWAITS else "") if GROUPED else tiles[2]
    HALVES: gl.constexpr = 2 if SILU else 1
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 32 if FP8 else 16])
    token = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, layout))
    slot = 0
    phase = 0
    order = _order(tiles, before, num_shared, AWAITS)
    end = (num_shared + num_tiles) * num_n
    index = _first_unit(order)
    expert = _expert_of(tiles, index, num_shared, num_n, end, AWAITS) if FP8 and GROUPED else 0
    while index < end:
        tile, n, is_shared = _place(index, num_shared, num_n)
        ahead = _next_unit(index, order)
        row = tile * BLOCK_T + token
        column = n * BLOCK_N
        own_row = row
        first_step = 0
        if AWAITS:
            _wait_for_rows(full.index(slot), phase)
        if SPLIT:
            own_row = token
            first_step = tile * num_steps
        if FP8:
            x_scales = x_scale_ptr + own_row
            has_scale = own_row < x_rows
            x_step = x_scale_stride
            w_scales = w_scale_ptr + (column // 128).to(gl.int64) * num_k
            if GROUPED:
                w_scales += (expert * expert_scale_rows).to(gl.int64) * num_k
                # Its address is wanted before anything else of the next unit.
                expert = _expert_of(tiles, ahead, num_shared, num_n, end, AWAITS)
            second_scales = w_scales + second_scale_row * num_k
            if SHARED:
                sx_scale_ptr, sx_scale_stride, sw_scale_ptr, row_step, scale_second, scale_width, k_step = shared_scales
                if is_shared:
                    first_row, row_tiles = shared_rows
                    which = tile // shared[1]
                    x_row = first_row + tile % row_tiles * BLOCK_T + token
                    x_scales = sx_scale_ptr + x_row
                    has_scale = x_row < shared_x_rows
                    x_step = sx_scale_stride
                    w_scales = sw_scale_ptr + (which * row_step + column // 128) * scale_width + which * k_step
                    second_scales = w_scales + scale_second * scale_width
        total = gl.zeros([BLOCK_N, BLOCK_T], gl.float32, layout)
        second_total = gl.zeros([BLOCK_N, BLOCK_T], gl.float32, layout)
        if FP8:
            # A row of a padded tile that was never written may have any scale; its own sums alone are lost.
            now = _step_scales(x_scales, x_step, has_scale, w_scales, second_scales, first_step, num_k, SILU, UNROLL)
            later = _step_scales(
                x_scales, x_step, has_scale, w_scales, second_scales, first_step + 1, num_k, SILU, UNROLL
            )
        for step in range(num_steps):
            mbarrier.wait(full.index(slot), phase)
            if FP8:
                parts = ()
                for u in gl.static_range(UNROLL):
                    x = x_smem.index(slot * UNROLL + u).permute((1, 0))
                    for half in gl.static_range(HALVES):
                        zero = gl.zeros([BLOCK_N, BLOCK_T], gl.float32, layout)
                        w = w_smem.index((slot * UNROLL + u) * HALVES + half)
                        parts = parts + (warpgroup_mma(w, x, zero, use_acc=False, is_async=True),)  # type: ignore[assignment]  # noqa: RUF005
                if UNROLL * HALVES == 1:
                    parts = (warpgroup_mma_wait(0, deps=parts),)  # type: ignore[assignment]
                else:
                    parts = warpgroup_mma_wait(0, deps=parts)
                mbarrier.arrive(free.index(slot), count=1)
                for u in gl.static_range(UNROLL):
                    x_by = now[u * (HALVES + 1)]
                    total += parts[u * HALVES] * (x_by * now[u * (HALVES + 1) + 1])[None, :]
                    if SILU:
                        second_total += parts[u * HALVES + 1] * (x_by * now[u * (HALVES + 1) + 2])[None, :]
                # Two steps ahead: a step is shorter than these loads.
                now = later
                later = _step_scales(
                    x_scales, x_step, has_scale, w_scales, second_scales, first_step + step + 2, num_k, SILU, UNROLL
                )
            else:
                sum_0 = total
                sum_1 = second_total
                for u in gl.static_range(UNROLL):
                    x = x_smem.index(slot * UNROLL + u).permute((1, 0))
                    sum_0 = warpgroup_mma(w_smem.index((slot * UNROLL + u) * HALVES), x, sum_0, is_async=True)
                    if SILU:
                        sum_1 = warpgroup_mma(w_smem.index((slot * UNROLL + u) * HALVES + 1), x, sum_1, is_async=True)
                if SILU:
                    total, second_total = warpgroup_mma_wait(0, deps=(sum_0, sum_1))
                else:
                    total = warpgroup_mma_wait(0, deps=(sum_0,))
                mbarrier.arrive(free.index(slot), count=1)
            slot, phase = next_slot(slot, phase, full.shape[0])
        columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
        out_row = gl.where(is_shared, shared_out_row, 0) + row
        group = n
        to = columns
        if HEADS:
            out_row = token
            group = tile * num_n + n
            to = columns + tile * num_columns
        in_rows = out_row < num_rows
        mask = (columns < num_columns)[:, None] & in_rows[None, :]
        if SILU:
            total = total / (1.0 + gl.exp(-total)) * second_total
        if QUANTISE:
            # Columns past the last belong to another matrix.
            total = gl.where((columns < num_columns)[:, None], total, 0.0)
            largest = gl.max(gl.abs(total), axis=0)
            scale = gl.where(largest > 0, largest / FP8_MAX, 1.0)
            total = total / scale[None, :]
            gl.store(out_scale_ptr + group * out_scale_stride + out_row, scale, mask=in_rows)
        out = out_ptr + out_row.to(gl.int64)[None, :] * out_stride + to[:, None]
        gl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)
        if NOTES:
            _note(done_ptr + index // num_n)
        index = ahead
    if AWAITS:
        # Who waits for this kernel may rely on the one before it too.
        gdc_wait()


@gluon.jit(do_not_specialize=["x_rows", "num_rows", "num_dense", "x_scale_stride", "out_scale_stride", "num_shared", "shared_tiles", "shared_out_row", "shared_x_rows", "shared_x_row", "sx_scale_stride", "row_tiles", "units_before", "programs_before", "unit_lasts"])  # fmt: skip
def few_rows_kernel(
    x_desc, w_desc, sx_desc, sw_desc, out_ptr, out_scale_ptr, tile_expert_ptr, num_tiles_ptr, done_ptr, units_before, programs_before, unit_lasts,
    x_scale_ptr, w_scale_ptr, sx_scale_ptr, sw_scale_ptr,
    num_dense, x_rows, num_rows, num_columns, num_n, num_k, num_steps, expert_rows, second_row, x_scale_stride, expert_scale_rows, second_scale_row,
    out_stride, out_scale_stride,
    num_shared, shared_tiles, shared_row_step, shared_k_step, shared_second, shared_x_rows, shared_x_row, row_tiles, shared_out_row,
    sx_scale_stride, scale_row_step, scale_second, scale_width, scale_k_step,
    FP8: gl.constexpr, SILU: gl.constexpr, QUANTISE: gl.constexpr, GROUPED: gl.constexpr, SHARED: gl.constexpr, KNOWN: gl.constexpr,
    SPLIT: gl.constexpr, HEADS: gl.constexpr, NOTES: gl.constexpr, AWAITS: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, UNROLL: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Units of BLOCK_T rows by BLOCK_N columns (with SILU of gate and up); see the head of this file and `few_rows`.

    With SPLIT or HEADS there is one tile of rows, and what counts tiles counts the parts of K or the heads.
    """
    HALVES: gl.constexpr = 2 if SILU else 1
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * UNROLL, BLOCK_T, BLOCK_K], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * UNROLL * HALVES, BLOCK_N, BLOCK_K], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    tiles = (tile_expert_ptr, num_tiles_ptr, num_dense)
    before = (units_before, programs_before, unit_lasts)
    grid = (num_n, num_steps)
    shared = (num_shared, shared_tiles, shared_row_step, shared_k_step, shared_second)
    shared_rows = (shared_x_row, row_tiles)
    shared_by = (sw_scale_ptr, scale_row_step, scale_second, scale_width, scale_k_step)
    shared_scales = (sx_scale_ptr, sx_scale_stride) + shared_by  # noqa: RUF005
    scales = (x_scale_ptr, w_scale_ptr, x_scale_stride, expert_scale_rows, second_scale_row)
    outputs = (out_ptr, out_scale_ptr, out_stride, out_scale_stride, shared_out_row)
    gl.warp_specialize(
        [
            (_multiply, (x_smem, w_smem, full, free, scales, outputs, tiles, done_ptr, before, grid, shared, shared_rows, shared_scales,
                         (x_rows, shared_x_rows, num_rows, num_columns, num_k),
                         FP8, SILU, QUANTISE, GROUPED, SHARED, SPLIT, HEADS, NOTES, AWAITS, BLOCK_T, BLOCK_N, UNROLL)),
            (_copy_weights, ((w_desc, sw_desc), w_smem, full, free, tiles, before, grid, (expert_rows, second_row), shared,
                             (w_scale_ptr, expert_scale_rows, second_scale_row),
                             shared_by, num_k, FP8, SILU, GROUPED, SHARED, KNOWN, SPLIT, HEADS, AWAITS, BLOCK_N, UNROLL, BLOCK_K)),
            (_copy_rows, ((x_desc, sx_desc), x_smem, full, free, tiles, done_ptr, before, grid, shared, shared_rows,
                          (x_scale_ptr, x_scale_stride, sx_scale_ptr, sx_scale_stride), num_k,
                          FP8, GROUPED, SHARED, SPLIT or HEADS, AWAITS, BLOCK_T, UNROLL, BLOCK_K)),
        ],
        [1, 1],
        [40, 40],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Experts that every one of `num_tokens` tokens takes, computed beside the routed ones and put behind their rows.

    `w`: gate_up [2 S I, D] or down [D, S I] of the S = `num_experts` of them. `x`: the tokens' rows [T, D]; None: for down, what
    gate_up has put behind the routed rows.
    """

    x: Tensor | QuantisedRows | None
    w: Tensor | Fp8Weight
    num_experts: int
    num_tokens: int

    def num_tiles(self, block_t: int) -> int:
        """Of one expert."""
        return -(-self.num_tokens // block_t)


def few_rows(
    x: Tensor | QuantisedRows,
    w: Tensor | Fp8Weight,
    *,
    silu: bool = False,
    tiles: Tiles | None = None,
    shared: Shared | None = None,
    known: bool = False,
    dtype: torch.dtype | None = None,
    block_n: int | None = None,
    unroll: int | None = None,
    num_splits: int = 1,
) -> Tensor | QuantisedRows:
    """As `triton.gemm.few_rows`, bf16 or FP8. With `shared` the result has S * ceil(T / tile) * tile rows more than `tiles` may use.

    `dtype`: of the result, fp32 from bf16. `known`: weights are read by `tiles` before the wait. So the kernel launched directly before
    must wait itself before it lets this one start, and `tiles` must be older than it; another that has only passed by is not enough. With
    `tiles.done` that kernel is the product with `silu` by the same tiles, whose SMs end at different times: a tile's rows are read here
    as soon as all of them are there. `num_splits`: parts of K of a plain product, summed by a second kernel in one order.
    """
    op = operands(x, w, silu=silu)
    block_t = tiles.num_rows if tiles else min(64, max(16, triton.next_power_of_2(op.num_rows)))
    num_routed = tiles.max_tiles if tiles else triton.cdiv(op.num_rows, block_t)
    num_shared = shared.num_experts * shared.num_tiles(block_t) if shared else 0
    num_rows = (num_routed + num_shared) * block_t if shared else op.num_rows
    out = empty_product(op, silu=silu, num_rows=num_rows, dtype=dtype)
    split = num_splits > 1
    target = out
    if split:
        assert not silu
        assert tiles is None
        assert num_routed == 1
        num_routed, num_rows = num_splits, num_splits * block_t
        target = empty_product(op, silu=False, num_rows=num_rows, dtype=torch.float32)
    processors = num_processors(op.x_SK.device)
    if block_n is None:
        expected = (tiles.num_expected if tiles else num_routed) + num_shared
        block_n = 64 if split else _block_n(op, silu=silu, num_tiles=expected, processors=processors)
    assert not (silu and op.fp8) or block_n == BLOCK, "a unit writes one scale a row"
    if unroll is None:
        unroll = 4 if block_t == 16 and not silu and not split else 2
    cut = _Cut(
        block_t=block_t,
        block_n=block_n,
        unroll=unroll,
        num_tiles=num_routed,
        num_steps=triton.cdiv(triton.cdiv(op.num_k, unroll), num_splits),
    )
    beside = _beside(shared, x, op, block_t=block_t, first_row=num_routed * block_t, silu=silu) if shared else None
    _launch(
        op, target, cut, num_rows=num_rows, silu=silu, tiles=tiles, beside=beside, num_shared=num_shared, known=known, split=split
    )  # fmt: skip
    if split:
        assert isinstance(target, Tensor)
        sum_splits(target, out, num_splits=num_splits, silu=False, rows_apart=block_t)
    return out


def splits_for(num_rows_w: int, num_k: int, processors: int) -> int:
    """Parts of K for `few_rows` such that the rings of all SMs hold the whole matrix before the rows come; 1: they cannot."""
    num_steps = -(-num_k // 2)
    most = min(_MOST_SPLITS, processors // -(-num_rows_w // 64), num_steps)
    if most < 2:
        return 1
    steps = -(-num_steps // most)
    return -(-num_steps // steps) if steps <= _HELD_STEPS else 1


def few_rows_by_head(x_BHC: Tensor, w_HVC: Tensor, *, quantise: bool) -> Tensor | QuantisedRows:
    """x[:, h] W[h]^T of every head h, side by side: [B, H V] in bf16, or FP8 where V is a scale's width.

    bf16; x contiguous, B up to 64, C a multiple of 256; rows of W contiguous, heads of W a whole number of its rows apart.
    """
    num_rows, num_heads, width = x_BHC.shape
    num_columns, row_stride = w_HVC.shape[1], w_HVC.stride(1)
    assert x_BHC.is_contiguous()
    assert w_HVC.stride(2) == 1
    assert w_HVC.stride(0) % row_stride == 0
    rows_apart = w_HVC.stride(0) // row_stride
    w_NC = w_HVC.as_strided(((num_heads - 1) * rows_apart + num_columns, width), (row_stride, 1))
    x_BK = x_BHC.flatten(1)
    op = Operands(
        x_SK=x_BK, x_scales=x_BK, w_EK=w_NC, w_scales=w_NC, expert_rows=rows_apart, expert_scale_rows=0,
        num_columns=num_columns, fp8=False,
    )  # fmt: skip
    unroll = 4 if num_rows <= 16 else 2
    assert width % (op.block_k * unroll) == 0, "a step of one head would reach into the next"
    assert not quantise or num_columns == BLOCK, "a unit writes one scale a row"
    cut = _Cut(
        block_t=max(16, triton.next_power_of_2(num_rows)),
        block_n=BLOCK if quantise else 64,
        unroll=unroll,
        num_tiles=num_heads,
        num_steps=width // (op.block_k * unroll),
    )
    out: Tensor | QuantisedRows
    if quantise:
        out = empty_rows(num_rows, num_heads * num_columns, x_BHC.device)
    else:
        out = torch.empty(num_rows, num_heads * num_columns, dtype=x_BHC.dtype, device=x_BHC.device)
    _launch(op, out, cut, num_rows=num_rows, heads=True)
    return out


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """Units of `block_t` rows and `block_n` columns, `num_tiles` of rows (of parts of K, of heads), `unroll` blocks of K a step."""

    block_t: int
    block_n: int
    unroll: int
    num_tiles: int
    num_steps: int


def _launch(
    op: Operands,
    out: Tensor | QuantisedRows,
    cut: _Cut,
    *,
    num_rows: int,
    silu: bool = False,
    tiles: Tiles | None = None,
    beside: tuple[Operands, tuple[int, ...]] | None = None,
    num_shared: int = 0,
    known: bool = False,
    split: bool = False,
    heads: bool = False,
) -> None:
    """`num_rows`: of `out`, which has FP8 rows if a unit is to quantise its own."""
    target = out.values if isinstance(out, QuantisedRows) else out
    out_scales = out.scales if isinstance(out, QuantisedRows) else target
    block_t, block_n, unroll = cut.block_t, cut.block_n, cut.unroll
    num_n = triton.cdiv(op.num_columns, block_n)
    stages = _RING_BYTES // (unroll * 128 * (block_n * (2 if silu else 1) + block_t))
    shared, shared_numbers = beside or (op, (0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0))
    done = tiles.done if tiles and (silu or known) else None
    assert done is None or len(done) == num_shared + cut.num_tiles, "a tile would have no counter of its own"
    assert done is None or not silu or block_n == _silu_block(op), "more or fewer units of a tile than are awaited"
    processors = num_processors(target.device)
    before = _before(op, cut, num_shared, processors) if known else (1, 1, 0)
    few_rows_kernel[(min(processors, (cut.num_tiles + num_shared) * num_n),)](
        _descriptor(op.x_SK, [block_t, op.block_k]), _descriptor(op.w_EK, [block_n, op.block_k]),
        _descriptor(shared.x_SK, [block_t, op.block_k]), _descriptor(shared.w_EK, [block_n, op.block_k]),
        target, out_scales, tiles.expert if tiles else target, tiles.num_used if tiles else target, target if done is None else done, *before,
        op.x_scales, op.w_scales, shared.x_scales, shared.w_scales,
        cut.num_tiles, op.num_rows, num_rows, op.num_columns, num_n, op.num_k, cut.num_steps, op.expert_rows, op.num_columns,
        op.x_scales.stride(-1), op.expert_scale_rows, op.second_scale_row, target.stride(0), out_scales.stride(-1),
        *shared_numbers,
        FP8=op.fp8, SILU=silu, QUANTISE=isinstance(out, QuantisedRows), GROUPED=tiles is not None, SHARED=beside is not None, KNOWN=known,
        SPLIT=split, HEADS=heads, NOTES=done is not None and silu, AWAITS=done is not None and known, BLOCK_T=block_t, BLOCK_N=block_n,
        BLOCK_K=op.block_k, UNROLL=unroll, STAGES=stages, num_warps=4, maxnreg=128, launch_pdl=True,
    )  # fmt: skip


def _block_n(op: Operands, *, silu: bool, num_tiles: int, processors: int) -> int:
    """Columns of a unit: few where there are few units; a scale's 128 in one where the result is quantised."""
    if silu:
        return _silu_block(op)
    return 128 if num_tiles * triton.cdiv(op.num_columns, 128) >= 4 * processors else 64


def _silu_block(op: Operands) -> int:
    return BLOCK if op.fp8 else 64


def _before(op: Operands, cut: _Cut, num_shared: int, processors: int) -> tuple[int, int, int]:
    """Of the product with `silu` that has made this one's rows: units a tile, programs, and as how many units of this one each of its lasts."""
    width, inner = op.num_columns, op.x_SK.shape[1]
    num_units = triton.cdiv(inner, _silu_block(op))
    num_programs = min(processors, (cut.num_tiles + num_shared) * num_units)
    return num_units, num_programs, round(2 * _silu_block(op) * width / (cut.block_n * inner))


def _beside(
    shared: Shared, x: Tensor | QuantisedRows, op: Operands, *, block_t: int, first_row: int, silu: bool
) -> tuple[Operands, tuple[int, ...]]:
    """The shared experts' operands, and how the kernel finds each expert's part of them."""
    beside = operands(x if shared.x is None else shared.x, shared.w, silu=silu)
    per_expert = shared.num_tiles(block_t)
    num_shared = shared.num_experts * per_expert
    inner = op.num_columns if silu else op.x_SK.shape[1]
    assert shared.num_experts == 1 or inner % (BLOCK if op.fp8 else op.block_k) == 0
    # Experts follow each other in the rows of gate_up, gates above ups, and in the columns of down.
    row_step, k_step, second = (inner, 0, beside.num_columns) if silu else (0, inner // op.block_k, 0)
    scale_width = triton.cdiv(beside.w_EK.shape[1], beside.block_k)
    x_row, row_tiles = (0, per_expert) if shared.x is not None else (first_row, num_shared)
    return beside, (
        num_shared, per_expert, row_step, k_step, second, beside.num_rows, x_row, row_tiles, first_row,
        beside.x_scales.stride(-1), row_step // BLOCK, beside.second_scale_row if silu else 0, scale_width, k_step,
    )  # fmt: skip


def _descriptor(x: Tensor, block: list[int]) -> Any:
    dtype = gl.float8e4nv if x.dtype == torch.float8_e4m3fn else gl.bfloat16
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, dtype))
