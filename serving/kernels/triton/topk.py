"""The MoE gate in one launch: sigmoid, bias, groups, top-k, weights; see `serving.kernels.topk.gate_topk`.

A token is one warp; its scores stay in registers. Equal scores: the lower expert, the lower group first. Bound: the fp32
logits read once, 12 bytes an assignment written; in practice the chain of K reductions. T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.triton.device import overlap


def gate_topk(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    num_groups: int,
    num_groups_kept: int,
    top_k: int,
    renormalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    assert logits_TE.stride(1) == 1, "rows must be contiguous"
    # Where all are kept the groups do not matter.
    groups = num_groups if num_groups_kept < num_groups else 1
    experts_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    if num_tokens:
        _gate_kernel[(num_tokens,)](
            logits_TE,
            bias_E,
            experts_TK,
            weights_TK,
            logits_TE.stride(0),
            scaling,
            NUM_GROUPS=groups,
            GROUP_SIZE=num_experts // groups,
            GROUPS=triton.next_power_of_2(groups),
            SIZE=triton.next_power_of_2(num_experts // groups),
            KEPT=min(num_groups_kept, groups),
            TOP_K=top_k,
            K=triton.next_power_of_2(top_k),
            RENORMALISE=renormalise,
            num_warps=1,
            **overlap(logits_TE.device),
        )
    return experts_TK, weights_TK


@triton.jit
def _keys(values, ids):
    """int64 that order as (value, lower id first): fp32 bits made monotone above, the id's complement below."""
    # -0 is 0. What is not a number loses against all that is.
    values = tl.where(values == 0, 0.0, values)
    bits = values.to(tl.int32, bitcast=True)
    ordered = tl.where(values != values, -0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))


@triton.jit
def _gate_kernel(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    logits_stride_t,
    scaling,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A token a program, its experts as [GROUPS, SIZE]; both are padded to powers of two."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    lowest: tl.constexpr = -0x8000000000000000
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    place = tl.arange(0, SIZE)
    expert = group[:, None] * GROUP_SIZE + place[None, :]
    real = (group[:, None] < NUM_GROUPS) & (place[None, :] < GROUP_SIZE)
    logits = tl.load(logits_ptr + token * logits_stride_t + expert, mask=real, other=0.0)
    bias = tl.load(bias_ptr + expert, mask=real, other=0.0)
    biased = 1.0 / (1.0 + tl.exp(-logits)) + bias
    # A key decides value and expert in one reduction; padding and what is taken or dropped lies below every key.
    keys = tl.where(real, _keys(biased, expert), lowest)
    if KEPT < NUM_GROUPS:
        best = tl.max(keys, axis=1)
        second = tl.max(tl.where(keys == best[:, None], lowest, keys), axis=1)
        two = tl.sum(tl.where((keys == best[:, None]) | (keys == second[:, None]), biased, 0.0), axis=1)
        group_keys = tl.where(group < NUM_GROUPS, _keys(two, group), lowest)
        kept = group < 0
        for _ in tl.static_range(KEPT):
            chosen = group_keys == tl.max(group_keys, axis=0)
            kept = kept | chosen
            group_keys = tl.where(chosen, lowest, group_keys)
        keys = tl.where(kept[:, None], keys, lowest)

    slot = tl.arange(0, K)
    experts = tl.zeros([K], tl.int64)
    for k in tl.static_range(TOP_K):
        best_key = tl.max(tl.max(keys, axis=1), axis=0)
        keys = tl.where(keys == best_key, lowest, keys)
        experts = tl.where(slot == k, 0xFFFFFFFF - (best_key & 0xFFFFFFFF), experts)
    chosen_logits = tl.load(logits_ptr + token * logits_stride_t + experts, mask=slot < TOP_K, other=0.0)
    weights = tl.where(slot < TOP_K, 1.0 / (1.0 + tl.exp(-chosen_logits)), 0.0)
    if RENORMALISE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    tl.store(experts_ptr + token * TOP_K + slot, experts, mask=slot < TOP_K)
    tl.store(weights_ptr + token * TOP_K + slot, weights * scaling, mask=slot < TOP_K)
