"""Matrix products with weights stored [out, in]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T, [M, N], in the dtype of both.

    fp32 on CPU goes to oneDNN by name: `F.linear` takes MKL there, which on AMD processors reads the weights of a
    decode step at half the rate.
    """
    if x_MK.dtype == torch.float32 and x_MK.device.type == "cpu" and torch.backends.mkldnn.is_available():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, None, "none", [], "")
        return out
    return F.linear(x_MK, weight_NK)
