"""FP8 e4m3 weights with one fp32 scale a block, as the published checkpoints store them (`weight_scale_inv`).

`w = q * scale` of the block that holds it; blocks at the lower and right edge may be partial.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0


def dequantise_block_fp8(quantised: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """e4m3 [M, N] and scales [ceil(M / block_m), ceil(N / block_n)] to `dtype` [M, N]; the product is fp32."""
    rows, columns = quantised.shape
    wide = quantised.to(torch.float32)
    wide.mul_(_spread(scales.to(torch.float32), block, rows, columns))
    return wide.to(dtype)


def quantise_block_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Any float [M, N] to e4m3 [M, N] and fp32 scales, such that each block's largest value becomes 448."""
    rows, columns = weight.shape
    wide = weight.to(torch.float32)
    padded = torch.zeros(-(-rows // block[0]) * block[0], -(-columns // block[1]) * block[1], device=weight.device)
    padded[:rows, :columns] = wide
    largest = padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    quantised = wide / _spread(scales, block, rows, columns)
    return quantised.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def _spread(scales: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    by_row = scales.repeat_interleave(block[0], dim=0)[:rows]
    return by_row.repeat_interleave(block[1], dim=1)[:, :columns]
