"""Products of one or two rows in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from serving.kernels.gemm import linear_reference, linear_silu_mul_reference

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton.thin import thin_product


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_rows", "width", "columns"), [(1, 64, 32), (2, 200, 34), (1, 72, 50), (2, 2816, 18)])
@pytest.mark.parametrize("silu", [False, True])
def test_a_product_is_torchs(num_rows: int, width: int, columns: int, silu: bool) -> None:
    # What lies beside the rows is not read.
    x, w = randn(num_rows, width + 8)[:, :width], randn(columns, width, seed=1) / width**0.5
    want = (linear_silu_mul_reference if silu else linear_reference)(x, w)
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(thin_product(x, w, silu=silu), want, rtol=1e-4, atol=1e-5)
    w[columns // 2 - 1, 3] += 1
    assert not torch.allclose(thin_product(x, w, silu=silu), want, rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    x, w = randn(2, 96), randn(40, 96, seed=1)
    together = thin_product(x, w)
    x[0] = float("nan")
    assert torch.equal(thin_product(x, w)[1], together[1])
    assert torch.equal(thin_product(x[1:2], w)[0], together[1])
