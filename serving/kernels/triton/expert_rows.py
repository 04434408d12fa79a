"""Which rows go to which expert, decided on the device, and the way back.

Pairs of token and expert get slots (`placing`): each expert's pairs lie together, in the order of the tokens, and each expert begins at
a multiple of TILE slots, so that a tile of a product meets one expert. Slots that pad a tile hold whatever was there: a row
of a product depends on its own row only, and nobody reads them back.

Where pairs may lack an expert (PARTIAL, -1) those get no slot. Where most tokens are expected to have none, rows are fetched by
slot (FETCHED) instead of sent by token, and summed by slot if rows without an expert need no zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.quant import BLOCK, QuantisedRows, empty_rows
from serving.kernels.triton.device import num_processors, overlap
from serving.kernels.triton.placing import Partial, Slots, done_of, new_slots, place, store_tiles
from serving.kernels.triton.quant import quantise

# Up to so many pairs each token's program counts all of them: one launch instead of three.
_COUNTED_BY_ALL = 1024
# Numbers of pairs counted at once by a program that looks at all; few, so that few kernels are compiled.
_COUNTED_AT_ONCE = (128, _COUNTED_BY_ALL)
# Where work is dealt out by its amount on the device.
_PROGRAMS_A_PROCESSOR = 16
# From so many tokens on a program has a whole row, of up to so many columns.
_MANY_TOKENS, _WHOLE_ROW, _PART_OF_ROW = 4096, 8192, 1024


@triton.jit
def _chosen(experts_ptr, pair, num_pairs, PARTIAL: tl.constexpr):
    """The expert of each pair, 0 where there is none; and which pairs have one."""
    counts = pair < num_pairs
    expert = tl.load(experts_ptr + pair, mask=counts, other=0).to(tl.int32)
    if PARTIAL:
        counts = counts & (expert >= 0)
        expert = tl.maximum(expert, 0)
    return expert, counts


@triton.jit
def _take(
    x_ptr, x_scale_ptr, token, group, column, mask, has_group, x_stride, x_scale_row, x_scale_stride,
    QUANTISE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Groups of 128 columns of a token's row as its experts get them, and their scales; of a plain row there are none."""
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + column, mask=mask, other=0.0)
    scale = x
    if QUANTISE:
        x, scale = quantise(x.to(tl.float32))
    elif SCALED:
        scale = tl.load(
            x_scale_ptr + group * x_scale_stride + token.to(tl.int64) * x_scale_row, mask=has_group, other=0.0
        )
    return x, scale


@triton.jit(do_not_specialize=["num_pairs", "num_done", "x_scale_row", "x_scale_stride", "out_scale_stride"])
def send_kernel(
    experts_ptr,
    x_ptr,
    x_scale_ptr,
    slots_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    done_ptr,
    num_done,
    out_ptr,
    out_scale_ptr,
    num_pairs,
    width,
    x_stride,
    x_scale_row,
    x_scale_stride,
    out_stride,
    out_scale_stride,
    NUM_BINS: tl.constexpr,
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    QUANTISE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PARTIAL: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """`place_kernel` and `scatter_kernel` in one, for at most PAIRS pairs; a token a program. PARTIAL: -1 for a pair without expert."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    bins = tl.arange(0, NUM_BINS)
    every = tl.arange(0, PAIRS)
    chosen, counts = _chosen(experts_ptr, every, num_pairs, PARTIAL)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = column < width
    has_group = group * 128 < width
    x, scale = _take(
        x_ptr, x_scale_ptr, token, group, column, mask, has_group, x_stride, x_scale_row, x_scale_stride, QUANTISE, SCALED
    )  # fmt: skip
    total = tl.histogram(chosen, NUM_BINS, mask=counts)
    tiles = (total + TILE - 1) // TILE
    tile_end = tl.cumsum(tiles, axis=0)
    first_slot = (tile_end - tiles) * TILE
    # All of the token's experts in one pass: a sum over the program takes longer than what it adds up.
    k_K = tl.arange(0, K)
    pair_K = token * TOP_K + k_K
    expert_K = tl.load(experts_ptr + pair_K, mask=k_K < TOP_K, other=0).to(tl.int32)
    before = (chosen[None, :] == expert_K[:, None]) & (every[None, :] < pair_K[:, None])
    if PARTIAL:
        before = before & counts[None, :]
    first_K = tl.sum(tl.where(bins[None, :] == expert_K[:, None], first_slot[None, :], 0), axis=1)
    slot_K = first_K + tl.sum(before.to(tl.int32), axis=1)
    if PARTIAL:
        slot_K = tl.where(expert_K >= 0, slot_K, -1)
    tl.store(slots_ptr + pair_K, slot_K, mask=(k_K < TOP_K) & (tl.program_id(1) == 0))
    for k in tl.static_range(TOP_K):
        slot = tl.sum(tl.where(k_K == k, slot_K, 0), axis=0).to(tl.int64)
        tl.store(out_ptr + slot * out_stride + column, x, mask=mask & (slot >= 0))
        if QUANTISE or SCALED:
            tl.store(out_scale_ptr + group * out_scale_stride + slot, scale, mask=has_group & (slot >= 0))
    if tl.program_id(1) == 0:
        store_tiles(
            tile_expert_ptr, num_tiles_ptr, done_ptr, num_done, tiles, tile_end, token, tl.num_programs(0), NUM_BINS
        )


@triton.jit(do_not_specialize=["num_slots", "x_scale_row", "x_scale_stride", "out_scale_stride"])
def scatter_kernel(
    x_ptr,
    x_scale_ptr,
    slots_ptr,
    weights_ptr,
    place_ptr,
    factor_ptr,
    out_ptr,
    out_scale_ptr,
    num_slots,
    width,
    x_stride,
    x_scale_row,
    x_scale_stride,
    out_stride,
    out_scale_stride,
    TOP_K: tl.constexpr,
    QUANTISE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    K: tl.constexpr,
    ALONE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A token's row to its TOP_K slots, of which -1 is none: as it is, quantised on the way, or already quantised (SCALED). ALONE: see `Alone`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = column < width
    has_group = group * 128 < width
    x, scale = _take(
        x_ptr, x_scale_ptr, token, group, column, mask, has_group, x_stride, x_scale_row, x_scale_stride, QUANTISE, SCALED
    )  # fmt: skip
    if ALONE:
        k_K = tl.arange(0, K)
        slots_K = tl.load(slots_ptr + token * TOP_K + k_K, mask=k_K < TOP_K, other=-1)
        weights_K = tl.load(weights_ptr + token * TOP_K + k_K, mask=k_K < TOP_K, other=0.0)
        if (tl.sum((slots_K >= 0).to(tl.int32), axis=0) == 1) & (tl.program_id(1) == 0):
            tl.store(place_ptr + slots_K, num_slots + token, mask=slots_K >= 0)
            tl.store(factor_ptr + slots_K, weights_K, mask=slots_K >= 0)
    for k in tl.static_range(TOP_K):
        slot = tl.load(slots_ptr + token * TOP_K + k).to(tl.int64)
        tl.store(out_ptr + slot * out_stride + column, x, mask=mask & (slot >= 0))
        if QUANTISE or SCALED:
            tl.store(out_scale_ptr + group * out_scale_stride + slot, scale, mask=has_group & (slot >= 0))


@triton.jit(do_not_specialize=["num_blocks", "x_scale_row", "x_scale_stride", "out_scale_stride"])
def fetch_kernel(
    x_ptr,
    x_scale_ptr,
    source_ptr,
    num_tiles_ptr,
    out_ptr,
    out_scale_ptr,
    width,
    num_blocks,
    x_stride,
    x_scale_row,
    x_scale_stride,
    out_stride,
    out_scale_stride,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    QUANTISE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """`scatter_kernel` by slot: each that has a source gets its token's row; the rest is not touched."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Not from the first cache, which may hold what was there before.
    num_units = tl.load(num_tiles_ptr, cache_modifier=".cg") * TILE * num_blocks
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        slot = (unit // num_blocks).to(tl.int64)
        pair = tl.load(source_ptr + slot, cache_modifier=".cg")
        if pair >= 0:
            token = pair // TOP_K
            group = unit % num_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
            column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
            mask = column < width
            has_group = group * 128 < width
            x, scale = _take(
                x_ptr, x_scale_ptr, token, group, column, mask, has_group, x_stride, x_scale_row, x_scale_stride, QUANTISE, SCALED
            )  # fmt: skip
            tl.store(out_ptr + slot * out_stride + column, x, mask=mask)
            if QUANTISE or SCALED:
                tl.store(out_scale_ptr + group * out_scale_stride + slot, scale, mask=has_group)


@triton.jit
def _slots_and_weights(slots_ptr, weights_ptr, token, TOP_K: tl.constexpr, K: tl.constexpr, PARTIAL: tl.constexpr):
    """A token's. Older than the first product, which waits before it lets another start, as the second may not. Not from the first cache,
    which may hold what was there before."""
    k_K = tl.arange(0, K)
    at = token * TOP_K + k_K
    slots_K = tl.load(slots_ptr + at, mask=k_K < TOP_K, other=-1 if PARTIAL else 0, cache_modifier=".cg")
    weights_K = tl.load(weights_ptr + at, mask=k_K < TOP_K, other=0.0, cache_modifier=".cg").to(tl.float32)
    if PARTIAL:
        weights_K = tl.where(slots_K >= 0, weights_K, 0.0)
    return slots_K, weights_K


@triton.jit
def _add_rows(
    total,
    y_ptr,
    y_stride,
    slots_K,
    weights_K,
    column,
    mask,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    PARTIAL: tl.constexpr,
    IN_TURN: tl.constexpr,
):
    """total + the weighted rows of the slots, in the order of K. IN_TURN: one after the other, without registers for all of them."""
    k_K = tl.arange(0, K)
    for k in tl.static_range(TOP_K):
        slot = tl.sum(tl.where(k_K == k, slots_K, 0), axis=0).to(tl.int64)
        weight = tl.sum(tl.where(k_K == k, weights_K, 0.0), axis=0)
        if IN_TURN:
            if slot >= 0:
                total += weight * tl.load(y_ptr + slot * y_stride + column, mask=mask, other=0.0).to(tl.float32)
        else:
            is_used = mask
            if PARTIAL:
                is_used = mask & (slot >= 0)
            total += weight * tl.load(y_ptr + slot * y_stride + column, mask=is_used, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["num_blocks"])
def combine_fetched_kernel(
    y_ptr,
    source_ptr,
    num_tiles_ptr,
    slots_ptr,
    weights_ptr,
    out_ptr,
    width,
    num_blocks,
    y_stride,
    out_stride,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """`combine_kernel` of those tokens alone that have an expert, by slot: a token's first slot writes its sum."""
    if PDL:
        gdc_launch_dependents()
    num_units = tl.load(num_tiles_ptr, cache_modifier=".cg") * TILE * num_blocks
    if PDL:
        gdc_wait()
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        slot = unit // num_blocks
        pair = tl.load(source_ptr + slot, cache_modifier=".cg")
        if pair >= 0:
            token = pair // TOP_K
            slots_K, weights_K = _slots_and_weights(slots_ptr, weights_ptr, token, TOP_K, K, True)
            k_K = tl.arange(0, K)
            if tl.sum(((slots_K >= 0) & (k_K < pair % TOP_K)).to(tl.int32), axis=0) == 0:
                column = unit % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
                mask = column < width
                total = tl.zeros([BLOCK_D], tl.float32)
                total = _add_rows(total, y_ptr, y_stride, slots_K, weights_K, column, mask, TOP_K, K, True, False)
                out = out_ptr + token.to(tl.int64) * out_stride + column
                tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["added_rows"])
def combine_kernel(
    y_ptr,
    slots_ptr,
    weights_ptr,
    added_ptr,
    out_ptr,
    width,
    y_stride,
    added_stride,
    added_rows,
    out_stride,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTIAL: tl.constexpr,
    FILL: tl.constexpr,
    IN_TURN: tl.constexpr,
    BUT_ALONE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Sum of a token's rows by their routing weights, in the order of K whatever the batch, and of its ADDED rows, `added_rows` apart; fp32.

    PARTIAL: slots may be -1. Not FILL: a token without slots is not written; BUT_ALONE: nor one with one.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = column < width
    if PDL:
        gdc_launch_dependents()
    slots_K, weights_K = _slots_and_weights(slots_ptr, weights_ptr, token, TOP_K, K, PARTIAL)
    if PDL:
        gdc_wait()
    if BUT_ALONE:
        num_slots = tl.sum((slots_K >= 0).to(tl.int32), axis=0)
        if num_slots == 1:
            return
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in tl.static_range(ADDED):
        added = added_ptr + (token + i * added_rows).to(tl.int64) * added_stride + column
        total += tl.load(added, mask=mask, other=0.0).to(tl.float32)
    total = _add_rows(total, y_ptr, y_stride, slots_K, weights_K, column, mask, TOP_K, K, PARTIAL, IN_TURN)
    if not FILL:
        mask = mask & (tl.max(slots_K, axis=0) >= 0)
    tl.store(out_ptr + token.to(tl.int64) * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def send(
    x_TD: Tensor | QuantisedRows,
    experts_TK: Tensor,
    num_experts: int,
    tile: int,
    *,
    quantise: bool,
    partial: Partial | None = None,
    num_beside: int | None = None,
) -> tuple[Slots, Tensor | QuantisedRows]:
    """`place`, and `scatter` or `fetch` to there; one launch for few pairs."""
    num_pairs, device = experts_TK.numel(), experts_TK.device
    if num_pairs > _COUNTED_BY_ALL:
        slots = place(experts_TK, num_experts, tile, partial, num_beside=num_beside)
        return slots, (scatter if slots.source_S is None else fetch)(x_TD, slots, quantise=quantise)
    slots = new_slots(experts_TK, num_experts, tile, partial, fetched=False, num_beside=num_beside)
    ends = _Ends.of(x_TD, slots, quantise=quantise)
    tiles, (values, x_scales, target, scales) = slots.tiles, ends.tensors
    num_tokens, width = values.shape
    send_kernel[(num_tokens, ends.num_blocks)](
        experts_TK, values, x_scales, slots.slots_TK, tiles.expert, tiles.num_used, *done_of(tiles), target, scales,
        num_pairs, width, values.stride(0), x_scales.stride(0), x_scales.stride(1), target.stride(0), scales.stride(1),
        NUM_BINS=triton.next_power_of_2(num_experts), PAIRS=next(n for n in _COUNTED_AT_ONCE if n >= num_pairs),
        TOP_K=experts_TK.shape[1], K=triton.next_power_of_2(experts_TK.shape[1]), TILE=tile, PARTIAL=partial is not None,
        **ends.form, **overlap(device),
    )  # fmt: skip
    return slots, ends.out


@dataclass(frozen=True, kw_only=True)
class Alone:
    """Tokens with one slot alone, whose weighted row is their sum: `place_S`, int32, of such a slot the number of slots and the token behind it,
    of any other the slot itself; `factor_S`: of such a slot the weight."""

    weights_TK: Tensor
    place_S: Tensor
    factor_S: Tensor

    @classmethod
    def of(cls, slots: Slots, weights_TK: Tensor) -> Alone:
        """To be filled by `scatter`."""
        device = weights_TK.device
        return cls(
            weights_TK=weights_TK,
            place_S=torch.arange(slots.num_slots, dtype=torch.int32, device=device),
            factor_S=torch.empty(slots.num_slots, dtype=torch.float32, device=device),
        )


def mostly_alone(experts_TK: Tensor, num_experts: int, tile: int, partial: Partial) -> bool:
    """Whether most of many tokens have one expert each, in tiles of many rows."""
    num_tokens, (expected, _) = len(experts_TK), partial.bounds(experts_TK, num_experts)
    return tile == 128 and num_tokens >= _MANY_TOKENS and num_tokens <= 2 * expected <= 3 * num_tokens


def _columns_at_once(num_tokens: int, slots: Slots, width: int) -> dict[str, int]:
    """Columns of a program that copies or adds up rows, and its warps: all of a row where there are many with few slots each, so that those
    are read once and all its values at a time; else a part, so that there are programs enough."""
    many = (
        min(num_tokens, slots.tiles.num_expected * slots.tiles.num_rows) >= _MANY_TOKENS and slots.partial is not None
    )
    columns = min(_WHOLE_ROW if many else _PART_OF_ROW, triton.next_power_of_2(width))
    return {"columns": columns, "num_warps": 8 if columns > _PART_OF_ROW else 4}


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """Where rows come from and go to: values and scales of both (absent scales replaced by something to point at)."""

    out: Tensor | QuantisedRows
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    num_blocks: int
    form: dict[str, int]

    @classmethod
    def of(cls, x_TD: Tensor | QuantisedRows, slots: Slots, *, quantise: bool) -> _Ends:
        """`out`: rows [num_slots, D] by slot, a copy of `x_TD`, or FP8 if it is that already or `quantise`."""
        scaled = isinstance(x_TD, QuantisedRows)
        values, x_scales = (x_TD.values, x_TD.scales) if isinstance(x_TD, QuantisedRows) else (x_TD, x_TD)
        assert values.stride(1) == 1, "rows must be contiguous"
        (num_tokens, width), device = values.shape, values.device
        out: Tensor | QuantisedRows
        if scaled or quantise:
            out = empty_rows(slots.num_slots, width, device)
            target, scales = out.values, out.scales
        else:
            target = scales = out = torch.empty(slots.num_slots, width, dtype=values.dtype, device=device)
        at_once = _columns_at_once(num_tokens, slots, width)
        block_g = max(1, at_once["columns"] // BLOCK)
        return cls(
            out=out,
            tensors=(values, x_scales, target, scales),
            num_blocks=triton.cdiv(width, BLOCK * block_g),
            form={
                "QUANTISE": quantise and not scaled,
                "SCALED": scaled,
                "BLOCK_G": block_g,
                "num_warps": at_once["num_warps"],
            },
        )


def scatter(
    x_TD: Tensor | QuantisedRows, slots: Slots, *, quantise: bool, alone: Alone | None = None
) -> Tensor | QuantisedRows:
    """Rows [num_slots, D] by slot: a copy of `x_TD`, or FP8 if it is that already or `quantise`. Fills `alone`."""
    ends = _Ends.of(x_TD, slots, quantise=quantise)
    values, x_scales, target, scales = ends.tensors
    (num_tokens, width), top_k = values.shape, slots.slots_TK.shape[1]
    assert alone is None or alone.weights_TK.is_contiguous()
    filled = [scales] * 3 if alone is None else [alone.weights_TK, alone.place_S, alone.factor_S]
    scatter_kernel[(num_tokens, ends.num_blocks)](
        values, x_scales, slots.slots_TK, *filled, target, scales, slots.num_slots, width,
        values.stride(0), x_scales.stride(0), x_scales.stride(1), target.stride(0), scales.stride(1),
        TOP_K=top_k, K=triton.next_power_of_2(top_k), ALONE=alone is not None, **ends.form, **overlap(target.device),
    )  # fmt: skip
    return ends.out


def fetch(x_TD: Tensor | QuantisedRows, slots: Slots, *, quantise: bool) -> Tensor | QuantisedRows:
    """`scatter` where few pairs have an expert: what it takes is by those."""
    assert slots.source_S is not None
    ends = _Ends.of(x_TD, slots, quantise=quantise)
    values, x_scales, target, scales = ends.tensors
    most_units = slots.num_slots * ends.num_blocks
    fetch_kernel[(min(most_units, _PROGRAMS_A_PROCESSOR * num_processors(target.device)),)](
        values, x_scales, slots.source_S, slots.tiles.num_used, target, scales, values.shape[1], ends.num_blocks,
        values.stride(0), x_scales.stride(0), x_scales.stride(1), target.stride(0), scales.stride(1),
        TOP_K=slots.slots_TK.shape[1], TILE=slots.tiles.num_rows, **ends.form, **overlap(target.device),
    )  # fmt: skip
    return ends.out


def combine(
    y_SD: Tensor,
    slots: Slots,
    weights_TK: Tensor,
    added_TD: Tensor | None = None,
    *,
    num_added: int = 1,
    fill: bool = True,
    into_TD: Tensor | None = None,
) -> Tensor:
    """[T, D] in the dtype of y: the sum over K of weight and row, and of `added_TD`, or of its `num_added` parts.

    Not `fill`: tokens without slots are not written. `into_TD`: what is returned, where tokens with one slot have their sums.
    """
    assert weights_TK.is_contiguous()
    num_tokens, top_k = weights_TK.shape
    width = y_SD.shape[1]
    out = torch.empty(num_tokens, width, dtype=y_SD.dtype, device=y_SD.device) if into_TD is None else into_TD
    at_once = _columns_at_once(num_tokens, slots, width)
    block, warps = at_once["columns"], at_once["num_warps"]
    num_blocks = triton.cdiv(width, block)
    form = {
        "TOP_K": top_k,
        "K": triton.next_power_of_2(top_k),
        "BLOCK_D": block,
        "num_warps": warps,
        **overlap(out.device),
    }
    if slots.source_S is not None and not fill:
        most_units = slots.num_slots * num_blocks
        combine_fetched_kernel[(min(most_units, _PROGRAMS_A_PROCESSOR * num_processors(out.device)),)](
            y_SD, slots.source_S, slots.tiles.num_used, slots.slots_TK, weights_TK, out, width, num_blocks, y_SD.stride(0), out.stride(0),
            TILE=slots.tiles.num_rows, **form,
        )  # fmt: skip
        return out
    added = y_SD if added_TD is None else added_TD
    assert added.stride(1) == 1, "rows must be contiguous"
    combine_kernel[(num_tokens, num_blocks)](
        y_SD, slots.slots_TK, weights_TK, added, out, width, y_SD.stride(0), added.stride(0), added.shape[0] // num_added, out.stride(0),
        ADDED=0 if added_TD is None else num_added, PARTIAL=slots.partial is not None, FILL=fill,
        IN_TURN=slots.partial is not None and block > _PART_OF_ROW, BUT_ALONE=into_TD is not None, **form,
    )  # fmt: skip
    return out
