"""Experts to slots, and sums of parts, on the device at sizes of a unit's rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from serving.kernels.part_sums import sum_parts
from serving.parallel.placement import Placement
from serving.parallel.replicas import Replicas

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shared", [None, 256])
@pytest.mark.parametrize("num_tokens", [1, 26, 5000])
def test_slots_are_those_of_a_cpu(num_tokens: int, shared: int | None) -> None:
    some = torch.Generator().manual_seed(num_tokens)
    slots = np.concatenate([np.arange(257), np.random.default_rng(1).integers(0, 257, 63)])[None]
    where = Placement(slots=slots, num_experts=257, num_gpus=320)
    experts = torch.rand(num_tokens, 256, generator=some).argsort(1)[:, :8].contiguous()
    weights = torch.rand(num_tokens, 8, generator=some)
    nobody = torch.rand(num_tokens, generator=some) < 0.3
    routed = []
    for device in ("cpu", "cuda"):
        counts = torch.full((256,), 3, device=device)
        replicas = Replicas(where, torch.device(device))
        found = replicas.route(
            0, experts.to(device), weights.to(device), nobody.to(device), counts, first=5, shared=shared
        )
        routed.append([tensor.cpu() for tensor in (*found, counts)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*routed, strict=True))
    assert routed[0][2].sum() == 3 * 256 + 8 * int((~nobody).sum())


@pytest.mark.parametrize(("num_rows", "step"), [(26, 25), (4096, 4096)])
def test_parts_are_added_in_fp32(num_rows: int, step: int) -> None:
    whole = torch.randn(step * 3 + num_rows, 7168, device="cuda", dtype=torch.bfloat16)
    out = whole.new_empty(num_rows, 7168)
    sum_parts(whole, 4, out)
    expected = torch.stack([whole[i * step : i * step + num_rows].float() for i in range(4)]).sum(0)
    torch.testing.assert_close(out, expected.to(torch.bfloat16))
