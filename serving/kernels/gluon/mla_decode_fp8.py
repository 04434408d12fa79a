"""Paged MLA decode over FP8 rows for sm_90: latents are never widened in memory; see `mla_decode` for what is common.

    S^T [64 tokens, N] = sum of 128-column groups: scale * K8 . (Q_high + Q_low)^T     all e4m3
    O^T [C, N]        += V8^T . (scale * P^T)                                          bf16, V widened in registers

A bf16 query value times a power of two is exactly the sum of two e4m3 values (8 bits are two times 4), so scores lose
nothing to the query. What wgmma takes from registers may be transposed: a 16-bit transposing load of e4m3 rows gives
each thread two tokens of two neighbouring columns, and a column's two are one register of a bf16 operand, its bits 2^-120
times the value. Scales, below 2^15, are applied to a group's scores and to its copy of the shares, with 2^112.

Bound: the bytes of the pages at 16 columns; beyond, how soon one warpgroup gets from a page to its shares, because its
products do not run beside its own softmax.
"""

# No postponed annotations: the types of an aggregate's fields are looked at.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.gluon.mla_segments import (
    Ring,
    mask_unseen,
    next_slot,
    publish_totals,
    ring,
    softmax_step,
    store_segment,
    work,
)


@aggregate
class Rings:
    """What the partitions share.

    `pages`: barriers of a page's slots, which are `latents` [4 each, 64, 128] e4m3, `ropes` [., 64, 64] and `scales`
    [., 64, 4]; `factors` [., N] of what came before a page's shares; `totals` [2, N]: sum of shares, largest score. The
    shares go beside: for each group [., 64, N], P^T times its scales, in memory of its own, since stores into one
    allocation wait for each other.
    """

    pages: Ring
    ropes: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor
    factors: Ring
    totals: Ring

    @gluon.constexpr_function
    def __init__(self, pages, ropes, scales, factors, totals):
        self.pages = pages
        self.ropes = ropes
        self.scales = scales
        self.factors = factors
        self.totals = totals


@gluon.jit
def _loader(descs, rings, plan, starts_ptr, table, C: gl.constexpr):
    table_ptr, table_stride, page_rows = table
    PAGES: gl.constexpr = rings.ropes.shape[0]
    at, end, seq, seq_start = work(plan)
    slot = 0
    phase = 1
    while at < end:
        seq_end = gl.load(starts_ptr + seq + 1)
        seg_end = gl.minimum(seq_end, end)
        row_ptr = table_ptr + seq.to(gl.int64) * table_stride - seq_start
        # The page table of a sequence without rows may hold anything: copies outside the pool give zeros, and all its
        # one page is masked.
        page = gl.load(row_ptr + at)
        for index in range(at, seg_end):
            row = page * page_rows
            page = gl.load(row_ptr + index + 1, mask=index + 1 < seg_end, other=0)
            mbarrier.wait(rings.pages.free.index(slot), phase)
            full = rings.pages.full.index(slot)
            # C bytes, their fp32 scales, 64 rope values.
            mbarrier.expect(full, 64 * (C + C // 32 + 128))
            tma.async_copy_global_to_shared(descs[2], [row, C // 4], full, rings.scales.index(slot))
            for c in gl.static_range(C // 128):
                to = rings.pages.slots.index(slot * (C // 128) + c)
                tma.async_copy_global_to_shared(descs[0], [row, c * 128], full, to)
            tma.async_copy_global_to_shared(descs[1], [row, (C + C // 32) // 2], full, rings.ropes.index(slot))
            slot, phase = next_slot(slot, phase, PAGES)
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def _split_query(q_ptr, first_column, end_column, query, query_rope, C: gl.constexpr):
    """Rows of the query times a power of two each, as high and low e4m3 parts; returns [N] what undoes the powers."""
    N: gl.constexpr = query_rope.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    rope_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    column = first_column + gl.arange(0, N, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    at = q_ptr + column.to(gl.int64)[:, None] * (C + 64) + c[None, :]
    inside = (column < end_column)[:, None]
    # Not zero: its exponent is taken.
    largest = gl.full([N], 2.0**-60, gl.float32, gl.SliceLayout(1, layout))
    for i in gl.static_range(C // 128):
        row = gl.load(at + i * 128, mask=inside, other=0.0)
        largest = gl.maximum(largest, gl.max(gl.abs(row.to(gl.float32)), axis=1))
    rope_column = first_column + gl.arange(0, N, layout=gl.SliceLayout(1, rope_layout))
    r = gl.arange(0, 64, layout=gl.SliceLayout(0, rope_layout))
    rope_at = q_ptr + rope_column.to(gl.int64)[:, None] * (C + 64) + C + r[None, :]
    rope = gl.load(rope_at, mask=(rope_column < end_column)[:, None], other=0.0)
    # The largest value to [128, 256): e4m3 ends at 448.
    exponent = largest.to(gl.uint32, bitcast=True) & 0x7F800000
    power = ((261 << 23) - exponent).to(gl.float32, bitcast=True)
    for i in gl.static_range(C // 128):
        row = gl.load(at + i * 128, mask=inside, other=0.0).to(gl.float32) * power[:, None]
        high = row.to(gl.float8e4nv)
        query.index(2 * i).store(high)
        query.index(2 * i + 1).store((row - high.to(gl.float32)).to(gl.float8e4nv))
    rope_power = gl.convert_layout(power, gl.SliceLayout(1, rope_layout))
    query_rope.store((rope.to(gl.float32) * rope_power[:, None]).to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    return (exponent - (7 << 23)).to(gl.float32, bitcast=True)


@gluon.jit
def _page_scores(rings, query, query_rope, page, position, first, length, C: gl.constexpr):
    """Scores [64, N] of the page at `position`, before the scale of the softmax, and what its groups' rows weigh."""
    GROUPS: gl.constexpr = C // 128
    N: gl.constexpr = query_rope.shape[0]
    PAGES: gl.constexpr = rings.ropes.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    # Columns of the high parts, then of the low ones: one product reads the latents once for both.
    pair_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * N, 32])
    pair_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * N, 128], gl.float8e4nv)
    pairs = query._reinterpret(gl.float8e4nv, [GROUPS, 2 * N, 128], pair_shared)
    slot = page % PAGES
    mbarrier.wait(rings.pages.full.index(slot), (page // PAGES) & 1)
    zeros = gl.zeros([64, N], gl.float32, layout)
    products = (warpgroup_mma(rings.ropes.index(slot), query_rope.permute((1, 0)), zeros, is_async=True),)
    for g in gl.static_range(GROUPS):
        latents = rings.pages.slots.index(slot * GROUPS + g)
        zeros = gl.zeros([64, 2 * N], gl.float32, pair_layout)
        product = warpgroup_mma(latents, pairs.index(g).permute((1, 0)), zeros, is_async=True)
        products = products + (product,)  # type: ignore[assignment]  # noqa: RUF005
    # Rows nobody owns may hold NaN.
    place = position + gl.arange(0, 64, layout=gl.SliceLayout(1, pair_layout))
    owned = ((place >= first) & (place < length))[:, None]
    scores = gl.zeros([64, 2 * N], gl.float32, pair_layout)
    weights = ()
    for g in gl.static_range(GROUPS):
        weight = gl.where(owned, rings.scales.index(slot).slice(g, 1, dim=1).load(pair_layout), 0.0)
        products = warpgroup_mma_wait(GROUPS - 1 - g, deps=products)
        scores += products[1 + g] * weight
        weight = gl.convert_layout(weight, layout, assert_trivial=True)
        weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
    mbarrier.arrive(rings.pages.free.index(slot), count=1)
    scores = gl.sum(gl.reshape(scores, [64, 2, N]), axis=1)
    return products[0] + gl.convert_layout(scores, layout, assert_trivial=True), weights


@gluon.jit
def _share(rings, shares, page, scores, weights, largest, sums):
    """Put the shares of a page, times what each group's rows weigh, into the ring; the new largest score and sums."""
    p, factor, largest = softmax_step(scores, largest, 1.0)
    SHARES: gl.constexpr = rings.factors.slots.shape[0]
    slot = page % SHARES
    mbarrier.wait(rings.factors.free.index(slot), ((page // SHARES) & 1) ^ 1)
    for g in gl.static_range(len(weights)):
        # Widened values are 2^-120 of the true ones; in all, 2^-8 remains.
        shares[g].index(slot).store((p * (weights[g] * 2.0**112)).to(gl.bfloat16))
    rings.factors.slots.index(slot).store(factor)
    fence_async_shared()
    mbarrier.arrive(rings.factors.full.index(slot), count=1)
    return largest, sums * factor[None, :] + p


@gluon.jit
def _scores(rings, shares, plan, starts_ptr, lens_ptr, asked, query, query_rope, C: gl.constexpr):
    q_ptr, first, scale, columns, heads, tokens, block = asked
    N: gl.constexpr = query_rope.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    column = gl.arange(0, N, layout=column_layout) + block * N
    # Query token t of `tokens` sees the first context_len - (tokens - 1) + t rows.
    unseen = gl.maximum(tokens - 1 - column // heads, 0)
    begin, end, seq, seq_start = work(plan)
    at = begin
    totals_phase = 1
    while at < end:
        seq_end = gl.load(starts_ptr + seq + 1)
        seg_end = gl.minimum(seq_end, end)
        length = gl.load(lens_ptr + seq)
        largest = gl.full([N], float("-inf"), gl.float32, column_layout)
        sums = gl.zeros([64, N], gl.float32, layout)
        seq_column = seq * columns
        power = _split_query(q_ptr, seq_column + block * N, seq_column + columns, query, query_rope, C)
        to_log2 = gl.convert_layout(power, column_layout) * (scale * 1.4426950408889634)
        for page in range(at - begin, seg_end - begin):
            position = (begin + page - seq_start) * 64
            scores, weights = _page_scores(rings, query, query_rope, page, position, first, length, C)
            scores = mask_unseen(scores * to_log2[None, :], position, first, length, unseen, tokens)
            largest, sums = _share(rings, shares, page, scores, weights, largest, sums)
        publish_totals(rings.totals, sums, largest, totals_phase)
        totals_phase ^= 1
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def _widen(pairs):
    """Two neighbouring e4m3 in 16 bits -> both as bf16, times 2^-120: sign and seven bits at their places."""
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b32 sign, rest;
            shl.b32 sign, $2, 8;
            shl.b32 rest, $2, 4;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 $0, rest, 0x07F007F0, sign, 0xEA;
            shr.u32 rest, $2, 4;
            and.b32 sign, $2, 0x80008000;
            lop3.b32 $1, rest, 0x07F007F0, sign, 0xEA;
        }
        """,
        "=r,=r,r",
        [pairs],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _values(rings, shares, plan, starts_ptr, outputs, columns, block, C: gl.constexpr):
    N: gl.constexpr = rings.factors.slots.shape[1]
    PAGES: gl.constexpr = rings.ropes.shape[0]
    SHARES: gl.constexpr = rings.factors.slots.shape[0]
    GROUPS: gl.constexpr = C // 128
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    columns_16 = rings.pages.slots._reinterpret(
        gl.uint16, [PAGES * GROUPS, 64, 64], gl.NVMMASharedLayout(128, 16, rank=2)
    )
    at, end, seq, seq_start = work(plan)
    slot = 0
    phase = 0
    share = 0
    share_phase = 0
    totals_phase = 0
    while at < end:
        seq_end = gl.load(starts_ptr + seq + 1)
        seg_end = gl.minimum(seq_end, end)
        # Even columns of a group, then its odd ones.
        outs = ()
        for _ in gl.static_range(2 * GROUPS):
            outs = outs + (gl.zeros([64, N], gl.float32, layout),)  # type: ignore[assignment]  # noqa: RUF005
        for _ in range(at, seg_end):
            mbarrier.wait(rings.pages.full.index(slot), phase)
            pairs = columns_16.index(slot * GROUPS).permute((1, 0)).load(operand)
            even, odd = _widen(pairs)
            mbarrier.wait(rings.factors.full.index(share), share_phase)
            factor = rings.factors.slots.index(share).load(column_layout)
            mixed = ()
            for g in gl.static_range(GROUPS):
                p = shares[g].index(share)
                update = warpgroup_mma(even, p, outs[2 * g] * factor[None, :], is_async=True)
                mixed = mixed + (update,)  # type: ignore[assignment]  # noqa: RUF005
                update = warpgroup_mma(odd, p, outs[2 * g + 1] * factor[None, :], is_async=True)
                mixed = mixed + (update,)  # type: ignore[assignment]  # noqa: RUF005
                if g + 1 < GROUPS:
                    pairs = columns_16.index(slot * GROUPS + g + 1).permute((1, 0)).load(operand)
                    mixed = warpgroup_mma_wait(2, deps=mixed)
                    even, odd = _widen(pairs)
            outs = warpgroup_mma_wait(0, deps=mixed)
            mbarrier.arrive(rings.pages.free.index(slot), count=1)
            mbarrier.arrive(rings.factors.free.index(share), count=1)
            slot, phase = next_slot(slot, phase, PAGES)
            share, share_phase = next_slot(share, share_phase, SHARES)
        is_whole = (at == seq_start) & (seg_end == seq_end)
        store_segment(
            rings.totals, totals_phase, outs, plan, outputs, seq, is_whole, columns, block, 0.6931471805599453, C,
            STEP=2, UNIT=256.0,
        )  # fmt: skip
        totals_phase ^= 1
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def mla_decode_fp8_kernel(
    q_ptr, latent_desc, rope_desc, scale_desc,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    bounds_ptr, firsts_ptr, first_starts_ptr, starts_ptr, lens_ptr, table_ptr, table_stride, page_rows,
    num_workers, num_groups, first, scale, columns, heads, tokens,
    C: gl.constexpr, N: gl.constexpr, PAGES: gl.constexpr, SHARES: gl.constexpr, SCORE_REGS: gl.constexpr,
):  # fmt: skip
    """Attend this CTA's pages for N columns; see the head of this file and `decode_paged`."""
    num_blocks = gl.num_programs(0) // num_groups
    block = gl.program_id(0) % num_blocks
    group = gl.program_id(0) // num_blocks
    bf16: gl.constexpr = gl.bfloat16
    e4m3: gl.constexpr = gl.float8e4nv
    GROUPS: gl.constexpr = C // 128
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], e4m3)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], bf16)
    by_column: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, N], bf16)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    query = gl.allocate_shared_memory(e4m3, [2 * GROUPS, N, 128], tile)
    query_rope = gl.allocate_shared_memory(bf16, [N, 64], narrow)
    pages = ring(gl.allocate_shared_memory(e4m3, [PAGES * GROUPS, 64, 128], tile), PAGES, 2)
    ropes = gl.allocate_shared_memory(bf16, [PAGES, 64, 64], narrow)
    scales = gl.allocate_shared_memory(gl.float32, [PAGES, 64, GROUPS], scale_desc.layout)
    shares = ()
    for _ in gl.static_range(GROUPS):
        share = gl.allocate_shared_memory(bf16, [SHARES, 64, N], by_column)
        shares = shares + (share,)  # type: ignore[assignment]  # noqa: RUF005
    factors = ring(gl.allocate_shared_memory(gl.float32, [SHARES, N], flat), SHARES)
    totals = ring(gl.allocate_shared_memory(gl.float32, [2, N], flat), 1)
    rings = Rings(pages, ropes, scales, factors, totals)
    fence_async_shared()
    # Everything above overlaps the end of the kernel before, everything below the launch of the merge.
    gdc_wait()
    gdc_launch_dependents()
    plan = (bounds_ptr, firsts_ptr, first_starts_ptr, num_workers, group, num_groups)
    descs = (latent_desc, rope_desc, scale_desc)
    asked = (q_ptr, first, scale, columns, heads, tokens, block)
    outputs = (out_ptr, lse_ptr, part_ptr, part_lse_ptr)
    gl.warp_specialize(
        [
            (_values, (rings, shares, plan, starts_ptr, outputs, columns, block, C)),
            (_scores, (rings, shares, plan, starts_ptr, lens_ptr, asked, query, query_rope, C)),
            (_loader, (descs, rings, plan, starts_ptr, (table_ptr, table_stride, page_rows), C)),
        ],
        [4, 1],
        [SCORE_REGS, 24],
    )
