"""The cases of `baton bench kernels`: what each kernel is given, what that costs at the least, and who else computes it.

A case is a function of the stage and of sizes that returns a `Work`; `cases` names them at the sizes that count. Inputs
differ from set to set, weights too: in a model the next call reads other memory.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvcache.layout import PAGE_TOKENS, PageLayout
from kvcache.pool import KVPool
from serving.kernels import mla
from serving.kernels.attention import attend_varlen
from serving.kernels.experts import grouped_mlp
from serving.kernels.gemm import linear
from serving.kernels.kv_store import absorb_and_store, norm_rope_store
from serving.kernels.norm_rope import add_rms_norm, inverse_frequencies, rms_norm, rms_norm_quantise, rotations
from serving.kernels.pages import gather_pages, scatter_pages
from serving.kernels.quant import (
    BLOCK,
    Fp8Weight,
    QuantisedRows,
    quantise_block_fp8,
    quantise_rows_fp8,
    silu_mul_quantise,
)
from serving.kernels.rows import fp8_row_bytes, pack_fp8_rows, slots
from serving.kernels.sampling import argmax, sample
from serving.kernels.topk import gate_topk

Bound = Literal["copy", "bf16", "fp8"]
Call = Callable[[int], Tensor | None]
"""Runs with the inputs of one set; returns what peers must agree on, None where they compute something else."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A case, prepared. `amount`: what one call moves (bytes, `bound` copy) or computes (flops) at the least. `captured`: as a
    CUDA graph, so that no launch is counted which the engine does not pay."""

    own: Call
    num_sets: int
    amount: float
    bound: Bound
    peers: Mapping[str, Call] = field(default_factory=dict)
    captured: bool = True


Case = Callable[[], Work]


# Of DeepSeek-V3: latent, rope, nope, value and hidden width, layers with the MTP layer's.
_C, _R, _N, _V, _D = 512, 64, 128, 128, 7168
_PLANES = 62
_EPS = 1e-6
_SOFTMAX_SCALE = (_N + _R) ** -0.5

# All sets together, against an L2 of 50 MB.
_FRESH_BYTES = 256 << 20
_POOL_BYTES = 64_000_000_000


class Stage:
    """The device, a generator on it, and one KV pool at a time of `pool_bytes`: two would not fit."""

    def __init__(self, device: torch.device, *, pool_bytes: int = _POOL_BYTES, planes: int = _PLANES) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._pool_bytes = pool_bytes
        self._planes = planes
        self._pool: KVPool | None = None

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def permutation(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self._generator, device=self.device)

    def rows(self, num_rows: int, width: int) -> QuantisedRows:
        return quantise_rows_fp8(self.randn(num_rows, width))

    def weight(self, *shape: int) -> Fp8Weight:
        """[N, K] or [E, N, K], values as a model's, of standard deviation K^-0.5."""
        pairs = []
        for _ in range(math.prod(shape[:-2])):
            drawn = self.randn(*shape[-2:], dtype=torch.float32)
            pairs.append(quantise_block_fp8(drawn.mul_(shape[-1] ** -0.5), (BLOCK, BLOCK)))
        quantised, scales = (
            torch.stack(parts).view(*shape[:-2], *parts[0].shape) for parts in zip(*pairs, strict=True)
        )
        return Fp8Weight(quantised=quantised, scales=scales)

    def pool(self, *, fp8: bool) -> KVPool:
        """Every row of the layers of `layer` holds random values; the last pool is dropped if it was of the other kind."""
        dtype = torch.uint8 if fp8 else torch.bfloat16
        if self._pool is None or self._pool.tensor.dtype != dtype:
            self._pool = None
            self._pool = self._new_pool(fp8_row_bytes(_C, _R) if fp8 else _C + _R, dtype)
        return self._pool

    def layer(self, index: int) -> int:
        """The layer that set `index` uses: four of them, far apart."""
        return index % 4 * self._planes // 4

    def _new_pool(self, row_width: int, dtype: torch.dtype) -> KVPool:
        layout = PageLayout(
            num_layers=self._planes, num_mtp_layers=0, row_width=row_width, element_bytes=dtype.itemsize
        )
        pool = KVPool(layout, -(-self._pool_bytes // layout.page_bytes), dtype, self.device)
        for index in range(4):
            for pages in pool.tensor[:, self.layer(index)].split(2048):
                drawn = self.randn(*pages.shape[:2], _C + _R)
                pages.copy_(drawn if dtype != torch.uint8 else pack_fp8_rows(drawn.flatten(0, 1), _C).view(pages.shape))
        return pool


def cases(stage: Stage) -> dict[str, Case]:
    """By name, in the order that needs each pool once: kernel, then format or shape."""

    def of(build: Callable[..., Work], **sizes: Any) -> Case:
        return partial(build, stage, **sizes)

    named: dict[str, Case] = {}
    for fp8 in (False, True):
        kind = "fp8" if fp8 else "bf16"
        for heads in (16, 32, 64, 128):
            for batch in (32, 64, 128):
                named[f"mla_decode/{kind}/h{heads}/b{batch}"] = of(
                    mla_decode, heads=heads, batch=batch, ctx=4096, fp8=fp8
                )
        named[f"mla_decode/{kind}/h32/b64/drafts3"] = of(
            mla_decode, heads=32, batch=64, ctx=4096, fp8=fp8, num_tokens=4
        )
        for tokens in (64, 4096):
            named[f"norm_rope_store/{kind}/{tokens}"] = of(latent_store, tokens=tokens, heads=0, fp8=fp8)
            named[f"norm_rope_store/{kind}/{tokens}/queries"] = of(latent_store, tokens=tokens, heads=128, fp8=fp8)
        named[f"absorb_and_store/{kind}/16"] = of(absorbed_query, tokens=16, heads=128, fp8=fp8)
        for way in (gather, scatter):
            named[f"pages/{way.__name__}/{kind}"] = of(way, num_pages=64, num_layers=_PLANES, fp8=fp8)
    for lengths, heads in ((4, 4096), 128), ((1, 1024), 128), ((1, 4096), 16), ((32, 2048), 16):
        named[f"attention/{lengths[0]}x{lengths[1]}/h{heads}"] = of(
            prefill_attention, batch=lengths[0], tokens=lengths[1], heads=heads
        )
    for m, n, k in (4096, 7168, 2048), (4096, 24576, 1536), (4096, 4096, 7168):
        named[f"linear_fp8/{m}x{n}x{k}"] = of(linear_fp8, m=m, n=n, k=k)
    for m, n, k in (128, 7168, 16384), (64, 4096, 7168), (128, 24576, 1536), (16, 4096, 7168):
        named[f"linear_fp8/{m}x{n}x{k}"] = of(linear_fp8, m=m, n=n, k=k, few=True)
    for tokens, n, k in (1024, 4096, 7168), (1024, 7168, 2048), (4096, 4096, 7168):
        sizes: dict[str, Any] = {"experts": 9, "tokens": tokens, "n": n, "k": k}
        named[f"grouped_fp8/9x{tokens}x{n}x{k}"] = of(grouped_fp8, **sizes)
        named[f"grouped_bf16/9x{tokens}x{n}x{k}"] = of(grouped_bf16, **sizes)
    for experts, tokens in (1, 256), (9, 64):
        for n, k in (4096, _D), (_D, 2048):
            named[f"grouped_fp8/masked/{experts}x{tokens}x{n}x{k}"] = of(
                grouped_fp8, experts=experts, tokens=tokens, n=n, k=k, few=True
            )
    named["experts/one/256"] = of(one_expert, tokens=256, hidden=_D, inner=2048)
    for tokens in (64, 256, 4096):
        named[f"experts/v3/{tokens}"] = of(
            experts_mlp, tokens=tokens, hidden=_D, inner=2048, num_experts=256, top_k=8, fp8=True
        )
    for tokens in (1, 64, 256, 4096):
        named[f"experts/lite/{tokens}"] = of(
            experts_mlp, tokens=tokens, hidden=2048, inner=1408, num_experts=64, top_k=6, fp8=False
        )
    for tokens in (64, 4096):
        named[f"gate/v3/{tokens}"] = of(gate, tokens=tokens, num_experts=256, num_groups=8, kept=4, top_k=8)
        named[f"gate/lite/{tokens}"] = of(gate, tokens=tokens, num_experts=64, num_groups=1, kept=1, top_k=6)
    for name, build in (
        ("rms_norm", norm),
        ("rms_norm/add", add_norm),
        ("rms_norm/quantise", norm_quantise),
        ("quantise", quantise),
    ):
        for tokens in (64, 32768):
            named[f"{name}/{tokens}"] = of(build, tokens=tokens, width=_D)
    for tokens, inner in (64, 2048), (32768, 2048), (32768, 18432):
        named[f"silu_mul_quantise/{tokens}x{inner}"] = of(silu_quantise, tokens=tokens, inner=inner)
    named["sampling/argmax/64"] = of(greedy, rows=64, vocab=129280)
    named["sampling/draw/64"] = of(drawn, rows=64, vocab=129280)
    return named


def ceilings(stage: Stage) -> dict[str, Case]:
    """What this machine does at best, as cases: a copy of 4 GB, and the library's matrix products."""
    return {
        "ceiling/copy": partial(_copy, stage, 4 << 30),
        "ceiling/bf16": partial(_matmul_bf16, stage, 8192),
        "ceiling/fp8": partial(_matmul_fp8, stage, 8192),
    }


def mla_decode(stage: Stage, *, heads: int, batch: int, ctx: int, fp8: bool, num_tokens: int = 1) -> Work:
    """Pages drawn at random from all of the pool; the plan is made before, as a step makes it once for all layers."""
    pool = stage.pool(fp8=fp8)
    pages = ctx // PAGE_TOKENS
    lens = torch.full((batch,), ctx, dtype=torch.int32, device=stage.device)
    tables = [stage.permutation(pool.num_pages)[: batch * pages].view(batch, pages).int() for _ in range(4)]
    shape = (batch, heads, _C + _R) if num_tokens == 1 else (batch, num_tokens, heads, _C + _R)
    queries = [stage.randn(*shape) for _ in tables]
    last_rows = [table[:, -1].long() * PAGE_TOKENS + PAGE_TOKENS - 1 for table in tables]
    plans = [mla.plan_decode(pool.tensor, rows, table, lens) for rows, table in zip(last_rows, tables, strict=True)]

    def own(i: int) -> Tensor:
        layer = stage.layer(i)
        out, _ = mla.decode_latent(queries[i], pool.tensor, layer, plans[i], latent=_C, scale=_SOFTMAX_SCALE)
        return out

    peers: dict[str, Call] = {}
    library = _peer("vllm.third_party.flashmla.flash_mla_interface")
    if library is not None and not fp8:
        schedule, _ = library.get_mla_metadata()

        def flash_mla(i: int) -> Tensor:
            q_BTHW = queries[i].view(batch, num_tokens, heads, _C + _R)
            cache = pool.tensor[:, stage.layer(i)].unsqueeze(2)
            out, _ = library.flash_mla_with_kvcache(
                q_BTHW, cache, tables[i], lens, _C, schedule, softmax_scale=_SOFTMAX_SCALE, causal=True
            )
            latents: Tensor = out.view(*queries[i].shape[:-1], _C)
            return latents

        peers["FlashMLA"] = flash_mla
    if heads * num_tokens >= 128:
        flops = 2.0 * batch * num_tokens * heads * ctx * (2 * _C + _R)
        return Work(own=own, peers=peers, num_sets=len(tables), amount=flops, bound="bf16")
    row_bytes = pool.layout.row_bytes
    return Work(own=own, peers=peers, num_sets=len(tables), amount=batch * ctx * row_bytes, bound="copy")


def latent_store(stage: Stage, *, tokens: int, heads: int, fp8: bool) -> Work:
    """With `heads` the queries' rope parts are turned too."""
    pool = stage.pool(fp8=fp8)
    num_bytes = tokens * (2 * (_C + _R) + pool.layout.row_bytes + heads * _R * 4)
    sets = range(_sets_for(num_bytes))
    latents = [stage.randn(tokens, 1536 + _C + _R)[:, 1536:] for _ in sets]
    queries = [stage.randn(tokens, heads, _N + _R)[:, :, _N:] if heads else None for _ in sets]
    weight = stage.randn(_C)
    turns = _turns(stage, tokens)
    places = [slots(pool.tensor, stage.permutation(pool.num_pages * PAGE_TOKENS)[:tokens]) for _ in sets]

    def own(i: int) -> None:
        layer = stage.layer(i)
        norm_rope_store(latents[i], weight, _EPS, turns, pool.tensor, layer, places[i], q_rope_THR=queries[i])

    return Work(own=own, num_sets=len(sets), amount=num_bytes, bound="copy")


def absorbed_query(stage: Stage, *, tokens: int, heads: int, fp8: bool) -> Work:
    """What a decode step of few rows does between the query's product and its attention."""
    pool = stage.pool(fp8=fp8)
    num_bytes = heads * _N * _C * 2 + tokens * (heads * (_N + _C + 2 * _R) * 2 + 2 * (_C + _R) + pool.layout.row_bytes)
    sets = range(_sets_for(num_bytes))
    queries = [stage.randn(tokens, heads, _N + _R) for _ in sets]
    weights = [stage.randn(heads, _N + _V, _C)[:, :_N] for _ in sets]
    latents = [stage.randn(tokens, 1536 + _C + _R)[:, 1536:] for _ in sets]
    norm = stage.randn(_C)
    turns = _turns(stage, tokens)
    places = [slots(pool.tensor, stage.permutation(pool.num_pages * PAGE_TOKENS)[:tokens]) for _ in sets]

    def own(i: int) -> Tensor:
        of_layer = pool.tensor, stage.layer(i), places[i]
        return absorb_and_store(queries[i], weights[i], latents[i], norm, _EPS, turns, *of_layer)

    return Work(own=own, num_sets=len(sets), amount=num_bytes, bound="copy")


def _turns(stage: Stage, tokens: int) -> Tensor:
    return rotations(
        torch.arange(tokens, device=stage.device),
        inverse_frequencies(_R, 1e4).to(stage.device),
        torch.ones(1, device=stage.device),
    )


def gather(stage: Stage, *, num_pages: int, num_layers: int, fp8: bool) -> Work:
    return _moved(stage, gather_pages, num_pages, num_layers, fp8)


def scatter(stage: Stage, *, num_pages: int, num_layers: int, fp8: bool) -> Work:
    return _moved(stage, scatter_pages, num_pages, num_layers, fp8)


def _moved(stage: Stage, move: Callable[..., None], num_pages: int, num_layers: int, fp8: bool) -> Work:
    pool = stage.pool(fp8=fp8)
    ids = [stage.permutation(pool.num_pages)[:num_pages] for _ in range(4)]
    buffer = torch.zeros(num_pages, num_layers, *pool.tensor.shape[2:], dtype=pool.tensor.dtype, device=stage.device)

    def own(i: int) -> None:
        move(pool.tensor, ids[i], 0, num_layers, buffer)

    return Work(own=own, num_sets=len(ids), amount=2 * buffer.numel() * buffer.element_size(), bound="copy")


def prefill_attention(stage: Stage, *, batch: int, tokens: int, heads: int) -> Work:
    """Causal, the half below the diagonal counted. Torch's own gets keys with the rope part copied to every head beforehand."""
    total = batch * tokens
    num_bytes = total * heads * (_N + _R + _N + 2 * _V) * 2
    sets = range(_sets_for(num_bytes))
    ends = torch.arange(0, total + 1, tokens, dtype=torch.int32, device=stage.device)
    queries = [stage.randn(total, heads, _N + _R) for _ in sets]
    keys_values = [stage.randn(total, heads, _N + _V) for _ in sets]
    ropes = [stage.randn(total, _R) for _ in sets]

    def own(i: int) -> Tensor:
        k, v = keys_values[i][:, :, :_N], keys_values[i][:, :, _N:]
        out, _ = attend_varlen(queries[i], k, ropes[i], v, ends, ends, scale=_SOFTMAX_SCALE, causal=True)
        return out

    whole = [
        torch.cat([kv[:, :, :_N], rope[:, None].expand(-1, heads, -1)], dim=-1)
        for kv, rope in zip(keys_values, ropes, strict=True)
    ]

    def sdpa(i: int) -> Tensor:
        q, k, v = (
            x.unflatten(0, (batch, tokens)).transpose(1, 2) for x in (queries[i], whole[i], keys_values[i][:, :, _N:])
        )
        # Torch's plain products would take the time of all other cases.
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=_SOFTMAX_SCALE)
        return out.transpose(1, 2).flatten(0, 1)

    flops = 2.0 * batch * heads * tokens * (tokens + 1) / 2 * (_N + _R + _V)
    return Work(own=own, peers={"torch": sdpa}, num_sets=len(sets), amount=flops, bound="bf16")


def linear_fp8(stage: Stage, *, m: int, n: int, k: int, few: bool = False) -> Work:
    """`few`: rows so few that the weight's bytes are the bound."""
    num_bytes = n * k
    sets = range(_sets_for(num_bytes))
    x, w = [stage.rows(m, k) for _ in sets], [stage.weight(n, k) for _ in sets]
    outs = [torch.empty(m, n, dtype=torch.bfloat16, device=stage.device) for _ in sets]
    peers: dict[str, Call] = {}
    library = _peer("vllm.third_party.deep_gemm")
    if library is not None:

        def deep_gemm(i: int) -> Tensor:
            operands = (x[i].values, x[i].scales), (w[i].quantised, w[i].scales)
            library.fp8_gemm_nt(*operands, outs[i], disable_ue8m0_cast=True)
            return outs[i]

        peers["DeepGEMM"] = deep_gemm
    return _product(lambda i: linear(x[i], w[i]), peers, len(sets), 2.0 * m * n * k, num_bytes if few else None, "fp8")


def grouped_fp8(stage: Stage, *, experts: int, tokens: int, n: int, k: int, few: bool = False) -> Work:
    """So many tokens for each of the experts; `few`: the weights' bytes are the bound, and the peer takes masked rows."""
    from serving.kernels.triton.gemm import Tiles
    from serving.kernels.triton.product import grouped_tile, product

    tile = grouped_tile(experts * tokens, experts, torch.float8_e4m3fn)
    rows = -(-tokens // tile) * tile
    num_bytes = experts * n * k
    sets = range(_sets_for(num_bytes))
    x, w = [stage.rows(experts * rows, k) for _ in sets], [stage.weight(experts, n, k) for _ in sets]
    expert = torch.arange(experts, dtype=torch.int32, device=stage.device).repeat_interleave(rows // tile)
    used = torch.tensor([len(expert)], dtype=torch.int32, device=stage.device)
    tiles = Tiles(expert=expert, num_used=used, max_tiles=len(expert), num_rows=tile, num_expected=len(expert))

    def own(i: int) -> Tensor:
        out = product(x[i], w[i], tiles=tiles)
        assert isinstance(out, Tensor)
        return out.view(experts, rows, n)[:, :tokens]

    peers: dict[str, Call] = {}
    library = _peer("vllm.third_party.deep_gemm")
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
    return _product(own, peers, len(sets), 2.0 * experts * tokens * n * k, num_bytes if few else None, "fp8")


def grouped_bf16(stage: Stage, *, experts: int, tokens: int, n: int, k: int) -> Work:
    from serving.kernels.triton.gemm import Tiles
    from serving.kernels.triton.product import grouped_tile, product

    tile = grouped_tile(experts * tokens, experts, torch.bfloat16)
    expert = torch.arange(experts, dtype=torch.int32, device=stage.device).repeat_interleave(tokens // tile)
    used = torch.tensor([len(expert)], dtype=torch.int32, device=stage.device)
    tiles = Tiles(expert=expert, num_used=used, max_tiles=len(expert), num_rows=tile, num_expected=len(expert))
    sets = range(_sets_for(2 * experts * n * k))
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
    return _product(own, {"torch": grouped_mm}, len(sets), flops, None, "bf16")


def one_expert(stage: Stage, *, tokens: int, hidden: int, inner: int) -> Work:
    """An EP320 rank's expert: both products, SiLU-mul and quantise between; the peer's two products have neither."""
    from serving.kernels.triton.product import product

    num_bytes = 3 * hidden * inner
    sets = range(_sets_for(num_bytes))
    x = [stage.rows(tokens, hidden) for _ in sets]
    gate_up = [stage.weight(1, 2 * inner, hidden) for _ in sets]
    down = [stage.weight(1, hidden, inner) for _ in sets]

    def own(i: int) -> Tensor:
        first = Fp8Weight(quantised=gate_up[i].quantised[0], scales=gate_up[i].scales[0])
        second = Fp8Weight(quantised=down[i].quantised[0], scales=down[i].scales[0])
        out = product(product(x[i], first, silu=True), second)
        assert isinstance(out, Tensor)
        return out

    peers: dict[str, Call] = {}
    library = _peer("vllm.third_party.deep_gemm")
    if library is not None:
        between = _stacked(stage.rows(tokens, inner), 1)
        outs = [torch.empty(1, tokens, n, dtype=torch.bfloat16, device=stage.device) for n in (2 * inner, hidden)]
        masks = torch.tensor([tokens], dtype=torch.int32, device=stage.device)
        stacked = [_stacked(rows, 1) for rows in x]

        def products(i: int) -> None:
            for operand, weight, out in ((stacked[i], gate_up[i], outs[0]), (between, down[i], outs[1])):
                pair = weight.quantised, weight.scales
                library.m_grouped_fp8_gemm_nt_masked(operand, pair, out, masks, tokens, disable_ue8m0_cast=True)

        peers["DeepGEMM's products"] = products
    return Work(own=own, peers=peers, num_sets=len(sets), amount=num_bytes, bound="copy")


def experts_mlp(stage: Stage, *, tokens: int, hidden: int, inner: int, num_experts: int, top_k: int, fp8: bool) -> Work:
    """The whole routed half of a layer, tokens spread evenly at random. Few tokens: the bytes of the experts they choose."""
    width = 1 if fp8 else 2
    x = [stage.randn(tokens, hidden) for _ in range(4)]
    chosen = [stage.rand(tokens, num_experts).topk(top_k, dim=-1).indices for _ in x]
    shares = [stage.rand(tokens, top_k) for _ in x]
    gate_up: Fp8Weight | Tensor
    down: Fp8Weight | Tensor
    if fp8:
        gate_up, down = stage.weight(num_experts, 2 * inner, hidden), stage.weight(num_experts, hidden, inner)
    else:
        gate_up = stage.randn(num_experts, 2 * inner, hidden).mul_(hidden**-0.5)
        down = stage.randn(num_experts, hidden, inner).mul_(inner**-0.5)

    def own(i: int) -> Tensor:
        return grouped_mlp(x[i], gate_up, down, chosen[i], shares[i])

    num_used = sum(len(experts.unique()) for experts in chosen) / len(chosen)
    num_bytes = num_used * 3 * hidden * inner * width
    flops = 6.0 * tokens * top_k * hidden * inner
    few = tokens * top_k / num_experts < 128
    return _product(own, {}, len(x), flops, num_bytes if few else None, "fp8" if fp8 else "bf16")


def gate(stage: Stage, *, tokens: int, num_experts: int, num_groups: int, kept: int, top_k: int) -> Work:
    num_bytes = tokens * (4 * num_experts + 12 * top_k)
    sets = range(_sets_for(num_bytes))
    logits, bias = [stage.randn(tokens, num_experts, dtype=torch.float32) for _ in sets], 0.01 * stage.rand(num_experts)

    def own(i: int) -> None:
        gate_topk(
            logits[i], bias, num_groups=num_groups, num_groups_kept=kept, top_k=top_k, renormalise=True, scaling=2.5
        )

    return Work(own=own, num_sets=len(sets), amount=num_bytes, bound="copy")


def norm(stage: Stage, *, tokens: int, width: int) -> Work:
    x, weight = _activations(stage, tokens, width), stage.randn(width)
    peers: dict[str, Call] = {"torch": lambda i: F.rms_norm(x[i], (width,), weight, _EPS)}
    amount = 4 * tokens * width
    return Work(own=lambda i: rms_norm(x[i], weight, _EPS), peers=peers, num_sets=len(x), amount=amount, bound="copy")


def add_norm(stage: Stage, *, tokens: int, width: int) -> Work:
    x, residual = _activations(stage, tokens, width), _activations(stage, tokens, width)
    weight = stage.randn(width)

    def own(i: int) -> Tensor:
        return add_rms_norm(x[i], residual[i], weight, _EPS)[0]

    return Work(own=own, num_sets=len(x), amount=8 * tokens * width, bound="copy")


def norm_quantise(stage: Stage, *, tokens: int, width: int) -> Work:
    """With the residual's addition, as a layer begins."""
    x, residual = _activations(stage, tokens, width), _activations(stage, tokens, width)
    weight = stage.randn(width)

    def own(i: int) -> None:
        rms_norm_quantise(x[i], weight, _EPS, residual_TD=residual[i])

    return Work(own=own, num_sets=len(x), amount=tokens * _quantised_bytes(width, read=3 * width), bound="copy")


def quantise(stage: Stage, *, tokens: int, width: int) -> Work:
    x = _activations(stage, tokens, width)

    def own(i: int) -> None:
        quantise_rows_fp8(x[i])

    return Work(own=own, num_sets=len(x), amount=tokens * _quantised_bytes(width, read=width), bound="copy")


def silu_quantise(stage: Stage, *, tokens: int, inner: int) -> Work:
    x = _activations(stage, tokens, 2 * inner)

    def own(i: int) -> None:
        silu_mul_quantise(x[i])

    return Work(own=own, num_sets=len(x), amount=tokens * _quantised_bytes(inner, read=2 * inner), bound="copy")


def greedy(stage: Stage, *, rows: int, vocab: int) -> Work:
    logits = [stage.randn(rows, vocab, dtype=torch.float32) for _ in range(_sets_for(4 * rows * vocab))]
    peers: dict[str, Call] = {"torch": lambda i: logits[i].argmax(dim=-1)}
    return Work(
        own=lambda i: argmax(logits[i]), peers=peers, num_sets=len(logits), amount=4 * rows * vocab, bound="copy"
    )


def drawn(stage: Stage, *, rows: int, vocab: int) -> Work:
    logits = [stage.randn(rows, vocab, dtype=torch.float32) for _ in range(_sets_for(4 * rows * vocab))]
    warm = torch.full((rows,), 0.7, dtype=torch.float64, device=stage.device)
    seeds, positions = stage.randint(1 << 40, rows), stage.randint(1 << 17, rows)

    def own(i: int) -> Tensor:
        return sample(logits[i], warm, seeds, positions)

    return Work(own=own, num_sets=len(logits), amount=4 * rows * vocab, bound="copy")


def _copy(stage: Stage, num_bytes: int) -> Work:
    source = stage.randint(256, num_bytes // 8)
    target = torch.empty_like(source)

    def own(i: int) -> None:
        target.copy_(source)

    # In a graph a copy runs at two thirds of its rate (H200, CUDA 13.0).
    return Work(own=own, num_sets=1, amount=2.0 * num_bytes, bound="copy", captured=False)


def _matmul_bf16(stage: Stage, size: int) -> Work:
    x = [stage.randn(size, size) for _ in range(3)]
    return Work(own=lambda i: x[i] @ x[i - 1].t(), num_sets=3, amount=2.0 * size**3, bound="bf16")


def _matmul_fp8(stage: Stage, size: int) -> Work:
    x = [stage.randn(size, size).to(torch.float8_e4m3fn) for _ in range(3)]
    one = torch.ones((), device=stage.device)

    def own(i: int) -> Tensor:
        return torch._scaled_mm(x[i], x[i - 1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return Work(own=own, num_sets=3, amount=2.0 * size**3, bound="fp8")


def _product(
    own: Call, peers: dict[str, Call], num_sets: int, flops: float, weight_bytes: float | None, rate: Any
) -> Work:
    """Bound by the bytes of weights where those are given, else by the matrix units."""
    if weight_bytes is not None:
        return Work(own=own, peers=peers, num_sets=num_sets, amount=weight_bytes, bound="copy")
    return Work(own=own, peers=peers, num_sets=num_sets, amount=flops, bound=rate)


def _activations(stage: Stage, tokens: int, width: int) -> list[Tensor]:
    return [stage.randn(tokens, width) for _ in range(_sets_for(2 * tokens * width))]


def _quantised_bytes(width: int, *, read: int) -> float:
    """Of one row: `read` bf16 values in, or written beside it, and `width` FP8 values with their scales."""
    return 2 * read + width + 4 * width / BLOCK


def _stacked(rows: QuantisedRows, experts: int) -> tuple[Tensor, Tensor]:
    """Values [E, M, K] and scales [E, M, K / 128], each expert's of one column side by side, as DeepGEMM reads them."""
    scales = rows.scales.unflatten(0, (experts, -1)).transpose(1, 2).contiguous().transpose(1, 2)
    return rows.values.unflatten(0, (experts, -1)), scales


def _sets_for(num_bytes: int) -> int:
    return min(max(2, -(-_FRESH_BYTES // num_bytes)), 32)


def _peer(module: str) -> Any:
    """The library, None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
