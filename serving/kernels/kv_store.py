"""Writes latent rows into the KV pool. Which row is whose is the page manager's business.

A row is `[c ; k_rope]` in the pool's dtype, or an FP8 row of `serving.kernels.rows` where the pool is uint8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serving.kernels.gemm import per_head
from serving.kernels.norm_rope import rms_norm, rope_
from serving.kernels.rows import layer_rows, pack_fp8_rows


def store_rows(kv_pool: Tensor, layer: int, slots_T: Tensor, rows_TW: Tensor) -> None:
    """Write `rows_TW` (any float dtype) to the slots of one layer, in place. Equal slots (scratch): any one of them wins."""
    layer_rows(kv_pool, layer).index_copy_(0, slots_T, rows_TW.to(kv_pool.dtype))


def norm_rope_store(
    latent_TW: Tensor,
    weight_C: Tensor,
    eps: float,
    rotations_T: Tensor,
    kv_pool: Tensor,
    layer: int,
    slots_T: Tensor,
    *,
    q_rope_THR: Tensor | None = None,
    q_out_THR: Tensor | None = None,
    keep: bool = False,
) -> Tensor | None:
    """Everything between the products of query and latent and the attention that reads them.

    `latent_TW` [T, C + R], rows strided: the product's latent before its RMSNorm (`weight_C`, `eps`) and the shared key
    before its turn by `rotations_T` (complex64 [T, R/2]); it may be overwritten. The finished row goes to its slot (int64)
    of the layer; with `keep` it is returned as well, [T, W] in the dtype of the latent (unquantised where the pool is FP8).
    `q_rope_THR`: view on the rope part of every head's query, turned in place, or into `q_out_THR` of the same shape.
    """
    if not _has_kernel(latent_TW, weight_C.shape[0]):
        return norm_rope_store_reference(
            latent_TW,
            weight_C,
            eps,
            rotations_T,
            kv_pool,
            layer,
            slots_T,
            q_rope_THR=q_rope_THR,
            q_out_THR=q_out_THR,
            keep=keep,
        )
    from serving.kernels.triton import kv_store as device

    return device.norm_rope_store(
        latent_TW,
        weight_C,
        eps,
        rotations_T,
        layer_rows(kv_pool, layer),
        slots_T,
        q_rope_THR=q_rope_THR,
        q_out_THR=q_out_THR,
        keep=keep,
    )


def norm_rope_store_reference(
    latent_TW: Tensor,
    weight_C: Tensor,
    eps: float,
    rotations_T: Tensor,
    kv_pool: Tensor,
    layer: int,
    slots_T: Tensor,
    *,
    q_rope_THR: Tensor | None = None,
    q_out_THR: Tensor | None = None,
    keep: bool = False,
) -> Tensor | None:
    latent = weight_C.shape[0]
    c_TC = rms_norm(latent_TW[:, :latent], weight_C, eps)
    rows_TW = torch.cat([c_TC, rope_(latent_TW[:, latent:], rotations_T)], dim=-1)
    if kv_pool.dtype == torch.uint8:
        layer_rows(kv_pool, layer).index_copy_(0, slots_T, pack_fp8_rows(rows_TW, latent))
    else:
        store_rows(kv_pool, layer, slots_T, rows_TW)
    if q_rope_THR is not None:
        rope_(q_rope_THR if q_out_THR is None else q_out_THR.copy_(q_rope_THR), rotations_T)
    return rows_TW if keep else None


def absorb_and_store(
    q_THQ: Tensor,
    w_HNC: Tensor,
    latent_TW: Tensor,
    weight_C: Tensor,
    eps: float,
    rotations_T: Tensor,
    kv_pool: Tensor,
    layer: int,
    slots_T: Tensor,
) -> Tensor:
    """[W_uk^T q_nope ; q_rope turned] of every head, [T, H, W], what absorbed attention asks with; and latent rows as `norm_rope_store`.

    `q_THQ`: [T, H, N + R], the last axis contiguous; it may be overwritten. `w_HNC`: [H, N, C].
    """
    nope, latent = w_HNC.shape[1:]
    stored = latent_TW, weight_C, eps, rotations_T
    if not q_THQ.is_cuda:
        return absorb_and_store_reference(q_THQ, w_HNC, *stored, kv_pool, layer, slots_T)
    if is_one_launch(q_THQ, w_HNC, latent_TW):
        from serving.kernels.triton import kv_store as device

        return device.absorb_and_store(q_THQ, w_HNC, *stored, layer_rows(kv_pool, layer), slots_T)
    # Both parts are written where they belong: a launch costs a GPU more than what it copies.
    q_THW = q_THQ.new_empty(*q_THQ.shape[:2], latent_TW.shape[1])
    norm_rope_store(*stored, kv_pool, layer, slots_T, q_rope_THR=q_THQ[:, :, nope:], q_out_THR=q_THW[:, :, latent:])
    per_head(q_THQ[:, :, :nope], w_HNC, q_THW[:, :, :latent])
    return q_THW


def absorb_and_store_reference(
    q_THQ: Tensor,
    w_HNC: Tensor,
    latent_TW: Tensor,
    weight_C: Tensor,
    eps: float,
    rotations_T: Tensor,
    kv_pool: Tensor,
    layer: int,
    slots_T: Tensor,
) -> Tensor:
    nope = w_HNC.shape[1]
    norm_rope_store_reference(
        latent_TW, weight_C, eps, rotations_T, kv_pool, layer, slots_T, q_rope_THR=q_THQ[:, :, nope:]
    )
    q_HTC = torch.bmm(q_THQ[:, :, :nope].transpose(0, 1), w_HNC)
    return torch.cat([q_HTC.transpose(0, 1), q_THQ[:, :, nope:]], dim=-1)


def is_one_launch(q_THQ: Tensor, w_HNC: Tensor, latent_TW: Tensor) -> bool:
    """Whether few enough tokens, and widths that are powers of two."""
    from serving.kernels.triton.per_head import columns_held, is_quick

    num_heads, nope, latent = w_HNC.shape
    return (
        is_quick(len(q_THQ), num_heads, nope) and _has_kernel(latent_TW, latent) and latent % columns_held(w_HNC) == 0
    )


def _has_kernel(latent_TW: Tensor, latent: int) -> bool:
    widths = latent, latent_TW.shape[1] - latent
    powers_of_two = all(width & (width - 1) == 0 for width in widths)
    return latent_TW.is_cuda and latent_TW.dtype != torch.float64 and powers_of_two
