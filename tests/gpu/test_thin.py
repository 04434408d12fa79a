"""Plain products on the device: of one or two rows, and what computes those of more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.gemm import (
    linear,
    linear_fp32,
    linear_reference,
    linear_silu_mul,
    linear_silu_mul_reference,
    per_head,
    per_head_reference,
)
from tests.gpu.graphs import replayed

pytestmark = pytest.mark.gpu


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# Thin, few, the library's, and with SiLU one of our own for many rows.
ROWS = [1, 2, 5, 16, 33, 64, 100, 6000]


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("width", "columns"), [(2048, 3648), (2816, 2048), (208, 34)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_the_exact_ones(num_rows: int, width: int, columns: int, dtype: torch.dtype) -> None:
    x = randn(num_rows, width + 64, dtype=dtype)[:, :width]
    w = randn(columns, width, dtype=dtype, seed=1) / width**0.5
    torch.cuda.synchronize()
    want = linear_reference(x.double(), w.double())
    want_fused = linear_silu_mul_reference(x.double(), w.double())
    assert isinstance(want_fused, Tensor)
    bound = 4e-3 if dtype == torch.bfloat16 else 1e-5
    assert error(linear(x, w), want) < bound
    assert error(linear_fp32(x, w), want) < 1e-5
    assert error(linear_fp32(x, w.roll(1, dims=0)), want) > 0.5
    fused = linear_silu_mul(x, w)
    assert isinstance(fused, Tensor)
    assert fused.dtype == linear(x, w).dtype == dtype
    assert error(fused, want_fused) < 2 * bound
    assert torch.equal(replayed(lambda: linear_silu_mul(x, w)), fused)
    assert torch.equal(replayed(lambda: linear(x, w)), linear(x, w))


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    x, w = randn(2, 2048, dtype=torch.bfloat16), randn(2048, 2048, dtype=torch.bfloat16, seed=1)
    torch.cuda.synchronize()
    together = linear(x, w)
    assert torch.equal(linear(x[1:2], w)[0], together[1])
    x[0] = float("nan")
    assert torch.equal(linear(x, w)[1], together[1])


@pytest.mark.parametrize("num_rows", [1, 16, 64, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_head_has_a_product_of_its_own(num_rows: int, dtype: torch.dtype) -> None:
    q = randn(num_rows, 16, 192, dtype=dtype)[:, :, :128]
    w = randn(16, 256, 512, dtype=dtype, seed=1) / 16
    out = torch.zeros(num_rows, 16, 576, dtype=dtype, device="cuda")
    torch.cuda.synchronize()
    per_head(q, w[:, :128], out[:, :, :512])
    again = torch.zeros_like(out)
    replayed(lambda: per_head(q, w[:, :128], again[:, :, :512]))
    assert torch.equal(again, out)
    want = torch.empty(num_rows, 16, 512, dtype=torch.float64, device="cuda")
    per_head_reference(q.double(), w[:, :128].double(), want)
    bound = 4e-3 if dtype == torch.bfloat16 else 1e-5
    assert error(out[:, :, :512], want) < bound
    assert not out[:, :, 512:].any()
    back = torch.empty(num_rows, 16, 128, dtype=dtype, device="cuda")
    latent = out[:, :, :512].contiguous()
    per_head(latent, w[:, 128:].transpose(1, 2), back)
    back_again = torch.empty_like(back)
    replayed(lambda: per_head(latent, w[:, 128:].transpose(1, 2), back_again))
    assert torch.equal(back_again, back)
    want = torch.empty(num_rows, 16, 128, dtype=torch.float64, device="cuda")
    per_head_reference(latent.double(), w[:, 128:].transpose(1, 2).double(), want)
    assert error(back, want) < bound
    assert error(back, want.roll(1, dims=1)) > 0.5
