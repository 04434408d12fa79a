"""Slots of the chosen experts' copies in one launch; see `serving.kernels.route`. Bound: 24 bytes a pick."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.triton.device import overlap

# Of many tokens so many a program, of few one.
_TOKENS, _FEW = 16, 1024


@triton.jit(do_not_specialize=["num_tokens", "first", "num_columns"])
def route_kernel(
    experts_ptr,
    weights_ptr,
    nobody_ptr,
    table_ptr,
    copies_ptr,
    counts_ptr,
    slots_ptr,
    out_weights_ptr,
    num_tokens,
    first,
    num_columns,
    shared,
    TOP_K: tl.constexpr,
    PICKS: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    ALL: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """PICKS of each of TOKENS tokens: TOP_K chosen ones, and `shared` if there is one more. ALL: no row is nobody's."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    k = tl.arange(0, K)[None, :]
    is_token = token < num_tokens
    is_used = is_token
    if not ALL:
        is_used = is_token & (tl.load(nobody_ptr + token, mask=is_token, other=1) == 0)
    chosen = is_token & (k < TOP_K)
    picked = is_token & (k < PICKS)
    expert = tl.load(experts_ptr + token * TOP_K + k, mask=chosen, other=-1)
    weight = tl.load(weights_ptr + token * TOP_K + k, mask=chosen, other=1.0)
    # A number of as many bits as the counts.
    tl.atomic_add(counts_ptr + expert, tl.full([TOKENS, K], 1, tl.int64), mask=chosen & is_used, sem="relaxed")
    expert = tl.where(k < TOP_K, expert, shared)
    num_copies = tl.load(copies_ptr + expert, mask=picked & is_used, other=1)
    copy = (first + token + k) % num_copies
    slot = tl.load(table_ptr + expert * num_columns + copy, mask=picked & is_used, other=-1)
    tl.store(slots_ptr + token * PICKS + k, slot, mask=picked)
    tl.store(out_weights_ptr + token * PICKS + k, weight, mask=picked)


def route(
    experts_TK: Tensor,
    weights_TK: Tensor,
    nobody_T: Tensor | None,
    slots_EC: Tensor,
    copies_E: Tensor,
    counts_E: Tensor,
    *,
    first: int,
    shared: int | None = None,
) -> tuple[Tensor, Tensor]:
    num_tokens, top_k = experts_TK.shape
    picks = top_k + (shared is not None)
    slots_TJ = experts_TK.new_empty(num_tokens, picks)
    weights_TJ = weights_TK.new_empty(num_tokens, picks)
    if num_tokens:
        nobody = experts_TK if nobody_T is None else nobody_T.contiguous().view(torch.uint8)
        tokens = _TOKENS if num_tokens > _FEW else 1
        route_kernel[(triton.cdiv(num_tokens, tokens),)](
            experts_TK.contiguous(), weights_TK.contiguous(), nobody, slots_EC, copies_E, counts_E, slots_TJ, weights_TJ,
            num_tokens, first, slots_EC.shape[1], -1 if shared is None else shared,
            TOP_K=top_k, PICKS=picks, K=triton.next_power_of_2(picks), TOKENS=tokens, ALL=nobody_T is None,
            num_warps=4 if tokens > 1 else 1, **overlap(experts_TK.device),
        )  # fmt: skip
    return slots_TJ, weights_TJ
