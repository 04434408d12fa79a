"""Rows straight into the memory of the ranks that want them, and results straight back: expert dispatch of a captured step
where ranks reach each other's memory.

    send      row t of this rank -> row place * C + t of each rank that has an expert of it; the routing of every row to every rank
    wait      until all ranks' rows, or results, of this exchange are here
    give_back result of each row in use -> place * C + t of the rank that it came from
    add_up    over the ranks that row t went to, in their order, in fp32

`place` is the sender's rank. An exchange is a send and a give_back; it has a number, which rises on all ranks alike and which a
rank writes into a flag of every other one when all that it wrote before is there. So no flag is ever reset, and nothing is read on
the host. What is written in exchange n + 1 was read in n: whoever sends has had all results of the exchange before, which
every rank gave when its experts had read all rows; and results are written to a rank that has sent anew, so has added up the old ones.

Legend: T rows of this rank, up to C, the capacity; W ranks; R = W * C rows that arrive; K picks of a row, of which up to M are of one
rank; D width; B blocks of 128 columns that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.kernels.quant import BLOCK, QuantisedRows

STEP, ENDED, GIVEN_UP = range(3)
"""In `Window.state`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """The memory that W ranks keep for each other, as one of them sees it.

    own: uint8 [bytes], this rank's. bases: int64 [W], where each rank's begins. places: int64 [W], the part of rank w's memory that
    this rank writes. state: int64 [3], the exchanges begun; programs of the launch in progress that have ended; the exchange of which
    a wait gave up, 0: none. given_up: int64 [1 + W] in host memory, for both: that exchange, or what the host wrote there to end all waits;
    and which ranks were late.
    members: uint8 [bytes] of every rank where all are in one process, which is what the references write; else none.
    """

    own: Tensor
    bases: Tensor
    places: Tensor
    state: Tensor
    given_up: Tensor
    members: tuple[Tensor, ...] = ()

    @property
    def world_size(self) -> int:
        return len(self.bases)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where in each rank's memory what begins, in bytes, made for the largest capacity; smaller ones use the same parts.

    sent, returned: int64 [W], the flags. slots: int64 [R, M], from 0 on this rank, those in use first, -1 behind them. weights: fp32
    [R, M]. scales: fp32 [B, R rounded up to a multiple of 4]. rows: [R, D]. results: [R, D], result t of rank w at w * C + t.
    """

    columns: int
    sent: int
    returned: int
    slots: int
    weights: int
    scales: int
    rows: int
    results: int
    num_bytes: int


def layout_for(world_size: int, capacity: int, *, width: int, columns: int, itemsize: int) -> Layout:
    """itemsize: bytes of an element of results, and of rows that are not FP8."""
    num_rows = world_size * capacity
    sizes = {
        "sent": world_size * 8,
        "returned": world_size * 8,
        "slots": num_rows * columns * 8,
        "weights": num_rows * columns * 4,
        "scales": -(-width // BLOCK) * _scale_stride(num_rows) * 4,
        "rows": num_rows * width * itemsize,
        "results": num_rows * width * itemsize,
    }
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // 256) * 256
    return Layout(columns=columns, **offsets, num_bytes=end)


@dataclass(frozen=True, kw_only=True)
class ArrivedRows:
    """Views of what the others wrote, of `x`'s kind. slots_RM: int64, weights_RM: fp32. Rows without a slot hold anything."""

    x: Tensor | QuantisedRows
    slots_RM: Tensor
    weights_RM: Tensor


def arrived_rows(window: Window, layout: Layout, x: Tensor | QuantisedRows, capacity: int) -> ArrivedRows:
    """x: what was sent; the same kind comes."""
    return _rows_in(window.own, layout, x, window.world_size * capacity)


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
    """x: [T, D], rows contiguous and of a multiple of 8 bytes. slots int64 of all ranks, -1: none, a row's distinct; weights fp32; both contiguous.
    Begins the next exchange."""
    num_rows, top_k = slots_TK.shape
    assert num_rows <= capacity, f"{num_rows} rows where {capacity} fit"
    assert min(top_k, slots_per_rank) <= layout.columns, f"{top_k} picks where {layout.columns} fit"
    if slots_TK.is_cuda:
        from serving.kernels.triton import dispatch

        return dispatch.send(window, layout, x, slots_TK, weights_TK, slots_per_rank=slots_per_rank, capacity=capacity)
    return send_reference(window, layout, x, slots_TK, weights_TK, slots_per_rank=slots_per_rank, capacity=capacity)


def send_reference(
    window: Window,
    layout: Layout,
    x: Tensor | QuantisedRows,
    slots_TK: Tensor,
    weights_TK: Tensor,
    *,
    slots_per_rank: int,
    capacity: int,
) -> None:
    num_rows = len(slots_TK)
    window.state[STEP] += 1
    for rank, memory in enumerate(window.members):
        begin = int(window.places[rank]) * capacity
        there = _rows_in(memory, layout, x, window.world_size * capacity)
        there.slots_RM[begin : begin + capacity] = -1
        there.weights_RM[begin : begin + capacity] = 0
        here_TK = (slots_TK >= 0) & (slots_TK // slots_per_rank == rank)
        for row in range(num_rows):
            here_K = here_TK[row]
            used = int(here_K.sum())
            there.slots_RM[begin + row, :used] = slots_TK[row, here_K] - rank * slots_per_rank
            there.weights_RM[begin + row, :used] = weights_TK[row, here_K]
        wanted = here_TK.any(1).nonzero().flatten()
        for into, values in zip(_payloads(there.x), _payloads(x), strict=True):
            into[begin + wanted] = values[wanted]
    _raise_flags(window, layout.sent)


def wait(window: Window, flags: int, *, limit_ns: int) -> None:
    """Until every flag at `flags` in this rank's memory shows this exchange. After `limit_ns` it gives up, which `window` tells from then on:
    later waits end at once, and what is computed is worth nothing."""
    if window.own.is_cuda:
        from serving.kernels.triton import dispatch

        return dispatch.wait(window, flags, limit_ns=limit_ns)
    return wait_reference(window, flags)


def wait_reference(window: Window, flags: int) -> None:
    """Waits for nobody: in one process, who is late does not come."""
    late_W = _part(window.own, flags, torch.int64, window.world_size) < window.state[STEP]
    if late_W.any() and not window.state[GIVEN_UP]:
        window.given_up[1:] = late_W
        window.given_up[0] = window.state[GIVEN_UP] = window.state[STEP]


def late_ranks(window: Window) -> list[int]:
    """Those that a wait gave up; mostly none. Reads host memory alone."""
    if not int(window.given_up[0]):
        return []
    ranks: list[int] = window.given_up[1:].nonzero().flatten().tolist()
    return ranks


def give_back(window: Window, layout: Layout, y_RD: Tensor, *, capacity: int) -> None:
    """y_RD: results of the rows that arrived, rows contiguous; those of rows without a slot are not read."""
    if window.own.is_cuda:
        from serving.kernels.triton import dispatch

        return dispatch.give_back(window, layout, y_RD, capacity=capacity)
    return give_back_reference(window, layout, y_RD, capacity=capacity)


def give_back_reference(window: Window, layout: Layout, y_RD: Tensor, *, capacity: int) -> None:
    num_rows = window.world_size * capacity
    slots_RM = _part(window.own, layout.slots, torch.int64, num_rows, layout.columns)
    for row in (slots_RM[:, 0] >= 0).nonzero().flatten().tolist():
        source, token = divmod(row, capacity)
        results = _part(window.members[source], layout.results, y_RD.dtype, *y_RD.shape)
        results[int(window.places[source]) * capacity + token] = y_RD[row]
    _raise_flags(window, layout.returned)


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
    """[T, D] in `dtype`, that of the results."""
    if window.own.is_cuda:
        from serving.kernels.triton import dispatch

        return dispatch.add_up(
            window, layout, slots_TK, slots_per_rank=slots_per_rank, capacity=capacity, width=width, dtype=dtype
        )
    return add_up_reference(
        window, layout, slots_TK, slots_per_rank=slots_per_rank, capacity=capacity, width=width, dtype=dtype
    )


def add_up_reference(
    window: Window,
    layout: Layout,
    slots_TK: Tensor,
    *,
    slots_per_rank: int,
    capacity: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    results = _part(window.own, layout.results, dtype, window.world_size, capacity, width)
    total = torch.zeros(len(slots_TK), width, dtype=torch.promote_types(dtype, torch.float32), device=slots_TK.device)
    for rank in range(window.world_size):
        wanted = ((slots_TK >= 0) & (slots_TK // slots_per_rank == rank)).any(1).nonzero().flatten()
        total[wanted] += results[rank, wanted]
    return total.to(dtype)


def payload_words(x: Tensor) -> Tensor:
    """Rows [T, D] as int64 [T, bytes / 8]."""
    assert x.stride(-1) == 1, "rows must be contiguous"
    row_bytes = x.shape[1] * x.element_size()
    assert row_bytes % 8 == 0, f"rows of {row_bytes} bytes"
    return x.view(torch.int64)


def _rows_in(memory: Tensor, layout: Layout, x: Tensor | QuantisedRows, num_rows: int) -> ArrivedRows:
    rows: Tensor | QuantisedRows
    if isinstance(x, Tensor):
        rows = _part(memory, layout.rows, x.dtype, num_rows, x.shape[1])
    else:
        width, num_blocks = x.values.shape[1], x.scales.shape[1]
        scales = _part(memory, layout.scales, torch.float32, num_blocks, _scale_stride(num_rows))
        rows = QuantisedRows(
            values=_part(memory, layout.rows, x.values.dtype, num_rows, width), scales=scales.t()[:num_rows]
        )
    return ArrivedRows(
        x=rows,
        slots_RM=_part(memory, layout.slots, torch.int64, num_rows, layout.columns),
        weights_RM=_part(memory, layout.weights, torch.float32, num_rows, layout.columns),
    )


def _payloads(x: Tensor | QuantisedRows) -> list[Tensor]:
    """Each [rows, ...] of a type that can be indexed."""
    return [x] if isinstance(x, Tensor) else [x.values.view(torch.uint8), x.scales]


def _raise_flags(window: Window, flags: int) -> None:
    for memory, place in zip(window.members, window.places.tolist(), strict=True):
        _part(memory, flags, torch.int64, window.world_size)[place] = window.state[STEP]


def _scale_stride(num_rows: int) -> int:
    return -(-num_rows // 4) * 4


def _part(memory: Tensor, offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return memory[offset : offset + num_bytes].view(dtype).view(shape)
