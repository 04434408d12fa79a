"""Prefill attention on a CPU that leaves FP8 rows, against plain products."""

from __future__ import annotations

import torch
from torch import Tensor

from serving.kernels.attention import attend_varlen_quantised, attend_varlen_quantised_reference

HEADS, NOPE, ROPE, V_WIDTH = 6, 32, 16, 40


def inputs(lens: list[int]) -> tuple[Tensor, ...]:
    some = torch.Generator().manual_seed(3)
    shapes = (HEADS, NOPE + ROPE), (HEADS, NOPE), (ROPE,), (HEADS, V_WIDTH)
    q, k, rope, v = (torch.randn(sum(lens), *shape, generator=some) for shape in shapes)
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    return q, k, rope, v, starts, starts


def test_rows_are_the_outputs_to_a_rounding_step() -> None:
    """Of 240 columns: a block and most of another."""
    x = inputs([1, 33, 20])
    got, want = (op(*x, scale=0.3, causal=True) for op in (attend_varlen_quantised, attend_varlen_quantised_reference))
    assert got.values.shape == (54, HEADS * V_WIDTH)
    torch.testing.assert_close(got.scales, want.scales)
    # Beside a boundary either neighbour is right: e4m3 has 3 bits of mantissa.
    torch.testing.assert_close(got.dequantise(torch.float32), want.dequantise(torch.float32), rtol=2**-3, atol=1e-3)
    other = attend_varlen_quantised(*x, scale=0.5, causal=True)
    assert not torch.allclose(other.dequantise(torch.float32), want.dequantise(torch.float32), rtol=2**-3, atol=1e-3)
