"""Attention of MLA prefill: queries of many sequences over expanded keys and values, in one launch.

Keys come in two parts, a nope part for each head and one rope part for all of them: nothing is copied to the heads. Returns
the log-sum-exp of the scores beside the output, so that pieces of a context can be attended apart and merged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from serving.kernels.mla import attend, attend_reference
from serving.kernels.quant import QuantisedRows, quantise_rows_fp8, quantise_rows_fp8_reference


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
    """Out [T, H, V] in the dtype of q, and lse fp32 [T, H] (natural log, scale included).

    `q_THQ`: Q = N + R, nope part first. `k_SHN`, `v_SHV`: any strides that leave the last axis contiguous and rows 16 bytes
    apart, the two halves of one product among them. `cu_q`, `cu_k`: int32 [B + 1] on the device, where each sequence's
    queries and keys begin and the last ones end. `causal`: a sequence's queries are its keys, query t sees keys [0, t].
    Without keys a query's output is 0 and its lse -inf.
    """
    if q_THQ.is_cuda and has_kernel(k_SHN.shape[2], k_rope_SR.shape[1], v_SHV.shape[2], q_THQ.dtype):
        if _has_hopper_kernel(q_THQ, k_SHN, k_rope_SR, v_SHV):
            from serving.kernels.gluon import attention as hopper

            return hopper.attend_varlen(q_THQ, k_SHN, k_rope_SR, v_SHV, cu_q, cu_k, scale=scale, causal=causal)
        from serving.kernels.triton import attention as device

        return device.attend_varlen(q_THQ, k_SHN, k_rope_SR, v_SHV, cu_q, cu_k, scale=scale, causal=causal)
    return _attend_each(attend, q_THQ, k_SHN, k_rope_SR, v_SHV, cu_q, cu_k, scale=scale, causal=causal)


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
    """Out of `attend_varlen`, rounded to its dtype and then quantised, heads side by side: rows [T, H V]."""
    if q_THQ.is_cuda and _has_hopper_kernel(q_THQ, k_SHN, k_rope_SR, v_SHV):
        from serving.kernels.gluon import attention as hopper

        return hopper.attend_varlen_quantised(q_THQ, k_SHN, k_rope_SR, v_SHV, cu_q, cu_k, scale=scale, causal=causal)
    out_THV, _ = attend_varlen(q_THQ, k_SHN, k_rope_SR, v_SHV, cu_q, cu_k, scale=scale, causal=causal)
    return quantise_rows_fp8(out_THV.flatten(1))


def attend_varlen_reference(
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
    """`attend_varlen` in plain products."""
    return _attend_each(attend_reference, q_THQ, k_SHN, k_rope_SR, v_SHV, cu_q, cu_k, scale=scale, causal=causal)


def attend_varlen_quantised_reference(
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
    """`attend_varlen_quantised` in plain products."""
    out_THV, _ = attend_varlen_reference(q_THQ, k_SHN, k_rope_SR, v_SHV, cu_q, cu_k, scale=scale, causal=causal)
    return quantise_rows_fp8_reference(out_THV.to(q_THQ.dtype).flatten(1))


def _attend_each(
    attend_one: Callable[..., tuple[Tensor, Tensor]],
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
    """A sequence at a time; reads the lengths on the host. lse is fp64 where the queries are."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()

    def attended(own: slice, keys: slice) -> tuple[Tensor, Tensor]:
        rope = k_rope_SR[keys, None].expand(-1, k_SHN.shape[1], -1)
        k = torch.cat([k_SHN[keys], rope], dim=-1)
        return attend_one(q_THQ[own], k, v_SHV[keys], scale=scale, causal=causal)

    spans = [(slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])) for i in range(len(starts_q) - 1)]
    spans = [(own, keys) for own, keys in spans if own.start < own.stop and keys.start < keys.stop]
    if len(spans) == 1 and spans[0][0] == slice(0, q_THQ.shape[0]):
        return attended(*spans[0])
    lse_dtype = torch.promote_types(q_THQ.dtype, torch.float32)
    out_THV = q_THQ.new_zeros(*q_THQ.shape[:2], v_SHV.shape[2])
    lse_TH = torch.full(q_THQ.shape[:2], -torch.inf, dtype=lse_dtype, device=q_THQ.device)
    for own, keys in spans:
        out_THV[own], lse_TH[own] = attended(own, keys)
    return out_THV, lse_TH


def merge_into(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Makes a the attention over the union of two disjoint sets of keys: out [..., V] of one dtype, lse fp32 [...]."""
    if not out_a.is_cuda or out_a.dtype == torch.float64:
        merge_into_reference(out_a, lse_a, out_b, lse_b)
        return
    from serving.kernels.triton import attention as device

    out, lse = device.merge(out_a, lse_a, out_b, lse_b)
    out_a.copy_(out)
    lse_a.copy_(lse)


def merge_into_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    # Without keys on either side the difference is NaN, and nothing changes.
    share_b = torch.sigmoid(lse_b - lse_a).masked_fill_(lse_b == -torch.inf, 0)[..., None]
    if out_a.dtype == share_b.dtype:
        out_a.lerp_(out_b, share_b)
    else:
        out_a.copy_(torch.lerp(out_a.to(share_b.dtype), out_b.to(share_b.dtype), share_b))
    torch.logaddexp(lse_a, lse_b, out=lse_a)


def has_kernel(nope: int, rope: int, v_width: int, dtype: torch.dtype) -> bool:
    """Whether a GPU attends these widths in one launch; else `attend_varlen` goes by sequence and reads lengths on the host."""
    powers_of_two = all(width >= 16 and width & (width - 1) == 0 for width in (nope, rope, v_width))
    return powers_of_two and dtype in (torch.float32, torch.bfloat16)


def _has_hopper_kernel(q_THQ: Tensor, k_SHN: Tensor, k_rope_SR: Tensor, v_SHV: Tensor) -> bool:
    """The published widths, on sm_90."""
    widths = k_SHN.shape[2], k_rope_SR.shape[1], v_SHV.shape[2]
    filled = q_THQ.shape[0] > 0 and k_SHN.shape[0] > 0
    published = widths == (128, 64, 128) and q_THQ.dtype == torch.bfloat16
    return filled and published and torch.cuda.get_device_capability(q_THQ.device) == (9, 0)
