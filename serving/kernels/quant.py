"""FP8 e4m3 with fp32 scales: weights one scale a block, as the published checkpoints store them (`weight_scale_inv`), and
activations one scale a row and 128 columns.

`w = q * scale` of the block that holds it; blocks at the lower and right edge may be partial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from serving.kernels.libraries import DeepGemm

FP8_MAX = 448.0
# Columns of an activation, rows and columns of a weight, that share a scale.
BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class QuantisedRows:
    """Activations [T, D] as FP8; `x[t, d] = values[t, d] * scales[t, d // 128]`.

    `values`: e4m3 [T, D], rows contiguous. `scales`: fp32 [T, ceil(D / 128)] with strides (1, R), R = T rounded up to a
    multiple of 4: the scales of one column block lie side by side, which is how a product reads them, and each block
    begins on 16 bytes, which the copy engine asks for. `empty_rows` allocates both.
    """

    values: Tensor
    scales: Tensor

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """[T, D] in `dtype`; the product is fp32."""
        wide = self.values.to(torch.float32)
        return wide.mul_(self.scales.repeat_interleave(BLOCK, dim=1)[:, : wide.shape[1]]).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Fp8Weight:
    """A weight that stays FP8, or a stack of E of them: `w[n, k] = quantised[n, k] * scales[n // 128, k // 128]`.

    `quantised`: e4m3 [N, K] or [E, N, K], contiguous, K a multiple of 16. `scales`: fp32 [ceil(N / 128), ceil(K / 128)] or
    that behind E, contiguous. The scales of an expert's gate_up [2I, D] are the gate's [ceil(I / 128), ...] above up's, so
    that either matrix begins a block of its own also where I is no multiple of 128. `library`: multiplies it on a GPU in
    place of our kernel.
    """

    quantised: Tensor
    scales: Tensor
    library: DeepGemm | None = None

    @property
    def shape(self) -> torch.Size:
        return self.quantised.shape


def empty_rows(num_rows: int, width: int, device: torch.device) -> QuantisedRows:
    """Uninitialised rows for a kernel to fill."""
    values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(-(-width // BLOCK), -(-num_rows // 4) * 4, dtype=torch.float32, device=device)
    return QuantisedRows(values=values, scales=scales.t()[:num_rows])


def quantise_rows_fp8_reference(x_TD: Tensor) -> QuantisedRows:
    """Any float [T, D] to FP8 such that the largest value of each row's 128 columns becomes 448. A row of zeros has scale 1."""
    num_rows, width = x_TD.shape
    rows = empty_rows(num_rows, width, x_TD.device)
    blocks_TBC = F.pad(x_TD.to(torch.float32), (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))
    largest_TB = blocks_TBC.abs().amax(dim=2)
    rows.scales.copy_(torch.where(largest_TB > 0, largest_TB / FP8_MAX, 1.0))
    quantised = (blocks_TBC / rows.scales[:, :, None]).flatten(1)[:, :width]
    rows.values.copy_(quantised.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))
    return rows


def quantise_rows_fp8(x_TD: Tensor) -> QuantisedRows:
    """Any float [T, D], rows contiguous, to FP8 with one scale a row and 128 columns, as `quantise_rows_fp8_reference` has it."""
    if x_TD.is_cuda:
        from serving.kernels.triton import quant

        return quant.quantise_rows_fp8(x_TD)
    return quantise_rows_fp8_reference(x_TD)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """silu(first half of the last axis) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(first half of the last axis) * second half, [..., 2I] to [..., I]."""
    if gate_up.is_cuda:
        from serving.kernels.triton import quant

        return quant.silu_mul(gate_up)
    return silu_mul_reference(gate_up)


def silu_mul_quantise_reference(gate_up_TI: Tensor) -> QuantisedRows:
    """`silu_mul` of [T, 2I] in fp32, then FP8 [T, I] without a rounding between."""
    return quantise_rows_fp8_reference(silu_mul_reference(gate_up_TI.to(torch.float32)))


def silu_mul_quantise(gate_up_TI: Tensor) -> QuantisedRows:
    """`silu_mul` of [T, 2I] in fp32, then FP8 [T, I] without a rounding between."""
    if gate_up_TI.is_cuda:
        from serving.kernels.triton import quant

        return quant.silu_mul_quantise(gate_up_TI)
    return silu_mul_quantise_reference(gate_up_TI)


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
