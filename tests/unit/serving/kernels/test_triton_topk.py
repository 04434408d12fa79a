"""The gate kernel in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.kernels.topk import gate_topk_reference

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import topk as device


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(experts_TK.shape[0], num_experts).scatter_add_(1, experts_TK, weights_TK)


@pytest.mark.parametrize(
    ("num_experts", "groups", "kept", "top_k"), [(16, 1, 1, 4), (16, 4, 2, 4), (24, 3, 2, 6), (64, 8, 4, 8)]
)
@pytest.mark.parametrize("renormalise", [True, False])
def test_experts_and_weights_are_the_references(
    num_experts: int, groups: int, kept: int, top_k: int, renormalise: bool
) -> None:
    logits, bias = randn(20, num_experts + 3)[:, :num_experts], randn(num_experts, seed=1)
    settings: dict[str, Any] = {"num_groups": groups, "num_groups_kept": kept, "top_k": top_k}
    got = device.gate_topk(logits, bias, **settings, renormalise=renormalise, scaling=2.5)
    want = gate_topk_reference(logits, bias, **settings, renormalise=renormalise, scaling=2.5)
    torch.testing.assert_close(dense(*got, num_experts), dense(*want, num_experts))
    unbiased = gate_topk_reference(logits, 0 * bias, **settings, renormalise=renormalise, scaling=2.5)
    assert not torch.allclose(dense(*got, num_experts), dense(*unbiased, num_experts))


def test_equal_scores_go_to_the_lower_expert_of_the_lower_group() -> None:
    experts, weights = device.gate_topk(
        torch.zeros(1, 16), torch.zeros(16), num_groups=4, num_groups_kept=2, top_k=3, renormalise=True, scaling=1.0
    )
    assert experts.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))


def test_damaged_logits_still_name_experts_that_exist_and_differ() -> None:
    logits = torch.full((1, 12), math.nan)
    experts, _ = device.gate_topk(
        logits, torch.zeros(12), num_groups=3, num_groups_kept=2, top_k=6, renormalise=True, scaling=1.0
    )
    assert len(set(experts[0].tolist())) == 6
    assert min(experts[0].tolist()) >= 0
    assert max(experts[0].tolist()) < 12
