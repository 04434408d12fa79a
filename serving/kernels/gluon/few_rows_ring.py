"""The kernel of `few_rows`: x W^T of few rows, dense or by expert, FP8 block-scaled or bf16, in Gluon. Bound: the bytes of W.

    weights -> a ring of tiles    one warp, bulk copies; it waits for the kernel before only where that says which weights
    rows    -> the same ring      one warp, once the kernel that makes them has ended, or has noted their tile (`Tiles.done`)
    ring    -> sums -> out        four warps; rows of W are the M of each product, the few rows of x its N

One persistent program an SM with a ring of 200 KB: the memory is busy from before the kernel that makes the rows has ended
until the last tile, through the ends of tiles too. The shared experts of a layer are computed beside the routed ones and
first: their weights are known before the gate has chosen. Where a matrix has columns for few SMs, parts of K are units of
their own (`num_splits`): its weights then lie in the rings whole when the rows come. Heads with a matrix each are units too.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.gluon.mla_segments import next_slot

FP8_MAX = gl.constexpr(448.0)


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
    """Units of BLOCK_T rows by BLOCK_N columns (with SILU of gate and up); see the head of this file and `few_rows.few_rows`.

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
