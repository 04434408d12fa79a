"""Cases of products with one weight for all rows, and with one for each head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.bench.kernel_cases.stage import (
    LATENT,
    NOPE,
    ROPE,
    VALUE,
    Call,
    Case,
    Stage,
    Work,
    peer_library,
    product_work,
    sets_for,
)
from serving.kernels.gemm import linear, linear_by_head, linear_fp32, linear_silu_mul, per_head
from serving.kernels.quant import Fp8Weight, QuantisedRows, silu_mul_quantise_reference, silu_mul_reference


def cases(stage: Stage) -> dict[str, Case]:
    """Plain ones are V2-Lite's, and V3's head and gate; FP8 with SiLU-mul V3's dense MLP and its shared expert."""
    named: dict[str, Case] = {}
    for m, n, k in (4096, 7168, 2048), (4096, 24576, 1536), (4096, 4096, 7168):
        named[f"linear_fp8/{m}x{n}x{k}"] = partial(linear_fp8, stage, m=m, n=n, k=k)
    for m, n, k in (128, 7168, 16384), (64, 4096, 7168), (128, 24576, 1536), (16, 4096, 7168):
        named[f"linear_fp8/{m}x{n}x{k}"] = partial(linear_fp8, stage, m=m, n=n, k=k, few=True)
    for n, k in (3648, 2048), (2048, 2048):
        for m in (1, 16, 64):
            named[f"linear_bf16/{m}x{n}x{k}"] = partial(linear_bf16, stage, m=m, n=n, k=k)
    named["linear_bf16/16x129280x7168"] = partial(linear_bf16, stage, m=16, n=129280, k=7168)
    for m in (16, 64):
        named[f"linear_fp32/{m}x256x7168"] = partial(linear_bf16, stage, m=m, n=256, k=7168, fp32=True)
    for m in (1, 16, 64):
        named[f"linear_silu_mul/{m}x5632x2048"] = partial(gate_up, stage, m=m, n=5632, k=2048, few=True)
    named["linear_silu_mul/4096x21888x2048"] = partial(gate_up, stage, m=4096, n=21888, k=2048)
    for n in (36864, 4096):
        named[f"linear_silu_mul_fp8/64x{n}x7168"] = partial(gate_up_fp8, stage, m=64, n=n, k=7168, few=True)
        named[f"linear_silu_mul_fp8/4096x{n}x7168"] = partial(gate_up_fp8, stage, m=4096, n=n, k=7168)
    for heads in (16, 128):
        named[f"per_head/absorb/16/h{heads}"] = partial(absorb, stage, tokens=16, heads=heads)
        named[f"linear_by_head/16/h{heads}"] = partial(values_by_head, stage, tokens=16, heads=heads)
    named["linear_by_head/16/h128/quantise"] = partial(values_by_head, stage, tokens=16, heads=128, quantise=True)
    return named


def linear_fp8(stage: Stage, *, m: int, n: int, k: int, few: bool = False) -> Work:
    """`few`: rows so few that the weight's bytes are the bound."""
    num_bytes = n * k
    sets = range(sets_for(num_bytes))
    x, w = [stage.rows(m, k) for _ in sets], [stage.weight(n, k) for _ in sets]
    peers: dict[str, Call] = {"torch": lambda i: _scaled_mm(x[i], w[i])}
    if (deep_gemm := _deep_gemm(x, w)) is not None:
        peers["DeepGEMM"] = deep_gemm
    return product_work(
        lambda i: linear(x[i], w[i]), peers, len(sets), 2.0 * m * n * k, num_bytes if few else None, "fp8"
    )


def gate_up_fp8(stage: Stage, *, m: int, n: int, k: int, few: bool = False) -> Work:
    """FP8 rows in and out, with SiLU-mul and quantise behind; DeepGEMM's is the product alone. `few`: as `linear_fp8`."""
    num_bytes = n * k
    sets = range(sets_for(num_bytes))
    x, w = [stage.rows(m, k) for _ in sets], [stage.weight(n, k) for _ in sets]
    peers: dict[str, Call] = {"torch": lambda i: silu_mul_quantise_reference(_scaled_mm(x[i], w[i]))}
    if (deep_gemm := _deep_gemm(x, w)) is not None:

        def product_alone(i: int) -> None:
            deep_gemm(i)

        peers["DeepGEMM's product"] = product_alone
    return product_work(
        lambda i: linear_silu_mul(x[i], w[i]), peers, len(sets), 2.0 * m * n * k, num_bytes if few else None, "fp8"
    )


def _scaled_mm(x: QuantisedRows, w: Fp8Weight) -> Tensor:
    by_row, by_block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    scales = x.scales, by_row, w.scales.t(), by_block
    return F.scaled_mm(x.values, w.quantised.t(), *scales, output_dtype=torch.bfloat16)


def _deep_gemm(x: Sequence[QuantisedRows], w: Sequence[Fp8Weight]) -> Call | None:
    """x W^T of a set, bf16 [M, N]; None where it is not installed."""
    library = peer_library("vllm.third_party.deep_gemm")
    if library is None:
        return None
    outs = [
        torch.empty(len(rows.values), len(weight.quantised), dtype=torch.bfloat16, device=rows.values.device)
        for rows, weight in zip(x, w, strict=True)
    ]

    def product(i: int) -> Tensor:
        operands = (x[i].values, x[i].scales), (w[i].quantised, w[i].scales)
        library.fp8_gemm_nt(*operands, outs[i], disable_ue8m0_cast=True)
        return outs[i]

    return product


def linear_bf16(stage: Stage, *, m: int, n: int, k: int, fp32: bool = False) -> Work:
    """Rows so few that the weight's bytes are the bound. `fp32`: of what comes out."""
    num_bytes = 2 * n * k
    sets = range(sets_for(num_bytes))
    x, w = [stage.randn(m, k) for _ in sets], [_plain_weight(stage, n, k) for _ in sets]
    dtype = torch.float32 if fp32 else torch.bfloat16
    own: Call = lambda i: (linear_fp32 if fp32 else linear)(x[i], w[i])  # noqa: E731
    peers: dict[str, Call] = {
        "torch": lambda i: torch.mm(x[i], w[i].t(), out_dtype=dtype) if fp32 else F.linear(x[i], w[i])
    }
    return Work(own=own, peers=peers, num_sets=len(sets), amount=num_bytes, bound="copy")


def gate_up(stage: Stage, *, m: int, n: int, k: int, few: bool = False) -> Work:
    """Plain, with SiLU-mul behind. `few`: rows so few that the weight's bytes are the bound."""
    num_bytes = 2 * n * k
    sets = range(sets_for(num_bytes))
    x, w = [stage.randn(m, k) for _ in sets], [_plain_weight(stage, n, k) for _ in sets]

    def own(i: int) -> Tensor:
        out = linear_silu_mul(x[i], w[i])
        assert isinstance(out, Tensor)
        return out

    peers: dict[str, Call] = {"torch": lambda i: silu_mul_reference(F.linear(x[i], w[i]))}
    return product_work(own, peers, len(sets), 2.0 * m * n * k, num_bytes if few else None, "bf16")


def absorb(stage: Stage, *, tokens: int, heads: int) -> Work:
    """From each head's query to its latent's width, parts of wider rows on both sides."""
    num_bytes = 2 * heads * NOPE * LATENT
    sets = range(sets_for(num_bytes))
    queries = [stage.randn(tokens, heads, NOPE + ROPE)[:, :, :NOPE] for _ in sets]
    weights = [_by_head(stage, heads)[:, :NOPE] for _ in sets]
    outs = [stage.randn(tokens, heads, LATENT + ROPE)[:, :, :LATENT] for _ in sets]

    def own(i: int) -> Tensor:
        per_head(queries[i], weights[i], outs[i])
        return outs[i]

    def bmm(i: int) -> Tensor:
        return torch.bmm(queries[i].transpose(0, 1), weights[i]).transpose(0, 1)

    return Work(own=own, peers={"torch": bmm}, num_sets=len(sets), amount=num_bytes, bound="copy")


def values_by_head(stage: Stage, *, tokens: int, heads: int, quantise: bool = False) -> Work:
    """From each head's latent to its value; torch's own quantises nothing."""
    num_bytes = 2 * heads * VALUE * LATENT
    sets = range(sets_for(num_bytes))
    latents = [stage.randn(tokens, heads, LATENT) for _ in sets]
    weights = [_by_head(stage, heads)[:, NOPE:] for _ in sets]

    def own(i: int) -> Tensor | QuantisedRows:
        return linear_by_head(latents[i], weights[i], quantise=quantise)

    def bmm(i: int) -> Tensor | None:
        out_THV = latents[i].new_empty(tokens, heads, VALUE)
        torch.bmm(latents[i].transpose(0, 1), weights[i].transpose(1, 2), out=out_THV.transpose(0, 1))
        return None if quantise else out_THV.flatten(1)

    return Work(own=own, peers={"torch": bmm}, num_sets=len(sets), amount=num_bytes, bound="copy")


def _plain_weight(stage: Stage, n: int, k: int) -> Tensor:
    return stage.randn(n, k).mul_(k**-0.5)


def _by_head(stage: Stage, heads: int) -> Tensor:
    """[H, N + V, C], the keys' part above the values'."""
    return stage.randn(heads, NOPE + VALUE, LATENT).mul_(LATENT**-0.5)
