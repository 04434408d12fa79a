"""Cases of what is done to rows between products: norms, quantising, activations."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from serving.bench.kernel_cases.stage import EPS, HIDDEN, Call, Case, Stage, Work, sets_for
from serving.kernels.norm_rope import add_rms_norm, rms_norm, rms_norm_quantise
from serving.kernels.quant import BLOCK, quantise_rows_fp8, silu_mul, silu_mul_quantise, silu_mul_reference


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
    amount = 4 * tokens * width
    return Work(own=lambda i: rms_norm(x[i], weight, EPS), peers=peers, num_sets=len(x), amount=amount, bound="copy")


def add_norm(stage: Stage, *, tokens: int, width: int) -> Work:
    x, residual = _activations(stage, tokens, width), _activations(stage, tokens, width)
    weight = stage.randn(width)

    def own(i: int) -> Tensor:
        return add_rms_norm(x[i], residual[i], weight, EPS)[0]

    return Work(own=own, num_sets=len(x), amount=8 * tokens * width, bound="copy")


def norm_quantise(stage: Stage, *, tokens: int, width: int) -> Work:
    """With the residual's addition, as a layer begins."""
    x, residual = _activations(stage, tokens, width), _activations(stage, tokens, width)
    weight = stage.randn(width)

    def own(i: int) -> None:
        rms_norm_quantise(x[i], weight, EPS, residual_TD=residual[i])

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


def silu(stage: Stage, *, tokens: int, inner: int) -> Work:
    x = _activations(stage, tokens, 2 * inner)
    peers: dict[str, Call] = {"torch": lambda i: silu_mul_reference(x[i])}
    return Work(own=lambda i: silu_mul(x[i]), peers=peers, num_sets=len(x), amount=6 * tokens * inner, bound="copy")


def _activations(stage: Stage, tokens: int, width: int) -> list[Tensor]:
    return [stage.randn(tokens, width) for _ in range(sets_for(2 * tokens * width))]


def _quantised_bytes(width: int, *, read: int) -> float:
    """Of one row: `read` bf16 values in, or written beside it, and `width` FP8 values with their scales."""
    return 2 * read + width + 4 * width / BLOCK
