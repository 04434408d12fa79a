"""FP8 rows and SiLU-mul on the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serving.kernels.quant import (
    QuantisedRows,
    quantise_rows_fp8,
    quantise_rows_fp8_reference,
    silu_mul,
    silu_mul_quantise,
    silu_mul_quantise_reference,
    silu_mul_reference,
)
from tests.gpu.graphs import replayed

pytestmark = pytest.mark.gpu

SHAPES = [(1, 256), (7, 416), (300, 7168), (5000, 1408)]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(0), dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("op", "reference"),
    [(quantise_rows_fp8, quantise_rows_fp8_reference), (silu_mul_quantise, silu_mul_quantise_reference)],
)
def test_graph_and_eager_equal_the_reference(
    shape: tuple[int, int], op: Callable[[Tensor], QuantisedRows], reference: Callable[[Tensor], QuantisedRows]
) -> None:
    x = randn(*shape)
    x[0] = 0
    got, want, again = op(x), reference(x), replayed(lambda: op(x))
    torch.testing.assert_close(got.scales, want.scales, rtol=1e-5, atol=0)
    # Division and exponential differ in the last bit, and a few numbers lie between two of FP8.
    parted = got.values.float() != want.values.float()
    assert parted.float().mean() < 1e-3
    torch.testing.assert_close(got.values.float(), want.values.float(), rtol=0.13, atol=2**-9)
    assert torch.equal(again.values.float(), got.values.float())
    assert torch.equal(again.scales, got.scales)
    other = reference(x.roll(1, dims=1))
    assert (got.values.float() != other.values.float()).float().mean() > 0.1 or shape[0] == 1


@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 96)])
def test_silu_mul_rounds_once(shape: tuple[int, ...]) -> None:
    gate_up = randn(*shape)
    want = silu_mul_reference(gate_up.float())
    torch.testing.assert_close(silu_mul(gate_up).float(), want, rtol=2**-8, atol=1e-6)
    assert torch.equal(replayed(lambda: silu_mul(gate_up)), silu_mul(gate_up))
