"""Cases of what is done to rows between products: norms, quantising, activations."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.bench.kernel_cases.stage import EPS, HIDDEN, Call, Case, Stage, Work, sets_for, vllm_ops
from serving.kernels.norm_rope import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_quantise,
    rms_norm_quantise_reference,
)
from serving.kernels.quant import (
    BLOCK,
    FP8_MAX,
    QuantisedRows,
    empty_rows,
    quantise_rows_fp8,
    quantise_rows_fp8_reference,
    silu_mul,
    silu_mul_quantise,
    silu_mul_quantise_reference,
    silu_mul_reference,
)


def cases(stage: Stage) -> dict[str, Case]:
    named: dict[str, Case] = {}
    of_name = {"rms_norm": norm, "rms_norm/add": add_norm, "rms_norm/quantise": norm_quantise, "quantise": quantise}
    for name, build in of_name.items():
        for tokens in (64, 32768):
            named[f"{name}/{tokens}"] = partial(build, stage, tokens=tokens, width=HIDDEN)
    for tokens, inner in (64, 2048), (32768, 2048), (32768, 18432):
        named[f"silu_mul_quantise/{tokens}x{inner}"] = partial(silu_quantise, stage, tokens=tokens, inner=inner)
    for tokens in (64, 32768):
        named[f"silu_mul/{tokens}x2048"] = partial(silu, stage, tokens=tokens, inner=2048)
    return named


def norm(stage: Stage, *, tokens: int, width: int) -> Work:
    x, weight = _activations(stage, tokens, width), stage.randn(width)
    peers: dict[str, Call] = {"torch": lambda i: F.rms_norm(x[i], (width,), weight, EPS)}
    if (ops := vllm_ops("_C")) is not None:

        def into_new(i: int) -> Tensor:
            out = torch.empty_like(x[i])
            ops.rms_norm(out, x[i], weight, EPS)
            return out

        peers["vLLM"] = into_new
    amount = 4 * tokens * width
    return Work(own=lambda i: rms_norm(x[i], weight, EPS), peers=peers, num_sets=len(x), amount=amount, bound="copy")


def add_norm(stage: Stage, *, tokens: int, width: int) -> Work:
    x, residual = _activations(stage, tokens, width), _activations(stage, tokens, width)
    weight = stage.randn(width)

    def own(i: int) -> Tensor:
        return add_rms_norm(x[i], residual[i], weight, EPS)[0]

    def eager(i: int) -> Tensor:
        return add_rms_norm_reference(x[i], residual[i], weight, EPS)[0]

    peers: dict[str, Call] = {"torch": eager}
    if (ops := vllm_ops("_C")) is not None:
        # It writes both results over what it is given: of each set only the first call, which is compared, finds what ours does.
        normed, summed = [of_set.clone() for of_set in x], [of_set.clone() for of_set in residual]

        def in_place(i: int) -> Tensor:
            ops.fused_add_rms_norm(normed[i], summed[i], weight, EPS)
            return normed[i]

        peers["vLLM"] = in_place
    return Work(own=own, peers=peers, num_sets=len(x), amount=8 * tokens * width, bound="copy")


def norm_quantise(stage: Stage, *, tokens: int, width: int) -> Work:
    """With the residual's addition, as a layer begins."""
    x, residual = _activations(stage, tokens, width), _activations(stage, tokens, width)
    weight = stage.randn(width)

    def own(i: int) -> QuantisedRows:
        return rms_norm_quantise(x[i], weight, EPS, residual_TD=residual[i])[0]

    def eager(i: int) -> QuantisedRows:
        return rms_norm_quantise_reference(x[i], weight, EPS, residual_TD=residual[i])[0]

    amount = tokens * _quantised_bytes(width, read=3 * width)
    return Work(own=own, peers={"torch": eager}, num_sets=len(x), amount=amount, bound="copy")


def quantise(stage: Stage, *, tokens: int, width: int) -> Work:
    x = _activations(stage, tokens, width)
    peers: dict[str, Call] = {"torch": lambda i: quantise_rows_fp8_reference(x[i])}
    if (ops := vllm_ops("_C")) is not None:

        def by_group(i: int) -> QuantisedRows:
            rows = empty_rows(tokens, width, stage.device)
            # No group counts as smaller than 1e-10; scales are no powers of two, and lie as `empty_rows` has them.
            ops.per_token_group_fp8_quant(
                x[i], rows.values, rows.scales, BLOCK, 1e-10, -FP8_MAX, FP8_MAX, False, True, True
            )
            return rows

        peers["vLLM"] = by_group
    amount = tokens * _quantised_bytes(width, read=width)
    return Work(own=lambda i: quantise_rows_fp8(x[i]), peers=peers, num_sets=len(x), amount=amount, bound="copy")


def silu_quantise(stage: Stage, *, tokens: int, inner: int) -> Work:
    x = _activations(stage, tokens, 2 * inner)
    peers: dict[str, Call] = {"torch": lambda i: silu_mul_quantise_reference(x[i])}
    if (ops := vllm_ops("_C")) is not None:

        def by_group(i: int) -> QuantisedRows:
            values = torch.empty(tokens, inner, dtype=torch.float8_e4m3fn, device=stage.device)
            scales = torch.empty(inner // BLOCK, tokens, device=stage.device).t()
            ops.silu_and_mul_per_block_quant(values, x[i], scales, BLOCK, None, True)
            return QuantisedRows(values=values, scales=scales)

        peers["vLLM"] = by_group
    amount = tokens * _quantised_bytes(inner, read=2 * inner)
    return Work(own=lambda i: silu_mul_quantise(x[i]), peers=peers, num_sets=len(x), amount=amount, bound="copy")


def silu(stage: Stage, *, tokens: int, inner: int) -> Work:
    x = _activations(stage, tokens, 2 * inner)
    peers: dict[str, Call] = {"torch": lambda i: silu_mul_reference(x[i])}
    return Work(own=lambda i: silu_mul(x[i]), peers=peers, num_sets=len(x), amount=6 * tokens * inner, bound="copy")


def _activations(stage: Stage, tokens: int, width: int) -> list[Tensor]:
    return [stage.randn(tokens, width) for _ in range(sets_for(2 * tokens * width))]


def _quantised_bytes(width: int, *, read: int) -> float:
    """Of one row: `read` bf16 values in, or written beside it, and `width` FP8 values with their scales."""
    return 2 * read + width + 4 * width / BLOCK
