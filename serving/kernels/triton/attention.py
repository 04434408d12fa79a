"""Prefill attention of MLA in Triton: variable lengths in one launch, keys in two parts, the rope part one for all heads.

FlashAttention-2 over the pieces `s = q_nope k_nope^T + q_rope k_rope^T`: the shared rope part is never copied to the heads,
and values may be a strided half of the product that made keys and values together. Scores live in base 2. The bound is the
matrix units: 2 * (Q + V) flops a pair of query and key. T queries, S keys, H heads, N nope, R rope, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    """`tma`: keys and values by tensor map, else by pointer."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool


def config_for(dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        return Config(block_m=32, block_n=32, num_warps=4, num_stages=1, tma=False)
    return Config(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True)


def head_group(num_heads: int, keys_a_seq: int) -> int:
    """Heads whose tiles run side by side: more balance the end, fewer keep their keys in the cache (about 34 MB of it)."""
    fitting = max(1, (34 << 20) // max(1, keys_a_seq * 512))
    return max(size for size in range(1, num_heads + 1) if num_heads % size == 0 and size <= fitting)


def attend_varlen(
    q_THQ: Tensor,
    k_SHN: Tensor,
    k_rope_SR: Tensor,
    v_SHV: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    scale: float,
    causal: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See `serving.kernels.attention.attend_varlen`. Widths N, R and V are powers of two from 16 up."""
    num_queries, num_heads = q_THQ.shape[:2]
    nope, rope, v_width = k_SHN.shape[2], k_rope_SR.shape[1], v_SHV.shape[2]
    out_THV = torch.empty(num_queries, num_heads, v_width, dtype=q_THQ.dtype, device=q_THQ.device)
    lse_TH = torch.empty(num_queries, num_heads, dtype=torch.float32, device=q_THQ.device)
    if num_queries == 0:
        return out_THV, lse_TH
    config = config or config_for(q_THQ.dtype)
    num_seqs = cu_q.shape[0] - 1
    max_tiles = num_queries // config.block_m + num_seqs
    keys: object = k_SHN
    ropes: object = k_rope_SR
    values: object = v_SHV
    if config.tma and k_SHN.shape[0] > 0:
        keys = _rows(k_SHN, config.block_n)
        ropes = TensorDescriptor.from_tensor(k_rope_SR, [config.block_n, rope])
        values = _rows(v_SHV, config.block_n)
    _attend_kernel[(max_tiles * num_heads,)](
        q_THQ,
        keys,
        ropes,
        values,
        out_THV,
        lse_TH,
        cu_q,
        cu_k,
        q_THQ.stride(0),
        q_THQ.stride(1),
        k_SHN.stride(0),
        k_SHN.stride(1),
        k_rope_SR.stride(0),
        v_SHV.stride(0),
        v_SHV.stride(1),
        max_tiles,
        num_seqs,
        head_group(num_heads, k_SHN.shape[0] // num_seqs),
        scale * _LOG2_E,
        NUM_HEADS=num_heads,
        NOPE=nope,
        ROPE=rope,
        V_WIDTH=v_width,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SEQS=max(32, triton.next_power_of_2(num_seqs)),
        CAUSAL=causal,
        TMA=config.tma and k_SHN.shape[0] > 0,
        PRECISION="ieee" if q_THQ.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out_THV, lse_TH


def _rows(x_SHW: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of [rows, W] of one head: all heads of a row side by side, whatever lies between them."""
    size, heads, width = x_SHW.shape
    span = (heads - 1) * x_SHW.stride(1) + width
    return TensorDescriptor(x_SHW, [size, span], [x_SHW.stride(0), 1], [rows, width])


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `serving.kernels.attention.merge_into`, as new tensors; contiguous inputs. Bound: the bytes."""
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    num_rows, width = lse_a.numel(), out_a.shape[-1]
    rows = max(1, 2048 // triton.next_power_of_2(width))
    if num_rows:
        _merge_kernel[(triton.cdiv(num_rows, rows),)](
            out_a, lse_a, out_b, lse_b, out, lse, num_rows, width, ROWS=rows, WIDTH=triton.next_power_of_2(width), num_warps=4
        )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    places = row[:, None] * width + column[None, :]
    a = tl.load(lse_a_ptr + row, mask=row < num_rows, other=0.0)
    b = tl.load(lse_b_ptr + row, mask=row < num_rows, other=0.0)
    largest = tl.maximum(a, b)
    # Two parts without keys: -inf - -inf would be NaN.
    pivot = tl.where(largest == -float("inf"), 0.0, largest)
    part_a, part_b = tl.exp(a - pivot), tl.exp(b - pivot)
    total = part_a + part_b
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(lse_ptr + row, largest + tl.log(divisor), mask=row < num_rows)
    weight = 1.0 / divisor
    out = tl.load(out_a_ptr + places, mask=inside, other=0.0).to(tl.float32) * (part_a * weight)[:, None]
    out += tl.load(out_b_ptr + places, mask=inside, other=0.0).to(tl.float32) * (part_b * weight)[:, None]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _block(source, row, column, limit, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, COLUMNS] from `row` and `column` on. Rows from `limit` on are 0 by pointer, a neighbour's by tensor map."""
    if TMA:
        block = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        places = rows[:, None].to(tl.int64) * stride + column + tl.arange(0, COLUMNS)[None, :]
        block = tl.load(source + places, mask=rows[:, None] < limit, other=0.0)
    return block


@triton.jit
def _attend_block(
    acc,
    row_max,
    row_sum,
    q_nope,
    q_rope,
    k,
    k_rope,
    v,
    key_start,
    key_end,
    start,
    first_query,
    head,
    k_stride_s,
    k_stride_h,
    kr_stride_s,
    v_stride_s,
    v_stride_h,
    scale_log2,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys, `start` on from the sequence's first. `MASKED`: it reaches the diagonal or the sequence's end."""
    row = key_start + start
    keys = _block(k, row, head * k_stride_h, key_end, k_stride_s, BLOCK_N, NOPE, TMA)
    ropes = _block(k_rope, row, 0, key_end, kr_stride_s, BLOCK_N, ROPE, TMA)
    scores = tl.dot(q_nope, keys.T, input_precision=PRECISION)
    scores = tl.dot(q_rope, ropes.T, scores, input_precision=PRECISION)
    if MASKED:
        columns = start + tl.arange(0, BLOCK_N)
        seen = (columns < key_end - key_start)[None, :]
        if CAUSAL:
            queries = first_query + tl.arange(0, BLOCK_M)
            seen = seen & (columns[None, :] <= queries[:, None])
        scores = tl.where(seen, scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    # A row that has seen no key yet: its maximum is -inf, and -inf - -inf would be NaN.
    pivot = tl.where(new_max == -float("inf"), 0.0, new_max) if MASKED else new_max
    shares = tl.exp2(scores * scale_log2 - pivot[:, None])
    shrink = tl.exp2(row_max - pivot)
    row_sum = row_sum * shrink + tl.sum(shares, 1)
    acc = acc * shrink[:, None]
    values = _block(v, row, head * v_stride_h, key_end, v_stride_s, BLOCK_N, V_WIDTH, TMA)
    if MASKED and TMA:
        # Rows past the end belong to somebody else: 0 * NaN would be NaN.
        own = row + tl.arange(0, BLOCK_N) < key_end
        values = tl.where(own[:, None], values, 0.0).to(values.dtype)
    acc = tl.dot(shares.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, new_max, row_sum


# Lengths change with every call: none of what depends on them may make a kernel of its own.
@triton.jit(do_not_specialize=["max_tiles", "num_seqs", "head_group"])
def _attend_kernel(
    q_ptr,
    k,
    k_rope,
    v,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_s,
    k_stride_h,
    kr_stride_s,
    v_stride_s,
    v_stride_h,
    max_tiles,
    num_seqs,
    head_group,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEQS: tl.constexpr,
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head a program. Neighbours share keys: a few heads at a time, all their blocks, longest first."""
    pid = tl.program_id(0)
    per_group = max_tiles * head_group
    head = pid // per_group * head_group + pid % head_group
    tile = pid % per_group // head_group

    # Sequence s has the tiles from cu_q[s] // BLOCK_M + s on: at least as many as it needs, no sum over lengths.
    seqs = tl.arange(0, SEQS)
    starts = tl.load(cu_q_ptr + seqs, mask=seqs < num_seqs, other=0)
    begun = (starts // BLOCK_M + seqs <= tile) & (seqs < num_seqs)
    seq = tl.sum(begun.to(tl.int32), 0) - 1
    query_start, query_end = tl.load(cu_q_ptr + seq), tl.load(cu_q_ptr + seq + 1)
    key_start, key_end = tl.load(cu_k_ptr + seq), tl.load(cu_k_ptr + seq + 1)
    num_tiles = tl.cdiv(query_end - query_start, BLOCK_M)
    first_query = (num_tiles - 1 - (tile - query_start // BLOCK_M - seq)) * BLOCK_M
    if first_query < 0:
        return

    queries = query_start + first_query + tl.arange(0, BLOCK_M)
    live = queries < query_end
    q_rows = q_ptr + queries[:, None].to(tl.int64) * q_stride_t + head * q_stride_h
    q_nope = tl.load(q_rows + tl.arange(0, NOPE)[None, :], mask=live[:, None], other=0.0)
    q_rope = tl.load(q_rows + NOPE + tl.arange(0, ROPE)[None, :], mask=live[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, V_WIDTH], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    num_keys = key_end - key_start
    if CAUSAL:
        last_key = tl.minimum(first_query + BLOCK_M, num_keys)
        unmasked = tl.minimum(first_query, num_keys) // BLOCK_N * BLOCK_N
    else:
        last_key = num_keys
        unmasked = num_keys // BLOCK_N * BLOCK_N
    for start in tl.range(0, unmasked, BLOCK_N):
        acc, row_max, row_sum = _attend_block(
            acc, row_max, row_sum, q_nope, q_rope, k, k_rope, v, key_start, key_end, start, first_query, head,
            k_stride_s, k_stride_h, kr_stride_s, v_stride_s, v_stride_h, scale_log2,
            NOPE, ROPE, V_WIDTH, BLOCK_M, BLOCK_N, CAUSAL, False, TMA, PRECISION,
        )  # fmt: skip
    for start in tl.range(unmasked, last_key, BLOCK_N, num_stages=1):
        acc, row_max, row_sum = _attend_block(
            acc, row_max, row_sum, q_nope, q_rope, k, k_rope, v, key_start, key_end, start, first_query, head,
            k_stride_s, k_stride_h, kr_stride_s, v_stride_s, v_stride_h, scale_log2,
            NOPE, ROPE, V_WIDTH, BLOCK_M, BLOCK_N, CAUSAL, True, TMA, PRECISION,
        )  # fmt: skip

    # A sequence without keys: output 0, log-sum-exp -inf, which a merge ignores.
    divisor = tl.where(row_sum > 0, row_sum, 1.0)
    acc = acc / divisor[:, None]
    lse = (row_max + tl.log2(divisor)) * 0.6931471805599453
    rows = queries.to(tl.int64) * NUM_HEADS + head
    tl.store(lse_ptr + rows, lse, mask=live)
    places = rows[:, None] * V_WIDTH + tl.arange(0, V_WIDTH)[None, :]
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
