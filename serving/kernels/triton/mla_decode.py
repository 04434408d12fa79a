"""Paged MLA decode: how a step's pages are cut over the SMs, the general kernel, and the merge of parts.

    _plan_kernel     context lengths -> page ranges of W workers, on the device, once a step
    _decode_kernel   any latent and rope width, bf16, fp32 (exact products) or FP8 rows
    _merge_kernel    parts of a sequence that several workers attended -> its output, by log-sum-exp

The kernels that are fast at the published widths are `serving.kernels.gluon.mla_decode`, `mla_decode_wide` and
`mla_decode_fp8`; they read the same plan and write the same parts. The pages of all sequences are counted through one
after the other: worker w attends flat pages `[bounds[w], bounds[w + 1])`. A kernel with K blocks of columns runs G groups
of workers a block, W // K if the cut was made for a whole device, W if it was made for K blocks; what a group attends of one sequence is a part, and part (group, sequence) has row
`group + sequence` of the partial results, which no other part has: from one part to the next at least one of the two
grows.

B sequences, P pages of a sequence, T query tokens, H heads, X = T * H query columns, C latent, R rope.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PAGE_TOKENS = tl.constexpr(64)

# Shorter parts cost more in merging than they save in reading.
_MIN_PART_PAGES = 3
# Pages that a worker may have more than the even share, if no worker then has parts of two sequences: what comes before and after the
# pages of a part takes as long as four pages.
_MOST_UNEVEN_PAGES = tl.constexpr(2)
# fp32 values of a part that one program merges.
_MERGE_VALUES = 2048


class Cut(NamedTuple):
    """int32 tensors: `bounds` [W + 1] in flat pages, `first_seqs` [W] and the flat page where each begins `first_starts`
    [W], `page_starts` [B + 1], `spans` [B, 2] (first and last worker of a sequence)."""

    bounds: Tensor
    first_seqs: Tensor
    first_starts: Tensor
    page_starts: Tensor
    spans: Tensor


def cut_pages(context_lens_B: Tensor, num_workers: int) -> Cut:
    """Cut the pages of a batch over workers, evenly, without reading a length on the host.

    Sequences are cut into equal parts, one a worker, where that keeps the workers busy; else at any page. A sequence of
    length 0 counts one page.
    """
    batch = context_lens_B.shape[0]
    shapes = (num_workers + 1,), (num_workers,), (num_workers,), (batch + 1,), (batch, 2)
    cut = Cut(*(context_lens_B.new_empty(shape) for shape in shapes))
    _plan_kernel[(max(num_workers, batch) + 1,)](
        context_lens_B,
        *cut,
        batch,
        num_workers,
        _MIN_PART_PAGES,
        BLOCK=triton.next_power_of_2(batch),
        num_warps=1 if batch <= 64 else 4,
    )
    return cut


@triton.jit
def _plan_kernel(
    lens_ptr, bounds_ptr, firsts_ptr, first_starts_ptr, starts_ptr, spans_ptr, batch, num_workers, min_part,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i writes worker i's and sequence i's entries; each finds the common cut by itself."""
    index = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    lens = tl.load(lens_ptr + at, mask=at < batch, other=0)
    pages = tl.where(at < batch, tl.maximum((lens + PAGE_TOKENS - 1) // PAGE_TOKENS, 1), 0)
    total = tl.sum(pages)
    # The shortest longest part with which every part has a worker of its own.
    low = min_part
    high = tl.maximum(tl.max(pages), min_part)
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum((pages + middle - 1) // middle) <= num_workers
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    parts = (pages + high - 1) // high
    num_parts = tl.sum(parts)
    # Up to a tenth above the even share, or so many pages, is made up by parts that need no merging; memory, not SMs, is the bound.
    most = total + tl.maximum(total // 10, _MOST_UNEVEN_PAGES * num_workers)
    apart = (num_parts <= num_workers) & ((high == min_part) | (high * num_workers <= most))
    page_ends = tl.cumsum(pages)
    part_ends = tl.cumsum(parts)

    if index <= num_workers:
        worker = index
        if apart:
            seq = tl.sum((part_ends <= worker).to(tl.int32))
            part = worker - tl.sum(tl.where(at < seq, parts, 0))
            within = tl.sum(tl.where(at == seq, pages * part // tl.maximum(parts, 1), 0))
            start = tl.where(worker < num_parts, tl.sum(tl.where(at < seq, pages, 0)) + within, total)
        else:
            start = (worker.to(tl.int64) * total // num_workers).to(tl.int32)
        first = tl.sum(((page_ends <= start) & (at < batch)).to(tl.int32))
        tl.store(bounds_ptr + worker, start)
        tl.store(firsts_ptr + worker, first, mask=worker < num_workers)
        tl.store(first_starts_ptr + worker, tl.sum(tl.where(at < first, pages, 0)), mask=worker < num_workers)
    if index <= batch:
        start = tl.sum(tl.where(at < index, pages, 0))
        tl.store(starts_ptr + index, start)
        last_page = start + tl.sum(tl.where(at == index, pages, 0)) - 1
        if apart:
            first_worker = tl.sum(tl.where(at < index, parts, 0))
            last_worker = first_worker + tl.sum(tl.where(at == index, parts, 0)) - 1
        else:
            first_worker = (((start + 1).to(tl.int64) * num_workers - 1) // total).to(tl.int32)
            last_worker = (((last_page + 1).to(tl.int64) * num_workers - 1) // total).to(tl.int32)
        tl.store(spans_ptr + index * 2, first_worker, mask=index < batch)
        tl.store(spans_ptr + index * 2 + 1, last_worker, mask=index < batch)


@triton.jit
def _decode_kernel(
    q_ptr, latent_ptr, rope_ptr, scale_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    bounds_ptr, firsts_ptr, first_starts_ptr, starts_ptr, lens_ptr, table_ptr, table_stride,
    latent_page, latent_row, rope_page, rope_row, scale_page, scale_row,
    num_workers, num_groups, num_blocks, first, scale, columns, heads, tokens,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Scores and values of N columns with online softmax; `*_page` and `*_row` are strides in elements of that view."""
    block = tl.program_id(0) % num_blocks
    group = tl.program_id(0) // num_blocks
    low = group * num_workers // num_groups
    high = (group + 1) * num_workers // num_groups
    at = tl.load(bounds_ptr + low)
    end = tl.load(bounds_ptr + high)
    seq = tl.load(firsts_ptr + low, mask=at < end, other=0)
    seq_start = tl.load(first_starts_ptr + low, mask=at < end, other=0)
    column = block * N + tl.arange(0, N)
    inside = column < columns
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    token = tl.arange(0, BLOCK_T)
    # Query token t of `tokens` sees the first context_len - (tokens - 1) + t rows.
    unseen = tl.maximum(tokens - 1 - column // heads, 0)
    while at < end:
        seq64 = seq.to(tl.int64)
        seq_end = tl.load(starts_ptr + seq + 1)
        seg_end = tl.minimum(seq_end, end)
        length = tl.load(lens_ptr + seq)
        q_row = q_ptr + (seq64 * columns + column)[:, None] * (C + R)
        q = tl.load(q_row + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        q_rope = tl.load(q_row + C + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0.0)
        largest = tl.full([N], float("-inf"), tl.float32)
        total = tl.zeros([N], tl.float32)
        out = tl.zeros([N, BLOCK_C], tl.float32)
        # The interpreter counts no `range` whose ends were loaded.
        begin = (at - seq_start) * PAGE_TOKENS
        while begin < (seg_end - seq_start) * PAGE_TOKENS:
            position = begin + token
            owned = (position >= first) & (position < length)
            page = tl.load(table_ptr + seq64 * table_stride + begin // PAGE_TOKENS, mask=length > 0, other=0)
            page = page.to(tl.int64)
            row = position % PAGE_TOKENS
            latent = tl.load(
                latent_ptr + page * latent_page + row[:, None] * latent_row + c[None, :],
                mask=owned[:, None] & (c < C)[None, :], other=0,
            )  # fmt: skip
            if FP8:
                by = tl.load(
                    scale_ptr + page * scale_page + row[:, None] * scale_row + (c // 128)[None, :],
                    mask=owned[:, None] & (c < C)[None, :], other=0.0,
                )  # fmt: skip
                latent = latent.to(tl.float8e4nv, bitcast=True).to(tl.float32) * by
            latent = latent.to(q.dtype)
            rope = tl.load(
                rope_ptr + page * rope_page + row[:, None] * rope_row + r[None, :],
                mask=owned[:, None] & (r < R)[None, :], other=0.0,
            ).to(q.dtype)  # fmt: skip
            scores = tl.dot(q, tl.trans(latent), input_precision="ieee")
            scores += tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
            seen = owned[None, :] & (position[None, :] < (length - unseen)[:, None])
            scores = tl.where(seen, scores * scale, float("-inf"))
            next_largest = tl.maximum(largest, tl.max(scores, axis=1))
            # A column that has seen no row yet: any finite number keeps its shares at zero.
            finite = tl.where(next_largest == float("-inf"), 0.0, next_largest)
            p = tl.exp(scores - finite[:, None])
            alpha = tl.exp(largest - finite)
            total = total * alpha + tl.sum(p, axis=1)
            out = out * alpha[:, None] + tl.dot(p.to(q.dtype), latent, input_precision="ieee")
            largest = next_largest
            begin += BLOCK_T
        some = tl.where(total > 0, total, 1.0)
        out = out / some[:, None]
        lse = tl.where(total > 0, largest + tl.log(some), float("-inf"))
        if (at == seq_start) & (seg_end == seq_end):
            mask = inside[:, None] & (c < C)[None, :]
            to = (seq64 * columns + column)[:, None] * C + c[None, :]
            tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(lse_ptr + seq64 * columns + column, lse, mask=inside)
        else:
            part = (group + seq64) * num_blocks + block
            n = tl.arange(0, N)
            tl.store(part_ptr + part * C * N + c[None, :] * N + n[:, None], out, mask=(c < C)[None, :])
            tl.store(part_lse_ptr + part * N + n, lse)
        at = seg_end
        seq_start = seq_end
        seq += 1


@triton.jit
def _merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, spans_ptr, num_workers, num_groups, num_blocks, columns,
    C: tl.constexpr, N: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """[C, N] parts of one sequence and block of columns -> out [X, C], lse [X]; a sequence of one part is there already."""
    if PDL:
        gdc_launch_dependents()
    seq = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    # The spans are older than the attention kernel: it had waited for them before it let this one start.
    first = ((tl.load(spans_ptr + seq * 2) + 1) * num_groups - 1) // num_workers
    last = ((tl.load(spans_ptr + seq * 2 + 1) + 1) * num_groups - 1) // num_workers
    if PDL:
        gdc_wait()
    if first < last:
        # Flat places in a part, so that weights lie in registers where the values do.
        place = tl.program_id(2) * BLOCK_C * N + tl.arange(0, BLOCK_C * N)
        n = place % N
        inside = place < C * N
        largest = tl.full([BLOCK_C * N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_C * N], tl.float32)
        out = tl.zeros([BLOCK_C * N], tl.float32)
        base = first
        while base <= last:
            # Loads of several parts are under way at once.
            for i in tl.static_range(UNROLL):
                part = (base + i + seq) * num_blocks + block
                there = base + i <= last
                lse = tl.load(part_lse_ptr + part * N + n, mask=there & inside, other=float("-inf"))
                value = tl.load(part_ptr + part * C * N + place, mask=there & inside, other=0.0)
                next_largest = tl.maximum(largest, lse)
                finite = tl.where(next_largest == float("-inf"), 0.0, next_largest)
                kept = tl.exp(largest - finite)
                weight = tl.exp(lse - finite)
                total = total * kept + weight
                out = out * kept + value * weight
                largest = next_largest
            base += UNROLL
        some = tl.where(total > 0, total, 1.0)
        out = (out / some).to(out_ptr.dtype.element_ty)
        lse = tl.where(total > 0, largest + tl.log(some), float("-inf"))
        column = block * N + n
        first_row = (place < N) & (column < columns)
        tl.store(lse_ptr + seq * columns + column, lse, mask=first_row)
        column = block * N + tl.arange(0, N)
        c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        to = out_ptr + (seq * columns + column)[:, None] * C + c[None, :]
        mask = (column < columns)[:, None] & (c < C)[None, :]
        tl.store(to, tl.trans(tl.reshape(out, [BLOCK_C, N])), mask=mask)


class Config(NamedTuple):
    """`gluon`: constants of a Gluon kernel, empty for the general one. `columns`: N, query columns of one program."""

    columns: int
    num_warps: int
    gluon: dict[str, int]


def config_for(num_columns: int, dtype: torch.dtype, latent: int, rope: int) -> Config:
    """Measured on an H200 at contexts of 4,096; the Gluon kernels are for the published widths on sm_90."""
    published = latent == 512 and rope == 64 and dtype in (torch.bfloat16, torch.uint8)
    if not (published and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
        return Config(16, 4, {})
    table = _FP8 if dtype == torch.uint8 else _BF16
    return next((config for config in table if num_columns <= config.columns), table[-1])


def _bf16(*, ring: int, ropes: int, shares: int, score_regs: int) -> dict[str, int]:
    return {"CHUNK": 128, "RING": ring, "ROPES": ropes, "SHARES": shares, "SCORE_REGS": score_regs}


# Rings fill the 227 KB of shared memory. Registers are for no spills inside the loops: with them the compiler also makes
# each product wait for the one before.
_BF16 = (
    Config(16, 4, _bf16(ring=10, ropes=3, shares=2, score_regs=152)),
    Config(32, 4, _bf16(ring=9, ropes=3, shares=2, score_regs=168)),
    Config(64, 4, {"CHUNK": 128, "HELD": 3, "RING": 11, "SLOTS": 3, "VALUE_REGS": 160, "SCORE_REGS": 168}),
)
_FP8 = (
    Config(16, 4, {"PAGES": 4, "SHARES": 2, "SCORE_REGS": 176}),
    Config(32, 4, {"PAGES": 4, "SHARES": 1, "SCORE_REGS": 232}),
)


def decode_paged(
    q_BTHW: Tensor,
    rows_BPTW: Tensor,
    page_table_BP: Tensor,
    context_lens_B: Tensor,
    cut: Cut,
    *,
    first: int,
    latent: int,
    scale: float,
    num_groups: int | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over cached rows: out [B, T, H, C] in q's dtype, lse [B, T, H] fp32 (natural log).

    `rows_BPTW` is one layer's view [pages, 64, row] of the pool, bf16, fp32 or uint8 (656-byte FP8 rows); rows of a page
    are contiguous. `page_table_BP` and `context_lens_B` are int32. Query token t of T sees rows
    `[first, context_len - (T - 1) + t)`; nothing seen gives zeros and -inf. Nothing outside a sequence's
    `[first, context_len)` reaches its result, whatever it holds.
    """
    batch, tokens, heads, width = q_BTHW.shape
    num_columns = tokens * heads
    assert q_BTHW.is_contiguous()
    if config is None:
        config = config_for(num_columns, rows_BPTW.dtype, latent, width - latent)
    num_blocks = triton.cdiv(num_columns, config.columns)
    num_workers = cut.first_seqs.shape[0]
    num_groups = num_groups or max(num_workers // num_blocks, 1)
    out = q_BTHW.new_empty(batch, tokens, heads, latent)
    lse = q_BTHW.new_empty(batch, tokens, heads, dtype=torch.float32)
    parts = (num_groups + batch) * num_blocks * config.columns
    part = q_BTHW.new_empty(parts * latent, dtype=torch.float32)
    part_lse = q_BTHW.new_empty(parts, dtype=torch.float32)
    launch = _launch_gluon if config.gluon else _launch_general
    launch(
        q_BTHW, rows_BPTW, (out, lse, part, part_lse), page_table_BP, context_lens_B, cut,
        (num_workers, num_groups, num_blocks), (first, scale, num_columns, heads, tokens), latent, config,
    )  # fmt: skip
    block_c = min(triton.next_power_of_2(latent), _MERGE_VALUES // config.columns)
    _merge_kernel[(batch, num_blocks, triton.cdiv(latent, block_c))](
        part, part_lse, out, lse, cut.spans, num_workers, num_groups, num_blocks, num_columns,
        C=latent, N=config.columns, BLOCK_C=block_c, UNROLL=4, PDL=q_BTHW.is_cuda, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out, lse


def _views(rows: Tensor, latent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, rope values and fp32 scales of the rows, as tensors of their own type over the same memory."""
    if rows.dtype != torch.uint8:
        return rows, rows[..., latent:], rows
    scales, rope_at = latent // 4, (latent + latent // 32) // 2
    return rows, rows.view(torch.bfloat16)[..., rope_at:], rows.view(torch.float32)[..., scales:]


def _launch_general(
    q: Tensor, rows: Tensor, outputs: tuple[Tensor, ...], table: Tensor, lens: Tensor, cut: Cut,
    grid: tuple[int, int, int], query: tuple[int, float, int, int, int], latent: int, config: Config,
) -> None:  # fmt: skip
    views = _views(rows, latent)
    rope = q.shape[-1] - latent
    _decode_kernel[(grid[1] * grid[2],)](
        q, *views, *outputs, *cut[:4], lens, table, table.stride(0),
        *(stride for view in views for stride in view.stride()[:2]), *grid, *query,
        C=latent, R=rope, BLOCK_C=max(triton.next_power_of_2(latent), 16), BLOCK_R=max(triton.next_power_of_2(rope), 16),
        N=config.columns, BLOCK_T=16 if q.dtype == torch.float32 else 32, FP8=rows.dtype == torch.uint8,
        num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip


def _launch_gluon(
    q: Tensor, rows: Tensor, outputs: tuple[Tensor, ...], table: Tensor, lens: Tensor, cut: Cut,
    grid: tuple[int, int, int], query: tuple[int, float, int, int, int], latent: int, config: Config,
) -> None:  # fmt: skip
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from serving.kernels.gluon.mla_decode import mla_decode_kernel, shared_layout
    from serving.kernels.gluon.mla_decode_fp8 import mla_decode_fp8_kernel
    from serving.kernels.gluon.mla_decode_wide import mla_decode_wide_kernel

    bf16 = torch.bfloat16
    row_size = rows.shape[-1]
    page_rows = rows.stride(0) // row_size
    # One tensor map over all rows of the pool that lie a row apart; pages of other layers are among them.
    num_rows = (rows.shape[0] - 1) * page_rows + rows.shape[1]
    flat = rows.as_strided((num_rows, row_size), (row_size, 1))

    def describe(tensor: Tensor, dtype: torch.dtype, block: list[int]) -> Any:
        return TensorDescriptor.from_tensor(tensor.view(dtype), block, shared_layout(block, dtype))

    kernel: Any
    inputs: tuple[Any, ...]
    if rows.dtype == torch.uint8:
        kernel = mla_decode_fp8_kernel
        scales, rope = describe(flat, torch.float32, [64, latent // 128]), describe(flat, bf16, [64, 64])
        inputs = q, describe(flat, torch.float8_e4m3fn, [64, 128]), rope, scales
    else:
        kernel = mla_decode_wide_kernel if config.columns == 64 else mla_decode_kernel
        columns = q.view(-1, q.shape[-1])
        blocks = [config.columns, config.gluon["CHUNK"]], [config.columns, 64]
        row_blocks = [64, config.gluon["CHUNK"]], [64, 64]
        inputs = *(describe(columns, bf16, b) for b in blocks), *(describe(flat, bf16, b) for b in row_blocks)
    kernel[(grid[1] * grid[2],)](
        *inputs, *outputs, *cut[:4], lens, table, table.stride(0), page_rows, *grid[:2], *query,
        C=latent, N=config.columns, **config.gluon, num_warps=config.num_warps, launch_pdl=True,
    )  # fmt: skip
