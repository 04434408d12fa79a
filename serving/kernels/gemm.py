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
    silu_mul,
    silu_mul_quantise,
    silu_mul_quantise_reference,
    silu_mul_reference,
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
    if weight_NK.is_cuda:
        from serving.kernels.triton.product import linear as device_linear

        return device_linear(x_MK, weight_NK)
    return F.linear(x_MK, weight_NK)


def linear_reference(x_MK: Tensor | QuantisedRows, weight_NK: Tensor | Fp8Weight) -> Tensor:
    """`linear` of a weight that is not packed, with fp32 sums."""
    if isinstance(weight_NK, Fp8Weight):
        return linear_fp8_reference(x_MK, weight_NK)
    assert isinstance(x_MK, Tensor), "quantised rows are for an FP8 weight"
    return linear_fp32_reference(x_MK, weight_NK).to(x_MK.dtype)


def linear_fp32(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T, [M, N], plain, in fp32 from factors of one dtype, bf16 or fp32."""
    if weight_NK.is_cuda and weight_NK.dtype == torch.bfloat16 and len(x_MK):
        from serving.kernels.triton.product import linear as device_linear

        return device_linear(x_MK, weight_NK, dtype=torch.float32)
    return linear(x_MK.to(torch.float32), weight_NK.to(torch.float32))


def linear_fp32_reference(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """`linear_fp32`; fp64 of fp64."""
    return F.linear(_wide(x_MK), _wide(weight_NK))


def linear_silu_mul(x_MK: Tensor | QuantisedRows, weight_NK: Tensor | Fp8Weight) -> Tensor | QuantisedRows:
    """silu(x gate^T) * (x up^T), [M, N / 2], the weight gate above up. FP8 rows from an FP8 weight, else as `linear`."""
    if isinstance(weight_NK, Fp8Weight):
        assert weight_NK.shape[0] % (2 * BLOCK) == 0, "gate and up would share a scale's block"
        return silu_mul_quantise(linear(x_MK, weight_NK))
    assert isinstance(x_MK, Tensor), "quantised rows are for an FP8 weight"
    if not weight_NK.is_cuda:
        return silu_mul(linear(x_MK, weight_NK))
    from serving.kernels.triton.product import linear_silu_mul as device_linear_silu_mul

    return device_linear_silu_mul(x_MK, weight_NK)


def linear_silu_mul_reference(x_MK: Tensor | QuantisedRows, weight_NK: Tensor | Fp8Weight) -> Tensor | QuantisedRows:
    """`linear_silu_mul`; of a plain weight nothing is rounded between."""
    if isinstance(weight_NK, Fp8Weight):
        return silu_mul_quantise_reference(linear_fp8_reference(x_MK, weight_NK))
    assert isinstance(x_MK, Tensor), "quantised rows are for an FP8 weight"
    return silu_mul_reference(linear_fp32_reference(x_MK, weight_NK)).to(x_MK.dtype)


def linear_fp8_reference(x_MK: Tensor | QuantisedRows, weight_NK: Fp8Weight) -> Tensor:
    """bf16 x W^T [M, N] of the dequantised operands, in fp32."""
    x_MK = x_MK if isinstance(x_MK, QuantisedRows) else quantise_rows_fp8_reference(x_MK)
    wide_NK = dequantise_block_fp8(weight_NK.quantised, weight_NK.scales, (BLOCK, BLOCK), torch.float32)
    return F.linear(x_MK.dequantise(torch.float32), wide_NK).to(torch.bfloat16)


def _linear_fp8(x_MK: Tensor | QuantisedRows, weight_NK: Fp8Weight) -> Tensor:
    if not weight_NK.quantised.is_cuda:
        return linear_fp8_reference(x_MK, weight_NK)
    rows_MK = x_MK if isinstance(x_MK, QuantisedRows) else quantise_rows_fp8(x_MK)
    if not len(rows_MK.values):
        return torch.empty(0, weight_NK.shape[0], dtype=torch.bfloat16, device=weight_NK.quantised.device)
    library = weight_NK.library
    if library is not None and library.takes(len(rows_MK.values), weight_NK.shape):
        return library.linear(rows_MK, weight_NK)
    from serving.kernels.triton.product import product

    out = product(rows_MK, weight_NK)
    assert isinstance(out, Tensor)
    return out


def linear_by_head(x_THC: Tensor, w_HVC: Tensor, *, quantise: bool) -> Tensor | QuantisedRows:
    """x[t, h] W[h]^T of every head h, side by side, [T, H V], plain; as FP8 rows if `quantise`."""
    if x_THC.is_cuda:
        from serving.kernels.triton.product import is_few_by_head

        if is_few_by_head(x_THC, w_HVC):
            from serving.kernels.gluon.few_rows import few_rows_by_head

            return few_rows_by_head(x_THC, w_HVC, quantise=quantise)
    out_THV = x_THC.new_empty(*x_THC.shape[:2], w_HVC.shape[1])
    per_head(x_THC, w_HVC.transpose(1, 2), out_THV)
    return quantise_rows_fp8(out_THV.flatten(1)) if quantise else out_THV.flatten(1)


def linear_by_head_reference(x_THC: Tensor, w_HVC: Tensor, *, quantise: bool) -> Tensor | QuantisedRows:
    """`linear_by_head`; what is quantised was not rounded before."""
    out_TX = torch.einsum("thc,hvc->thv", _wide(x_THC), _wide(w_HVC)).flatten(1)
    return quantise_rows_fp8_reference(out_TX) if quantise else out_TX.to(x_THC.dtype)


def per_head(x_THK: Tensor, w_HKN: Tensor, out_THN: Tensor) -> None:
    """out[t, h] = x[t, h] W[h] of every head h, into `out`; plain, any strides."""
    num_rows, num_heads, width = x_THK.shape
    if x_THK.is_cuda and x_THK.dtype != torch.float64:
        from serving.kernels.triton import per_head as device

        if device.is_quick(num_rows, num_heads, width):
            device.per_head(x_THK, w_HKN, out_THN)
            return
    torch.bmm(x_THK.transpose(0, 1), w_HKN, out=out_THN.transpose(0, 1))


def per_head_reference(x_THK: Tensor, w_HKN: Tensor, out_THN: Tensor) -> None:
    out_THN.copy_(torch.einsum("thk,hkn->thn", _wide(x_THK), _wide(w_HKN)))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
