"""Host tensors are copied byte by byte, whatever they are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.engine.staging import copy


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).view(3, 4),
        torch.arange(12, dtype=torch.float64).view(3, 4).t(),
        torch.randn(7).to(torch.bfloat16),
        torch.tensor(3.5),
        torch.empty(0, 4, dtype=torch.int32),
        torch.tensor([True, False]),
    ],
    ids=["int64", "strided", "bf16", "one number", "none", "bool"],
)
def test_a_copy_says_the_same(tensor: Tensor) -> None:
    with torch.inference_mode():
        into = torch.zeros(tensor.shape, dtype=tensor.dtype)
        copy(into, tensor)
        assert torch.equal(into, tensor)
        if tensor.numel() > 1:
            copy(into, tensor.flip(0))
            assert not torch.equal(into, tensor)
