"""What the MLA decode kernels share: rings between partitions, a CTA's segments, one softmax step, a segment's result.

A segment is the part of one sequence's pages that one CTA attends; `triton.mla_decode` cuts them. `plan` is what a
kernel was given of that cut: bounds, first sequences and where they start, number of workers, this CTA's group, groups.

Every barrier that is initialised is used in that instance of the kernel: the compiler gives the memory of an unused one
to something else, which the barrier then corrupts.
"""

# No postponed annotations: the types of an aggregate's fields are looked at.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate


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


@gluon.jit
def barriers(num: gl.constexpr, arrivals: gl.constexpr):
    """Barriers [num, 1] that turn after so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [num, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(num):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def ring(slots, num: gl.constexpr, readers: gl.constexpr = 1):
    """A ring over allocated slots, with its barriers."""
    return Ring(slots, barriers(num, 1), barriers(num, readers))


@gluon.jit
def next_slot(slot, phase, num_slots: gl.constexpr):
    """The ring position after this one; the phase turns when the ring wraps."""
    slot += 1
    wraps = slot == num_slots
    return gl.where(wraps, 0, slot), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def work(plan):
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
def keep_owned(tile, first, limit):
    """Zero the rows of a [64, X] tile outside [first, limit): they may hold NaN, which 0 * NaN would let through."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    owned = (rows >= first) & (rows < limit)
    values = tile.load(layout)
    tile.store(gl.where(owned[:, None], values, gl.zeros_like(values)))


@gluon.jit
def mask_unseen(scores, position, first, length, unseen, tokens):
    """Scores [64, N] of the page at `position`, -inf where column n sees no row: outside [first, length - unseen[n])."""
    if (position < first) | (position + 64 > length - (tokens - 1)):
        place = position + gl.arange(0, 64, layout=gl.SliceLayout(1, scores.type.layout))
        seen = (place[:, None] >= first) & (place[:, None] < (length - unseen)[None, :])
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def softmax_step(scores, largest, to_log2):
    """Shares [64, N] of these scores, the factor [N] of all shares before, and the new largest score [N]."""
    next_largest = gl.maximum(largest, gl.max(scores, axis=0))
    # A column that has seen no row yet: any finite number keeps its shares at zero.
    finite = gl.where(next_largest == float("-inf"), 0.0, next_largest)
    factor = gl.exp2((largest - finite) * to_log2)
    return gl.exp2(scores * to_log2 - (finite * to_log2)[None, :]), factor, next_largest


@gluon.jit
def publish_totals(totals, sums, largest, phase):
    """Hand a segment's sum of shares [N], from sums [64, N], and largest score [N] to `store_segment`."""
    total = gl.sum(sums, axis=0)
    mbarrier.wait(totals.free.index(0), phase)
    totals.slots.index(0).store(total)
    totals.slots.index(1).store(largest)
    mbarrier.arrive(totals.full.index(0), count=1)


@gluon.jit
def store_segment(
    totals, phase, outs, plan, outputs, seq, is_whole, columns, block, to_natural,
    C: gl.constexpr, STEP: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """Normalise O^T and write it: a whole sequence to out and lse, else as the part (group, sequence).

    `outs`: tiles [rows, N], in units of 1 / UNIT; each STEP of them hold every STEP-th row of STEP * rows.
    """
    out_ptr, lse_ptr, part_ptr, part_lse_ptr = outputs
    ROWS: gl.constexpr = outs[0].shape[0]
    N: gl.constexpr = outs[0].shape[1]
    layout: gl.constexpr = outs[0].type.layout
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)) * STEP
    column = gl.arange(0, N, layout=column_layout)
    mbarrier.wait(totals.full.index(0), phase)
    total = totals.slots.index(0).load(column_layout)
    largest = totals.slots.index(1).load(column_layout)
    mbarrier.arrive(totals.free.index(0), count=1)
    weight = gl.where(total > 0, UNIT / total, 0.0)
    lse = gl.where(total > 0, largest * to_natural + gl.log(total), float("-inf"))
    seq64 = seq.to(gl.int64)
    place = block * N + column
    inside = place < columns
    if is_whole:
        out_to = out_ptr + seq64 * columns * C + place[None, :] * C + row[:, None]
        for i in gl.static_range(C // ROWS):
            out = (outs[i] * weight[None, :]).to(out_ptr.dtype.element_ty)
            gl.store(out_to + (i // STEP * STEP * ROWS + i % STEP), out, mask=inside[None, :])
        gl.store(lse_ptr + seq64 * columns + place, lse, mask=inside)
    else:
        # Parts lie as [C, N]: what a thread holds is then 8 contiguous bytes.
        part = (plan[4] + seq64) * (gl.num_programs(0) // plan[5]) + block
        part_to = part_ptr + part * C * N + row[:, None] * N + column[None, :]
        for i in gl.static_range(C // ROWS):
            gl.store(part_to + (i // STEP * STEP * ROWS + i % STEP) * N, outs[i] * weight[None, :])
        gl.store(part_lse_ptr + part * N + column, lse)
