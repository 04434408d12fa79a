"""RMSNorm kernels on the device."""

from __future__ import annotations

import pytest
import torch

from serving.kernels.norm_rope import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_quantise,
    rms_norm_reference,
)
from tests.gpu.graphs import replayed

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [7168, 1536, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graph_and_eager_equal_the_reference(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, width + 64, device="cuda").to(dtype)[:, :width]
    residual, weight = torch.randn(37, width, device="cuda").to(dtype), torch.randn(width, device="cuda").to(dtype)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), rtol=bound, atol=bound)
    normed, summed = add_rms_norm(x, residual, weight, 1e-6)
    want_normed, want_sum = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert torch.equal(summed, want_sum)
    torch.testing.assert_close(normed, want_normed, rtol=bound, atol=bound)
    assert not torch.allclose(normed, rms_norm_reference(x, weight, 1e-6), rtol=bound, atol=bound)

    rows, kept, again = replayed(lambda: rms_norm_quantise(x, weight, 1e-6, residual_TD=residual, keep=True))
    assert kept is not None
    assert again is not None
    # Another number of warps adds the squares in another order; bf16 does not show it.
    torch.testing.assert_close(kept, normed, rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert torch.equal(again, summed)
    blocks = torch.nn.functional.pad(kept.float(), (0, -width % 128)).unflatten(1, (-1, 128))
    torch.testing.assert_close(rows.scales, blocks.abs().amax(2) / 448, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        rows.dequantise(torch.float32), kept.float(), rtol=1 / 15, atol=float(rows.scales.max()) / 512
    )
