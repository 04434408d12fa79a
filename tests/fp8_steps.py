"""FP8 values of a kernel beside those of its reference, counted in e4m3's own steps."""

from __future__ import annotations

import torch
from torch import Tensor


def steps_apart(got: Tensor, want: Tensor) -> Tensor:
    """int64, of the same shape: how many e4m3 numbers `got` is above or below `want`; neither is NaN."""
    return (_places(got) - _places(want)).abs()


def assert_one_step_apart(got: Tensor, want: Tensor) -> None:
    """Nearly all values are those of `want`, and every other one a neighbour.

    Where rounding carries into the exponent Triton's interpreter may forget the carry: half of a power of two in its place.
    """
    assert not got.float().isnan().any()
    uncarried = (2 * got.float() == want.float()) & (want.float().frexp().mantissa.abs() == 0.5)
    far = (steps_apart(got, want) > 1) & ~uncarried
    assert not far.any(), f"{got[far].float().tolist()[:8]} where {want[far].float().tolist()[:8]} is right"
    assert (got.float() == want.float()).float().mean() > 0.85


def largest_moved(values: Tensor, num_steps: int) -> Tensor:
    """A copy in which the largest value is so many steps smaller."""
    codes = values.contiguous().view(torch.uint8).clone()
    # The sign is the first bit, so that a code less is a magnitude less.
    codes.view(-1)[values.float().abs().argmax()] -= num_steps
    return codes.view(torch.float8_e4m3fn)


def _places(values: Tensor) -> Tensor:
    """Of each value among all e4m3 numbers, counted from 0."""
    assert values.dtype == torch.float8_e4m3fn
    codes = values.contiguous().view(torch.uint8).to(torch.int64)
    magnitudes = codes & 0x7F
    return torch.where(codes > 0x7F, -magnitudes, magnitudes)
