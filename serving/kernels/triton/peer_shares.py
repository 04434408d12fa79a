"""Shares of rows through peer memory; see `serving.kernels.peer_shares`. Two launches an exchange.

Programs of a pull spin themselves, a few hundred small ones at most, so that there is room beside them for what they wait for. Bound: the
bytes over NVLink, and the time that a write takes to be seen by another device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.dispatch import Window
from serving.kernels.peer_shares import SharesLayout
from serving.kernels.triton.device import overlap
from serving.kernels.triton.dispatch import LOOK, await_flags, end, lanes

_WORDS = 1024
"""Of 8 bytes, of a program that copies."""
_ELEMENTS = 1024
"""Of a program that adds."""


@triton.jit
def _share(rank, least, more, row_words):
    """First word and number of words of a rank's share."""
    return (rank * least + tl.minimum(rank, more)) * row_words, (least + (rank < more).to(tl.int32)) * row_words


@triton.jit(do_not_specialize=["world_size", "num_blocks", "least", "more"])
def push_kernel(
    x_ptr,
    bases_ptr,
    places_ptr,
    state_ptr,
    world_size,
    num_blocks,
    num_words,
    least,
    more,
    row_words,
    places_at,
    place_bytes,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
    RANKS: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A program has a block of what one rank gets."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    step = tl.load(state_ptr) + 1
    rank = tl.program_id(0) // num_blocks
    base = tl.load(bases_ptr + rank)
    place = tl.load(places_ptr + rank)
    first = 0
    number = num_words
    if not WHOLE:
        first, number = _share(rank, least, more, row_words)
    word = tl.program_id(0) % num_blocks * WORDS + tl.arange(0, WORDS)
    words = tl.load(x_ptr + first + word, mask=word < number, other=0)
    there = base + places_at + (step % 2 * world_size + place) * place_bytes
    tl.store(tl.multiple_of(there.to(tl.pointer_type(tl.int64)), 16) + word, words, mask=word < number)
    end(bases_ptr, places_ptr, state_ptr, step, 0, world_size, RANKS, DEVICE)


@triton.jit(do_not_specialize=["world_size", "num_blocks", "least", "more", "limit"])
def pull_kernel(
    memory_ptr,
    out_ptr,
    state_ptr,
    given_up_ptr,
    world_size,
    num_blocks,
    least,
    more,
    row_words,
    places_at,
    place_bytes,
    limit,
    WORDS: tl.constexpr,
    RANKS: tl.constexpr,
    LOOK: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A program has a block of one rank's share, and waits for that rank; there is one for each at least."""
    if PDL:
        gdc_wait()
    rank = tl.program_id(0) // num_blocks
    flags_ptr = memory_ptr.to(tl.pointer_type(tl.int64))
    step = await_flags(flags_ptr, state_ptr, given_up_ptr, rank, rank + 1, limit, RANKS, LOOK, DEVICE)
    if PDL:
        gdc_launch_dependents()
    first, number = _share(rank, least, more, row_words)
    word = tl.program_id(0) % num_blocks * WORDS + tl.arange(0, WORDS)
    came = memory_ptr + places_at + (step % 2 * world_size + rank) * place_bytes
    words = tl.load(came.to(tl.pointer_type(tl.int64)) + word, mask=word < number, other=0)
    tl.store(out_ptr + first + word, words, mask=word < number)


@triton.jit(do_not_specialize=["world_size", "limit"])
def pull_sum_kernel(
    memory_ptr,
    out_ptr,
    state_ptr,
    given_up_ptr,
    world_size,
    number,
    places_at,
    place_bytes,
    limit,
    WIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    RANKS: tl.constexpr,
    LOOK: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    if PDL:
        gdc_wait()
    flags_ptr = memory_ptr.to(tl.pointer_type(tl.int64))
    step = await_flags(flags_ptr, state_ptr, given_up_ptr, 0, world_size, limit, RANKS, LOOK, DEVICE)
    if PDL:
        gdc_launch_dependents()
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    total = tl.zeros([ELEMENTS], WIDE)
    for rank in range(world_size):
        came = memory_ptr + places_at + (step % 2 * world_size + rank) * place_bytes
        part = came.to(tl.pointer_type(out_ptr.dtype.element_ty)) + element
        total += tl.load(part, mask=element < number, other=0.0).to(WIDE)
    tl.store(out_ptr + element, total.to(out_ptr.dtype.element_ty), mask=element < number)


def push(window: Window, layout: SharesLayout, x_NX: Tensor, *, whole: bool) -> None:
    row_words = _row_words(x_NX)
    least, more = divmod(len(x_NX), layout.world_size)
    words = x_NX.numel() * x_NX.element_size() // 8
    most = words if whole else (least + (more > 0)) * row_words
    assert most * 8 <= layout.place_bytes, f"a share of {most * 8} bytes where {layout.place_bytes} fit"
    num_blocks = max(1, triton.cdiv(most, _WORDS))
    push_kernel[(layout.world_size * num_blocks,)](
        _flat(x_NX), window.bases, window.places, window.state,
        layout.world_size, num_blocks, words, least, more, row_words, layout.places, layout.place_bytes,
        WHOLE=whole, WORDS=_WORDS, RANKS=lanes(layout.world_size, 4), DEVICE=x_NX.is_cuda, num_warps=4, **overlap(x_NX.device),
    )  # fmt: skip


def pull(window: Window, layout: SharesLayout, out_NX: Tensor, *, limit_ns: int) -> None:
    row_words = _row_words(out_NX)
    least, more = divmod(len(out_NX), layout.world_size)
    num_blocks = max(1, triton.cdiv((least + (more > 0)) * row_words, _WORDS))
    pull_kernel[(layout.world_size * num_blocks,)](
        window.own, _flat(out_NX), window.state, window.given_up,
        layout.world_size, num_blocks, least, more, row_words, layout.places, layout.place_bytes, limit_ns,
        WORDS=_WORDS, RANKS=lanes(1, 4), LOOK=LOOK, DEVICE=out_NX.is_cuda, num_warps=4, **overlap(out_NX.device),
    )  # fmt: skip


def pull_sum(window: Window, layout: SharesLayout, out_SX: Tensor, *, limit_ns: int) -> None:
    assert out_SX.is_contiguous(), "rows lie one behind the other"
    pull_sum_kernel[(max(1, triton.cdiv(out_SX.numel(), _ELEMENTS)),)](
        window.own, out_SX, window.state, window.given_up,
        layout.world_size, out_SX.numel(), layout.places, layout.place_bytes, limit_ns,
        WIDE=tl.float64 if out_SX.dtype == torch.float64 else tl.float32, ELEMENTS=_ELEMENTS, RANKS=lanes(layout.world_size, 4), LOOK=LOOK, DEVICE=out_SX.is_cuda, num_warps=4, **overlap(out_SX.device),
    )  # fmt: skip


def _row_words(rows: Tensor) -> int:
    assert rows.is_contiguous(), "rows lie one behind the other"
    row_bytes = rows.shape[1:].numel() * rows.element_size()
    assert row_bytes % 8 == 0, f"rows of {row_bytes} bytes"
    return row_bytes // 8


def _flat(rows: Tensor) -> Tensor:
    return rows.view(-1).view(torch.int64)
