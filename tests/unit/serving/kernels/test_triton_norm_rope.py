"""RMSNorm with residual and FP8 quantise in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.norm_rope import add_rms_norm_reference, rms_norm_quantise_reference, rms_norm_reference

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import norm_rope as device
from tests.fp8_steps import assert_one_step_apart, largest_moved


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [16, 128, 200, 576])
def test_the_norm_of_rows_with_a_stride(width: int) -> None:
    wide, weight = randn(5, width + 24) * 5, randn(width, seed=1)
    x = wide[:, :width]
    normed, summed, rows = device.norm(x, None, weight, 1e-3, keep=True, quantise=False)
    assert normed is not None
    torch.testing.assert_close(normed, rms_norm_reference(x, weight, 1e-3))
    assert not torch.allclose(normed, rms_norm_reference(x, weight, 1e-1), rtol=1e-4)
    assert summed is None
    assert rows is None


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("width", [128, 200])
def test_residual_norm_and_quantise_are_those_done_apart(width: int, keep: bool) -> None:
    x, residual, weight = randn(7, width) * 5, randn(7, width, seed=1), randn(width, seed=2)
    residual[3] = -x[3]
    normed, summed, rows = device.norm(x, residual, weight, 1e-6, keep=keep, quantise=True)
    want_normed, want_sum = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert summed is not None
    torch.testing.assert_close(summed, want_sum, rtol=0, atol=0)
    assert (normed is not None) == keep
    if normed is not None:
        torch.testing.assert_close(normed, want_normed)
    want_rows, _, _ = rms_norm_quantise_reference(x, weight, 1e-6, residual_TD=residual)
    assert rows is not None
    assert rows.scales.stride() == want_rows.scales.stride()
    torch.testing.assert_close(rows.scales, want_rows.scales)
    assert_one_step_apart(rows.values, want_rows.values)
    with pytest.raises(AssertionError, match="is right"):
        assert_one_step_apart(largest_moved(rows.values, 2), want_rows.values)
    assert rows.values.float().abs().max() == 448
