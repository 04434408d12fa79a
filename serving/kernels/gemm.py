"""Matrix products with weights stored [out, in]: plain, packed for the CPU, or FP8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.packed import packed_linear
from serving.kernels.quant import (
    BLOCK,
    Fp8Weight,
    QuantisedRows,
    dequantise_block_fp8,
    quantise_rows_fp8,
    quantise_rows_fp8_reference,
)


def linear(x_MK: Tensor | QuantisedRows, weight_NK: Tensor | Fp8Weight) -> Tensor:
    """x W^T, [M, N], in the dtype of both, the weight plain or packed; bf16 from an FP8 weight.

    An FP8 weight is multiplied by FP8 rows with fp32 sums, 128 columns at a time; a plain `x_MK` is quantised first.
    """
    if isinstance(weight_NK, Fp8Weight):
        return _linear_fp8(x_MK, weight_NK)
    assert isinstance(x_MK, Tensor), "quantised rows are for an FP8 weight"
    if weight_NK.is_mkldnn:
        return packed_linear(x_MK, weight_NK)
    return F.linear(x_MK, weight_NK)


def linear_fp8_reference(x_MK: Tensor | QuantisedRows, weight_NK: Fp8Weight) -> Tensor:
    """bf16 x W^T [M, N] of the dequantised operands, in fp32."""
    x_MK = x_MK if isinstance(x_MK, QuantisedRows) else quantise_rows_fp8_reference(x_MK)
    wide_NK = dequantise_block_fp8(weight_NK.quantised, weight_NK.scales, (BLOCK, BLOCK), torch.float32)
    return F.linear(x_MK.dequantise(torch.float32), wide_NK).to(torch.bfloat16)


def _linear_fp8(x_MK: Tensor | QuantisedRows, weight_NK: Fp8Weight) -> Tensor:
    if not weight_NK.quantised.is_cuda:
        return linear_fp8_reference(x_MK, weight_NK)
    from serving.kernels.triton.product import product

    out = product(x_MK if isinstance(x_MK, QuantisedRows) else quantise_rows_fp8(x_MK), weight_NK)
    assert isinstance(out, Tensor)
    return out
