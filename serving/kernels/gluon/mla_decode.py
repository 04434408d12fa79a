"""Paged MLA decode for sm_90: heads as the narrow side of each product, one role a warpgroup.

    S^T [64 tokens, N] = K [64, W] . Q^T [W, N]      scores: softmax over tokens, P^T to shared memory
    O^T [C, N]        += V^T [C, 64] . P^T [64, N]   values: the default partition; V is the first C columns of K
    pages -> ring of column chunks                   loader: one warp, bulk tensor copies, runs ahead over segments

N query columns (query token, head) of one sequence stand in the N dimension of wgmma, so 16 or 32 heads are not padded
to 64. Bound: the bytes of the pages. More columns have a kernel of their own, `mla_decode_wide`, and FP8 rows too,
`mla_decode_fp8`.
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

from serving.kernels.gluon.mla_segments import (
    Ring,
    keep_owned,
    mask_unseen,
    next_slot,
    publish_totals,
    ring,
    softmax_step,
    store_segment,
    work,
)

_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.float8_e4m3fn: gl.float8e4nv}


def shared_layout(block: list[int], dtype: torch.dtype) -> Any:
    """How a copied block lies in shared memory; the kernel allocates the same."""
    return gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[dtype])


@aggregate
class Rings:
    """What the partitions share.

    `query` [chunks, N, CHUNK] with one pair of barriers, `query_rope` [N, 64]; `chunks` [., 64, CHUNK] and `ropes`
    [., 64, 64] of pages; `shares` [., 64, N] is P^T with `factors` [., N] of what came before; `totals` [2, N]: sum of
    shares, largest score.
    """

    query: Ring
    query_rope: gl.shared_memory_descriptor
    chunks: Ring
    ropes: Ring
    shares: Ring
    factors: gl.shared_memory_descriptor
    totals: Ring

    @gluon.constexpr_function
    def __init__(self, query, query_rope, chunks, ropes, shares, factors, totals):
        self.query = query
        self.query_rope = query_rope
        self.chunks = chunks
        self.ropes = ropes
        self.shares = shares
        self.factors = factors
        self.totals = totals


@gluon.jit
def _copy_query(descs, rings, first_column, C: gl.constexpr):
    CHUNK: gl.constexpr = rings.query.slots.shape[2]
    full = rings.query.full.index(0)
    mbarrier.expect(full, rings.query.slots.shape[1] * (C + 64) * 2)
    for c in gl.static_range(C // CHUNK):
        tma.async_copy_global_to_shared(descs[0], [first_column, c * CHUNK], full, rings.query.slots.index(c))
    tma.async_copy_global_to_shared(descs[1], [first_column, C], full, rings.query_rope)


@gluon.jit
def _loader(descs, rings, plan, starts_ptr, pages, block, C: gl.constexpr):
    table_ptr, table_stride, page_rows, columns = pages
    chunks = rings.chunks
    CHUNK: gl.constexpr = chunks.slots.shape[2]
    at, end, seq, seq_start = work(plan)
    slot = 0
    phase = 1
    rope_slot = 0
    rope_phase = 1
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
            for c in gl.static_range(C // CHUNK):
                mbarrier.wait(chunks.free.index(slot), phase)
                full = chunks.full.index(slot)
                mbarrier.expect(full, 64 * CHUNK * 2)
                tma.async_copy_global_to_shared(descs[2], [row, c * CHUNK], full, chunks.slots.index(slot))
                slot, phase = next_slot(slot, phase, chunks.slots.shape[0])
            mbarrier.wait(rings.ropes.free.index(rope_slot), rope_phase)
            full = rings.ropes.full.index(rope_slot)
            mbarrier.expect(full, 64 * 64 * 2)
            tma.async_copy_global_to_shared(descs[3], [row, C], full, rings.ropes.slots.index(rope_slot))
            rope_slot, rope_phase = next_slot(rope_slot, rope_phase, rings.ropes.slots.shape[0])
            if index == at:
                # After its first page: that can be on its way while the last segment's scores still need their query.
                mbarrier.wait(rings.query.free.index(0), query_phase)
                _copy_query(descs, rings, seq * columns + block * rings.query.slots.shape[1], C)
                query_phase ^= 1
        at = seg_end
        seq_start = seq_end
        seq += 1


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
            keep_owned(chunks.slots.index(page_slot), first - position, length - position)
            page_slot, page_phase = next_slot(page_slot, page_phase, RING)
        mbarrier.wait(ropes.full.index(rope), rope_phase)
        keep_owned(ropes.slots.index(rope), first - position, length - position)
        fence_async_shared()
        gl.thread_barrier()
    scores = gl.zeros([64, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    for c in gl.static_range(CHUNKS):
        mbarrier.wait(chunks.full.index(slot), phase)
        query = rings.query.slots.index(c).permute((1, 0))
        scores = warpgroup_mma(chunks.slots.index(slot), query, scores, is_async=True)
        slot, phase = next_slot(slot, phase, RING)
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
    column = gl.arange(0, N, layout=column_layout) + block * N
    # Query token t of `tokens` sees the first context_len - (tokens - 1) + t rows.
    unseen = gl.maximum(tokens - 1 - column // heads, 0)
    to_log2 = scale * 1.4426950408889634
    begin, end, seq, seq_start = work(plan)
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
            scores = mask_unseen(scores, position, first, length, unseen, tokens)
            p, factor, largest = softmax_step(scores, largest, to_log2)
            share = page % SHARES
            mbarrier.wait(shares.free.index(share), ((page // SHARES) & 1) ^ 1)
            shares.slots.index(share).store(p.to(gl.bfloat16))
            rings.factors.index(share).store(factor)
            fence_async_shared()
            mbarrier.arrive(shares.full.index(share), count=1)
            sums = sums * factor[None, :] + p
        mbarrier.arrive(rings.query.free.index(0), count=1)
        publish_totals(rings.totals, sums, largest, totals_phase)
        totals_phase ^= 1
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def _values(rings, plan, starts_ptr, outputs, columns, scale, block, C: gl.constexpr):
    chunks = rings.chunks
    shares = rings.shares
    RING: gl.constexpr = chunks.slots.shape[0]
    N: gl.constexpr = rings.query.slots.shape[1]
    CHUNK: gl.constexpr = chunks.slots.shape[2]
    CHUNKS: gl.constexpr = C // CHUNK
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    at, end, seq, seq_start = work(plan)
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
                slot, phase = next_slot(slot, phase, RING)
            outs = warpgroup_mma_wait(0, deps=mixed)
            for _c in gl.static_range(CHUNKS):
                mbarrier.arrive(chunks.free.index(freed), count=1)
                freed, _phase = next_slot(freed, 0, RING)
            mbarrier.arrive(shares.free.index(share), count=1)
            share, share_phase = next_slot(share, share_phase, shares.slots.shape[0])
        is_whole = (at == seq_start) & (seg_end == seq_end)
        store_segment(
            rings.totals, totals_phase, outs, plan, outputs, seq, is_whole, columns, block, scale, C, STEP=1, UNIT=1.0
        )
        totals_phase ^= 1
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def mla_decode_kernel(
    q_desc, q_rope_desc, latent_desc, rope_desc,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    bounds_ptr, firsts_ptr, first_starts_ptr, starts_ptr, lens_ptr, table_ptr, table_stride, page_rows,
    num_workers, num_groups, first, scale, columns, heads, tokens,
    C: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, RING: gl.constexpr, ROPES: gl.constexpr,
    SHARES: gl.constexpr, SCORE_REGS: gl.constexpr,
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
    query = ring(gl.allocate_shared_memory(bf16, [C // CHUNK, N, CHUNK], wide), 1)
    query_rope = gl.allocate_shared_memory(bf16, [N, 64], narrow)
    chunks = ring(gl.allocate_shared_memory(bf16, [RING, 64, CHUNK], wide), RING)
    ropes = ring(gl.allocate_shared_memory(bf16, [ROPES, 64, 64], narrow), ROPES)
    shares = ring(gl.allocate_shared_memory(bf16, [SHARES, 64, N], by_column), SHARES)
    factors = gl.allocate_shared_memory(gl.float32, [SHARES, N], flat)
    totals = ring(gl.allocate_shared_memory(gl.float32, [2, N], flat), 1)
    rings = Rings(query, query_rope, chunks, ropes, shares, factors, totals)
    fence_async_shared()
    # Everything above overlaps the end of the kernel before, everything below the launch of the merge.
    gdc_wait()
    gdc_launch_dependents()
    plan = (bounds_ptr, firsts_ptr, first_starts_ptr, num_workers, group, num_groups)
    descs = (q_desc, q_rope_desc, latent_desc, rope_desc)
    pages = (table_ptr, table_stride, page_rows, columns)
    asked = (first, scale, heads, tokens)
    outputs = (out_ptr, lse_ptr, part_ptr, part_lse_ptr)
    gl.warp_specialize(
        [
            (_values, (rings, plan, starts_ptr, outputs, columns, scale, block, C)),
            (_scores, (rings, plan, starts_ptr, lens_ptr, asked, block, C)),
            (_loader, (descs, rings, plan, starts_ptr, pages, block, C)),
        ],
        [4, 1],
        [SCORE_REGS, 24],
    )
