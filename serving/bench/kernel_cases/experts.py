"""Cases of the routed experts: the gate, rows by expert, and products by expert."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.bench.kernel_cases.stage import (
    HIDDEN,
    Call,
    Case,
    Stage,
    Work,
    peer_library,
    product_work,
    sets_for,
    vllm_ops,
)
from serving.kernels.experts import grouped_mlp
from serving.kernels.gemm import linear_fp32
from serving.kernels.quant import BLOCK, Fp8Weight, QuantisedRows, silu_mul_reference
from serving.kernels.topk import gate_topk, gate_topk_reference


def cases(stage: Stage) -> dict[str, Case]:
    named: dict[str, Case] = {}
    for tokens, n, k in (1024, 4096, 7168), (1024, 7168, 2048), (4096, 4096, 7168):
        sizes: dict[str, Any] = {"experts": 9, "tokens": tokens, "n": n, "k": k}
        named[f"grouped_fp8/9x{tokens}x{n}x{k}"] = partial(grouped_fp8, stage, **sizes)
        named[f"grouped_bf16/9x{tokens}x{n}x{k}"] = partial(grouped_bf16, stage, **sizes)
    for experts, tokens in (1, 256), (9, 64):
        for n, k in (4096, HIDDEN), (HIDDEN, 2048):
            masked = partial(grouped_fp8, stage, experts=experts, tokens=tokens, n=n, k=k, few=True)
            named[f"grouped_fp8/masked/{experts}x{tokens}x{n}x{k}"] = masked
    named["experts/one/256"] = partial(one_expert, stage, tokens=256, hidden=HIDDEN, inner=2048)
    v3: dict[str, Any] = {"hidden": HIDDEN, "inner": 2048, "num_experts": 256, "top_k": 8, "fp8": True}
    for tokens in (64, 256, 4096):
        named[f"experts/v3/{tokens}"] = partial(experts_mlp, stage, tokens=tokens, **v3)
    lite: dict[str, Any] = {"hidden": 2048, "inner": 1408, "num_experts": 64, "top_k": 6, "fp8": False}
    for tokens in (1, 64, 256, 4096):
        named[f"experts/lite/{tokens}"] = partial(experts_mlp, stage, tokens=tokens, **lite)
    for tokens in (64, 4096):
        for way in (send, combine):
            placed = partial(way, stage, tokens=tokens, hidden=HIDDEN, num_experts=256, top_k=8)
            named[f"expert_rows/{way.__name__}/{tokens}"] = placed
    groups: dict[str, Any] = {"num_experts": 256, "num_groups": 8, "kept": 4, "top_k": 8}
    for tokens in (64, 4096):
        named[f"gate/v3/{tokens}"] = partial(gate, stage, tokens=tokens, **groups)
        named[f"gate/lite/{tokens}"] = partial(
            gate, stage, tokens=tokens, num_experts=64, num_groups=1, kept=1, top_k=6
        )
    for tokens in (16, 64):
        named[f"gate/product/v3/{tokens}"] = partial(gate_product, stage, tokens=tokens, hidden=HIDDEN, **groups)
    return named


def grouped_fp8(stage: Stage, *, experts: int, tokens: int, n: int, k: int, few: bool = False) -> Work:
    """So many tokens for each of the experts; `few`: the weights' bytes are the bound, and the peer takes masked rows."""
    from serving.kernels.triton.gemm import Tiles
    from serving.kernels.triton.product import grouped_tile, product

    tile = grouped_tile(experts * tokens, experts, torch.float8_e4m3fn)
    rows = -(-tokens // tile) * tile
    num_bytes = experts * n * k
    sets = range(sets_for(num_bytes))
    x, w = [stage.rows(experts * rows, k) for _ in sets], [stage.weight(experts, n, k) for _ in sets]
    expert = torch.arange(experts, dtype=torch.int32, device=stage.device).repeat_interleave(rows // tile)
    used = torch.tensor([len(expert)], dtype=torch.int32, device=stage.device)
    tiles = Tiles(expert=expert, num_used=used, max_tiles=len(expert), num_rows=tile, num_expected=len(expert))

    def own(i: int) -> Tensor:
        out = product(x[i], w[i], tiles=tiles)
        assert isinstance(out, Tensor)
        return out.view(experts, rows, n)[:, :tokens]

    peers: dict[str, Call] = {}
    library = peer_library("vllm.third_party.deep_gemm")
    if library is not None:
        outs = [torch.empty(experts, rows, n, dtype=torch.bfloat16, device=stage.device) for _ in sets]
        masks = torch.full((experts,), tokens, dtype=torch.int32, device=stage.device)
        of_row = torch.arange(experts, dtype=torch.int32, device=stage.device).repeat_interleave(rows)
        stacked = [_stacked(rows_, experts) for rows_ in x] if few else []

        def masked(i: int) -> Tensor:
            weight = w[i].quantised, w[i].scales
            library.m_grouped_fp8_gemm_nt_masked(stacked[i], weight, outs[i], masks, tokens, disable_ue8m0_cast=True)
            return outs[i][:, :tokens]

        def contiguous(i: int) -> Tensor:
            operands = (x[i].values, x[i].scales), (w[i].quantised, w[i].scales)
            library.m_grouped_fp8_gemm_nt_contiguous(*operands, outs[i].view(-1, n), of_row, disable_ue8m0_cast=True)
            return outs[i][:, :tokens]

        peers["DeepGEMM"] = masked if few else contiguous
    return product_work(own, peers, len(sets), 2.0 * experts * tokens * n * k, num_bytes if few else None, "fp8")


def grouped_bf16(stage: Stage, *, experts: int, tokens: int, n: int, k: int) -> Work:
    from serving.kernels.triton.gemm import Tiles
    from serving.kernels.triton.product import grouped_tile, product

    tile = grouped_tile(experts * tokens, experts, torch.bfloat16)
    expert = torch.arange(experts, dtype=torch.int32, device=stage.device).repeat_interleave(tokens // tile)
    used = torch.tensor([len(expert)], dtype=torch.int32, device=stage.device)
    tiles = Tiles(expert=expert, num_used=used, max_tiles=len(expert), num_rows=tile, num_expected=len(expert))
    sets = range(sets_for(2 * experts * n * k))
    x = [stage.randn(experts * tokens, k) for _ in sets]
    w = [stage.randn(experts, n, k).mul_(k**-0.5) for _ in sets]
    ends = torch.arange(tokens, experts * tokens + 1, tokens, dtype=torch.int32, device=stage.device)

    def own(i: int) -> Tensor:
        out = product(x[i], w[i], tiles=tiles)
        assert isinstance(out, Tensor)
        return out

    def grouped_mm(i: int) -> Tensor:
        return torch._grouped_mm(x[i], w[i].transpose(1, 2), offs=ends)

    flops = 2.0 * experts * tokens * n * k
    return product_work(own, {"torch": grouped_mm}, len(sets), flops, None, "bf16")


def one_expert(stage: Stage, *, tokens: int, hidden: int, inner: int) -> Work:
    """An EP320 rank's expert: both products, SiLU-mul and quantise between; the peer's two products have neither."""
    from serving.kernels.triton.product import product

    num_bytes = 3 * hidden * inner
    sets = range(sets_for(num_bytes))
    x = [stage.rows(tokens, hidden) for _ in sets]
    gate_up = [stage.weight(1, 2 * inner, hidden) for _ in sets]
    down = [stage.weight(1, hidden, inner) for _ in sets]

    def own(i: int) -> Tensor:
        first = Fp8Weight(quantised=gate_up[i].quantised[0], scales=gate_up[i].scales[0])
        second = Fp8Weight(quantised=down[i].quantised[0], scales=down[i].scales[0])
        out = product(product(x[i], first, silu=True), second)
        assert isinstance(out, Tensor)
        return out

    counts = torch.tensor([tokens], dtype=torch.int32, device=stage.device)
    peers = _products_alone(stage, gate_up, down, [counts for _ in sets])
    return Work(own=own, peers=peers, num_sets=len(sets), amount=num_bytes, bound="copy")


def experts_mlp(stage: Stage, *, tokens: int, hidden: int, inner: int, num_experts: int, top_k: int, fp8: bool) -> Work:
    """The whole routed half of a layer, tokens spread evenly at random. Few tokens: the bytes of the experts they choose.

    Torch multiplies by expert in bf16 alone: beside FP8 stand DeepGEMM's products of as many rows.
    """
    width = 1 if fp8 else 2
    x = [stage.randn(tokens, hidden) for _ in range(4)]
    chosen = [_chosen(stage, tokens, num_experts, top_k) for _ in x]
    shares = [stage.rand(tokens, top_k) for _ in x]
    gate_up: Fp8Weight | Tensor
    down: Fp8Weight | Tensor
    peers: dict[str, Call]
    if fp8:
        gate_up, down = stage.weight(num_experts, 2 * inner, hidden), stage.weight(num_experts, hidden, inner)
        counts = [experts.flatten().bincount(minlength=num_experts).int() for experts in chosen]
        peers = _products_alone(stage, [gate_up for _ in x], [down for _ in x], counts)
    else:
        gate_up = stage.randn(num_experts, 2 * inner, hidden).mul_(hidden**-0.5)
        down = stage.randn(num_experts, hidden, inner).mul_(inner**-0.5)
        peers = {"torch": partial(_by_sorting, x, gate_up, down, chosen, shares)}

    def own(i: int) -> Tensor:
        return grouped_mlp(x[i], gate_up, down, chosen[i], shares[i])

    num_used = sum(len(experts.unique()) for experts in chosen) / len(chosen)
    num_bytes = num_used * 3 * hidden * inner * width
    flops = 6.0 * tokens * top_k * hidden * inner
    few = tokens * top_k / num_experts < 128
    return product_work(own, peers, len(x), flops, num_bytes if few else None, "fp8" if fp8 else "bf16")


def _products_alone(
    stage: Stage, gate_up: Sequence[Fp8Weight], down: Sequence[Fp8Weight], counts: Sequence[Tensor]
) -> dict[str, Call]:
    """DeepGEMM's gate_up and down of other rows, as many of each expert as `counts` of a set says, int32 [E]; nothing between them."""
    library = peer_library("vllm.third_party.deep_gemm")
    if library is None:
        return {}
    experts, width, hidden = gate_up[0].shape
    expected = -(-int(counts[0].sum()) // experts)
    most = -(-max(int(of_set.max()) for of_set in counts) // BLOCK) * BLOCK
    operands = [_stacked(stage.rows(experts * most, k), experts) for k in (hidden, width // 2)]
    outs = [torch.empty(experts, most, n, dtype=torch.bfloat16, device=stage.device) for n in (width, hidden)]

    def products(i: int) -> None:
        for operand, weight, out in zip(operands, (gate_up[i], down[i]), outs, strict=True):
            pair = weight.quantised, weight.scales
            library.m_grouped_fp8_gemm_nt_masked(operand, pair, out, counts[i], expected, disable_ue8m0_cast=True)

    return {"DeepGEMM's products": products}


def _by_sorting(
    x: Sequence[Tensor],
    gate_up_EID: Tensor,
    down_EDI: Tensor,
    chosen: Sequence[Tensor],
    shares: Sequence[Tensor],
    i: int,
) -> Tensor:
    """`grouped_mlp` of torch's own operations: [T, D] of set `i`."""
    num_experts, top_k = len(gate_up_EID), chosen[i].shape[1]
    expert_N, by_expert = chosen[i].flatten().sort()
    ends = torch.searchsorted(expert_N, torch.arange(num_experts, device=expert_N.device), right=True).int()
    rows_ND = x[i].index_select(0, by_expert // top_k)
    hidden_NI = silu_mul_reference(torch._grouped_mm(rows_ND, gate_up_EID.transpose(1, 2), offs=ends))
    y_ND = torch._grouped_mm(hidden_NI, down_EDI.transpose(1, 2), offs=ends)
    places_TK = by_expert.argsort().view(-1, top_k)
    return F.embedding_bag(places_TK, y_ND, mode="sum", per_sample_weights=shares[i].to(y_ND.dtype))


def send(stage: Stage, *, tokens: int, hidden: int, num_experts: int, top_k: int) -> Work:
    """Rows to where their experts have them, quantised on the way. Torch's own sorts and copies them in bf16."""
    from serving.kernels.triton import expert_rows
    from serving.kernels.triton.product import grouped_tile

    pairs = tokens * top_k
    num_bytes = 2 * tokens * hidden + pairs * (hidden + 4 * hidden // BLOCK)
    x = [stage.randn(tokens, hidden) for _ in range(sets_for(num_bytes))]
    chosen = [_chosen(stage, tokens, num_experts, top_k) for _ in x]
    tile = grouped_tile(pairs, num_experts, torch.float8_e4m3fn)

    def own(i: int) -> Tensor:
        slots, _ = expert_rows.send(x[i], chosen[i], num_experts, tile, quantise=True)
        return slots.slots_TK

    def by_sorting(i: int) -> None:
        x[i].index_select(0, chosen[i].view(-1).argsort() // top_k)

    return Work(own=own, peers={"torch": by_sorting}, num_sets=len(x), amount=num_bytes, bound="copy")


def combine(stage: Stage, *, tokens: int, hidden: int, num_experts: int, top_k: int) -> Work:
    """From the experts' rows to each token's weighted sum."""
    from serving.kernels.triton import expert_rows
    from serving.kernels.triton.placing import place
    from serving.kernels.triton.product import grouped_tile

    num_bytes = 2 * hidden * tokens * (top_k + 1)
    tile = grouped_tile(tokens * top_k, num_experts, torch.float8_e4m3fn)
    sets = range(sets_for(num_bytes))
    slots = [place(_chosen(stage, tokens, num_experts, top_k), num_experts, tile) for _ in sets]
    y = [stage.randn(of_set.num_slots, hidden) for of_set in slots]
    shares = [stage.rand(tokens, top_k) for _ in sets]
    rounded = [share.bfloat16() for share in shares]

    def own(i: int) -> Tensor:
        return expert_rows.combine(y[i], slots[i], shares[i])

    def embedding_bag(i: int) -> Tensor:
        return F.embedding_bag(slots[i].slots_TK, y[i], mode="sum", per_sample_weights=rounded[i])

    return Work(own=own, peers={"torch": embedding_bag}, num_sets=len(sets), amount=num_bytes, bound="copy")


def gate(stage: Stage, *, tokens: int, num_experts: int, num_groups: int, kept: int, top_k: int) -> Work:
    """Compared with each token's weights put where their experts are, since the order of its picks is free."""
    num_bytes = tokens * (4 * num_experts + 12 * top_k)
    sets = range(sets_for(num_bytes))
    logits, bias = [stage.randn(tokens, num_experts, dtype=torch.float32) for _ in sets], 0.01 * stage.rand(num_experts)
    how: dict[str, Any] = {
        "num_groups": num_groups, "num_groups_kept": kept, "top_k": top_k, "renormalise": True, "scaling": 2.5,
    }  # fmt: skip

    def by_expert(picks: tuple[Tensor, Tensor]) -> Tensor:
        experts_TK, weights_TK = picks
        return weights_TK.new_zeros(tokens, num_experts).scatter_(1, experts_TK.long(), weights_TK)

    peers: dict[str, Call] = {"torch": lambda i: gate_topk_reference(logits[i], bias, **how)}
    if (ops := vllm_ops("_moe_C")) is not None:

        def grouped_topk(i: int) -> tuple[Tensor, Tensor]:
            # 1: scores are sigmoids.
            weights_TK, experts_TK = ops.grouped_topk(logits[i], num_groups, kept, top_k, True, 2.5, bias, 1)
            return experts_TK, weights_TK

        peers["vLLM"] = grouped_topk
    return Work(
        own=lambda i: gate_topk(logits[i], bias, **how),
        peers=peers, num_sets=len(sets), amount=num_bytes, bound="copy", read=by_expert,
    )  # fmt: skip


def gate_product(
    stage: Stage, *, tokens: int, hidden: int, num_experts: int, num_groups: int, kept: int, top_k: int
) -> Work:
    """The gate's product and what it chooses; torch's own is the product alone."""
    num_bytes = 2 * hidden * (num_experts + tokens) + 12 * tokens * top_k
    sets = range(sets_for(num_bytes))
    x = [stage.randn(tokens, hidden) for _ in sets]
    weights = [stage.randn(num_experts, hidden).mul_(hidden**-0.5) for _ in sets]
    bias = 0.01 * stage.rand(num_experts)

    def own(i: int) -> Tensor:
        _, weights_TK = gate_topk(
            linear_fp32(x[i], weights[i]), bias, num_groups=num_groups, num_groups_kept=kept, top_k=top_k,
            renormalise=True, scaling=2.5,
        )  # fmt: skip
        return weights_TK

    def product(i: int) -> None:
        torch.mm(x[i], weights[i].t(), out_dtype=torch.float32)

    return Work(own=own, peers={"torch's product": product}, num_sets=len(sets), amount=num_bytes, bound="copy")


def _chosen(stage: Stage, tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Distinct experts of each token, int64 [T, K], spread evenly at random."""
    return stage.rand(tokens, num_experts).topk(top_k, dim=-1).indices


def _stacked(rows: QuantisedRows, experts: int) -> tuple[Tensor, Tensor]:
    """Values [E, M, K] and scales [E, M, K / 128], each expert's of one column side by side, as DeepGEMM reads them."""
    scales = rows.scales.unflatten(0, (experts, -1)).transpose(1, 2).contiguous().transpose(1, 2)
    return rows.values.unflatten(0, (experts, -1)), scales
