"""Cases of attention, of latent rows on their way into the pool, and of pages on theirs between workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvcache.layout import PAGE_TOKENS
from serving.bench.kernel_cases.stage import (
    EPS,
    LATENT,
    NOPE,
    PLANES,
    ROPE,
    SOFTMAX_SCALE,
    VALUE,
    Call,
    Case,
    Stage,
    Work,
    peer_library,
    sets_for,
)
from serving.kernels import mla
from serving.kernels.attention import attend_varlen, attend_varlen_quantised, merge_into, merge_into_reference
from serving.kernels.kv_store import absorb_and_store, norm_rope_store
from serving.kernels.norm_rope import inverse_frequencies, rope_, rotations
from serving.kernels.pages import gather_pages, scatter_pages, scatter_pages_reference
from serving.kernels.quant import QuantisedRows
from serving.kernels.rows import layer_rows, pack_fp8_rows, slots


def cases(stage: Stage) -> dict[str, Case]:
    """By name; all of a kind of pool side by side."""
    named: dict[str, Case] = {}
    for fp8 in (False, True):
        kind = "fp8" if fp8 else "bf16"
        decode, store = partial(mla_decode, stage, fp8=fp8), partial(latent_store, stage, fp8=fp8)
        for heads in (16, 32, 64, 128):
            for batch in (32, 64, 128):
                named[f"mla_decode/{kind}/h{heads}/b{batch}"] = partial(decode, heads=heads, batch=batch, ctx=4096)
            for batch, ctx in (128, 1024), (32, 16384):
                named[f"mla_decode/{kind}/h{heads}/b{batch}/ctx{ctx}"] = partial(
                    decode, heads=heads, batch=batch, ctx=ctx
                )
        named[f"mla_decode/{kind}/h32/b64/drafts3"] = partial(decode, heads=32, batch=64, ctx=4096, num_tokens=4)
        for tokens in (64, 4096):
            named[f"norm_rope_store/{kind}/{tokens}"] = partial(store, tokens=tokens, heads=0)
            named[f"norm_rope_store/{kind}/{tokens}/queries"] = partial(store, tokens=tokens, heads=128)
        named[f"absorb_and_store/{kind}/16"] = partial(absorbed_query, stage, tokens=16, heads=128, fp8=fp8)
        for way in (gather, scatter):
            named[f"pages/{way.__name__}/{kind}"] = partial(way, stage, num_pages=64, num_layers=PLANES, fp8=fp8)
    for lengths, heads in ((4, 4096), 128), ((1, 1024), 128), ((1, 4096), 16), ((32, 2048), 16):
        attend = partial(prefill_attention, stage, batch=lengths[0], tokens=lengths[1], heads=heads)
        named[f"attention/{lengths[0]}x{lengths[1]}/h{heads}"] = attend
    whole = partial(prefill_attention, stage, batch=4, tokens=4096, heads=128, quantise=True)
    named["attention/4x4096/h128/quantise"] = whole
    named["attention/merge/4096/h128"] = partial(merge, stage, tokens=4096, heads=128)
    return named


def mla_decode(stage: Stage, *, heads: int, batch: int, ctx: int, fp8: bool, num_tokens: int = 1) -> Work:
    """Pages drawn at random from all of the pool, none twice; the plan is made before, as a step makes it once for all layers."""
    pool = stage.pool(fp8=fp8)
    pages = ctx // PAGE_TOKENS
    assert batch * pages <= pool.num_pages, "a batch's pages are all different"
    lens = torch.full((batch,), ctx, dtype=torch.int32, device=stage.device)
    tables = [stage.permutation(pool.num_pages)[: batch * pages].view(batch, pages).int() for _ in range(4)]
    shape = (batch, heads, LATENT + ROPE) if num_tokens == 1 else (batch, num_tokens, heads, LATENT + ROPE)
    queries = [stage.randn(*shape) for _ in tables]
    last_rows = [table[:, -1].long() * PAGE_TOKENS + PAGE_TOKENS - 1 for table in tables]
    plans = [mla.plan_decode(pool.tensor, rows, table, lens) for rows, table in zip(last_rows, tables, strict=True)]

    def own(i: int) -> Tensor:
        layer = stage.layer(i)
        out, _ = mla.decode_latent(queries[i], pool.tensor, layer, plans[i], latent=LATENT, scale=SOFTMAX_SCALE)
        return out

    peers: dict[str, Call] = {}
    library = peer_library("vllm.third_party.flashmla.flash_mla_interface")
    if library is not None and not fp8:
        schedule = cache(lambda: library.get_mla_metadata()[0])

        def flash_mla(i: int) -> Tensor:
            q_BTHW = queries[i].view(batch, num_tokens, heads, LATENT + ROPE)
            rows = pool.tensor[:, stage.layer(i)].unsqueeze(2)
            out, _ = library.flash_mla_with_kvcache(
                q_BTHW, rows, tables[i], lens, LATENT, schedule(), softmax_scale=SOFTMAX_SCALE, causal=True
            )
            latents: Tensor = out.view(*queries[i].shape[:-1], LATENT)
            return latents

        peers["FlashMLA"] = flash_mla
    if heads * num_tokens >= 128:
        flops = 2.0 * batch * num_tokens * heads * ctx * (2 * LATENT + ROPE)
        return Work(own=own, peers=peers, num_sets=len(tables), amount=flops, bound="bf16")
    row_bytes = pool.layout.row_bytes
    return Work(own=own, peers=peers, num_sets=len(tables), amount=batch * ctx * row_bytes, bound="copy")


def latent_store(stage: Stage, *, tokens: int, heads: int, fp8: bool) -> Work:
    """With `heads` the queries' rope parts are turned too: in place, so that neither side finds what the other found, and they are not compared."""
    pool = stage.pool(fp8=fp8)
    num_bytes = tokens * (2 * (LATENT + ROPE) + pool.layout.row_bytes + heads * ROPE * 4)
    sets = range(sets_for(num_bytes))
    latents = [stage.randn(tokens, 1536 + LATENT + ROPE)[:, 1536:] for _ in sets]
    queries = [stage.randn(tokens, heads, NOPE + ROPE)[:, :, NOPE:] if heads else None for _ in sets]
    weight = stage.randn(LATENT)
    turns = _turns(stage, tokens)
    places = [slots(pool.tensor, stage.permutation(pool.num_pages * PAGE_TOKENS)[:tokens]) for _ in sets]

    def own(i: int) -> None:
        layer = stage.layer(i)
        norm_rope_store(latents[i], weight, EPS, turns, pool.tensor, layer, places[i], q_rope_THR=queries[i])

    def eager(i: int) -> None:
        _store_eagerly(latents[i], weight, turns, pool.tensor, stage.layer(i), places[i], queries[i])

    return Work(own=own, peers={"torch": eager}, num_sets=len(sets), amount=num_bytes, bound="copy")


def absorbed_query(stage: Stage, *, tokens: int, heads: int, fp8: bool) -> Work:
    """What a decode step of few rows does between the query's product and its attention; not compared, as `latent_store`."""
    pool = stage.pool(fp8=fp8)
    num_bytes = heads * NOPE * LATENT * 2 + tokens * (
        heads * (NOPE + LATENT + 2 * ROPE) * 2 + 2 * (LATENT + ROPE) + pool.layout.row_bytes
    )
    sets = range(sets_for(num_bytes))
    queries = [stage.randn(tokens, heads, NOPE + ROPE) for _ in sets]
    weights = [stage.randn(heads, NOPE + VALUE, LATENT)[:, :NOPE] for _ in sets]
    latents = [stage.randn(tokens, 1536 + LATENT + ROPE)[:, 1536:] for _ in sets]
    norm = stage.randn(LATENT)
    turns = _turns(stage, tokens)
    places = [slots(pool.tensor, stage.permutation(pool.num_pages * PAGE_TOKENS)[:tokens]) for _ in sets]

    def own(i: int) -> Tensor:
        of_layer = pool.tensor, stage.layer(i), places[i]
        return absorb_and_store(queries[i], weights[i], latents[i], norm, EPS, turns, *of_layer)

    def eager(i: int) -> None:
        q_nope, q_rope = queries[i].split([NOPE, ROPE], dim=-1)
        _store_eagerly(latents[i], norm, turns, pool.tensor, stage.layer(i), places[i], q_rope)
        torch.cat([torch.bmm(q_nope.transpose(0, 1), weights[i]).transpose(0, 1), q_rope], dim=-1)

    return Work(own=own, peers={"torch": eager}, num_sets=len(sets), amount=num_bytes, bound="copy")


def _store_eagerly(
    latent_TW: Tensor,
    weight_C: Tensor,
    turns: Tensor,
    kv_pool: Tensor,
    layer: int,
    places: Tensor,
    q_rope_THR: Tensor | None,
) -> None:
    """`norm_rope_store` of torch's own operations."""
    normed_TC = F.rms_norm(latent_TW[:, :LATENT], (LATENT,), weight_C, EPS)
    rows_TW = torch.cat([normed_TC, rope_(latent_TW[:, LATENT:], turns)], dim=-1)
    stored = pack_fp8_rows(rows_TW, LATENT) if kv_pool.dtype == torch.uint8 else rows_TW
    layer_rows(kv_pool, layer).index_copy_(0, places, stored)
    if q_rope_THR is not None:
        rope_(q_rope_THR, turns)


def _turns(stage: Stage, tokens: int) -> Tensor:
    return rotations(
        torch.arange(tokens, device=stage.device),
        inverse_frequencies(ROPE, 1e4).to(stage.device),
        torch.ones(1, device=stage.device),
    )


def gather(stage: Stage, *, num_pages: int, num_layers: int, fp8: bool) -> Work:
    def by_torch(kv_pool: Tensor, page_ids_N: Tensor, first_layer: int, num_layers: int, out: Tensor) -> None:
        torch.index_select(kv_pool[:, first_layer : first_layer + num_layers], 0, page_ids_N, out=out)

    return _moved(stage, gather_pages, by_torch, num_pages, num_layers, fp8)


def scatter(stage: Stage, *, num_pages: int, num_layers: int, fp8: bool) -> Work:
    return _moved(stage, scatter_pages, scatter_pages_reference, num_pages, num_layers, fp8)


def _moved(
    stage: Stage, move: Callable[..., None], by_torch: Callable[..., None], num_pages: int, num_layers: int, fp8: bool
) -> Work:
    pool = stage.pool(fp8=fp8)
    ids = [stage.permutation(pool.num_pages)[:num_pages] for _ in range(4)]
    buffer = torch.zeros(num_pages, num_layers, *pool.tensor.shape[2:], dtype=pool.tensor.dtype, device=stage.device)

    def own(i: int) -> None:
        move(pool.tensor, ids[i], 0, num_layers, buffer)

    def eager(i: int) -> None:
        by_torch(pool.tensor, ids[i], 0, num_layers, buffer)

    num_bytes = 2 * buffer.numel() * buffer.element_size()
    return Work(own=own, peers={"torch": eager}, num_sets=len(ids), amount=num_bytes, bound="copy")


def prefill_attention(stage: Stage, *, batch: int, tokens: int, heads: int, quantise: bool = False) -> Work:
    """Causal, the half below the diagonal counted. Torch's own gets keys with the rope part copied to every head beforehand, and quantises nothing."""
    total = batch * tokens
    num_bytes = total * heads * (NOPE + ROPE + NOPE + 2 * VALUE) * 2
    sets = range(sets_for(num_bytes))
    ends = torch.arange(0, total + 1, tokens, dtype=torch.int32, device=stage.device)
    queries = [stage.randn(total, heads, NOPE + ROPE) for _ in sets]
    keys_values = [stage.randn(total, heads, NOPE + VALUE) for _ in sets]
    ropes = [stage.randn(total, ROPE) for _ in sets]

    def own(i: int) -> Tensor | QuantisedRows:
        k, v = keys_values[i][:, :, :NOPE], keys_values[i][:, :, NOPE:]
        inputs = queries[i], k, ropes[i], v, ends, ends
        if quantise:
            return attend_varlen_quantised(*inputs, scale=SOFTMAX_SCALE, causal=True)
        out, _ = attend_varlen(*inputs, scale=SOFTMAX_SCALE, causal=True)
        return out

    whole = [
        torch.cat([kv[:, :, :NOPE], rope[:, None].expand(-1, heads, -1)], dim=-1)
        for kv, rope in zip(keys_values, ropes, strict=True)
    ]

    def sdpa(i: int) -> Tensor | None:
        q, k, v = (
            x.unflatten(0, (batch, tokens)).transpose(1, 2) for x in (queries[i], whole[i], keys_values[i][:, :, NOPE:])
        )
        # Torch's plain products would take the time of all other cases.
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SOFTMAX_SCALE)
        return None if quantise else out.transpose(1, 2).flatten(0, 1)

    flops = 2.0 * batch * heads * tokens * (tokens + 1) / 2 * (NOPE + ROPE + VALUE)
    return Work(own=own, peers={"torch": sdpa}, num_sets=len(sets), amount=flops, bound="bf16")


def merge(stage: Stage, *, tokens: int, heads: int) -> Work:
    """Two parts of a context. The first is what comes out, so that neither side finds what the other found, and they are not compared."""
    num_bytes = 3 * tokens * heads * (2 * VALUE + 4)
    outs = [[stage.randn(tokens, heads, VALUE) for _ in range(2)] for _ in range(sets_for(num_bytes))]
    lses = [[stage.randn(tokens, heads, dtype=torch.float32) for _ in range(2)] for _ in outs]

    def own(i: int) -> Tensor:
        merge_into(outs[i][0], lses[i][0], outs[i][1], lses[i][1])
        return outs[i][0]

    def eager(i: int) -> None:
        merge_into_reference(outs[i][0], lses[i][0], outs[i][1], lses[i][1])

    return Work(own=own, peers={"torch": eager}, num_sets=len(outs), amount=num_bytes, bound="copy")
