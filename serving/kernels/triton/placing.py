"""Slots for pairs of token and expert. Two kernels each: the pairs of each expert among every program's, then where each goes.

`count_kernel`, `place_kernel`: each pair has an expert, and their order is found pair by pair. `count_rows_kernel`, `place_rows_kernel`: pairs
may lack one (-1), so there are many for each that has; a token's experts are distinct, so one sum along the tokens orders its pairs together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_pairs", "steps"])
def count_kernel(
    experts_ptr, counts_ptr, num_pairs, steps, NUM_BINS: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr = False
):
    """counts [programs, NUM_BINS]: pairs of each expert among the program's `steps` x STEP pairs."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([NUM_BINS], tl.int32)
    first = tl.program_id(0) * steps * STEP
    for step in range(steps):
        pair = first + step * STEP + tl.arange(0, STEP)
        expert = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=0).to(tl.int32)
        total += tl.histogram(expert, NUM_BINS, mask=pair < num_pairs)
    tl.store(counts_ptr + tl.program_id(0) * NUM_BINS + tl.arange(0, NUM_BINS), total)


@triton.jit
def read_counts(counts_ptr, program, NUM_BINS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Of each expert its tiles, where they end, and the slot of the program's first pair; all int32 [NUM_BINS]. Counts of ROWS programs at a time."""
    bins = tl.arange(0, NUM_BINS)
    total = tl.zeros([NUM_BINS], tl.int32)
    before = tl.zeros([NUM_BINS], tl.int32)
    for first in range(0, tl.num_programs(0), ROWS):
        other = first + tl.arange(0, ROWS)
        counts = tl.load(
            counts_ptr + other[:, None] * NUM_BINS + bins[None, :],
            mask=(other < tl.num_programs(0))[:, None],
            other=0,
        )
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((other < program)[:, None], counts, 0), axis=0)
    tiles = (total + TILE - 1) // TILE
    tile_end = tl.cumsum(tiles, axis=0)
    next_slot = (tile_end - tiles) * TILE + before
    return tiles, tile_end, next_slot


@triton.jit
def store_tiles(
    tile_expert_ptr, num_tiles_ptr, tiles, tile_end, program, num_programs, NUM_BINS: tl.constexpr
):  # fmt: skip
    """The program's share of the expert of each tile, and the number of tiles; `tiles` of each expert, which end at `tile_end`."""
    if program == 0:
        num_tiles = tl.sum(tiles, axis=0)
        tl.store(num_tiles_ptr, num_tiles)
        # Of no tile a product reads the expert ahead.
        tl.store(tile_expert_ptr, 0, mask=num_tiles == 0)
    bins = tl.arange(0, NUM_BINS)
    for tile in range(program, tl.max(tiles, axis=0), num_programs):
        tl.store(tile_expert_ptr + tile_end - tiles + tile, bins, mask=tile < tiles)


@triton.jit(do_not_specialize=["num_pairs", "steps"])
def place_kernel(
    experts_ptr,
    counts_ptr,
    slots_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    num_pairs,
    steps,
    NUM_BINS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """The slot of each pair, the tiles and their number. Counts are read ROWS programs at a time.

    NUM_BINS is a power of two from the number of experts.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    tiles, tile_end, next_slot = read_counts(counts_ptr, program, NUM_BINS, ROWS, TILE)
    lane = tl.arange(0, STEP)
    for step in range(steps):
        pair = (program * steps + step) * STEP + lane
        expert = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=0).to(tl.int32)
        same = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        rank = tl.sum(same.to(tl.int32), axis=1)
        tl.store(slots_ptr + pair, tl.gather(next_slot, expert, 0) + rank, mask=pair < num_pairs)
        next_slot += tl.histogram(expert, NUM_BINS, mask=pair < num_pairs)
    store_tiles(tile_expert_ptr, num_tiles_ptr, tiles, tile_end, program, tl.num_programs(0), NUM_BINS)


@triton.jit
def picks_of(picks_ptr, row, num_rows, picks_per_bin, TOP_K: tl.constexpr, NUM_BINS: tl.constexpr, ROWS: tl.constexpr):
    """int32 [ROWS, NUM_BINS]: of each row its picks in each bin of so many neighbours; -1 is in none."""
    bins = tl.arange(0, NUM_BINS)
    num_picks = tl.zeros([ROWS, NUM_BINS], tl.int32)
    for k in tl.static_range(TOP_K):
        pick = tl.load(picks_ptr + row * TOP_K + k, mask=row < num_rows, other=-1).to(tl.int32)
        in_bin = tl.where(pick >= 0, pick // picks_per_bin, -1)
        num_picks += (in_bin[:, None] == bins[None, :]).to(tl.int32)
    return num_picks


@triton.jit(do_not_specialize=["num_slots", "num_rows", "steps"])
def count_rows_kernel(
    experts_ptr,
    counts_ptr,
    source_ptr,
    num_slots,
    num_rows,
    steps,
    TOP_K: tl.constexpr,
    NUM_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    FETCHED: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """counts [programs, NUM_BINS]: pairs of each expert among the program's `steps` x ROWS tokens. FETCHED: no slot has a source yet."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([NUM_BINS], tl.int32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        total += tl.sum(picks_of(experts_ptr, row, num_rows, 1, TOP_K, NUM_BINS, ROWS), axis=0)
    tl.store(counts_ptr + tl.program_id(0) * NUM_BINS + tl.arange(0, NUM_BINS), total)
    if FETCHED:
        for first_slot in range(tl.program_id(0) * 256, num_slots, tl.num_programs(0) * 256):
            slot = first_slot + tl.arange(0, 256)
            tl.store(source_ptr + slot, -1, mask=slot < num_slots)


@triton.jit(do_not_specialize=["num_rows", "steps"])
def place_rows_kernel(
    experts_ptr,
    counts_ptr,
    slots_ptr,
    source_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    num_rows,
    steps,
    TOP_K: tl.constexpr,
    NUM_BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNTED: tl.constexpr,
    TILE: tl.constexpr,
    FETCHED: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """The slot of each pair, -1 of those without expert, the tiles and their number; FETCHED: the pair in each slot. Counts are read COUNTED
    programs at a time."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    bins = tl.arange(0, NUM_BINS)
    program = tl.program_id(0)
    tiles, tile_end, next_slot = read_counts(counts_ptr, program, NUM_BINS, COUNTED, TILE)
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        picks = picks_of(experts_ptr, row, num_rows, 1, TOP_K, NUM_BINS, ROWS)
        slots = next_slot[None, :] + tl.cumsum(picks, axis=0) - picks
        for k in tl.static_range(TOP_K):
            pair = row * TOP_K + k
            expert = tl.load(experts_ptr + pair, mask=row < num_rows, other=-1).to(tl.int32)
            slot = tl.sum(tl.where(expert[:, None] == bins[None, :], slots, 0), axis=1)
            if FETCHED:
                tl.store(source_ptr + slot, pair, mask=expert >= 0)
            tl.store(slots_ptr + pair, tl.where(expert >= 0, slot, -1), mask=row < num_rows)
        next_slot += tl.sum(picks, axis=0)
    store_tiles(tile_expert_ptr, num_tiles_ptr, tiles, tile_end, program, tl.num_programs(0), NUM_BINS)
