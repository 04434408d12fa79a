"""The routed experts' MLPs over the tokens that chose them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.gemm import linear, linear_silu_mul
from serving.kernels.quant import (
    BLOCK,
    Fp8Weight,
    QuantisedRows,
    dequantise_block_fp8,
    quantise_rows_fp8_reference,
    silu_mul,
    silu_mul_quantise_reference,
)


def grouped_mlp(
    x_TD: Tensor | QuantisedRows,
    gate_up_EID: Tensor | list[Tensor] | Fp8Weight,
    down_EDI: Tensor | list[Tensor] | Fp8Weight,
    experts_TK: Tensor,
    weights_TK: Tensor,
    shared: tuple[Tensor | Fp8Weight, Tensor | Fp8Weight] | None = None,
    *,
    partial: bool = False,
    fill: bool = True,
    num_used: int | None = None,
    max_used: int | None = None,
) -> Tensor:
    """Over each token's experts weight * down(silu(gate x) * up x), and the same of `shared`; [T, D] in the dtype of x, bf16 from FP8 weights.

    `gate_up_EID` is [E, 2I, D], gate above up, `down_EDI` [E, D, I], both plain or both FP8, or on CPU a list of E packed
    matrices; `shared`: gate_up [2 S I, D] and down [D, S I] of what every token takes, S a whole number; `experts_TK` int64, all below E, a token's distinct; `weights_TK` fp32 (on a CPU rounded to the dtype of x). `x_TD` may come quantised where the weights are FP8, its scales on a GPU in any strides. On a
    GPU nothing is read on the host and no shape depends on the choice of experts. The sum over K has one order whatever the
    batch.

    `partial`: experts may be -1, for no expert: no product meets such a pair, its weight may be anything, and so may the row of a
    token without any. That token's result is zeros (and what `shared` gives), or if not `fill` whatever was in memory.
    `num_used`: about so many pairs have an expert, which GPU kernels are cut for; `max_used`: never more than so many, for which
    they take memory, else for min(K, E) of every token.
    """
    if not partial:
        assert (num_used, max_used) == (None, None), "all pairs have an expert"
    assert fill or (partial and shared is None), "every token has a result"
    if weights_TK.is_cuda:
        from serving.kernels.triton import experts
        from serving.kernels.triton.placing import Partial

        assert not isinstance(gate_up_EID, list)
        assert not isinstance(down_EDI, list)
        return experts.grouped_mlp(
            x_TD, gate_up_EID, down_EDI, experts_TK, weights_TK, shared,
            partial=Partial(num_used=num_used, max_used=max_used) if partial else None, fill=fill,
        )  # fmt: skip
    if isinstance(gate_up_EID, Fp8Weight):
        assert isinstance(down_EDI, Fp8Weight)
        routed_TD = grouped_mlp_fp8_reference(x_TD, gate_up_EID, down_EDI, experts_TK, weights_TK)
    else:
        assert isinstance(x_TD, Tensor)
        assert not isinstance(down_EDI, Fp8Weight)
        routed_TD = grouped_mlp_reference(x_TD, gate_up_EID, down_EDI, experts_TK, weights_TK)
    return routed_TD if shared is None else routed_TD.add_(linear(linear_silu_mul(x_TD, shared[0]), shared[1]))


def grouped_mlp_reference(
    x_TD: Tensor,
    gate_up_EID: Tensor | list[Tensor],
    down_EDI: Tensor | list[Tensor],
    experts_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """As `grouped_mlp`. Pairs of token and expert are sorted by expert, so each chosen expert's weights are read once. The
    counts are read on the host, which an accelerator's kernel must not do."""
    top_k = experts_TK.shape[1]
    experts = experts_TK.view(-1)
    by_expert = experts.argsort(stable=True)
    num_unused, *counts = torch.bincount(experts + 1, minlength=len(gate_up_EID) + 1).tolist()
    if num_unused:
        by_expert = by_expert[num_unused:]
    hidden_NI = silu_mul(_grouped_linear(x_TD.index_select(0, by_expert // top_k), gate_up_EID, counts))
    out_ND = _grouped_linear(hidden_NI, down_EDI, counts)
    # Gathered in token order, so that the sum over K has one order whatever the batch.
    places = torch.empty_like(experts).scatter_(0, by_expert, torch.arange(len(by_expert), device=x_TD.device))
    weights_TK = weights_TK.to(out_ND.dtype)
    if not num_unused:
        return F.embedding_bag(places.view(-1, top_k), out_ND, mode="sum", per_sample_weights=weights_TK)
    used_TK = experts_TK >= 0
    counts_T = used_TK.sum(1)
    weights = weights_TK[used_TK]
    places = places[used_TK.view(-1)]
    return F.embedding_bag(places, out_ND, counts_T.cumsum(0) - counts_T, mode="sum", per_sample_weights=weights)


def _grouped_linear(x_NK: Tensor, weights_EMK: Tensor | list[Tensor], counts: list[int]) -> Tensor:
    """[N, M]: the first `counts[0]` rows times expert 0's matrix, the next `counts[1]` times expert 1's, and so on."""
    out_NM = x_NK.new_empty(x_NK.shape[0], weights_EMK[0].shape[0])
    chosen = [expert for expert, count in enumerate(counts) if count]
    sizes = [count for count in counts if count]
    for expert, x, out in zip(chosen, x_NK.split(sizes), out_NM.split(sizes), strict=True):
        out.copy_(linear(x, weights_EMK[expert]))
    return out_NM


def grouped_mlp_fp8_reference(
    x_TD: Tensor | QuantisedRows,
    gate_up_EID: Fp8Weight,
    down_EDI: Fp8Weight,
    experts_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """As `grouped_mlp`: rows and the activation quantised by 128 columns, all else fp32, a token and an expert at a time."""
    rows = x_TD if isinstance(x_TD, QuantisedRows) else quantise_rows_fp8_reference(x_TD)
    x_TD = rows.dequantise(torch.float32)
    inner = down_EDI.shape[2]
    blocks = -(-inner // BLOCK)

    def wide(weight: Fp8Weight, expert: int, rows: slice, scales: slice) -> Tensor:
        return dequantise_block_fp8(
            weight.quantised[expert, rows], weight.scales[expert, scales], (BLOCK, BLOCK), torch.float32
        )

    out_TD = torch.zeros(x_TD.shape[0], down_EDI.shape[1], device=x_TD.device)
    for expert in experts_TK[experts_TK >= 0].unique().tolist():
        gate = wide(gate_up_EID, expert, slice(inner), slice(blocks))
        up = wide(gate_up_EID, expert, slice(inner, None), slice(blocks, None))
        down = wide(down_EDI, expert, slice(None), slice(None))
        tokens, places = (experts_TK == expert).nonzero(as_tuple=True)
        hidden = silu_mul_quantise_reference(torch.cat([x_TD[tokens] @ gate.T, x_TD[tokens] @ up.T], dim=1))
        y = hidden.dequantise(torch.float32) @ down.T
        out_TD.index_add_(0, tokens, weights_TK[tokens, places, None] * y)
    return out_TD.to(torch.bfloat16)
