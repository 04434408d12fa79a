"""Expert dispatch through peer memory; see `serving.kernels.dispatch`.

Both launches that write elsewhere end in the same way: each program orders its writes before a count of the programs that have ended,
and the one that completes the count orders them all before the flags that it raises at the ranks. A wait is one program, so that ranks
that wait for each other on two streams keep no processor from what they wait for, and lets the next kernel start only when it is over.

Bound: what moves: K rows out and K results back for each token, over NVLink; the routing of W * C rows beside them; and the time
that a write takes to be seen by another device, twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from serving.kernels.dispatch import Layout, Window, arrived_rows, payload_words
from serving.kernels.quant import QuantisedRows
from serving.kernels.triton.device import num_processors, overlap

_WORDS = 1024
"""Of 8 bytes, that a program copies of a row to send."""
_RESULT_WORDS = 2048
"""The same, at once, of a result."""
_ROUTED_ROWS = 32
LOOK = 256
_COLUMNS = 1024
_MOST_ROWS = 32
"""That a program looks at for those in use."""
_PROGRAMS_A_PROCESSOR = 8


@triton.jit
def end(bases_ptr, places_ptr, state_ptr, step, flags, world_size, RANKS: tl.constexpr, DEVICE: tl.constexpr):
    """Of every program, after its writes: the last one to come raises `step` in this rank's flag of each."""
    rank = tl.arange(0, RANKS)
    known = rank < world_size
    base = tl.load(bases_ptr + rank, mask=known, other=0)
    place = tl.load(places_ptr + rank, mask=known, other=0)
    # All threads' writes are before the count of one of them, all programs' before the last count.
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(state_ptr, step)
        tl.store(state_ptr + 1, 0)
        if DEVICE:
            # One fence of a thread for all its flags, and so all that was written before any of them, wherever it is.
            tl.inline_asm_elementwise(
                "fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
            )
        flag = (base + flags + place * 8).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(flag, tl.zeros([RANKS], tl.int64) + step, mask=known, sem="relaxed", scope="sys")


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "capacity",
        "world_size",
        "num_row_programs",
        "arrived_scale_stride",
        "scale_stride_b",
    ]
)
def send_kernel(
    rows_ptr,
    scales_ptr,
    slots_ptr,
    weights_ptr,
    bases_ptr,
    places_ptr,
    state_ptr,
    num_rows,
    capacity,
    world_size,
    num_row_programs,
    row_words,
    row_stride,
    num_blocks,
    scale_stride_b,
    arrived_scale_stride,
    sent_at,
    slots_at,
    weights_at,
    scales_at,
    rows_at,
    SLOTS_PER_RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALED: tl.constexpr,
    WORDS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROUTED: tl.constexpr,
    RANKS: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """The first programs have a part of a row each and one in SPLIT of its picks, whose ranks they write it to: page after page of a memory
    that is larger than what a processor can address at once costs it a microsecond each. The others have the routing of ROUTED rows to one rank."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    step = tl.load(state_ptr) + 1
    program = tl.program_id(0)
    k_K = tl.arange(0, K)
    if program < num_row_programs:
        row = program // (PARTS * SPLIT)
        first_pick = program // PARTS % SPLIT
        part = program % PARTS
        word = part * WORDS + tl.arange(0, WORDS)
        words = tl.load(rows_ptr + row.to(tl.int64) * row_stride + word, mask=word < row_words, other=0)
        slot_K = tl.load(slots_ptr + row * TOP_K + k_K, mask=k_K < TOP_K, other=-1)
        rank_K = tl.where(slot_K >= 0, slot_K // SLOTS_PER_RANK, -1)
        base_K = tl.load(bases_ptr + rank_K, mask=rank_K >= 0, other=0)
        at_K = tl.load(places_ptr + rank_K, mask=rank_K >= 0, other=0) * capacity + row
        block = tl.arange(0, BLOCKS)
        if SCALED:
            has_block = (block < num_blocks) & (part == 0)
            scales = tl.load(scales_ptr + block * scale_stride_b + row, mask=has_block, other=0.0)
        for i in tl.static_range((TOP_K + SPLIT - 1) // SPLIT):
            k = first_pick + i * SPLIT
            rank = tl.max(tl.where(k_K == k, rank_K, -1), axis=0)
            # Of several picks on a rank the first counts.
            earlier = tl.sum(((rank_K == rank) & (k_K < k)).to(tl.int32), axis=0)
            if (rank >= 0) & (earlier == 0):
                base = tl.sum(tl.where(k_K == k, base_K, 0), axis=0)
                at = tl.sum(tl.where(k_K == k, at_K, 0), axis=0)
                there = tl.multiple_of((base + rows_at).to(tl.pointer_type(tl.int64)), 16)
                tl.store(there + at * row_words + word, words, mask=word < row_words)
                if SCALED:
                    scales_there = (base + scales_at).to(tl.pointer_type(tl.float32))
                    tl.store(scales_there + block * arrived_scale_stride + at, scales, mask=has_block)
    else:
        index = program - num_row_programs
        target = index % world_size
        row_C = index // world_size * ROUTED + tl.arange(0, ROUTED)
        picked = (row_C < num_rows)[:, None] & (k_K < TOP_K)[None, :]
        pick = row_C[:, None] * TOP_K + k_K[None, :]
        slot_CK = tl.load(slots_ptr + pick, mask=picked, other=-1)
        weight_CK = tl.load(weights_ptr + pick, mask=picked, other=0.0)
        local_CK = slot_CK - target * SLOTS_PER_RANK
        here_CK = (slot_CK >= 0) & (local_CK >= 0) & (local_CK < SLOTS_PER_RANK)
        column_CK = tl.cumsum(here_CK.to(tl.int32), axis=1) - 1
        target_base = tl.load(bases_ptr + target)
        at_C = (tl.load(places_ptr + target) * capacity + row_C) * COLUMNS
        slots_there = (target_base + slots_at).to(tl.pointer_type(tl.int64))
        weights_there = (target_base + weights_at).to(tl.pointer_type(tl.float32))
        for column in tl.static_range(COLUMNS):
            mine_CK = here_CK & (column_CK == column)
            slot_C = tl.sum(tl.where(mine_CK, local_CK + 1, 0), axis=1) - 1
            weight_C = tl.sum(tl.where(mine_CK, weight_CK, 0.0), axis=1)
            tl.store(slots_there + at_C + column, slot_C, mask=row_C < capacity)
            tl.store(weights_there + at_C + column, weight_C, mask=row_C < capacity)
    end(bases_ptr, places_ptr, state_ptr, step, sent_at, world_size, RANKS, DEVICE)


@triton.jit
def await_flags(
    flags_ptr,
    state_ptr,
    given_up_ptr,
    first,
    last,
    limit,
    RANKS: tl.constexpr,
    LOOK: tl.constexpr,
    DEVICE: tl.constexpr,
):
    """Until the flags from `first` to before `last` show this exchange, which is returned; or somebody gave up."""
    rank = first + tl.arange(0, RANKS)
    known = rank < last
    nothing = tl.zeros([RANKS], tl.int64)
    step = tl.load(state_ptr)
    given_up = tl.load(state_ptr + 2)
    rounds = 0
    seen = tl.atomic_add(flags_ptr + rank, nothing, mask=known, sem="acquire", scope="sys")
    num_late = tl.sum((known & (seen < step)).to(tl.int32), axis=0)
    spent = tl.full([], 0, tl.int64)
    begin = globaltimer() if DEVICE else spent
    while (num_late > 0) & (given_up == 0):
        seen = tl.atomic_add(flags_ptr + rank, nothing, mask=known, sem="acquire", scope="sys")
        num_late = tl.sum((known & (seen < step)).to(tl.int32), axis=0)
        spent = globaltimer() - begin if DEVICE else spent + 1
        rounds += 1
        if (num_late > 0) & (rounds % LOOK == 0):
            # Over the bus, so not every time.
            given_up = tl.load(given_up_ptr, volatile=True)
            tl.store(state_ptr + 2, given_up)
        if (num_late > 0) & (given_up == 0) & (spent > limit):
            given_up = step
            tl.store(state_ptr + 2, step)
            tl.store(given_up_ptr + 1 + rank, (seen < step).to(tl.int64), mask=known)
            tl.store(given_up_ptr, step)
    return step


@triton.jit(do_not_specialize=["world_size", "limit"])
def wait_kernel(
    flags_ptr,
    state_ptr,
    given_up_ptr,
    world_size,
    limit,
    RANKS: tl.constexpr,
    LOOK: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """`limit` is in ns; without a DEVICE there is no clock, and it is in rounds. Every LOOK of those it sees whether the host gave up."""
    if PDL:
        gdc_wait()
    await_flags(flags_ptr, state_ptr, given_up_ptr, 0, world_size, limit, RANKS, LOOK, DEVICE)
    if PDL:
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_rows", "capacity", "world_size"])
def give_back_kernel(
    y_ptr,
    slots_ptr,
    bases_ptr,
    places_ptr,
    state_ptr,
    num_rows,
    capacity,
    world_size,
    row_words,
    y_stride,
    returned_at,
    results_at,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RANKS: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A program looks at ROWS rows, spread over all, since neighbours may be all in use, and sends those that are."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    step = tl.load(state_ptr)
    row_R = tl.program_id(0) + tl.arange(0, ROWS) * tl.num_programs(0)
    slot_R = tl.load(slots_ptr + row_R * COLUMNS, mask=row_R < num_rows, other=-1)
    used_R = slot_R >= 0
    nth_R = tl.cumsum(used_R.to(tl.int32), axis=0)
    for n in range(tl.sum(used_R.to(tl.int32), axis=0)):
        row = tl.sum(tl.where(used_R & (nth_R == n + 1), row_R, 0), axis=0)
        source = row // capacity
        base = tl.load(bases_ptr + source)
        at = tl.load(places_ptr + source) * capacity + row % capacity
        there = tl.multiple_of((base + results_at).to(tl.pointer_type(tl.int64)), 16)
        for first in range(0, row_words, WORDS):
            word = first + tl.arange(0, WORDS)
            words = tl.load(y_ptr + row.to(tl.int64) * y_stride + word, mask=word < row_words, other=0)
            tl.store(there + at * row_words + word, words, mask=word < row_words)
    end(bases_ptr, places_ptr, state_ptr, step, returned_at, world_size, RANKS, DEVICE)


@triton.jit(do_not_specialize=["capacity", "world_size"])
def add_up_kernel(
    results_ptr,
    slots_ptr,
    out_ptr,
    capacity,
    world_size,
    width,
    SLOTS_PER_RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k_K = tl.arange(0, K)
    slot_K = tl.load(slots_ptr + row * TOP_K + k_K, mask=k_K < TOP_K, other=-1)
    rank_K = tl.where(slot_K >= 0, slot_K // SLOTS_PER_RANK, world_size)
    rank = tl.full([], -1, tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    for _ in tl.static_range(TOP_K):
        # In the ranks' order, each once; past the last one there is nothing to add.
        rank = tl.min(tl.where(rank_K > rank, rank_K, world_size), axis=0)
        result = results_ptr + (rank * capacity + row) * width + column
        total += tl.load(result, mask=(column < width) & (rank < world_size), other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


def send(
    window: Window,
    layout: Layout,
    x: Tensor | QuantisedRows,
    slots_TK: Tensor,
    weights_TK: Tensor,
    *,
    slots_per_rank: int,
    capacity: int,
) -> None:
    num_rows, top_k = slots_TK.shape
    assert slots_TK.is_contiguous(), "a row's picks lie behind those of the row before"
    assert weights_TK.is_contiguous(), "a row's weights lie behind those of the row before"
    values, scales = (x, None) if isinstance(x, Tensor) else (x.values, x.scales)
    arrived = arrived_rows(window, layout, x, capacity).x
    arrived_stride = 0 if isinstance(arrived, Tensor) else arrived.scales.stride(1)
    words = payload_words(values)
    row_words = words.shape[1]
    block = min(_WORDS, triton.next_power_of_2(row_words))
    parts = triton.cdiv(row_words, block)
    split = min(top_k, window.world_size)
    num_row_programs = num_rows * parts * split
    routed = min(_ROUTED_ROWS, triton.next_power_of_2(capacity))
    num_programs = num_row_programs + window.world_size * triton.cdiv(capacity, routed)
    send_kernel[(num_programs,)](
        words,
        words if scales is None else scales,
        slots_TK,
        weights_TK,
        window.bases,
        window.places,
        window.state,
        num_rows,
        capacity,
        window.world_size,
        num_row_programs,
        row_words,
        words.stride(0),
        0 if scales is None else scales.shape[1],
        0 if scales is None else scales.stride(1),
        arrived_stride,
        layout.sent,
        layout.slots,
        layout.weights,
        layout.scales,
        layout.rows,
        SLOTS_PER_RANK=slots_per_rank,
        TOP_K=top_k,
        K=triton.next_power_of_2(top_k),
        COLUMNS=layout.columns,
        SCALED=scales is not None,
        WORDS=block,
        PARTS=parts,
        SPLIT=split,
        BLOCKS=1 if scales is None else triton.next_power_of_2(scales.shape[1]),
        ROUTED=routed,
        RANKS=lanes(window.world_size, 4),
        DEVICE=window.own.is_cuda,
        num_warps=4,
        **overlap(slots_TK.device),
    )


def wait(window: Window, flags: int, *, limit_ns: int) -> None:
    num_warps = 1 if window.world_size <= 32 else 4
    wait_kernel[(1,)](
        window.own[flags:].view(torch.int64),
        window.state,
        window.given_up,
        window.world_size,
        limit_ns,
        RANKS=lanes(window.world_size, num_warps),
        LOOK=LOOK,
        DEVICE=window.own.is_cuda,
        num_warps=num_warps,
        **overlap(window.own.device),
    )


def give_back(window: Window, layout: Layout, y_RD: Tensor, *, capacity: int) -> None:
    num_rows = window.world_size * capacity
    assert len(y_RD) == num_rows, f"{len(y_RD)} results of {num_rows} rows"
    words = payload_words(y_RD)
    rows = triton.cdiv(num_rows, _PROGRAMS_A_PROCESSOR * num_processors(y_RD.device))
    rows = min(_MOST_ROWS, triton.next_power_of_2(rows))
    # Odd, so that rows of one program are not the same row of several ranks.
    num_programs = triton.cdiv(num_rows, rows) | 1
    give_back_kernel[(num_programs,)](
        words,
        window.own[layout.slots :].view(torch.int64),
        window.bases,
        window.places,
        window.state,
        num_rows,
        capacity,
        window.world_size,
        words.shape[1],
        words.stride(0),
        layout.returned,
        layout.results,
        COLUMNS=layout.columns,
        ROWS=rows,
        WORDS=min(_RESULT_WORDS, triton.next_power_of_2(words.shape[1])),
        RANKS=lanes(window.world_size, 4),
        DEVICE=window.own.is_cuda,
        num_warps=4,
        **overlap(y_RD.device),
    )


def add_up(
    window: Window,
    layout: Layout,
    slots_TK: Tensor,
    *,
    slots_per_rank: int,
    capacity: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    num_rows, top_k = slots_TK.shape
    out = torch.empty(num_rows, width, dtype=dtype, device=slots_TK.device)
    if not num_rows:
        return out
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    add_up_kernel[(num_rows, triton.cdiv(width, columns))](
        window.own[layout.results :].view(dtype),
        slots_TK,
        out,
        capacity,
        window.world_size,
        width,
        SLOTS_PER_RANK=slots_per_rank,
        TOP_K=top_k,
        K=triton.next_power_of_2(top_k),
        COLUMNS=columns,
        num_warps=4,
        **overlap(out.device),
    )
    return out


def lanes(world_size: int, num_warps: int) -> int:
    """A thread a rank at least, so that no two threads do the same atomic."""
    lanes: int = max(32 * num_warps, triton.next_power_of_2(world_size))
    return lanes
