"""Experts to slots, and sums of parts, on the device at sizes of a unit's rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.kernels.part_sums import sum_parts, sum_parts_reference
from serving.parallel.placement import Placement
from serving.parallel.replicas import Replicas
from tests.gpu.graphs import replayed

pytestmark = pytest.mark.gpu


Routed = tuple[Tensor, Tensor]


def once(call: Callable[[], Routed]) -> Routed:
    return call()


@pytest.mark.parametrize("shared", [None, 256])
@pytest.mark.parametrize("num_tokens", [1, 26, 5000])
def test_slots_in_graph_and_eager_are_those_of_a_cpu(num_tokens: int, shared: int | None) -> None:
    some = torch.Generator().manual_seed(num_tokens)
    slots = np.concatenate([np.arange(257), np.random.default_rng(1).integers(0, 257, 63)])[None]
    where = Placement(slots=slots, num_experts=257, num_gpus=320)
    experts = torch.rand(num_tokens, 256, generator=some).argsort(1)[:, :8].contiguous()
    weights = torch.rand(num_tokens, 8, generator=some)
    nobody = torch.rand(num_tokens, generator=some) < 0.3

    def routed(device: str, run: Callable[[Callable[[], Routed]], Routed] = once, first: int = 5) -> list[Tensor]:
        """Slots, weights and counts."""
        replicas = Replicas(where, torch.device(device))
        picks = experts.to(device), weights.to(device), nobody.to(device)
        counts = torch.empty(256, dtype=torch.int64, device=device)

        def call() -> Routed:
            # A graph's replay comes after a first run.
            counts.fill_(3)
            return replicas.route(0, *picks, counts, first=first, shared=shared)

        return [tensor.cpu() for tensor in (*run(call), counts)]

    want = routed("cpu")
    for got in (routed("cuda"), routed("cuda", replayed)):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    assert want[2].sum() == 3 * 256 + 8 * int((~nobody).sum())
    # From another first row on the turns are others.
    assert not torch.equal(routed("cuda", first=6)[0], want[0])


@pytest.mark.parametrize(("num_rows", "step"), [(26, 25), (4096, 4096)])
def test_parts_are_added_in_fp32(num_rows: int, step: int) -> None:
    torch.manual_seed(0)
    whole = torch.randn(step * 3 + num_rows, 7168, device="cuda", dtype=torch.bfloat16)

    def added(num_parts: int = 4) -> Tensor:
        out = whole.new_empty(num_rows, 7168)
        sum_parts(whole, num_parts, out)
        return out

    wide = torch.empty(num_rows, 7168, device="cuda")
    sum_parts_reference(whole.float(), 4, wide)
    want = wide.to(torch.bfloat16)
    torch.testing.assert_close(added(), want)
    assert torch.equal(replayed(added), added())
    assert not torch.allclose(added(3), want, rtol=2e-2)
    between = whole[:num_rows].clone()
    for part in range(1, 4):
        between += whole[part * step : part * step + num_rows]
    assert not torch.allclose(between, want, rtol=2e-2), "a rounding after each part would not show"
