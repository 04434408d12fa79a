"""Rows to FP8 and SiLU-mul in Triton's interpreter, whose FP8 is right to one step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serving.kernels.quant import (
    QuantisedRows,
    quantise_rows_fp8,
    quantise_rows_fp8_reference,
    silu_mul_quantise_reference,
    silu_mul_reference,
)

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import quant as device
from tests.fp8_steps import assert_one_step_apart, largest_moved, steps_apart


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_alike(got: QuantisedRows, want: QuantisedRows) -> None:
    assert got.scales.stride() == want.scales.stride()
    torch.testing.assert_close(got.scales, want.scales, rtol=1e-5, atol=0)
    assert_one_step_apart(got.values, want.values)


def test_steps_are_counted_from_each_number_to_each_other() -> None:
    codes = torch.cat([torch.arange(0xFE, 0x80, -1), torch.arange(0x7F)]).to(torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn)
    assert (numbers.float().diff() > 0).all()
    for num_steps in (0, 1, 2, 7):
        near, far = numbers[: len(numbers) - num_steps], numbers[num_steps:]
        assert (steps_apart(far, near) == num_steps).all()
        assert (steps_apart(near, far) == num_steps).all()


@pytest.mark.parametrize("shape", [(1, 128), (3, 64), (5, 200), (9, 1100)])
def test_rows_are_quantised_as_the_reference_does(shape: tuple[int, int]) -> None:
    x = randn(*shape) * torch.logspace(-3, 3, shape[1])
    x[-1] = 0
    got = device.quantise_rows_fp8(x)
    want = quantise_rows_fp8_reference(x)
    assert_alike(got, want)
    with pytest.raises(AssertionError, match="is right"):
        assert_one_step_apart(largest_moved(got.values, 2), want.values)
    assert (got.values[-1].float() == 0).all()
    assert (got.scales[-1] == 1).all()
    x[0, 0] = 3 * x.abs().max() + 1
    with pytest.raises(AssertionError):
        assert_alike(got, quantise_rows_fp8_reference(x))


def test_the_largest_of_each_128_columns_becomes_448() -> None:
    x = randn(4, 300)
    rows = quantise_rows_fp8(x)
    assert (rows.values.float().abs()[:, :128].amax(1) == 448).all()
    assert (rows.values.float().abs()[:, 256:].amax(1) == 448).all()
    torch.testing.assert_close(rows.dequantise(torch.float32), x, rtol=2**-4, atol=1e-5)


def test_rows_that_are_a_slice_of_wider_ones() -> None:
    whole = randn(6, 400)
    whole[:, 256:] = float("nan")
    assert_alike(device.quantise_rows_fp8(whole[:, :256]), quantise_rows_fp8_reference(whole[:, :256]))


@pytest.mark.parametrize("shape", [(1, 256), (3, 130), (5, 2, 96)])
def test_silu_mul_is_the_reference(shape: tuple[int, ...]) -> None:
    gate_up = randn(*shape) * 3
    torch.testing.assert_close(device.silu_mul(gate_up), silu_mul_reference(gate_up))
    swapped = torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1)
    assert not torch.allclose(device.silu_mul(swapped), silu_mul_reference(gate_up))


@pytest.mark.parametrize("shape", [(1, 256), (5, 400), (9, 2208)])
def test_silu_mul_quantises_what_it_makes(shape: tuple[int, int]) -> None:
    gate_up = randn(*shape) * 3
    assert_alike(device.silu_mul_quantise(gate_up), silu_mul_quantise_reference(gate_up))


@pytest.mark.parametrize("op", [device.quantise_rows_fp8, device.silu_mul_quantise])
def test_no_rows_make_no_rows(op: Callable[[Tensor], QuantisedRows]) -> None:
    assert op(torch.empty(0, 256)).values.shape[0] == 0
