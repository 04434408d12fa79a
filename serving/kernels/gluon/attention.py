"""Prefill attention of MLA for sm_90: a copying warp and two warpgroups of 64 queries each, one CTA a processor.

    loader     takes the next tile from a counter, tells the others, copies its queries, then its blocks of 128 keys and
               values into two rings, ahead of the products
    attender   S_j = Q K_j^T is under way while O += P_{j-1} V_{j-1} is, and while softmax makes P_{j-1} of S_{j-1}

Keys come as a nope part a head and one rope part for all heads. Blocks go from the last to the first: only the last one can
reach the diagonal or the end of the keys. The bound is the matrix units: 2 * (Q + V) flops a pair of query and key.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from serving.kernels import quant
from serving.kernels.quant import QuantisedRows, empty_rows
from serving.kernels.triton.attention import head_group
from serving.kernels.triton.device import num_programs

BLOCK = 128
_HALF = 64
FP8_MAX = gl.constexpr(448.0)
_STAGES = 2
_LOG2_E = 1.4426950408889634


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
) -> tuple[Tensor, Tensor]:
    """See `serving.kernels.attention.attend_varlen`: bf16, N = V = 128, R = 64, at least one query and one key."""
    num_queries, num_heads, v_width = len(q_THQ), q_THQ.shape[1], v_SHV.shape[2]
    out_THV = torch.empty(num_queries, num_heads, v_width, dtype=q_THQ.dtype, device=q_THQ.device)
    lse_TH = torch.empty(num_queries, num_heads, dtype=torch.float32, device=q_THQ.device)
    _launch(q_THQ, k_SHN, k_rope_SR, v_SHV, cu_q, cu_k, out_THV, lse_TH, scale=scale, causal=causal, quantise=False)
    return out_THV, lse_TH


def attend_varlen_quantised(
    q_THQ: Tensor,
    k_SHN: Tensor,
    k_rope_SR: Tensor,
    v_SHV: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    scale: float,
    causal: bool,
) -> QuantisedRows:
    """As `attend_varlen`; a head's values share a scale."""
    num_queries, num_heads, v_width = len(q_THQ), q_THQ.shape[1], v_SHV.shape[2]
    assert v_width == quant.BLOCK
    rows = empty_rows(num_queries, num_heads * v_width, q_THQ.device)
    _launch(
        q_THQ, k_SHN, k_rope_SR, v_SHV, cu_q, cu_k, rows.values, rows.scales, scale=scale, causal=causal, quantise=True
    )
    return rows


def _launch(
    q_THQ: Tensor,
    k_SHN: Tensor,
    k_rope_SR: Tensor,
    v_SHV: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    out: Tensor,
    beside_TH: Tensor,
    *,
    scale: float,
    causal: bool,
    quantise: bool,
) -> None:
    """`beside_TH`: the log-sum-exps, or the scales."""
    num_queries, num_heads = q_THQ.shape[:2]
    nope, rope, v_width = k_SHN.shape[2], k_rope_SR.shape[1], v_SHV.shape[2]
    num_seqs = cu_q.shape[0] - 1
    max_tiles = num_queries // BLOCK + num_seqs
    group = head_group(num_heads, k_SHN.shape[0] // num_seqs)
    attend_kernel[(min(num_programs(q_THQ.device), max_tiles * num_heads),)](
        _blocks(q_THQ, _HALF, nope),
        _blocks(q_THQ, _HALF, rope),
        _blocks(k_SHN, BLOCK, nope),
        _blocks(k_rope_SR[:, None], BLOCK, rope),
        _blocks(v_SHV, BLOCK, v_width),
        out,
        beside_TH,
        cu_q,
        cu_k,
        torch.zeros(1, dtype=torch.int32, device=q_THQ.device),
        q_THQ.stride(1),
        k_SHN.stride(1),
        v_SHV.stride(1),
        num_seqs,
        max_tiles,
        num_heads,
        group,
        scale * _LOG2_E,
        beside_TH.stride(0),
        beside_TH.stride(1),
        NOPE=nope,
        ROPE=rope,
        V_WIDTH=v_width,
        BLOCK_N=BLOCK,
        STAGES=_STAGES,
        SEQS=max(32, 1 << (num_seqs - 1).bit_length()),
        CAUSAL=causal,
        QUANTISE=quantise,
        num_warps=4,
    )


def _blocks(x_THW: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks [rows, columns] of all heads of a row side by side, whatever lies between them."""
    size, heads, width = x_THW.shape
    span = (heads - 1) * x_THW.stride(1) + width
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor(x_THW, [size, span], [x_THW.stride(0), 1], [rows, columns], layout)


@gluon.jit
def _tile(index, lens, sizes, BLOCK_N: gl.constexpr, SEQS: gl.constexpr, CAUSAL: gl.constexpr):
    """Tile `index`: head, first query of the tile in its sequence, rows where queries and keys begin, how many there are, blocks of keys.

    Sequence s has the tiles from cu_q[s] // BLOCK + s on: at least as many as it needs. A tile too many has no queries.
    """
    cu_q_ptr, cu_k_ptr = lens
    num_seqs, max_tiles, group = sizes
    per_group = max_tiles * group
    head = index // per_group * group + index % group
    tile = index % per_group // group
    layout: gl.constexpr = gl.BlockedLayout([SEQS // 32], [32], [gl.num_warps()], [0])
    seqs = gl.arange(0, SEQS, layout=layout)
    starts = gl.load(cu_q_ptr + seqs, mask=seqs < num_seqs, other=0)
    begun = (starts // BLOCK_N + seqs <= tile) & (seqs < num_seqs)
    seq = gl.sum(begun.to(gl.int32), axis=0) - 1
    q_start = gl.load(cu_q_ptr + seq)
    num_queries = gl.load(cu_q_ptr + seq + 1) - q_start
    k_start = gl.load(cu_k_ptr + seq)
    num_keys = gl.load(cu_k_ptr + seq + 1) - k_start
    # Longest first.
    first_query = (gl.cdiv(num_queries, BLOCK_N) - 1 - (tile - q_start // BLOCK_N - seq)) * BLOCK_N
    seen = num_keys
    if CAUSAL:
        seen = gl.minimum(num_keys, first_query + BLOCK_N)
    return head, first_query, q_start, num_queries, k_start, num_keys, gl.cdiv(seen, BLOCK_N)


@gluon.jit
def _tell(told, value, what: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    told.index(what).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def _hear(told, what: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(told.index(what).load(layout), axis=0)


@gluon.jit
def _load(
    descs, smem, bars, told, lens, sizes, strides, next_ptr, num_tiles, SEQS: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    q_desc, q_rope_desc, k_desc, k_rope_desc, v_desc = descs
    q, q_rope, keys, ropes, values = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _fixed, told_full, told_empty = bars
    q_stride, k_stride, v_stride = strides
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HALF: gl.constexpr = q.shape[1]
    NOPE: gl.constexpr = q.shape[2]
    ROPE: gl.constexpr = q_rope.shape[2]
    V_WIDTH: gl.constexpr = values.shape[2]
    block = 0
    q_phase = 1
    told_phase = 1
    index = gl.program_id(0)
    while index < num_tiles:
        head, first_query, q_start, num_queries, k_start, num_keys, num_blocks = _tile(
            index, lens, sizes, BLOCK_N, SEQS, CAUSAL
        )
        if first_query >= 0:
            mbarrier.wait(told_empty, told_phase)
            told_phase ^= 1
            _tell(told, head, 0)
            _tell(told, first_query, 1)
            _tell(told, q_start, 2)
            _tell(told, num_queries, 3)
            _tell(told, num_keys, 4)
            _tell(told, num_blocks, 5)
            mbarrier.arrive(told_full, count=1)
            if num_blocks > 0:
                mbarrier.wait(q_empty, q_phase)
                q_phase ^= 1
                mbarrier.expect(q_full, 2 * HALF * (NOPE + ROPE) * 2)
                for half in gl.static_range(2):
                    row = q_start + first_query + half * HALF
                    column = head * q_stride
                    tma.async_copy_global_to_shared(q_desc, [row, column], q_full, q.index(half))
                    tma.async_copy_global_to_shared(q_rope_desc, [row, column + NOPE], q_full, q_rope.index(half))
            for j in range(num_blocks):
                row = k_start + (num_blocks - 1 - j) * BLOCK_N
                slot = block % STAGES
                phase = block // STAGES & 1 ^ 1
                mbarrier.wait(k_empty.index(slot), phase)
                mbarrier.expect(k_full.index(slot), BLOCK_N * (NOPE + ROPE) * 2)
                tma.async_copy_global_to_shared(k_desc, [row, head * k_stride], k_full.index(slot), keys.index(slot))
                tma.async_copy_global_to_shared(k_rope_desc, [row, 0], k_full.index(slot), ropes.index(slot))
                mbarrier.wait(v_empty.index(slot), phase)
                mbarrier.expect(v_full.index(slot), BLOCK_N * V_WIDTH * 2)
                tma.async_copy_global_to_shared(v_desc, [row, head * v_stride], v_full.index(slot), values.index(slot))
                block += 1
        index = gl.num_programs(0) + gl.atomic_add(next_ptr, 1, sem="relaxed")
    mbarrier.wait(told_empty, told_phase)
    _tell(told, -1, 0)
    mbarrier.arrive(told_full, count=1)


@gluon.jit
def _start_scores(smem, bars, block, half: gl.constexpr):
    q, q_rope, keys, ropes, _values = smem
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    HALF: gl.constexpr = q.shape[1]
    slot = block % STAGES
    mbarrier.wait(bars[2].index(slot), block // STAGES & 1)
    scores = gl.zeros([HALF, BLOCK_N], gl.float32, layout)
    scores = warpgroup_mma(q.index(half), keys.index(slot).permute((1, 0)), scores, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope.index(half), ropes.index(slot).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _keep_own(values, num_own, half: gl.constexpr):
    """Zero this half's rows of a [128, V] block from `num_own` on: a neighbour's may be NaN, which a share of 0 lets through."""
    HALF: gl.constexpr = values.shape[0] // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    part = values.slice(half * HALF, HALF)
    rows = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    kept = part.load(layout)
    part.store(gl.where((rows < num_own)[:, None], kept, gl.zeros_like(kept)))
    fence_async_shared()


@gluon.jit
def _attend(
    smem, bars, told, outputs, num_heads, scale_log2, half: gl.constexpr, CAUSAL: gl.constexpr, QUANTISE: gl.constexpr
):  # fmt: skip
    q, _q_rope, keys, _ropes, values = smem
    q_full, q_empty, _k_full, k_empty, v_full, v_empty, fixed, told_full, told_empty = bars
    out_ptr, beside_ptr, beside_stride_t, beside_stride_h = outputs
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HALF: gl.constexpr = q.shape[1]
    V_WIDTH: gl.constexpr = values.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    block = 0
    q_phase = 0
    fixed_phase = 0
    told_phase = 0
    mbarrier.wait(told_full, told_phase)
    head = _hear(told, 0)
    while head >= 0:
        first_query = _hear(told, 1)
        q_start = _hear(told, 2)
        num_queries = _hear(told, 3)
        num_keys = _hear(told, 4)
        num_blocks = _hear(told, 5)
        mbarrier.arrive(told_empty, count=1)
        told_phase ^= 1
        acc = gl.zeros([HALF, V_WIDTH], gl.float32, o_layout)
        largest = gl.full([HALF], float("-inf"), gl.float32, row_layout)
        total = gl.zeros([HALF], gl.float32, row_layout)
        if num_blocks > 0:
            mbarrier.wait(q_full, q_phase)
            q_phase ^= 1
            alone = _start_scores(smem, bars, block, half)
            scores = warpgroup_mma_wait(0, deps=(alone,))
            mbarrier.arrive(k_empty.index(block % STAGES), count=1)
            last = (num_blocks - 1) * BLOCK_N
            column = last + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
            seen = (column < num_keys)[None, :]
            if CAUSAL:
                query = first_query + half * HALF + gl.arange(0, HALF, layout=row_layout)
                seen = seen & (column[None, :] <= query[:, None])
            scores = gl.where(seen, scores, float("-inf"))
            largest = gl.max(scores, axis=1) * scale_log2
            shares = gl.exp2(scores * scale_log2 - largest[:, None])
            total = gl.sum(shares, axis=1)
            p = gl.convert_layout(shares.to(gl.bfloat16), p_layout)
            if num_keys - last < BLOCK_N:
                mbarrier.wait(v_full.index(block % STAGES), block // STAGES & 1)
                _keep_own(values.index(block % STAGES), num_keys - last, half)
                gl.thread_barrier()
                mbarrier.arrive(fixed, count=1)
                mbarrier.wait(fixed, fixed_phase)
                fixed_phase ^= 1
            for _ in range(num_blocks - 1):
                started = _start_scores(smem, bars, block + 1, half)
                slot = block % STAGES
                mbarrier.wait(v_full.index(slot), block // STAGES & 1)
                mixed = warpgroup_mma(p, values.index(slot), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(started,))
                mbarrier.arrive(k_empty.index((block + 1) % STAGES), count=1)
                new_largest = gl.maximum(largest, gl.max(scores, axis=1) * scale_log2)
                shrink = gl.exp2(largest - new_largest)
                shares = gl.exp2(scores * scale_log2 - new_largest[:, None])
                total = total * shrink + gl.sum(shares, axis=1)
                largest = new_largest
                acc = warpgroup_mma_wait(0, deps=(mixed, p))[0]
                mbarrier.arrive(v_empty.index(slot), count=1)
                acc = acc * gl.convert_layout(shrink, out_row_layout)[:, None]
                p = gl.convert_layout(shares.to(gl.bfloat16), p_layout)
                block += 1
            mbarrier.arrive(q_empty, count=1)
            slot = block % STAGES
            mbarrier.wait(v_full.index(slot), block // STAGES & 1)
            mixed = warpgroup_mma(p, values.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(mixed, p))[0]
            mbarrier.arrive(v_empty.index(slot), count=1)
            block += 1
        # Without keys: output 0, log-sum-exp -inf, which a merge ignores.
        weight = 1.0 / gl.where(total > 0, total, 1.0)
        acc = acc * gl.convert_layout(weight, out_row_layout)[:, None]
        if QUANTISE:
            acc = acc.to(gl.bfloat16).to(gl.float32)
            most = gl.max(gl.abs(acc), axis=1)
            fp8_scale = gl.where(most > 0, most / FP8_MAX, 1.0)
            acc = acc / fp8_scale[:, None]
        else:
            query = first_query + half * HALF + gl.arange(0, HALF, layout=row_layout)
            row = (q_start + query).to(gl.int64)
            lse = (largest + gl.log2(total)) * 0.6931471805599453
            gl.store(beside_ptr + row * beside_stride_t + head, lse, mask=query < num_queries)
        query = first_query + half * HALF + gl.arange(0, HALF, layout=out_row_layout)
        row = (q_start + query).to(gl.int64)
        if QUANTISE:
            gl.store(beside_ptr + row * beside_stride_t + head * beside_stride_h, fp8_scale, mask=query < num_queries)
        column = gl.arange(0, V_WIDTH, layout=gl.SliceLayout(0, o_layout))
        places = out_ptr + (row * num_heads + head)[:, None] * V_WIDTH + column[None, :]
        gl.store(places, acc.to(out_ptr.dtype.element_ty), mask=(query < num_queries)[:, None])
        mbarrier.wait(told_full, told_phase)
        head = _hear(told, 0)


@gluon.jit
def _barriers(num: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [num, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(num):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit(do_not_specialize=["num_seqs", "max_tiles", "group", "beside_stride_h"])
def attend_kernel(
    q_desc, q_rope_desc, k_desc, k_rope_desc, v_desc, out_ptr, beside_ptr, cu_q_ptr, cu_k_ptr, next_ptr,
    q_stride, k_stride, v_stride, num_seqs, max_tiles, num_heads, group, scale_log2, beside_stride_t, beside_stride_h,
    NOPE: gl.constexpr, ROPE: gl.constexpr, V_WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SEQS: gl.constexpr, CAUSAL: gl.constexpr, QUANTISE: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 queries of one head: a few heads at a time, so that tiles that run together share keys, longest first."""
    HALF: gl.constexpr = BLOCK_N // 2
    smem = (
        gl.allocate_shared_memory(gl.bfloat16, [2, HALF, NOPE], q_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [2, HALF, ROPE], q_rope_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, NOPE], k_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, ROPE], k_rope_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, V_WIDTH], v_desc.layout),
    )
    bars = (
        _barriers(1, 1).index(0), _barriers(1, 2).index(0), _barriers(STAGES, 1), _barriers(STAGES, 2),
        _barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(1, 2).index(0),
        _barriers(1, 1).index(0), _barriers(1, 2).index(0),
    )  # fmt: skip
    told = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()
    descs = (q_desc, q_rope_desc, k_desc, k_rope_desc, v_desc)
    lens = (cu_q_ptr, cu_k_ptr)
    sizes = (num_seqs, max_tiles, group)
    strides = (q_stride, k_stride, v_stride)
    outputs = (out_ptr, beside_ptr, beside_stride_t, beside_stride_h)
    num_tiles = max_tiles * num_heads
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_attend, (smem, bars, told, outputs, num_heads, scale_log2, first, CAUSAL, QUANTISE)),
            (_attend, (smem, bars, told, outputs, num_heads, scale_log2, second, CAUSAL, QUANTISE)),
            (_load, (descs, smem, bars, told, lens, sizes, strides, next_ptr, num_tiles, SEQS, CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )
