"""One token a row in a few small launches, nothing sorted: see `serving.kernels.sampling.sample`.

A row is cut into segments, so that few rows fill the device too: (1) maximum and its lowest id a segment, (2) each segment's
sum of exp((logit - maximum) / temperature), (3) which segment holds the target, then which token of it. Before (2), where
top-k or top-p is asked for, the lowest logit that stays is found bit by bit, four at a time, from the top: how much lies in
each of the 16 parts of what is still in question, then the part in which the limit is passed. What is drawn from is float64, the search
adds up fp32 shares (a limit is met to one part in a million); sums are always added in the same order: a row's token does not depend on its neighbours, nor on the launch. Bound: the fp32 logits read once
for greedy rows, twice for drawn ones, eight times more for each of top-k and top-p. B rows, V vocabulary, S segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SEGMENT = 2048
# Of the search for the lowest logit that stays: 8 passes of 4 bits.
_SEARCH_SEGMENT = 2048
_SEARCH_CHUNK = 512
_PASSES = 8
_BITS = 4


def argmax(logits_BV: Tensor) -> Tensor:
    best_BS = _best(logits_BV)
    tokens_B = torch.empty(logits_BV.shape[0], dtype=torch.int64, device=logits_BV.device)
    num_segments = best_BS.shape[1]
    _argmax_kernel[(logits_BV.shape[0],)](
        best_BS, tokens_B, num_segments, SEGMENTS=triton.next_power_of_2(num_segments), num_warps=1
    )
    return tokens_B


def sample(
    logits_BV: Tensor,
    temperatures_B: Tensor,
    seeds_B: Tensor,
    positions_B: Tensor,
    *,
    top_k_B: Tensor | None = None,
    top_p_B: Tensor | None = None,
    min_p_B: Tensor | None = None,
) -> Tensor:
    assert logits_BV.dtype == torch.float32, "fp32 logits"
    assert temperatures_B.is_contiguous(), "a number a row"
    assert seeds_B.is_contiguous(), "a number a row"
    assert positions_B.is_contiguous(), "a number a row"
    num_rows, vocab = logits_BV.shape
    best_BS = _best(logits_BV)
    num_segments = best_BS.shape[1]
    segments = triton.next_power_of_2(num_segments)
    floors_B = None
    if top_k_B is not None:
        floors_B = _lowest_kept(logits_BV, temperatures_B, best_BS, top_k_B, None, by_count=True)
    if top_p_B is not None:
        floors_B = _lowest_kept(logits_BV, temperatures_B, best_BS, top_p_B, floors_B, by_count=False)
    sums_BS = torch.empty(num_rows, num_segments, dtype=torch.float64, device=logits_BV.device)
    tokens_B = torch.empty(num_rows, dtype=torch.int64, device=logits_BV.device)
    _sums_kernel[(num_rows, num_segments)](
        logits_BV,
        temperatures_B,
        floors_B,
        min_p_B,
        best_BS,
        sums_BS,
        logits_BV.stride(0),
        vocab,
        num_segments,
        SEGMENT=_SEGMENT,
        SEGMENTS=segments,
        num_warps=4,
    )
    _draw_kernel[(num_rows,)](
        logits_BV,
        temperatures_B,
        floors_B,
        min_p_B,
        seeds_B,
        positions_B,
        best_BS,
        sums_BS,
        tokens_B,
        logits_BV.stride(0),
        vocab,
        num_segments,
        SEGMENT=_SEGMENT,
        SEGMENTS=segments,
        num_warps=4,
    )
    return tokens_B


def _lowest_kept(
    logits_BV: Tensor,
    temperatures_B: Tensor,
    best_BS: Tensor,
    limits_B: Tensor,
    floors_B: Tensor | None,
    *,
    by_count: bool,
) -> Tensor:
    """int64 [B], the ordered bits of the lowest logit of each row above which less than the limit lies.

    Limits are numbers of tokens, or shares of the probability of what `floors_B` leaves. A limit that keeps everything gives 0.
    """
    num_rows, vocab = logits_BV.shape
    num_parts = triton.cdiv(vocab, _SEARCH_SEGMENT)
    bins = 1 << _BITS
    # Two of each: a pass reads what the one before it wrote. Both begin on 16 bytes, whatever the batch: kernels are compiled for that.
    parts = torch.empty(2, num_rows, num_parts, bins, dtype=torch.float64, device=logits_BV.device)
    lows = torch.empty(2, num_rows + num_rows % 2, dtype=torch.int64, device=logits_BV.device)
    masses = torch.empty(2, num_rows, 2, dtype=torch.float64, device=logits_BV.device)
    for step in range(_PASSES + 1):
        last = step == _PASSES
        _search_kernel[(num_rows, 1 if last else num_parts)](
            logits_BV,
            temperatures_B,
            best_BS,
            limits_B,
            floors_B,
            parts[step % 2],
            lows[step % 2],
            masses[step % 2],
            parts[1 - step % 2],
            lows[1 - step % 2],
            masses[1 - step % 2],
            logits_BV.stride(0),
            vocab,
            num_parts,
            best_BS.shape[1],
            _BITS * max(0, _PASSES - 1 - step),
            FIRST=step == 0,
            SECOND=step == 1,
            LAST=last,
            BY_COUNT=by_count,
            BITS=_BITS,
            SEGMENT=_SEARCH_SEGMENT,
            CHUNK=_SEARCH_CHUNK,
            PARTS=triton.next_power_of_2(num_parts),
            BEST=triton.next_power_of_2(best_BS.shape[1]),
            num_warps=4,
        )
    return lows[1 - _PASSES % 2]


def _best(logits_BV: Tensor) -> Tensor:
    """int64 [B, S]: key of the best token of each segment."""
    num_rows, vocab = logits_BV.shape
    assert logits_BV.dtype in (torch.float32, torch.bfloat16), "fp32 or bf16 logits"
    assert logits_BV.stride(1) == 1, "rows must be contiguous"
    best_BS = torch.empty(num_rows, triton.cdiv(vocab, _SEGMENT), dtype=torch.int64, device=logits_BV.device)
    _best_kernel[best_BS.shape](
        logits_BV, best_BS, logits_BV.stride(0), vocab, best_BS.shape[1], SEGMENT=_SEGMENT, num_warps=4
    )
    return best_BS


@triton.jit
def _keys(values, ids):
    """int64 that order as (value, lower id first); NaN above all, as torch's argmax has it."""
    values = tl.where(values == 0, 0.0, values)
    bits = values.to(tl.int32, bitcast=True)
    ordered = tl.where(values != values, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))


@triton.jit
def _token_of(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _best_of_row(best_ptr, num_segments, SEGMENTS: tl.constexpr):
    segment = tl.arange(0, SEGMENTS)
    keys = tl.load(best_ptr + segment, mask=segment < num_segments, other=-0x8000000000000000)
    return tl.max(keys, axis=0)


@triton.jit
def _ordered(values):
    """uint32 that order as fp32 values do; 0 and -0 are one."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["shift"])
def _search_kernel(
    logits_ptr,
    temperatures_ptr,
    best_ptr,
    limits_ptr,
    floors_ptr,
    old_parts_ptr,
    old_lows_ptr,
    old_masses_ptr,
    parts_ptr,
    lows_ptr,
    masses_ptr,
    logits_stride_b,
    vocab,
    num_parts,
    num_best,
    shift,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    LAST: tl.constexpr,
    BY_COUNT: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    BEST: tl.constexpr,
):
    """One pass: settle what the pass before it summed up, then sum up this segment's part of the 16 bins that remain."""
    BINS: tl.constexpr = 1 << BITS
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(temperatures_ptr + row)
    limit = tl.load(limits_ptr + row).to(tl.float64)
    active = temperature > 0
    active = active & (limit < vocab) if BY_COUNT else active & (limit < 1)
    if active:
        bin = tl.arange(0, BINS)
        low = tl.full([], 0, tl.int64)
        above = tl.full([], 0.0, tl.float64)
        goal = limit
        if not FIRST:
            if not SECOND:
                low = tl.load(old_lows_ptr + row)
                above = tl.load(old_masses_ptr + row * 2)
                goal = tl.load(old_masses_ptr + row * 2 + 1)
            parts = tl.arange(0, PARTS)
            places = (row * num_parts + parts[:, None]) * BINS + bin[None, :]
            bins = tl.sum(tl.load(old_parts_ptr + places, mask=parts[:, None] < num_parts, other=0.0), axis=0)
            if SECOND and not BY_COUNT:
                # At least the best token stays.
                goal = tl.maximum(limit * tl.sum(bins, axis=0), 1e-300)
            # What lies above the end of each bin. The lowest bin of those with less than the goal holds the answer.
            higher = bin[None, :] > bin[:, None]
            beyond = above + tl.sum(tl.where(higher, bins[None, :] + tl.zeros([BINS, BINS], tl.float64), 0.0), axis=1)
            chosen = tl.sum((beyond >= goal).to(tl.int32), axis=0)
            above = tl.sum(tl.where(bin == chosen, beyond, 0.0), axis=0)
            low += chosen.to(tl.int64) << (0 if LAST else shift + BITS)
        if part == 0:
            tl.store(lows_ptr + row, low)
            tl.store(masses_ptr + row * 2, above)
            tl.store(masses_ptr + row * 2 + 1, goal)
        if not LAST:
            best = _value_of(_best_of_row(best_ptr + row * num_best, num_best, BEST))
            inverse = (1.0 / temperature).to(tl.float32)
            mass = tl.zeros([BINS, CHUNK], tl.float32)
            for start in tl.static_range(0, SEGMENT, CHUNK):
                token = part * SEGMENT + start + tl.arange(0, CHUNK)
                logits = tl.load(logits_ptr + row * logits_stride_b + token, mask=token < vocab, other=-float("inf"))
                ordered = _ordered(logits)
                counted = token < vocab
                if floors_ptr is not None:
                    counted = counted & (ordered >= tl.load(floors_ptr + row).to(tl.uint32))
                # Outside of what is in question no bin has this place.
                place = (ordered - low.to(tl.uint32)) >> shift
                if tl.max((counted & (place < BINS)).to(tl.int32), axis=0) > 0:
                    if BY_COUNT:
                        share = tl.where(counted, 1.0, 0.0)
                    else:
                        scaled = tl.where(counted, logits - best, 1.0) * inverse
                        share = tl.where(scaled <= 0, tl.exp(tl.minimum(scaled, 0.0)), 0.0)
                    mass += tl.where(place.to(tl.int32)[None, :] == bin[:, None], share[None, :], 0.0)
            places = (row * num_parts + part) * BINS + bin
            tl.store(parts_ptr + places, tl.sum(mass.to(tl.float64), axis=1))
    else:
        if part == 0:
            low = tl.full([], 0, tl.int64)
            if floors_ptr is not None:
                # What the limit before this one leaves.
                low = tl.load(floors_ptr + row)
            tl.store(lows_ptr + row, low)


@triton.jit
def _weights(logits_ptr, token, vocab, best_value, temperature, floors_ptr, min_p_ptr, row):
    """exp((logit - best) / temperature), float64, of the tokens that stay; 0 of the others. NaN counts for nothing."""
    logits = tl.load(logits_ptr + token, mask=token < vocab, other=-float("inf"))
    if floors_ptr is not None:
        logits = tl.where(_ordered(logits) >= tl.load(floors_ptr + row).to(tl.uint32), logits, -float("inf"))
    scaled = (logits.to(tl.float64) - best_value.to(tl.float64)) * (1.0 / temperature)
    if min_p_ptr is not None:
        scaled = tl.where(scaled >= tl.log(tl.load(min_p_ptr + row)), scaled, -float("inf"))
    return tl.where(scaled <= 0, tl.exp(tl.minimum(scaled, 0.0)), 0.0)


@triton.jit
def _mix(x):
    """SplitMix64's output function on uint64."""
    x = (x ^ (x >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, position):
    """The same number as `serving.kernels.sampling.uniforms`."""
    gamma = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    state = _mix(seed.to(tl.uint64, bitcast=True) + gamma) + (position + 1).to(tl.uint64, bitcast=True) * gamma
    return (_mix(state) >> 16).to(tl.int64).to(tl.float64) * 3.552713678800501e-15  # 2^-48


@triton.jit
def _best_kernel(logits_ptr, best_ptr, logits_stride_b, vocab, num_segments, SEGMENT: tl.constexpr):
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = segment * SEGMENT + tl.arange(0, SEGMENT)
    logits = tl.load(logits_ptr + row * logits_stride_b + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    keys = tl.where(token < vocab, _keys(logits, token), -0x8000000000000000)
    tl.store(best_ptr + row * num_segments + segment, tl.max(keys, axis=0))


@triton.jit
def _argmax_kernel(best_ptr, tokens_ptr, num_segments, SEGMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(tokens_ptr + row, _token_of(_best_of_row(best_ptr + row * num_segments, num_segments, SEGMENTS)))


@triton.jit
def _sums_kernel(
    logits_ptr,
    temperatures_ptr,
    floors_ptr,
    min_p_ptr,
    best_ptr,
    sums_ptr,
    logits_stride_b,
    vocab,
    num_segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0:
        best = _value_of(_best_of_row(best_ptr + row * num_segments, num_segments, SEGMENTS))
        token = segment * SEGMENT + tl.arange(0, SEGMENT)
        weights = _weights(
            logits_ptr + row * logits_stride_b, token, vocab, best, temperature, floors_ptr, min_p_ptr, row
        )
        tl.store(sums_ptr + row * num_segments + segment, tl.sum(weights, axis=0))


@triton.jit
def _draw_kernel(
    logits_ptr,
    temperatures_ptr,
    floors_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    best_ptr,
    sums_ptr,
    tokens_ptr,
    logits_stride_b,
    vocab,
    num_segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    best_key = _best_of_row(best_ptr + row * num_segments, num_segments, SEGMENTS)
    token = _token_of(best_key)
    if temperature > 0:
        segment = tl.arange(0, SEGMENTS)
        sums = tl.load(sums_ptr + row * num_segments + segment, mask=segment < num_segments, other=0.0)
        through = tl.cumsum(sums, 0)
        uniform = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        target = uniform * tl.sum(tl.where(segment == SEGMENTS - 1, through, 0.0), axis=0)
        # The first segment that goes beyond the target; of NaN logits there is none, and the best token stands.
        chosen = tl.min(tl.where((through > target) & (sums > 0), segment, SEGMENTS), axis=0)
        if chosen < SEGMENTS:
            before = tl.sum(tl.where(segment == chosen, through - sums, 0.0), axis=0)
            candidates = chosen * SEGMENT + tl.arange(0, SEGMENT)
            weights = _weights(
                logits_ptr + row * logits_stride_b,
                candidates,
                vocab,
                _value_of(best_key),
                temperature,
                floors_ptr,
                min_p_ptr,
                row,
            )
            beyond = (before + tl.cumsum(weights, 0) > target) & (weights > 0)
            # Sums in another order may end a rounding short of the target: then the segment's last token that counts.
            first = tl.min(tl.where(beyond, candidates, vocab), axis=0)
            last = tl.max(tl.where(weights > 0, candidates, 0), axis=0)
            token = tl.minimum(first, last).to(tl.int64)
    tl.store(tokens_ptr + row, token)
