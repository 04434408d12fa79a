"""The routed experts' MLPs over the tokens that chose them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.gemm import linear


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(first half of the last axis) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def grouped_mlp(
    x_TD: Tensor,
    gate_up_EID: Tensor | list[Tensor],
    down_EDI: Tensor | list[Tensor],
    experts_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Sum over each token's experts of weight * down(silu(gate x) * up x); [T, D] in the dtype of x.

    `gate_up_EID` is [E, 2I, D], gate above up, `down_EDI` [E, D, I], or a list of E packed matrices; `experts_TK` int64,
    `weights_TK` fp32. Pairs of token and expert are sorted by expert, so each chosen expert's weights are read once. The
    counts are read on the host, which an accelerator's kernel must not do.
    """
    num_tokens, top_k = experts_TK.shape
    by_expert = experts_TK.view(-1).argsort(stable=True)
    counts = torch.bincount(experts_TK.view(-1), minlength=len(gate_up_EID)).tolist()
    x_ND = x_TD.index_select(0, by_expert // top_k)
    chosen = [(expert, count) for expert, count in enumerate(counts) if count]
    parts = x_ND.split([count for _, count in chosen])
    hidden_NI = silu_mul(torch.cat([linear(x, gate_up_EID[e]) for x, (e, _) in zip(parts, chosen, strict=True)]))
    parts = hidden_NI.split([count for _, count in chosen])
    out_ND = torch.cat([linear(h, down_EDI[e]) for h, (e, _) in zip(parts, chosen, strict=True)])
    out_ND = out_ND.mul_(weights_TK.view(-1, 1).index_select(0, by_expert))
    # Back to token order, so that the sum over K has one order whatever the batch.
    out_TKD = torch.empty_like(out_ND).index_copy_(0, by_expert, out_ND).view(num_tokens, top_k, -1)
    return out_TKD.sum(dim=1)
