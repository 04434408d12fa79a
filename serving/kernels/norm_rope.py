"""RMSNorm, and rotary embedding over interleaved pairs with YaRN.

Pairs (2i, 2i+1) are turned as complex numbers and stay where they are, as in the published checkpoints. Angles are
fp32, as in the published model, whatever the compute dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.quant import QuantisedRows, quantise_rows_fp8_reference


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    if not _on_device(x_TD):
        return rms_norm_reference(x_TD, weight_D, eps)
    from serving.kernels.triton import norm_rope as device

    normed_TD, _, _ = device.norm(x_TD, None, weight_D, eps, keep=True, quantise=False)
    assert normed_TD is not None
    return normed_TD


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum): x + residual rounded to their dtype, then `rms_norm`. Both new, [T, D]."""
    if not _on_device(x_TD):
        return add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)
    from serving.kernels.triton import norm_rope as device

    normed_TD, sum_TD, _ = device.norm(x_TD, residual_TD, weight_D, eps, keep=True, quantise=False)
    assert normed_TD is not None
    assert sum_TD is not None
    return normed_TD, sum_TD


def add_rms_norm_reference(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_TD = x_TD + residual_TD
    return rms_norm_reference(sum_TD, weight_D, eps), sum_TD


def rms_norm_quantise(
    x_TD: Tensor, weight_D: Tensor, eps: float, *, residual_TD: Tensor | None = None, keep: bool = False
) -> tuple[QuantisedRows, Tensor | None, Tensor | None]:
    """(the norm as FP8 rows, the norm itself if `keep`, x + residual if there is one); what is quantised is the rounded norm."""
    if not _on_device(x_TD):
        return rms_norm_quantise_reference(x_TD, weight_D, eps, residual_TD=residual_TD, keep=keep)
    from serving.kernels.triton import norm_rope as device

    normed_TD, sum_TD, rows = device.norm(x_TD, residual_TD, weight_D, eps, keep=keep, quantise=True)
    assert rows is not None
    return rows, normed_TD, sum_TD


def rms_norm_quantise_reference(
    x_TD: Tensor, weight_D: Tensor, eps: float, *, residual_TD: Tensor | None = None, keep: bool = False
) -> tuple[QuantisedRows, Tensor | None, Tensor | None]:
    sum_TD = None if residual_TD is None else x_TD + residual_TD
    normed_TD = rms_norm_reference(x_TD if sum_TD is None else sum_TD, weight_D, eps)
    return quantise_rows_fp8_reference(normed_TD), normed_TD if keep else None, sum_TD


def _on_device(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def inverse_frequencies(rope_dim: int, theta: float) -> Tensor:
    """theta^(-2i / R) of each pair i, fp32 [R / 2] on CPU."""
    return 1.0 / theta ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim)


def yarn_inverse_frequencies(
    rope_dim: int, theta: float, *, factor: float, original_max_positions: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """`inverse_frequencies` under YaRN (arXiv 2309.00071, section 3.2).

    Pairs that turn more than `beta_fast` times over the original context keep their frequency, those under `beta_slow`
    turns are slowed by `factor`, a linear ramp lies between.
    """

    def pair_with_turns(turns: float) -> float:
        return rope_dim * math.log(original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    freqs = inverse_frequencies(rope_dim, theta)
    low = max(math.floor(pair_with_turns(beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(beta_slow)), rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1.0 - ramp.clamp(0.0, 1.0)
    return freqs / factor * (1.0 - keep) + freqs * keep


def rotations(positions_T: Tensor, inverse_freqs: Tensor, magnitude: Tensor) -> Tensor:
    """complex64 [T, R/2]: the factor each pair is multiplied with at its position; computed once a step. `magnitude` fp32 [1]."""
    return torch.polar(magnitude, positions_T.to(torch.float32)[:, None] * inverse_freqs)


def rope_(x: Tensor, rotations_T: Tensor) -> Tensor:
    """Turn `x` [T, R] or [T, H, R] in place. fp32 inside, except that fp64 stays fp64. Last axis contiguous."""
    turn = rotations_T if x.dim() == 2 else rotations_T[:, None]
    if x.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)
        return x
    wide = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))).mul_(turn)
    return x.copy_(torch.view_as_real(wide).flatten(-2))
