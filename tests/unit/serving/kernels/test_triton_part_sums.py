"""The device's sum of parts against plain torch, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from serving.kernels.part_sums import sum_parts_reference
from serving.kernels.triton.part_sums import sum_parts


@pytest.mark.parametrize(("num_rows", "num_parts", "step"), [(1, 1, 0), (3, 4, 3), (5, 4, 4), (700, 3, 700), (0, 2, 1)])
def test_parts_are_added_wherever_they_begin(num_rows: int, num_parts: int, step: int) -> None:
    num_read = step * (num_parts - 1) + num_rows
    whole = torch.randn(num_read + 2, 7)
    # Behind the last part nothing is read.
    whole[num_read:] = torch.nan
    found, expected = torch.full((2, num_rows, 7), 9.0)
    sum_parts(whole, num_parts, step, found)
    sum_parts_reference(whole[:num_read], num_parts, expected)
    torch.testing.assert_close(found, expected)
    if num_rows and step:
        sum_parts_reference(whole[: num_read - step], num_parts - 1, expected)
        assert not torch.allclose(found, expected)
