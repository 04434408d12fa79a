"""RMSNorm, and rotary embedding over interleaved pairs with YaRN.

Pairs (2i, 2i+1) are turned as complex numbers and stay where they are, as in the published checkpoints. Angles are
fp32, as in the published model, whatever the compute dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


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


def rotations(positions_T: Tensor, inverse_freqs: Tensor, magnitude: float) -> Tensor:
    """complex64 [T, R/2]: the factor each pair is multiplied with at its position; computed once a step."""
    angles = positions_T.to(torch.float32)[:, None] * inverse_freqs
    return torch.polar(torch.full_like(angles, magnitude), angles)


def rope_(x: Tensor, rotations_T: Tensor) -> Tensor:
    """Turn `x` [T, R] or [T, H, R] in place. fp32 inside, except that fp64 stays fp64. Last axis contiguous."""
    turn = rotations_T if x.dim() == 2 else rotations_T[:, None]
    if x.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)
        return x
    wide = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))).mul_(turn)
    return x.copy_(torch.view_as_real(wide).flatten(-2))
