"""Slots for pairs of token and expert. Two kernels each: the pairs of each expert among every program's, then where each goes.

`count_kernel`, `place_kernel`: each pair has an expert, and their order is found pair by pair. `count_rows_kernel`, `place_rows_kernel`: pairs
may lack one (-1), so there are many for each that has; a token's experts are distinct, so one sum along the tokens orders its pairs together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.triton.device import num_processors, overlap
from serving.kernels.triton.gemm import Tiles

_STEP = 64
# Tokens times experts that a program looks at, and most tokens.
_LOOKED_AT, _MOST_ROWS = 2048, 64
# Bins of a histogram that the device counts in.
_FEWEST_BINS = 16


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
    tile_expert_ptr, num_tiles_ptr, done_ptr, num_done, tiles, tile_end, program, num_programs, NUM_BINS: tl.constexpr
):  # fmt: skip
    """The program's share of the expert of each tile, and the number of tiles; `tiles` of each expert, which end at `tile_end`. Of none
    of them (`num_done`) is anything done."""
    if program == 0:
        num_tiles = tl.sum(tiles, axis=0)
        tl.store(num_tiles_ptr, num_tiles)
        # Of no tile a product reads the expert ahead.
        tl.store(tile_expert_ptr, 0, mask=num_tiles == 0)
    bins = tl.arange(0, NUM_BINS)
    for tile in range(program, tl.max(tiles, axis=0), num_programs):
        tl.store(tile_expert_ptr + tile_end - tiles + tile, bins, mask=tile < tiles)
    for first in range(program * NUM_BINS, num_done, num_programs * NUM_BINS):
        tl.store(done_ptr + first + bins, 0, mask=first + bins < num_done)


@triton.jit(do_not_specialize=["num_pairs", "num_done", "steps"])
def place_kernel(
    experts_ptr,
    counts_ptr,
    slots_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    done_ptr,
    num_done,
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
    store_tiles(
        tile_expert_ptr, num_tiles_ptr, done_ptr, num_done, tiles, tile_end, program, tl.num_programs(0), NUM_BINS
    )


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


@triton.jit(do_not_specialize=["num_rows", "num_done", "steps"])
def place_rows_kernel(
    experts_ptr,
    counts_ptr,
    slots_ptr,
    source_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    done_ptr,
    num_done,
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
    store_tiles(
        tile_expert_ptr, num_tiles_ptr, done_ptr, num_done, tiles, tile_end, program, tl.num_programs(0), NUM_BINS
    )


@dataclass(frozen=True, kw_only=True)
class Partial:
    """Pairs of token and expert may lack the expert (-1).

    `num_used`: about so many have one, for the choice of tiles; `max_used`: no more than so many. None: all that distinct experts allow.
    """

    num_used: int | None = None
    max_used: int | None = None

    def bounds(self, experts_TK: Tensor, num_experts: int) -> tuple[int, int]:
        """Pairs to expect, and the most there may be."""
        num_tokens, top_k = experts_TK.shape
        most = num_tokens * min(top_k, num_experts)
        if self.max_used is not None:
            most = min(most, self.max_used)
        return most if self.num_used is None else min(most, self.num_used), most

    def is_sparse(self, experts_TK: Tensor, num_experts: int) -> bool:
        """Whether most tokens are expected to have no expert."""
        return 2 * self.bounds(experts_TK, num_experts)[0] < len(experts_TK)


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Where the pairs of token and expert went. `slots_TK`: int32, the slot of each pair, -1: none; there are `num_slots` at most.

    `source_S`: int32 [num_slots], the pair in each slot of the tiles in use, -1: none; where rows are fetched.
    """

    slots_TK: Tensor
    num_slots: int
    tiles: Tiles
    partial: Partial | None
    source_S: Tensor | None


def place(
    experts_TK: Tensor, num_experts: int, tile: int, partial: Partial | None = None, *, num_beside: int | None = None
) -> Slots:
    """Slots for pairs of token and expert (int64 [T, K], all below `num_experts`), in tiles of `tile`. Two launches.

    `num_beside`: `Tiles.done` is wanted, with so many tiles of shared experts.
    """
    if partial is not None:
        return _place_partial(experts_TK, num_experts, tile, partial, num_beside)
    slots = new_slots(experts_TK, num_experts, tile, None, fetched=False, num_beside=num_beside)
    num_pairs, device, tiles = experts_TK.numel(), experts_TK.device, slots.tiles
    num_bins = triton.next_power_of_2(num_experts)
    num_steps = triton.cdiv(num_pairs, _STEP)
    steps = triton.cdiv(num_steps, 2 * num_processors(device))
    programs = triton.cdiv(num_steps, steps)
    counts = torch.empty(programs, num_bins, dtype=torch.int32, device=device)
    shape = {"NUM_BINS": num_bins, "STEP": _STEP}
    count_kernel[(programs,)](experts_TK, counts, num_pairs, steps, **shape, **overlap(device))
    place_kernel[(programs,)](
        experts_TK, counts, slots.slots_TK, tiles.expert, tiles.num_used, *done_of(tiles), num_pairs, steps,
        **shape, ROWS=max(8, 8192 // num_bins), TILE=tile, **overlap(device),
    )  # fmt: skip
    return slots


def _place_partial(experts_TK: Tensor, num_experts: int, tile: int, partial: Partial, num_beside: int | None) -> Slots:
    """`place` of pairs that may lack an expert."""
    fetched = partial.is_sparse(experts_TK, num_experts)
    slots = new_slots(experts_TK, num_experts, tile, partial, fetched=fetched, num_beside=num_beside)
    (num_tokens, top_k), device, tiles = experts_TK.shape, experts_TK.device, slots.tiles
    num_bins = max(_FEWEST_BINS, triton.next_power_of_2(num_experts))
    rows = max(1, min(_MOST_ROWS, _LOOKED_AT // num_bins))
    num_steps = triton.cdiv(num_tokens, rows)
    steps = triton.cdiv(num_steps, 2 * num_processors(device))
    programs = triton.cdiv(num_steps, steps)
    counts = torch.empty(programs, num_bins, dtype=torch.int32, device=device)
    source = slots.slots_TK if slots.source_S is None else slots.source_S
    shape = {"TOP_K": top_k, "NUM_BINS": num_bins, "ROWS": rows, "FETCHED": fetched}
    count_rows_kernel[(programs,)](
        experts_TK, counts, source, slots.num_slots, num_tokens, steps, **shape, **overlap(device)
    )
    place_rows_kernel[(programs,)](
        experts_TK, counts, slots.slots_TK, source, tiles.expert, tiles.num_used, *done_of(tiles), num_tokens, steps,
        **shape, COUNTED=max(8, 4096 // num_bins), TILE=tile, **overlap(device),
    )  # fmt: skip
    return slots


def done_of(tiles: Tiles) -> tuple[Tensor, int]:
    """`Tiles.done` and its length for a kernel; where there is none something to point at."""
    return (tiles.expert, 0) if tiles.done is None else (tiles.done, len(tiles.done))


def new_slots(
    experts_TK: Tensor,
    num_experts: int,
    tile: int,
    partial: Partial | None,
    *,
    fetched: bool,
    num_beside: int | None = None,
) -> Slots:
    """To be filled by a kernel; for the most tiles there may be."""
    assert experts_TK.is_contiguous()
    num_pairs, device = experts_TK.numel(), experts_TK.device
    expected, most = (num_pairs, num_pairs) if partial is None else partial.bounds(experts_TK, num_experts)

    def num_tiles(num_used: int) -> int:
        return max(1, (num_used + min(num_experts, num_used) * (tile - 1)) // tile)

    max_tiles = num_tiles(most)
    tiles = Tiles(
        expert=torch.empty(max_tiles, dtype=torch.int32, device=device),
        num_used=torch.empty(1, dtype=torch.int32, device=device),
        max_tiles=max_tiles,
        num_rows=tile,
        num_expected=num_tiles(expected),
        done=None if num_beside is None else torch.empty(num_beside + max_tiles, dtype=torch.int32, device=device),
    )
    num_slots = max_tiles * tile
    return Slots(
        slots_TK=torch.empty(experts_TK.shape, dtype=torch.int32, device=device),
        num_slots=num_slots,
        tiles=tiles,
        partial=partial,
        source_S=torch.empty(num_slots, dtype=torch.int32, device=device) if fetched else None,
    )
