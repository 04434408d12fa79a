"""From the products that make query and latent to what attention reads, in one launch: see `serving.kernels.kv_store`.

The bound is memory: a latent row in and one or two out (2.3 KB to 3.5 KB a token in bf16), and the rope part of every
head's query in and out. T tokens, H heads, C latent, R rope, W = C + R.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.triton.device import overlap
from serving.kernels.triton.norm_rope import inverse_scale_of, scale_of
from serving.kernels.triton.per_head import columns_held, columns_of_head

# Measured at 4,096 tokens: one warp a token takes 5.6 us, two 7.0.
_HEADS_A_PROGRAM = 16
_WARPS = 1


def norm_rope_store(
    latent_TW: Tensor,
    weight_C: Tensor,
    eps: float,
    rotations_T: Tensor,
    rows_NW: Tensor,
    slots_T: Tensor,
    *,
    q_rope_THR: Tensor | None,
    q_out_THR: Tensor | None,
    keep: bool,
) -> Tensor | None:
    """`rows_NW`: all rows of the layer, as `serving.kernels.rows.layer_rows` has them; uint8 means FP8 rows."""
    num_tokens, width = latent_TW.shape
    latent = weight_C.shape[0]
    rope = width - latent
    assert latent_TW.stride(1) == 1, "rows must be contiguous"
    kept_TW = torch.empty(num_tokens, width, dtype=latent_TW.dtype, device=latent_TW.device) if keep else None
    num_heads = 0
    if q_rope_THR is not None:
        q_out_THR = q_rope_THR if q_out_THR is None else q_out_THR
        num_heads = q_rope_THR.shape[1]
        assert q_rope_THR.stride(2) == q_out_THR.stride(2) == 1, "the rope part of a head must be contiguous"
    if num_tokens == 0:
        return kept_TW
    fp8 = rows_NW.dtype == torch.uint8
    _kernel[(num_tokens, 1 + triton.cdiv(num_heads, _HEADS_A_PROGRAM))](
        latent_TW,
        weight_C,
        torch.view_as_real(rotations_T),
        rows_NW.view(torch.float8_e4m3fn) if fp8 else rows_NW,
        rows_NW.view(torch.float32) if fp8 else None,
        rows_NW.view(torch.bfloat16) if fp8 else None,
        slots_T,
        kept_TW,
        q_rope_THR,
        q_out_THR,
        latent_TW.stride(0),
        rows_NW.stride(0),
        0 if q_rope_THR is None else q_rope_THR.stride(0),
        0 if q_rope_THR is None else q_rope_THR.stride(1),
        0 if q_out_THR is None else q_out_THR.stride(0),
        0 if q_out_THR is None else q_out_THR.stride(1),
        num_heads,
        eps,
        LATENT=latent,
        ROPE=rope,
        HEADS=min(_HEADS_A_PROGRAM, triton.next_power_of_2(num_heads)) if num_heads else 0,
        KEEP=keep,
        FP8=fp8,
        num_warps=_WARPS,
        **overlap(latent_TW.device),
    )
    return kept_TW


def absorb_and_store(
    q_THQ: Tensor,
    w_HNC: Tensor,
    latent_TW: Tensor,
    weight_C: Tensor,
    eps: float,
    rotations_T: Tensor,
    rows_NW: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """As `serving.kernels.kv_store` has it, of few tokens, in one launch; `rows_NW` as above."""
    num_tokens, num_heads, _ = q_THQ.shape
    _, nope, latent = w_HNC.shape
    rope = latent_TW.shape[1] - latent
    assert num_tokens > 0
    assert q_THQ.stride(2) == latent_TW.stride(1) == 1, "rows must be contiguous"
    q_THW = q_THQ.new_empty(num_tokens, num_heads, latent + rope)
    fp8 = rows_NW.dtype == torch.uint8
    block_n = columns_held(w_HNC)
    num_parts = num_tokens * (1 + triton.cdiv(num_heads, _HEADS_A_PROGRAM))
    _absorb_kernel[(num_parts + num_heads * (latent // block_n),)](
        q_THQ, w_HNC, q_THW, latent_TW, weight_C, torch.view_as_real(rotations_T),
        rows_NW.view(torch.float8_e4m3fn) if fp8 else rows_NW,
        rows_NW.view(torch.float32) if fp8 else None, rows_NW.view(torch.bfloat16) if fp8 else None, slots_T,
        q_THQ.stride(0), q_THQ.stride(1), *w_HNC.stride(), q_THW.stride(0), q_THW.stride(1), latent_TW.stride(0), rows_NW.stride(0),
        num_tokens, num_heads, num_parts, eps,
        NOPE=nope, LATENT=latent, ROPE=rope, HEADS=min(_HEADS_A_PROGRAM, triton.next_power_of_2(num_heads)), FP8=fp8,
        BLOCK_T=16, BLOCK_N=block_n, num_warps=4, **overlap(q_THQ.device),
    )  # fmt: skip
    return q_THW


@triton.jit
def _turned(x, parts, ROPE: tl.constexpr):
    """Pairs of the last axis of [H, R] times the rotations [R] of one token, fp32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [x.shape[0], ROPE // 2, 2]))
    cos, sin = tl.split(tl.reshape(parts, [ROPE // 2, 2]))
    cos, sin = cos[None, :], sin[None, :]
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [x.shape[0], ROPE])


@triton.jit
def _turn_query(
    q_ptr, q_out_ptr, rotation, q_stride_h, q_out_stride_h, first_head, num_heads, ROPE: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    head = first_head + tl.arange(0, HEADS)
    column = tl.arange(0, ROPE)
    inside = head[:, None] < num_heads
    q = tl.load(q_ptr + head[:, None] * q_stride_h + column[None, :], mask=inside, other=0.0)
    turned = _turned(q, rotation, ROPE).to(q.dtype)
    tl.store(q_out_ptr + head[:, None] * q_out_stride_h + column[None, :], turned, mask=inside)


@triton.jit
def _store_latent(
    latent_ptr,
    weight,
    rotation,
    rows_ptr,
    rows_fp32_ptr,
    rows_bf16_ptr,
    row,
    kept_ptr,
    eps,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    KEEP: tl.constexpr,
    FP8: tl.constexpr,
):
    column, rope_column = tl.arange(0, LATENT), tl.arange(0, ROPE)
    c = tl.load(latent_ptr + column)
    wide = c.to(tl.float32)
    mean = tl.sum(wide * wide, axis=0) / LATENT
    normed = (wide * tl.rsqrt(mean + eps) * weight).to(c.dtype)
    k_rope = tl.load(latent_ptr + LATENT + rope_column)[None, :]
    turned = tl.reshape(_turned(k_rope, rotation, ROPE), [ROPE]).to(c.dtype)
    if KEEP:
        tl.store(kept_ptr + column, normed)
        tl.store(kept_ptr + LATENT + rope_column, turned)
    if FP8:
        groups: tl.constexpr = LATENT // 128
        grouped = tl.reshape(normed.to(tl.float32), [groups, 128])
        largest = tl.max(tl.abs(grouped), axis=1)
        values = (grouped * inverse_scale_of(largest)[:, None]).to(tl.float8e4nv)
        tl.store(rows_ptr + row + column, tl.reshape(values, [LATENT]))
        tl.store(rows_fp32_ptr + (row + LATENT) // 4 + tl.arange(0, groups), scale_of(largest))
        tl.store(rows_bf16_ptr + (row + LATENT + 4 * groups) // 2 + rope_column, turned.to(tl.bfloat16))
    else:
        tl.store(rows_ptr + row + column, normed.to(rows_ptr.dtype.element_ty))
        tl.store(rows_ptr + row + LATENT + rope_column, turned.to(rows_ptr.dtype.element_ty))


@triton.jit
def _kernel(
    latent_ptr,
    weight_ptr,
    rotation_ptr,
    rows_ptr,
    rows_fp32_ptr,
    rows_bf16_ptr,
    slots_ptr,
    kept_ptr,
    q_ptr,
    q_out_ptr,
    latent_stride_t,
    row_stride,
    q_stride_t,
    q_stride_h,
    q_out_stride_t,
    q_out_stride_h,
    num_heads,
    eps,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    KEEP: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Program (t, 0) has the latent row of token t, program (t, 1 + i) the i-th HEADS of its query."""
    if PDL:
        gdc_launch_dependents()
    _part_of_token(
        latent_ptr, weight_ptr, rotation_ptr, rows_ptr, rows_fp32_ptr, rows_bf16_ptr, slots_ptr, kept_ptr, q_ptr, q_out_ptr,
        tl.program_id(0).to(tl.int64), tl.program_id(1),
        latent_stride_t, row_stride, q_stride_t, q_stride_h, q_out_stride_t, q_out_stride_h, num_heads, eps,
        LATENT, ROPE, HEADS, KEEP, FP8, PDL,
    )  # fmt: skip


@triton.jit
def _part_of_token(
    latent_ptr, weight_ptr, rotation_ptr, rows_ptr, rows_fp32_ptr, rows_bf16_ptr, slots_ptr, kept_ptr, q_ptr, q_out_ptr, token, part,
    latent_stride_t, row_stride, q_stride_t, q_stride_h, q_out_stride_t, q_out_stride_h, num_heads, eps,
    LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, KEEP: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Weights, and what a step makes before its first layer by launches that let no other start early. Not from the first
    # cache, which may hold what was there before.
    rotation = tl.load(rotation_ptr + token * ROPE + tl.arange(0, ROPE), cache_modifier=".cg")
    weight = tl.load(weight_ptr + tl.arange(0, LATENT)).to(tl.float32)
    row = tl.load(slots_ptr + token, cache_modifier=".cg") * row_stride
    if PDL:
        gdc_wait()
    if part == 0:
        kept = kept_ptr + token * (LATENT + ROPE) if KEEP else kept_ptr
        latent = latent_ptr + token * latent_stride_t
        _store_latent(
            latent,
            weight,
            rotation,
            rows_ptr,
            rows_fp32_ptr,
            rows_bf16_ptr,
            row,
            kept,
            eps,
            LATENT,
            ROPE,
            KEEP,
            FP8,
        )
    else:
        if HEADS > 0:
            q, q_out = q_ptr + token * q_stride_t, q_out_ptr + token * q_out_stride_t
            _turn_query(q, q_out, rotation, q_stride_h, q_out_stride_h, (part - 1) * HEADS, num_heads, ROPE, HEADS)


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def _absorb_kernel(
    q_ptr, w_ptr, q_out_ptr, latent_ptr, weight_ptr, rotation_ptr, rows_ptr, rows_fp32_ptr, rows_bf16_ptr, slots_ptr,
    q_stride_t, q_stride_h, w_stride_h, w_stride_n, w_stride_c, q_out_stride_t, q_out_stride_h, latent_stride_t, row_stride,
    num_tokens, num_heads, num_parts, eps,
    NOPE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, FP8: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The first programs have what `_kernel` has, the others BLOCK_N columns each of one head's product."""
    if PDL:
        gdc_launch_dependents()
    index = tl.program_id(0)
    if index < num_parts:
        _part_of_token(
            latent_ptr, weight_ptr, rotation_ptr, rows_ptr, rows_fp32_ptr, rows_bf16_ptr, slots_ptr, latent_ptr,
            q_ptr + NOPE, q_out_ptr + LATENT, (index % num_tokens).to(tl.int64), index // num_tokens,
            latent_stride_t, row_stride, q_stride_t, q_stride_h, q_out_stride_t, q_out_stride_h, num_heads, eps,
            LATENT, ROPE, HEADS, False, FP8, PDL,
        )  # fmt: skip
    else:
        index -= num_parts
        blocks: tl.constexpr = LATENT // BLOCK_N
        columns_of_head(
            q_ptr, w_ptr, q_out_ptr, num_tokens, LATENT, (index // blocks).to(tl.int64), index % blocks,
            q_stride_t, q_stride_h, 1, w_stride_h, w_stride_n, w_stride_c, q_out_stride_t, q_out_stride_h, 1,
            NOPE, BLOCK_T, BLOCK_N, PDL,
        )  # fmt: skip
