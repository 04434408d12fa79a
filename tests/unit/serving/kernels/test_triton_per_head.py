"""Products of every head in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.gemm import per_head_reference
from serving.kernels.triton.per_head import per_head


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_rows", "columns"), [(1, 32), (17, 20), (40, 100)])
@pytest.mark.parametrize("turned", [False, True])
def test_each_head_has_a_product_of_its_own(num_rows: int, columns: int, turned: bool) -> None:
    x = randn(num_rows, 3, 24)[:, :, :16]
    w = randn(3, columns, 16, seed=1).transpose(1, 2) if turned else randn(3, 16, columns, seed=1)
    out = torch.full((num_rows, 3, columns + 4), float("nan"))
    per_head(x, w, out[:, :, :columns])
    want = torch.empty(num_rows, 3, columns)
    per_head_reference(x, w, want)
    torch.testing.assert_close(out[:, :, :columns], want, rtol=1e-4, atol=1e-5)
    assert out[:, :, columns:].isnan().all()
    assert not torch.allclose(out[:, 1:, :columns], want[:, :-1], rtol=1e-4, atol=1e-5)
