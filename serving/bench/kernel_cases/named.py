"""Every case by name, at the sizes that count."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from serving.bench.kernel_cases.attention import (
    absorbed_query,
    gather,
    latent_store,
    mla_decode,
    prefill_attention,
    scatter,
)
from serving.bench.kernel_cases.experts import experts_mlp, gate, grouped_bf16, grouped_fp8, one_expert
from serving.bench.kernel_cases.products import linear_fp8
from serving.bench.kernel_cases.rows import add_norm, norm, norm_quantise, quantise, silu_quantise
from serving.bench.kernel_cases.stage import HIDDEN, PLANES, Case, Stage, Work
from serving.bench.kernel_cases.steps import drawn, greedy


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
            named[f"pages/{way.__name__}/{kind}"] = of(way, num_pages=64, num_layers=PLANES, fp8=fp8)
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
        for n, k in (4096, HIDDEN), (HIDDEN, 2048):
            named[f"grouped_fp8/masked/{experts}x{tokens}x{n}x{k}"] = of(
                grouped_fp8, experts=experts, tokens=tokens, n=n, k=k, few=True
            )
    named["experts/one/256"] = of(one_expert, tokens=256, hidden=HIDDEN, inner=2048)
    for tokens in (64, 256, 4096):
        named[f"experts/v3/{tokens}"] = of(
            experts_mlp, tokens=tokens, hidden=HIDDEN, inner=2048, num_experts=256, top_k=8, fp8=True
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
            named[f"{name}/{tokens}"] = of(build, tokens=tokens, width=HIDDEN)
    for tokens, inner in (64, 2048), (32768, 2048), (32768, 18432):
        named[f"silu_mul_quantise/{tokens}x{inner}"] = of(silu_quantise, tokens=tokens, inner=inner)
    named["sampling/argmax/64"] = of(greedy, rows=64, vocab=129280)
    named["sampling/draw/64"] = of(drawn, rows=64, vocab=129280)
    return named
