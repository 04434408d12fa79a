"""Copies of rows for the members of a group, and their sums. Bound: bytes; a row is read once however many copies it has."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.dispatch_rows import Copies
from serving.kernels.triton.device import overlap
from serving.kernels.triton.placing import picks_of

# Rows times members that a program looks at, and most rows.
_LOOKED_AT, _MOST_ROWS = 2048, 64
_FEWEST_MEMBERS = 16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Of rows of which the columns lie apart so many are copied together, that neighbours be read at one time.
_ROWS_ACROSS = 32


@triton.jit(do_not_specialize=["num_rows"])
def count_kernel(
    slots_ptr,
    counts_ptr,
    num_rows,
    slots_per_member,
    TOP_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """counts [programs, 2, MEMBERS]: of the program's ROWS rows the copies and the picks for each member."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    picks = picks_of(slots_ptr, row, num_rows, slots_per_member, TOP_K, MEMBERS, ROWS)
    counts = counts_ptr + tl.program_id(0) * 2 * MEMBERS + tl.arange(0, MEMBERS)
    tl.store(counts, tl.sum((picks > 0).to(tl.int32), axis=0))
    tl.store(counts + MEMBERS, tl.sum(picks, axis=0))


@triton.jit(do_not_specialize=["num_rows"])
def place_kernel(
    slots_ptr,
    counts_ptr,
    totals_ptr,
    places_ptr,
    num_rows,
    num_members,
    slots_per_member,
    TOP_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    MOST_PLACES: tl.constexpr,
    COUNTED: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Where the copies of the program's ROWS rows stand; the first also writes the totals. Counts are read COUNTED programs at a time."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    member = tl.arange(0, MEMBERS)
    copies = tl.zeros([MEMBERS], tl.int32)
    before = tl.zeros([MEMBERS], tl.int32)
    num_picks = tl.zeros([MEMBERS], tl.int32)
    for first in range(0, tl.num_programs(0), COUNTED):
        other = first + tl.arange(0, COUNTED)
        at = counts_ptr + other[:, None] * 2 * MEMBERS + member[None, :]
        is_program = (other < tl.num_programs(0))[:, None]
        counts = tl.load(at, mask=is_program, other=0)
        copies += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((other < program)[:, None], counts, 0), axis=0)
        if program == 0:
            num_picks += tl.sum(tl.load(at + MEMBERS, mask=is_program, other=0), axis=0)
    if program == 0:
        tl.store(totals_ptr + member * 2, copies.to(tl.int64), mask=member < num_members)
        tl.store(totals_ptr + member * 2 + 1, num_picks.to(tl.int64), mask=member < num_members)
    row = program * ROWS + tl.arange(0, ROWS)
    picks = picks_of(slots_ptr, row, num_rows, slots_per_member, TOP_K, MEMBERS, ROWS)
    wanted = (picks > 0).to(tl.int32)
    place = (tl.cumsum(copies, axis=0) - copies + before)[None, :] + tl.cumsum(wanted, axis=0) - wanted
    which = tl.cumsum(wanted, axis=1) - wanted
    is_row = (row < num_rows)[:, None]
    places = places_ptr + row[:, None] * PLACES
    tl.store(places + which, place, mask=(wanted > 0) & is_row)
    empty = tl.arange(0, MOST_PLACES)[None, :]
    is_empty = (empty >= tl.sum(wanted, axis=1)[:, None]) & (empty < PLACES) & is_row
    tl.store(places + empty, tl.full([ROWS, MOST_PLACES], -1, tl.int32), mask=is_empty)


# How far columns of scales lie apart follows from the number of rows, which must not ask for another kernel.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["x_column_stride"])
def spread_kernel(
    x_ptr,
    places_ptr,
    out_ptr,
    num_rows,
    width,
    x_stride,
    x_column_stride,
    out_stride,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Words of ROWS rows to where their copies stand."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = row < num_rows
    in_width = (column < width)[None, :]
    words = tl.load(
        x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :] * x_column_stride,
        mask=is_row[:, None] & in_width,
        other=0,
    )
    for k in tl.static_range(PLACES):
        place = tl.load(places_ptr + row * PLACES + k, mask=is_row, other=-1)
        out = out_ptr + place.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(out, words, mask=(place >= 0)[:, None] & in_width)


@triton.jit
def total_kernel(
    y_ptr,
    places_ptr,
    added_ptr,
    out_ptr,
    width,
    y_stride,
    added_stride,
    out_stride,
    ADDED: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """The sum of a row's copies, in the members' order, and of its ADDED row, rounded once."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = column < width
    total = tl.zeros([COLUMNS], WIDE)
    for k in tl.static_range(PLACES):
        place = tl.load(places_ptr + row * PLACES + k)
        y = tl.load(y_ptr + place.to(tl.int64) * y_stride + column, mask=in_width & (place >= 0), other=0.0)
        total += y.to(WIDE)
    if ADDED:
        added = tl.load(added_ptr + row.to(tl.int64) * added_stride + column, mask=in_width, other=0.0)
        total += added.to(WIDE)
    out = out_ptr + row.to(tl.int64) * out_stride + column
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_width)


@triton.jit(do_not_specialize=["num_pairs", "first"])
def routing_kernel(
    routing_ptr,
    slots_ptr,
    weights_ptr,
    num_pairs,
    first,
    num_slots,
    TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Slots from `first` on and the weights' bits; PAIRS a program."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    mask = pair < num_pairs
    at = routing_ptr + pair // TOP_K * (2 * TOP_K) + pair % TOP_K
    slot = tl.load(at, mask=mask, other=0) - 1 - first
    slot = tl.where((slot >= 0) & (slot < num_slots), slot, -1)
    tl.store(slots_ptr + pair, slot.to(tl.int64), mask=mask)
    tl.store(weights_ptr + pair, tl.load(at + TOP_K, mask=mask, other=0), mask=mask)


def copies_for(slots_TK: Tensor, slots_per_member: int, num_members: int) -> Copies:
    """Two launches."""
    assert slots_TK.is_contiguous()
    num_rows, top_k = slots_TK.shape
    device = slots_TK.device
    num_places = min(top_k, num_members)
    places_TP = torch.empty(num_rows, num_places, dtype=torch.int32, device=device)
    if not num_rows:
        return Copies(counts_WC=torch.zeros(num_members, 2, dtype=torch.int64, device=device), places_TP=places_TP)
    members = max(_FEWEST_MEMBERS, triton.next_power_of_2(num_members))
    rows = min(_MOST_ROWS, max(1, _LOOKED_AT // members))
    programs = triton.cdiv(num_rows, rows)
    counts = torch.empty(programs, 2, members, dtype=torch.int32, device=device)
    counts_WC = torch.empty(num_members, 2, dtype=torch.int64, device=device)
    shape = {"TOP_K": top_k, "MEMBERS": members, "ROWS": rows}
    count_kernel[(programs,)](slots_TK, counts, num_rows, slots_per_member, **shape, **overlap(device))
    place_kernel[(programs,)](
        slots_TK, counts, counts_WC, places_TP, num_rows, num_members, slots_per_member,
        **shape, PLACES=num_places, MOST_PLACES=triton.next_power_of_2(num_places), COUNTED=max(8, 4096 // members), **overlap(device),
    )  # fmt: skip
    return Copies(counts_WC=counts_WC, places_TP=places_TP)


def spread(x_TX: Tensor, copies: Copies, num_copies: int) -> Tensor:
    """One launch."""
    out_NX = torch.empty((num_copies, *x_TX.shape[1:]), dtype=x_TX.dtype, device=x_TX.device)
    num_rows, num_places = copies.places_TP.shape
    if not out_NX.numel():
        return out_NX
    source, target = _words(x_TX.flatten(1)), _words(out_NX.flatten(1))
    if source.element_size() != target.element_size():
        target = target.view(source.dtype)
    width = source.shape[1]
    across = source.stride(1) != 1
    rows = _ROWS_ACROSS if across else max(1, min(8, 512 // triton.next_power_of_2(width)))
    columns = min(64 if across else 1024, triton.next_power_of_2(width))
    spread_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(width, columns))](
        source, copies.places_TP, target, num_rows, width, source.stride(0), source.stride(1), target.stride(0),
        PLACES=num_places, ROWS=rows, COLUMNS=columns, **overlap(x_TX.device),
    )  # fmt: skip
    return out_NX


def _words(x_TX: Tensor) -> Tensor:
    """The same memory as integers, of four bytes if rows are made of such."""
    size = x_TX.element_size()
    words = x_TX.view(_WORDS[size])
    in_fours = all(number * size % 4 == 0 for number in (words.shape[1], words.stride(0), words.storage_offset()))
    return words.view(torch.int32) if size < 4 and words.stride(1) == 1 and in_fours else words


def total(y_ND: Tensor, copies: Copies, added_TD: Tensor | None = None) -> Tensor:
    """One launch."""
    added = y_ND if added_TD is None else added_TD
    assert y_ND.stride(1) == added.stride(1) == 1, "rows must be contiguous"
    num_rows, num_places = copies.places_TP.shape
    width = y_ND.shape[1]
    assert added_TD is None or added_TD.shape == (num_rows, width), (
        f"{added_TD.shape} added to {num_rows} rows of {width}"
    )
    out_TD = torch.empty(num_rows, width, dtype=y_ND.dtype, device=y_ND.device)
    if not out_TD.numel():
        return out_TD
    columns = min(1024, triton.next_power_of_2(width))
    total_kernel[(num_rows, triton.cdiv(width, columns))](
        y_ND, copies.places_TP, added, out_TD, width, y_ND.stride(0), added.stride(0), out_TD.stride(0),
        ADDED=added_TD is not None, PLACES=num_places, COLUMNS=columns, WIDE=tl.float64 if y_ND.dtype == torch.float64 else tl.float32, **overlap(y_ND.device),
    )  # fmt: skip
    return out_TD


def routing_here(routing_RM: Tensor, first: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """One launch."""
    assert routing_RM.is_contiguous()
    num_rows, top_k = routing_RM.shape[0], routing_RM.shape[1] // 2
    slots_RK = torch.empty(num_rows, top_k, dtype=torch.int64, device=routing_RM.device)
    weights_RK = torch.empty(num_rows, top_k, dtype=torch.float32, device=routing_RM.device)
    if slots_RK.numel():
        pairs = 1024
        routing_kernel[(triton.cdiv(slots_RK.numel(), pairs),)](
            routing_RM, slots_RK, weights_RK.view(torch.int32), slots_RK.numel(), first, num_slots,
            TOP_K=top_k, PAIRS=pairs, **overlap(routing_RM.device),
        )  # fmt: skip
    return slots_RK, weights_RK
