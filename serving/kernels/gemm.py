"""Matrix products with weights stored [out, in], or packed for the CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from serving.kernels.packed import packed_linear


def linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T, [M, N], in the dtype of both; the weight plain or packed."""
    if weight_NK.is_mkldnn:
        return packed_linear(x_MK, weight_NK)
    return F.linear(x_MK, weight_NK)
