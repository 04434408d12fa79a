"""Matrix products with weights stored [out, in], or packed for the CPU.

A packed weight is oneDNN's own blocked copy of a matrix: opaque (no slices, no views), the same shape, dtype and size. It
is read at about twice the rate of the plain layout by the few rows of a decode step, and no slower by a prefill.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The number of rows a layout is chosen for; one choice serves every number.
_PACKED_FOR_ROWS = 8
# Decode batches of up to so many rows are multiplied as they are.
_EXACT_ROWS = 16


def pack(weight_NK: Tensor) -> Tensor:
    """The weight as `linear` reads it fastest. fp32 and bf16 on CPU: a packed copy; elsewhere the weight itself."""
    packable = weight_NK.device.type == "cpu" and weight_NK.dtype in (torch.float32, torch.bfloat16)
    if not packable or not torch.backends.mkldnn.is_available() or not _fits(weight_NK.dtype):
        return weight_NK
    with torch.inference_mode():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), _PACKED_FOR_ROWS)
    return packed


def _fits(dtype: torch.dtype) -> bool:
    """oneDNN computes bf16 only on processors with AVX-512; the plain path works everywhere."""
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T, [M, N], in the dtype of both; the weight plain or packed."""
    if weight_NK.is_mkldnn:
        num_rows = x_MK.shape[0]
        num_padded = padded_rows(num_rows) - num_rows
        if num_padded:
            x_MK = F.pad(x_MK, (0, 0, 0, num_padded))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, None, "none", [], "")
        return out[:num_rows] if num_padded else out
    return F.linear(x_MK, weight_NK)


def padded_rows(num_rows: int) -> int:
    """The next of four sizes between two powers of two, at least a multiple of 16.

    oneDNN compiles and keeps a kernel for each number of rows it meets. Experts meet every number: after a few long prompts of the
    embedded model those kernels held 380 MB, and making them was 0.2 s of the 0.6 s that a first 512-token prompt took.
    """
    if num_rows <= _EXACT_ROWS:
        return num_rows
    step = max(_EXACT_ROWS, (1 << (num_rows - 1).bit_length()) // 8)
    return -(-num_rows // step) * step
