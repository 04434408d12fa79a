"""Launches that begin before the one before them has ended: layers whose buffers the allocator uses again say the same without."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp
from serving.kernels.gemm import linear_fp32
from serving.kernels.norm_rope import add_rms_norm, rms_norm_quantise
from serving.kernels.quant import Fp8Weight, QuantisedRows, quantise_block_fp8
from serving.kernels.topk import gate_topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_LAYERS, NUM_EXPERTS, TOP_K, WIDTH, INNER = 20, 64, 6, 1024, 256
REPLAYS = 100
LAUNCHERS = ("expert_rows", "gemm", "norm_rope", "placing", "quant", "thin", "topk")


class Behind:
    """A kernel whose launches wait for the kernel before them to end."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            return self._kernel[grid](*args, **{**kwargs, "launch_pdl": False})

        return launch


def without_overlap(patch: pytest.MonkeyPatch) -> None:
    from serving.kernels.gluon import few_rows

    for name in LAUNCHERS:
        patch.setattr(importlib.import_module(f"serving.kernels.triton.{name}"), "overlap", lambda _device: {})
    patch.setattr(few_rows, "few_rows_kernel", Behind(few_rows.few_rows_kernel))


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


Weight = Tensor | Fp8Weight


@dataclass(frozen=True, kw_only=True)
class Layer:
    gate: Tensor
    gate_up: Weight
    down: Weight
    shared: tuple[Weight, Weight]


def quantised(weight: Tensor) -> Fp8Weight:
    """[N, K], or [E, N, K]."""
    if weight.dim() == 2:
        values, scales = quantise_block_fp8(weight, (128, 128))
        return Fp8Weight(quantised=values, scales=scales)
    parts = [quantise_block_fp8(part, (128, 128)) for part in weight]
    return Fp8Weight(quantised=torch.stack([v for v, _ in parts]), scales=torch.stack([s for _, s in parts]))


def make_layer(seed: int, *, fp8: bool) -> Layer:
    stored: Callable[[Tensor], Weight] = quantised if fp8 else lambda weight: weight
    return Layer(
        gate=randn(NUM_EXPERTS, WIDTH, seed=seed) / WIDTH**0.5,
        gate_up=stored(randn(NUM_EXPERTS, 2 * INNER, WIDTH, seed=seed + 1) / WIDTH**0.5),
        down=stored(randn(NUM_EXPERTS, WIDTH, INNER, seed=seed + 2) / INNER**0.5),
        shared=(
            stored(randn(4 * INNER, WIDTH, seed=seed + 3) / WIDTH**0.5),
            stored(randn(WIDTH, 2 * INNER, seed=seed + 4) / INNER**0.5),
        ),
    )


def chain(x_TD: Tensor, layers: list[Layer], *, fp8: bool) -> Tensor:
    """The hidden states behind all layers, each of which chooses experts by what the one before has made."""
    ones, no_bias = torch.ones_like(x_TD[0]), torch.zeros(NUM_EXPERTS, device="cuda")
    added_TD = torch.zeros_like(x_TD)
    for layer in layers:
        rows: Tensor | QuantisedRows
        if fp8:
            rows, normed_TD, sum_TD = rms_norm_quantise(x_TD, ones, 1e-6, residual_TD=added_TD, keep=True)
            assert normed_TD is not None
            assert sum_TD is not None
        else:
            normed_TD, sum_TD = add_rms_norm(x_TD, added_TD, ones, 1e-6)
            rows = normed_TD
        experts_TK, weights_TK = gate_topk(
            linear_fp32(normed_TD, layer.gate), no_bias,
            num_groups=1, num_groups_kept=1, top_k=TOP_K, renormalise=True, scaling=1.0,
        )  # fmt: skip
        added_TD = grouped_mlp(rows, layer.gate_up, layer.down, experts_TK, weights_TK, layer.shared)
        x_TD = sum_TD
    return x_TD + added_TD


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 64])
def test_overlapped_layers_in_a_graph_have_the_bits_of_layers_one_by_one(
    num_tokens: int, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [make_layer(10 * i, fp8=fp8) for i in range(NUM_LAYERS)]
    inputs = [randn(num_tokens, WIDTH, seed=1000 + i) for i in range(4)]
    with monkeypatch.context() as patch:
        without_overlap(patch)
        wants = [chain(x, layers, fp8=fp8) for x in inputs]
        other_gate = replace(layers[7], gate=layers[7].gate.roll(1, dims=0))
        other = chain(inputs[0], [*layers[:7], other_gate, *layers[8:]], fp8=fp8)
        torch.cuda.synchronize()
    assert all(want.isfinite().all() for want in wants)
    assert not torch.equal(wants[0], wants[1])
    assert not torch.equal(wants[0], other)

    x = inputs[0].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain(x, layers, fp8=fp8)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x, layers, fp8=fp8)
    torch.cuda.synchronize()
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(REPLAYS):
        # No wait between replays: they follow each other as decode steps do.
        x.copy_(inputs[i % 4])
        graph.replay()
        differ += (out != wants[i % 4]).any()
    assert int(differ) == 0
