"""Paged MLA decode for sm_90: heads as the narrow side of each product, one role a warpgroup.

    S^T [64 tokens, N] = K [64, W] . Q^T [W, N]      scores: softmax over tokens, P^T to shared memory
    O^T [C, N]        += V^T [C, 64] . P^T [64, N]   values: the default partition; V is the first C columns of K
    pages -> ring of column chunks                   loader: one warp, bulk tensor copies, runs ahead over segments
    FP8 rows -> raw ring -> the same chunks          two wideners: FP8 latents times their scale, as bf16

N query columns (query token, head) of one sequence stand in the N dimension of wgmma, so 16 or 32 heads are not padded
to 64. A segment is the part of one sequence's pages that one CTA attends; `PagedPlan` cuts them. Bound: the bytes of
the pages up to 32 columns, tensor cores and shared memory beyond and for FP8 rows.

Every barrier that is initialised is used in that instance of the kernel: the compiler gives the memory of an unused one
to something else, which the barrier then corrupts.
"""

# No postponed annotations: the types of an aggregate's fields are looked at.

from typing import Any

import torch
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

_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.float8_e4m3fn: gl.float8e4nv}


def shared_layout(block: list[int], dtype: torch.dtype) -> Any:
    """How a copied block lies in shared memory; the kernel allocates the same."""
    return gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[dtype])


@aggregate
class Ring:
    """Slots `[num, ...]` from one partition to others; for each a barrier that it is full and one that it is free."""

    slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, slots, full, free):
        self.slots = slots
        self.full = full
        self.free = free


@aggregate
class Rings:
    """What the partitions share.

    `query` [chunks, N, CHUNK] with one pair of barriers, `query_rope` [N, 64]; `chunks` [., 64, CHUNK] and `ropes`
    [., 64, 64] of pages; `raws` [., 64, CHUNK] e4m3 and `scales` [., 64, 4] of FP8 rows (else `ropes` again); `shares`
    [., 64, N] is P^T with `factors` [., N] of what came before; `totals` [2, N]: sum of shares, largest score.
    """

    query: Ring
    query_rope: gl.shared_memory_descriptor
    chunks: Ring
    ropes: Ring
    raws: Ring
    scales: Ring
    shares: Ring
    factors: gl.shared_memory_descriptor
    totals: Ring

    @gluon.constexpr_function
    def __init__(self, query, query_rope, chunks, ropes, raws, scales, shares, factors, totals):
        self.query = query
        self.query_rope = query_rope
        self.chunks = chunks
        self.ropes = ropes
        self.raws = raws
        self.scales = scales
        self.shares = shares
        self.factors = factors
        self.totals = totals


@gluon.jit
def _barriers(num: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [num, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(num):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def _ring(slots, num: gl.constexpr, readers: gl.constexpr = 1):
    return Ring(slots, _barriers(num, 1), _barriers(num, readers))


@gluon.jit
def _next(slot, phase, num_slots: gl.constexpr):
    """The ring position after this one; the phase turns when the ring wraps."""
    slot += 1
    wraps = slot == num_slots
    return gl.where(wraps, 0, slot), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _work(plan):
    """Flat page range of this CTA's group of workers, the sequence it begins in and where that begins."""
    bounds_ptr, firsts_ptr, first_starts_ptr, num_workers, group, num_groups = plan
    low = (group * num_workers) // num_groups
    high = ((group + 1) * num_workers) // num_groups
    return (
        gl.load(bounds_ptr + low),
        gl.load(bounds_ptr + high),
        gl.load(firsts_ptr + low),
        gl.load(first_starts_ptr + low),
    )


@gluon.jit
def _copy_query(descs, rings, first_column, C: gl.constexpr):
    CHUNK: gl.constexpr = rings.query.slots.shape[2]
    full = rings.query.full.index(0)
    mbarrier.expect(full, rings.query.slots.shape[1] * (C + 64) * 2)
    for c in gl.static_range(C // CHUNK):
        tma.async_copy_global_to_shared(descs[0], [first_column, c * CHUNK], full, rings.query.slots.index(c))
    tma.async_copy_global_to_shared(descs[1], [first_column, C], full, rings.query_rope)


@gluon.jit
def _loader(descs, rings, plan, starts_ptr, pages, block, C: gl.constexpr, FP8: gl.constexpr):
    table_ptr, table_stride, page_rows, columns = pages
    latents = rings.raws if FP8 else rings.chunks
    CHUNK: gl.constexpr = rings.chunks.slots.shape[2]
    CHUNK_BYTES: gl.constexpr = 64 * CHUNK if FP8 else 64 * CHUNK * 2
    at, end, seq, seq_start = _work(plan)
    slot = 0
    phase = 1
    rope_slot = 0
    rope_phase = 1
    scale_slot = 0
    scale_phase = 1
    query_phase = 1
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
            if FP8:
                mbarrier.wait(rings.scales.free.index(scale_slot), scale_phase)
                full = rings.scales.full.index(scale_slot)
                mbarrier.expect(full, 64 * 16)
                tma.async_copy_global_to_shared(descs[4], [row, C // 4], full, rings.scales.slots.index(scale_slot))
                scale_slot, scale_phase = _next(scale_slot, scale_phase, rings.scales.slots.shape[0])
            for c in gl.static_range(C // CHUNK):
                mbarrier.wait(latents.free.index(slot), phase)
                full = latents.full.index(slot)
                mbarrier.expect(full, CHUNK_BYTES)
                tma.async_copy_global_to_shared(descs[2], [row, c * CHUNK], full, latents.slots.index(slot))
                slot, phase = _next(slot, phase, latents.slots.shape[0])
            mbarrier.wait(rings.ropes.free.index(rope_slot), rope_phase)
            full = rings.ropes.full.index(rope_slot)
            mbarrier.expect(full, 64 * 64 * 2)
            # In an FP8 row the rope values follow C bytes and C / 128 fp32 scales.
            rope_at: gl.constexpr = (C + C // 32) // 2 if FP8 else C
            tma.async_copy_global_to_shared(descs[3], [row, rope_at], full, rings.ropes.slots.index(rope_slot))
            rope_slot, rope_phase = _next(rope_slot, rope_phase, rings.ropes.slots.shape[0])
            if index == at:
                # After its first page: that can be on its way while the last segment's scores still need their query.
                mbarrier.wait(rings.query.free.index(0), query_phase)
                _copy_query(descs, rings, seq * columns + block * rings.query.slots.shape[1], C)
                query_phase ^= 1
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def _widener(rings, plan, C: gl.constexpr, TEAM: gl.constexpr):
    """Every other chunk of FP8 latents times the scale of their 128 columns, as bf16 into the chunk ring."""
    RING: gl.constexpr = rings.chunks.slots.shape[0]
    RAWS: gl.constexpr = rings.raws.slots.shape[0]
    SCALES: gl.constexpr = rings.scales.slots.shape[0]
    CHUNKS: gl.constexpr = C // 128
    gl.static_assert(rings.chunks.slots.shape[2] == 128)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    at, end, _seq, _seq_start = _work(plan)
    for page in range(end - at):
        scale_slot = page % SCALES
        mbarrier.wait(rings.scales.full.index(scale_slot), (page // SCALES) & 1)
        for c in gl.static_range(TEAM, CHUNKS, 2):
            chunk = page * CHUNKS + c
            raw = chunk % RAWS
            mbarrier.wait(rings.raws.full.index(raw), (chunk // RAWS) & 1)
            values = rings.raws.slots.index(raw).load(layout).to(gl.float32)
            scale = rings.scales.slots.index(scale_slot).slice(c, 1, dim=1).load(layout)
            wide = (values * scale).to(gl.bfloat16)
            slot = chunk % RING
            mbarrier.wait(rings.chunks.free.index(slot), ((chunk // RING) & 1) ^ 1)
            rings.chunks.slots.index(slot).store(wide)
            fence_async_shared()
            mbarrier.arrive(rings.chunks.full.index(slot), count=1)
            mbarrier.arrive(rings.raws.free.index(raw), count=1)
        mbarrier.arrive(rings.scales.free.index(scale_slot), count=1)


@gluon.jit
def _keep_owned(tile, first, limit):
    """Zero the rows of a [64, X] tile outside [first, limit): they may hold NaN, which 0 * NaN would let through."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    owned = (rows >= first) & (rows < limit)
    values = tile.load(layout)
    tile.store(gl.where(owned[:, None], values, gl.zeros_like(values)))


@gluon.jit
def _page_scores(rings, page, position, first, length, C: gl.constexpr):
    """S^T [64, N] of the CTA's page number `page`, whose rows outside [first, length) are zeroed in place."""
    chunks = rings.chunks
    ropes = rings.ropes
    RING: gl.constexpr = chunks.slots.shape[0]
    ROPES: gl.constexpr = ropes.slots.shape[0]
    N: gl.constexpr = rings.query.slots.shape[1]
    CHUNKS: gl.constexpr = C // chunks.slots.shape[2]
    slot = (page * CHUNKS) % RING
    phase = ((page * CHUNKS) // RING) & 1
    rope = page % ROPES
    rope_phase = (page // ROPES) & 1
    if (position < first) | (position + 64 > length):
        page_slot = slot
        page_phase = phase
        for _ in gl.static_range(CHUNKS):
            mbarrier.wait(chunks.full.index(page_slot), page_phase)
            _keep_owned(chunks.slots.index(page_slot), first - position, length - position)
            page_slot, page_phase = _next(page_slot, page_phase, RING)
        mbarrier.wait(ropes.full.index(rope), rope_phase)
        _keep_owned(ropes.slots.index(rope), first - position, length - position)
        fence_async_shared()
        gl.thread_barrier()
    scores = gl.zeros([64, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    for c in gl.static_range(CHUNKS):
        mbarrier.wait(chunks.full.index(slot), phase)
        query = rings.query.slots.index(c).permute((1, 0))
        scores = warpgroup_mma(chunks.slots.index(slot), query, scores, is_async=True)
        slot, phase = _next(slot, phase, RING)
    mbarrier.wait(ropes.full.index(rope), rope_phase)
    scores = warpgroup_mma(ropes.slots.index(rope), rings.query_rope.permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(ropes.free.index(rope), count=1)
    return scores


@gluon.jit
def _scores(rings, plan, starts_ptr, lens_ptr, query, block, C: gl.constexpr):
    first, scale, heads, tokens = query
    shares = rings.shares
    N: gl.constexpr = rings.query.slots.shape[1]
    SHARES: gl.constexpr = shares.slots.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, N, layout=column_layout) + block * N
    # Query token t of `tokens` sees the first context_len - (tokens - 1) + t rows.
    unseen = gl.maximum(tokens - 1 - column // heads, 0)
    to_log2 = scale * 1.4426950408889634
    begin, end, seq, seq_start = _work(plan)
    at = begin
    query_phase = 0
    totals_phase = 1
    while at < end:
        seq_end = gl.load(starts_ptr + seq + 1)
        seg_end = gl.minimum(seq_end, end)
        length = gl.load(lens_ptr + seq)
        largest = gl.full([N], float("-inf"), gl.float32, column_layout)
        sums = gl.zeros([64, N], gl.float32, layout)
        mbarrier.wait(rings.query.full.index(0), query_phase)
        query_phase ^= 1
        for index in range(at, seg_end):
            page = index - begin
            position = (index - seq_start) * 64
            scores = _page_scores(rings, page, position, first, length, C)
            if (position < first) | (position + 64 > length - (tokens - 1)):
                place = position + row
                seen = (place[:, None] >= first) & (place[:, None] < (length - unseen)[None, :])
                scores = gl.where(seen, scores, float("-inf"))
            next_largest = gl.maximum(largest, gl.max(scores, axis=0))
            # A column that has seen no row yet: any finite number keeps its shares at zero.
            finite = gl.where(next_largest == float("-inf"), 0.0, next_largest)
            factor = gl.exp2((largest - finite) * to_log2)
            p = gl.exp2(scores * to_log2 - (finite * to_log2)[None, :])
            share = page % SHARES
            mbarrier.wait(shares.free.index(share), ((page // SHARES) & 1) ^ 1)
            shares.slots.index(share).store(p.to(gl.bfloat16))
            rings.factors.index(share).store(factor)
            fence_async_shared()
            mbarrier.arrive(shares.full.index(share), count=1)
            sums = sums * factor[None, :] + p
            largest = next_largest
        mbarrier.arrive(rings.query.free.index(0), count=1)
        total = gl.sum(sums, axis=0)
        mbarrier.wait(rings.totals.free.index(0), totals_phase)
        rings.totals.slots.index(0).store(total)
        rings.totals.slots.index(1).store(largest)
        mbarrier.arrive(rings.totals.full.index(0), count=1)
        totals_phase ^= 1
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def _values(rings, plan, starts_ptr, outputs, columns, scale, block, C: gl.constexpr):
    out_ptr, lse_ptr, part_ptr, part_lse_ptr = outputs
    chunks = rings.chunks
    shares = rings.shares
    RING: gl.constexpr = chunks.slots.shape[0]
    N: gl.constexpr = rings.query.slots.shape[1]
    CHUNK: gl.constexpr = chunks.slots.shape[2]
    CHUNKS: gl.constexpr = C // CHUNK
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, N, layout=column_layout)
    at, end, seq, seq_start = _work(plan)
    slot = 0
    phase = 0
    share = 0
    share_phase = 0
    totals_phase = 0
    while at < end:
        seq_end = gl.load(starts_ptr + seq + 1)
        seg_end = gl.minimum(seq_end, end)
        outs = ()
        for _ in gl.static_range(CHUNKS):
            outs = outs + (gl.zeros([CHUNK, N], gl.float32, layout),)  # type: ignore[assignment]  # noqa: RUF005
        for _ in range(at, seg_end):
            mbarrier.wait(shares.full.index(share), share_phase)
            factor = rings.factors.index(share).load(column_layout)
            p = shares.slots.index(share)
            freed = slot
            mixed = ()
            for c in gl.static_range(CHUNKS):
                mbarrier.wait(chunks.full.index(slot), phase)
                v = chunks.slots.index(slot).permute((1, 0))
                update = warpgroup_mma(v, p, outs[c] * factor[None, :], is_async=True)
                mixed = mixed + (update,)  # type: ignore[assignment]  # noqa: RUF005
                slot, phase = _next(slot, phase, RING)
            outs = warpgroup_mma_wait(0, deps=mixed)
            for _c in gl.static_range(CHUNKS):
                mbarrier.arrive(chunks.free.index(freed), count=1)
                freed, _phase = _next(freed, 0, RING)
            mbarrier.arrive(shares.free.index(share), count=1)
            share, share_phase = _next(share, share_phase, shares.slots.shape[0])
        mbarrier.wait(rings.totals.full.index(0), totals_phase)
        totals_phase ^= 1
        total = rings.totals.slots.index(0).load(column_layout)
        largest = rings.totals.slots.index(1).load(column_layout)
        mbarrier.arrive(rings.totals.free.index(0), count=1)
        weight = gl.where(total > 0, 1.0 / total, 0.0)
        lse = gl.where(total > 0, largest * scale + gl.log(total), float("-inf"))
        seq64 = seq.to(gl.int64)
        place = block * N + column
        inside = place < columns
        if (at == seq_start) & (seg_end == seq_end):
            out_to = out_ptr + seq64 * columns * C + place[None, :] * C + row[:, None]
            for c in gl.static_range(CHUNKS):
                out = (outs[c] * weight[None, :]).to(out_ptr.dtype.element_ty)
                gl.store(out_to + c * CHUNK, out, mask=inside[None, :])
            gl.store(lse_ptr + seq64 * columns + place, lse, mask=inside)
        else:
            # Parts lie as [C, N]: what a thread holds is then 8 contiguous bytes.
            part = (plan[4] + seq64) * (gl.num_programs(0) // plan[5]) + block
            part_to = part_ptr + part * C * N + row[:, None] * N + column[None, :]
            for c in gl.static_range(CHUNKS):
                gl.store(part_to + c * CHUNK * N, outs[c] * weight[None, :])
            gl.store(part_lse_ptr + part * N + column, lse)
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def mla_decode_kernel(
    q_desc, q_rope_desc, latent_desc, rope_desc, scale_desc,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    bounds_ptr, firsts_ptr, first_starts_ptr, starts_ptr, lens_ptr, table_ptr, table_stride, page_rows,
    num_workers, num_groups, first, scale, columns, heads, tokens,
    C: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, RING: gl.constexpr, ROPES: gl.constexpr,
    RAWS: gl.constexpr, SHARES: gl.constexpr, FP8: gl.constexpr, SCORE_REGS: gl.constexpr, WIDEN_REGS: gl.constexpr,
):  # fmt: skip
    """Attend this CTA's pages for N columns; see the head of this file and `decode_paged`."""
    num_blocks = gl.num_programs(0) // num_groups
    block = gl.program_id(0) % num_blocks
    group = gl.program_id(0) // num_blocks
    bf16: gl.constexpr = gl.bfloat16
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, CHUNK], bf16)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], bf16)
    by_column: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, N], bf16)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    query = _ring(gl.allocate_shared_memory(bf16, [C // CHUNK, N, CHUNK], wide), 1)
    query_rope = gl.allocate_shared_memory(bf16, [N, 64], narrow)
    chunks = _ring(gl.allocate_shared_memory(bf16, [RING, 64, CHUNK], wide), RING)
    ropes = _ring(gl.allocate_shared_memory(bf16, [ROPES, 64, 64], narrow), ROPES)
    raws = ropes
    scales = ropes
    if FP8:
        raws = _ring(gl.allocate_shared_memory(gl.float8e4nv, [RAWS, 64, CHUNK], latent_desc.layout), RAWS)
        scales = _ring(gl.allocate_shared_memory(gl.float32, [2, 64, 4], scale_desc.layout), 2, 2)
    shares = _ring(gl.allocate_shared_memory(bf16, [SHARES, 64, N], by_column), SHARES)
    factors = gl.allocate_shared_memory(gl.float32, [SHARES, N], flat)
    totals = _ring(gl.allocate_shared_memory(gl.float32, [2, N], flat), 1)
    rings = Rings(query, query_rope, chunks, ropes, raws, scales, shares, factors, totals)
    fence_async_shared()
    # Everything above overlaps the end of the kernel before, everything below the launch of the merge.
    gdc_wait()
    gdc_launch_dependents()
    plan = (bounds_ptr, firsts_ptr, first_starts_ptr, num_workers, group, num_groups)
    descs = (q_desc, q_rope_desc, latent_desc, rope_desc, scale_desc)
    pages = (table_ptr, table_stride, page_rows, columns)
    asked = (first, scale, heads, tokens)
    outputs = (out_ptr, lse_ptr, part_ptr, part_lse_ptr)
    if FP8:
        gl.warp_specialize(
            [
                (_values, (rings, plan, starts_ptr, outputs, columns, scale, block, C)),
                (_scores, (rings, plan, starts_ptr, lens_ptr, asked, block, C)),
                (_widener, (rings, plan, C, 0)),
                (_widener, (rings, plan, C, 1)),
                (_loader, (descs, rings, plan, starts_ptr, pages, block, C, FP8)),
            ],
            [4, 4, 4, 1],
            [SCORE_REGS, WIDEN_REGS, WIDEN_REGS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_values, (rings, plan, starts_ptr, outputs, columns, scale, block, C)),
                (_scores, (rings, plan, starts_ptr, lens_ptr, asked, block, C)),
                (_loader, (descs, rings, plan, starts_ptr, pages, block, C, FP8)),
            ],
            [4, 1],
            [SCORE_REGS, 24],
        )
