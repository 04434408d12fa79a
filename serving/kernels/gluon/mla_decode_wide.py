"""Paged MLA decode for sm_90 where 64 query columns are many enough to be the wide side of each product.

    S [64, 64 tokens] = Q [64, W] . K^T           scores: softmax along rows, P over the page's rope values
    O [64, C]        += P [64, 64 tokens] . V     values: two warpgroups, chunks in turn; V is the first C columns of K
    pages -> ring of column chunks                loader: one warp, bulk tensor copies, runs ahead over segments

Beside `mla_decode` each product reads less of shared memory, and the softmax needs no other warp. The first chunks of
the query stand in registers of the scores' warpgroup (they come through the ring of chunks as a page does), which
leaves shared memory for more pages in flight. Bound: tensor cores.
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

from serving.kernels.gluon.mla_segments import Ring, barriers, keep_owned, next_slot, ring, work


@aggregate
class Rings:
    """What the partitions share.

    `query` [., 64, CHUNK], what of the query is not in registers, with one pair of barriers, `query_rope` [64, 64];
    `chunks` [., 64, CHUNK] of pages; `slots` [., 64, 64] hold a page's rope values, then P, with a barrier for each;
    `factors` [., 64] of what came before; `totals` [2, 64]: sum of shares, largest score.
    """

    query: Ring
    query_rope: gl.shared_memory_descriptor
    chunks: Ring
    slots: Ring
    shares_full: gl.shared_memory_descriptor
    factors: gl.shared_memory_descriptor
    factors_full: gl.shared_memory_descriptor
    totals: Ring

    @gluon.constexpr_function
    def __init__(self, query, query_rope, chunks, slots, shares_full, factors, factors_full, totals):
        self.query = query
        self.query_rope = query_rope
        self.chunks = chunks
        self.slots = slots
        self.shares_full = shares_full
        self.factors = factors
        self.factors_full = factors_full
        self.totals = totals


@gluon.jit
def _skip(slot, count: gl.constexpr, num_slots: gl.constexpr):
    slot += count
    return gl.where(slot >= num_slots, slot - num_slots, slot)


@gluon.jit
def _loader(descs, rings, plan, starts_ptr, pages, block, C: gl.constexpr, HELD: gl.constexpr):
    table_ptr, table_stride, page_rows, columns = pages
    chunks = rings.chunks
    RING: gl.constexpr = chunks.slots.shape[0]
    CHUNK: gl.constexpr = chunks.slots.shape[2]
    SLOTS: gl.constexpr = rings.slots.slots.shape[0]
    CHUNKS: gl.constexpr = C // CHUNK
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
        first_column = seq * columns + block * 64
        # The page table of a sequence without rows may hold anything: copies outside the pool give zeros, and all its
        # one page is masked.
        page = gl.load(row_ptr + at)
        for c in gl.static_range(HELD):
            mbarrier.wait(chunks.free.index(slot), phase)
            full = chunks.full.index(slot)
            mbarrier.expect(full, 64 * CHUNK * 2)
            tma.async_copy_global_to_shared(descs[0], [first_column, c * CHUNK], full, chunks.slots.index(slot))
            slot, phase = next_slot(slot, phase, RING)
        for index in range(at, seg_end):
            row = page * page_rows
            page = gl.load(row_ptr + index + 1, mask=index + 1 < seg_end, other=0)
            for c in gl.static_range(CHUNKS):
                mbarrier.wait(chunks.free.index(slot), phase)
                full = chunks.full.index(slot)
                mbarrier.expect(full, 64 * CHUNK * 2)
                tma.async_copy_global_to_shared(descs[2], [row, c * CHUNK], full, chunks.slots.index(slot))
                slot, phase = next_slot(slot, phase, RING)
            mbarrier.wait(rings.slots.free.index(rope_slot), rope_phase)
            full = rings.slots.full.index(rope_slot)
            mbarrier.expect(full, 64 * 64 * 2)
            tma.async_copy_global_to_shared(descs[3], [row, C], full, rings.slots.slots.index(rope_slot))
            rope_slot, rope_phase = next_slot(rope_slot, rope_phase, SLOTS)
            if index == at:
                # After its first page: that can be on its way while the last segment's scores still need their query.
                mbarrier.wait(rings.query.free.index(0), query_phase)
                query_phase ^= 1
                full = rings.query.full.index(0)
                mbarrier.expect(full, 64 * (C - HELD * CHUNK + 64) * 2)
                for c in gl.static_range(CHUNKS - HELD):
                    to = rings.query.slots.index(c)
                    tma.async_copy_global_to_shared(descs[0], [first_column, (HELD + c) * CHUNK], full, to)
                tma.async_copy_global_to_shared(descs[1], [first_column, C], full, rings.query_rope)
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def _page_scores(rings, held, slot, phase, rope, rope_phase, position, first, length, C: gl.constexpr):
    """S [64, 64 tokens] of the page whose chunks begin at `slot`; rows outside [first, length) are zeroed in place."""
    chunks = rings.chunks
    RING: gl.constexpr = chunks.slots.shape[0]
    CHUNKS: gl.constexpr = C // chunks.slots.shape[2]
    HELD: gl.constexpr = len(held)
    if (position < first) | (position + 64 > length):
        page_slot = slot
        page_phase = phase
        for _ in gl.static_range(CHUNKS):
            mbarrier.wait(chunks.full.index(page_slot), page_phase)
            keep_owned(chunks.slots.index(page_slot), first - position, length - position)
            page_slot, page_phase = next_slot(page_slot, page_phase, RING)
        mbarrier.wait(rings.slots.full.index(rope), rope_phase)
        keep_owned(rings.slots.slots.index(rope), first - position, length - position)
        fence_async_shared()
        gl.thread_barrier()
    scores = gl.zeros([64, 64], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    for c in gl.static_range(CHUNKS):
        mbarrier.wait(chunks.full.index(slot), phase)
        keys = chunks.slots.index(slot).permute((1, 0))
        if c < HELD:
            scores = warpgroup_mma(held[c], keys, scores, is_async=True)
        else:
            scores = warpgroup_mma(rings.query.slots.index(c - HELD), keys, scores, is_async=True)
        slot, phase = next_slot(slot, phase, RING)
    mbarrier.wait(rings.slots.full.index(rope), rope_phase)
    keys = rings.slots.slots.index(rope).permute((1, 0))
    scores = warpgroup_mma(rings.query_rope, keys, scores, is_async=True)
    return warpgroup_mma_wait(0, deps=(scores,)), slot, phase


@gluon.jit
def _mask_unseen(scores, position, first, length, unseen, tokens):
    """Scores [64, 64 tokens] of the page at `position`, -inf where row n sees nothing: outside [first, length - unseen[n])."""
    if (position < first) | (position + 64 > length - (tokens - 1)):
        place = position + gl.arange(0, 64, layout=gl.SliceLayout(0, scores.type.layout))
        seen = (place[None, :] >= first) & (place[None, :] < (length - unseen)[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def _scores(rings, plan, starts_ptr, lens_ptr, query, block, C: gl.constexpr, HELD: gl.constexpr):
    first, scale, heads, tokens = query
    chunks = rings.chunks
    slots = rings.slots
    RING: gl.constexpr = chunks.slots.shape[0]
    SLOTS: gl.constexpr = slots.slots.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    column = gl.arange(0, 64, layout=row_layout) + block * 64
    # Query token t of `tokens` sees the first context_len - (tokens - 1) + t rows.
    unseen = gl.maximum(tokens - 1 - column // heads, 0)
    to_log2 = scale * 1.4426950408889634
    at, end, seq, seq_start = work(plan)
    slot = 0
    phase = 0
    share = 0
    share_phase = 0
    query_phase = 0
    totals_phase = 1
    while at < end:
        seq_end = gl.load(starts_ptr + seq + 1)
        seg_end = gl.minimum(seq_end, end)
        length = gl.load(lens_ptr + seq)
        largest = gl.full([64], float("-inf"), gl.float32, row_layout)
        total = gl.zeros([64], gl.float32, row_layout)
        held = ()
        for _ in gl.static_range(HELD):
            mbarrier.wait(chunks.full.index(slot), phase)
            held = held + (chunks.slots.index(slot).load(operand),)  # type: ignore[assignment]  # noqa: RUF005
            slot, phase = next_slot(slot, phase, RING)
        mbarrier.wait(rings.query.full.index(0), query_phase)
        query_phase ^= 1
        for index in range(at, seg_end):
            position = (index - seq_start) * 64
            scores, slot, phase = _page_scores(rings, held, slot, phase, share, share_phase, position, first, length, C)
            if index == at:
                # Only now: loads into registers have ended for certain when products have used them.
                held_slot = _skip(slot, RING - HELD - C // chunks.slots.shape[2], RING)
                for _ in gl.static_range(HELD):
                    mbarrier.arrive(chunks.free.index(held_slot), count=1)
                    held_slot = _skip(held_slot, 1, RING)
            if index > at:
                mbarrier.arrive(rings.shares_full.index(_skip(share, SLOTS - 1, SLOTS)), count=1)
            scores = _mask_unseen(scores, position, first, length, unseen, tokens)
            next_largest = gl.maximum(largest, gl.max(scores, axis=1))
            # A row that has seen nothing yet: any finite number keeps its shares at zero.
            finite = gl.where(next_largest == float("-inf"), 0.0, next_largest)
            factor = gl.exp2((largest - finite) * to_log2)
            largest = next_largest
            # Free since the page's rope values were let into this slot.
            rings.factors.index(share).store(factor)
            mbarrier.arrive(rings.factors_full.index(share), count=1)
            p = gl.exp2(scores * to_log2 - (finite * to_log2)[:, None])
            slots.slots.index(share).store(p.to(gl.bfloat16))
            fence_async_shared()
            total = total * factor + gl.sum(p, axis=1)
            share, share_phase = next_slot(share, share_phase, SLOTS)
        mbarrier.arrive(rings.shares_full.index(_skip(share, SLOTS - 1, SLOTS)), count=1)
        mbarrier.arrive(rings.query.free.index(0), count=1)
        mbarrier.wait(rings.totals.free.index(0), totals_phase)
        totals_phase ^= 1
        rings.totals.slots.index(0).store(total)
        rings.totals.slots.index(1).store(largest)
        mbarrier.arrive(rings.totals.full.index(0), count=1)
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def _values(
    rings, plan, starts_ptr, outputs, columns, scale, block, HALF: gl.constexpr, C: gl.constexpr, HELD: gl.constexpr
):
    chunks = rings.chunks
    slots = rings.slots
    RING: gl.constexpr = chunks.slots.shape[0]
    CHUNK: gl.constexpr = chunks.slots.shape[2]
    SLOTS: gl.constexpr = slots.slots.shape[0]
    OWN: gl.constexpr = C // CHUNK // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    at, end, seq, seq_start = work(plan)
    slot = HALF
    share = 0
    share_phase = 0
    totals_phase = 0
    while at < end:
        seq_end = gl.load(starts_ptr + seq + 1)
        seg_end = gl.minimum(seq_end, end)
        slot = _skip(slot, HELD, RING)
        outs = ()
        for _ in gl.static_range(OWN):
            outs = outs + (gl.zeros([64, CHUNK], gl.float32, layout),)  # type: ignore[assignment]  # noqa: RUF005
        for _ in range(at, seg_end):
            mbarrier.wait(rings.factors_full.index(share), share_phase)
            factor = rings.factors.index(share).load(row_layout)
            mixed = ()
            for c in gl.static_range(OWN):
                mixed = mixed + (outs[c] * factor[:, None],)  # type: ignore[assignment]  # noqa: RUF005
            # That the shares are there says also that the scores' warps saw all of the page.
            mbarrier.wait(rings.shares_full.index(share), share_phase)
            outs = ()
            own = slot
            for c in gl.static_range(OWN):
                update = warpgroup_mma(slots.slots.index(share), chunks.slots.index(own), mixed[c], is_async=True)
                outs = outs + (update,)  # type: ignore[assignment]  # noqa: RUF005
                own = _skip(own, 2, RING)
            own = slot
            for c in gl.static_range(OWN):
                outs = warpgroup_mma_wait(OWN - 1 - c, deps=outs)
                mbarrier.arrive(chunks.free.index(own), count=1)
                own = _skip(own, 2, RING)
            mbarrier.arrive(slots.free.index(share), count=1)
            slot = _skip(slot, 2 * OWN, RING)
            share, share_phase = next_slot(share, share_phase, SLOTS)
        is_whole = (at == seq_start) & (seg_end == seq_end)
        _store_half(rings.totals, totals_phase, outs, plan, outputs, seq, is_whole, columns, block, scale, HALF, C)
        totals_phase ^= 1
        at = seg_end
        seq_start = seq_end
        seq += 1


@gluon.jit
def _store_half(
    totals, phase, outs, plan, outputs, seq, is_whole, columns, block, to_natural, HALF: gl.constexpr, C: gl.constexpr
):
    """Normalise O [64, C / 2] and write it: a whole sequence to out and lse, else as the part (group, sequence)."""
    out_ptr, lse_ptr, part_ptr, part_lse_ptr = outputs
    CHUNK: gl.constexpr = outs[0].shape[1]
    layout: gl.constexpr = outs[0].type.layout
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    row = gl.arange(0, 64, layout=row_layout)
    c = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout)) + HALF * CHUNK
    mbarrier.wait(totals.full.index(0), phase)
    total = totals.slots.index(0).load(row_layout)
    largest = totals.slots.index(1).load(row_layout)
    mbarrier.arrive(totals.free.index(0), count=1)
    weight = gl.where(total > 0, 1.0 / total, 0.0)
    lse = gl.where(total > 0, largest * to_natural + gl.log(total), float("-inf"))
    seq64 = seq.to(gl.int64)
    place = block * 64 + row
    inside = place < columns
    if is_whole:
        out_to = out_ptr + seq64 * columns * C + place[:, None] * C + c[None, :]
        for i in gl.static_range(len(outs)):
            out = (outs[i] * weight[:, None]).to(out_ptr.dtype.element_ty)
            gl.store(out_to + 2 * i * CHUNK, out, mask=inside[:, None])
        if HALF == 0:
            gl.store(lse_ptr + seq64 * columns + place, lse, mask=inside)
    else:
        # Parts lie as [C, 64], for the merge.
        part = (plan[4] + seq64) * (gl.num_programs(0) // plan[5]) + block
        part_to = part_ptr + part * C * 64 + c[None, :] * 64 + row[:, None]
        for i in gl.static_range(len(outs)):
            gl.store(part_to + 2 * i * CHUNK * 64, outs[i] * weight[:, None])
        if HALF == 0:
            gl.store(part_lse_ptr + part * 64 + row, lse)


@gluon.jit(
    do_not_specialize=[
        "table_stride",
        "page_rows",
        "num_workers",
        "num_groups",
        "first",
        "columns",
        "heads",
        "tokens",
    ]
)
def mla_decode_wide_kernel(
    q_desc, q_rope_desc, latent_desc, rope_desc,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    bounds_ptr, firsts_ptr, first_starts_ptr, starts_ptr, lens_ptr, table_ptr, table_stride, page_rows,
    num_workers, num_groups, first, scale, columns, heads, tokens,
    C: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, HELD: gl.constexpr, RING: gl.constexpr, SLOTS: gl.constexpr,
    VALUE_REGS: gl.constexpr, SCORE_REGS: gl.constexpr,
):  # fmt: skip
    """Attend this CTA's pages for 64 columns; see the head of this file and `decode_paged`."""
    gl.static_assert(N == 64)
    gl.static_assert(SLOTS >= 2, "P of a page waits for the scores of the next")
    gl.static_assert(RING >= 2 * (C // CHUNK), "values of a page are behind the scores of the next")
    num_blocks = gl.num_programs(0) // num_groups
    block = gl.program_id(0) % num_blocks
    group = gl.program_id(0) // num_blocks
    bf16: gl.constexpr = gl.bfloat16
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, CHUNK], bf16)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], bf16)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    query = ring(gl.allocate_shared_memory(bf16, [C // CHUNK - HELD, 64, CHUNK], wide), 1)
    query_rope = gl.allocate_shared_memory(bf16, [64, 64], narrow)
    chunks = ring(gl.allocate_shared_memory(bf16, [RING, 64, CHUNK], wide), RING)
    slots = ring(gl.allocate_shared_memory(bf16, [SLOTS, 64, 64], narrow), SLOTS, 2)
    shares_full = barriers(SLOTS, 1)
    factors = gl.allocate_shared_memory(gl.float32, [SLOTS, 64], flat)
    factors_full = barriers(SLOTS, 1)
    totals = ring(gl.allocate_shared_memory(gl.float32, [2, 64], flat), 1, 2)
    rings = Rings(query, query_rope, chunks, slots, shares_full, factors, factors_full, totals)
    fence_async_shared()
    # Everything above overlaps the end of the kernel before, everything below the launch of the merge.
    gdc_wait()
    gdc_launch_dependents()
    plan = (bounds_ptr, firsts_ptr, first_starts_ptr, num_workers, group, num_groups)
    descs = (q_desc, q_rope_desc, latent_desc, rope_desc)
    pages = (table_ptr, table_stride, page_rows, columns)
    asked = (first, scale, heads, tokens)
    outputs = (out_ptr, lse_ptr, part_ptr, part_lse_ptr)
    left: gl.constexpr = 0
    right: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_values, (rings, plan, starts_ptr, outputs, columns, scale, block, left, C, HELD)),
            (_values, (rings, plan, starts_ptr, outputs, columns, scale, block, right, C, HELD)),
            (_scores, (rings, plan, starts_ptr, lens_ptr, asked, block, C, HELD)),
            (_loader, (descs, rings, plan, starts_ptr, pages, block, C, HELD)),
        ],
        [4, 4, 1],
        [VALUE_REGS, SCORE_REGS, 24],
    )
