"""Tokens that have an expert for some of their picks or for none, on the device; what is not written is poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp, grouped_mlp_fp8_reference, grouped_mlp_reference
from serving.kernels.quant import Fp8Weight, QuantisedRows, quantise_rows_fp8, silu_mul_reference
from serving.kernels.triton import experts as device
from tests.gpu.graphs import replayed
from tests.gpu.test_experts import error, fp8_stack, randn, shared_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poison"),
]


@dataclass(frozen=True)
class Case:
    """`used`: pairs with an expert, about. `hint`: what the caller expects; None: nothing."""

    num_tokens: int
    num_experts: int
    top_k: int
    width: int
    inner: int
    used: int
    hint: int | None = None


FEW_BY_SLOT = Case(8320, 1, 9, 1024, 512, 230, 230)
# Of the tokens that have an expert most have one; most have more.
MOSTLY_ALONE = Case(6000, 12, 8, 1024, 384, 6400)
RARELY_ALONE = Case(6000, 12, 8, 1024, 384, 12000)
CASES = [
    # Placed by one launch, in the ring.
    Case(1, 8, 4, 256, 128, 2),
    Case(64, 16, 8, 512, 256, 200),
    Case(64, 16, 8, 512, 256, 0),
    # By token: in the ring, in tiles of many rows.
    Case(400, 64, 8, 512, 256, 500),
    Case(3000, 12, 8, 1024, 384, 9000),
    Case(3000, 12, 8, 1024, 384, 0),
    MOSTLY_ALONE,
    RARELY_ALONE,
    # By slot: a fixed dispatch to many ranks with one or two experts each; the parts of K are summed of few rows alone.
    FEW_BY_SLOT,
    Case(8320, 1, 9, 1024, 512, 0, 230),
    Case(4608, 2, 8, 1024, 512, 20, 24),
    # Far more than expected.
    Case(2000, 2, 8, 512, 256, 1800, 40),
]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        if out.is_cuda and out.is_floating_point():
            out.view(torch.uint8).fill_(255)
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def placed_alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each call whose second product brings what one expert makes of a token to the token's place."""
    num_tokens: list[int] = []
    alone = device._alone

    def counted(x_TD: Tensor | QuantisedRows, *args: Any) -> Tensor:
        out_TD = alone(x_TD, *args)
        num_tokens.append(len(out_TD))
        return out_TD

    monkeypatch.setattr(device, "_alone", counted)
    return num_tokens


def routing(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct experts a token, -1 in the other places; weights, NaN there; and which tokens have an expert."""
    generator = torch.Generator("cuda").manual_seed(0)
    among = max(case.top_k, case.num_experts)
    order = torch.rand(case.num_tokens, among, generator=generator, device="cuda").argsort(dim=1)[:, : case.top_k]
    possible = order < case.num_experts
    share = case.used / max(1, int(possible.sum()))
    taken = possible & (torch.rand(order.shape, generator=generator, device="cuda") < share)
    weights = randn(*order.shape, seed=3).float().abs()
    return torch.where(taken, order, -1), torch.where(taken, weights, float("nan")), taken.any(dim=1)


def matrices(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = (randn(case.num_experts, case.inner, case.width, seed=seed) / case.width**0.5 for seed in (1, 2))
    return gate, 4 * up, randn(case.num_experts, case.width, case.inner, seed=4) / case.inner**0.5


def check(got: Tensor, want: Tensor, used_T: Tensor, *, fill: bool, limit: float) -> None:
    if used_T.any():
        assert error(got[used_T], want[used_T]) < limit
    assert bool((got[~used_T] == 0).all() if fill else got[~used_T].isnan().all())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_experts(case: Case, dtype: torch.dtype, placed_alone: list[int]) -> None:
    experts, weights, used_T = routing(case)
    x = torch.where(used_T[:, None], randn(case.num_tokens, case.width), float("nan")).to(dtype)
    gate, up, down = matrices(case)
    gate_up, down = torch.cat([gate, up], dim=1).to(dtype), down.to(dtype)
    taken = experts >= 0
    clean = torch.where(used_T[:, None], x, 0).double()
    want = grouped_mlp_reference(
        clean, gate_up.double(), down.double(), experts.clamp(min=0), weights.where(taken, 0.0).double()
    )
    limit = 5e-3 if dtype == torch.bfloat16 else 1e-5

    def call(fill: bool, gate_up: Tensor = gate_up) -> Tensor:
        return grouped_mlp(x, gate_up, down, experts, weights, partial=True, fill=fill, num_used=case.hint)

    for fill in (True, False):
        got = call(fill)
        check(got, want, used_T, fill=fill, limit=limit)
        again = replayed(lambda: call(fill))  # noqa: B023
        assert torch.equal(again.nan_to_num(7.0), got.nan_to_num(7.0))
    assert placed_alone == [], "nobody knows that most have one expert"
    exact = grouped_mlp(
        x, gate_up, down, experts, weights, partial=True, num_used=int(taken.sum()), max_used=int(taken.sum())
    )
    assert placed_alone == ([case.num_tokens] if case == MOSTLY_ALONE and dtype == torch.bfloat16 else [])
    check(exact, want, used_T, fill=True, limit=limit)
    if used_T.any():
        assert error(call(True, gate_up.flip(1))[used_T], want[used_T]) > 0.5
    shared = shared_experts(1, case.width, case.inner, dtype)
    clean = clean.to(dtype)
    more = grouped_mlp(clean, gate_up, down, experts, weights, shared, partial=True, num_used=case.hint)
    beside = silu_mul_reference(clean.double() @ shared[0].double().T) @ shared[1].double().T
    assert error(more, want + beside) < limit if used_T.any() else bool((more == 0).all())


@pytest.mark.parametrize("case", [*CASES, Case(8320, 1, 9, 7168, 2048, 230, 230)], ids=str)
def test_fp8_experts(case: Case, placed_alone: list[int]) -> None:
    experts, weights, used_T = routing(case)
    x = torch.where(used_T[:, None], randn(case.num_tokens, case.width), float("nan"))
    gate, up, down = matrices(case)
    gate_up_fp8, down_fp8 = fp8_stack(gate, up), fp8_stack(down)
    rows = quantise_rows_fp8(torch.where(used_T[:, None], x, 0))
    want = grouped_mlp_fp8_reference(rows, gate_up_fp8, down_fp8, experts, weights)
    rows.scales[~used_T] = float("nan")
    # As they come from other ranks: scales row by row.
    arrived = QuantisedRows(values=rows.values, scales=rows.scales.contiguous())

    def call(x: Tensor | QuantisedRows, fill: bool, gate_up: Fp8Weight = gate_up_fp8) -> Tensor:
        return grouped_mlp(x, gate_up, down_fp8, experts, weights, partial=True, fill=fill, num_used=case.hint)

    for fill in (True, False):
        got = call(rows, fill)
        check(got, want, used_T, fill=fill, limit=1e-2)
        for other in (x, arrived):
            assert torch.equal(call(other, fill)[used_T], got[used_T])
        again = replayed(lambda: call(arrived, fill))  # noqa: B023
        assert torch.equal(again.nan_to_num(7.0), got.nan_to_num(7.0))
    assert placed_alone == [], "nobody knows that most have one expert"
    num_used = int((experts >= 0).sum())

    def exact(weights: Tensor) -> Tensor:
        return grouped_mlp(
            arrived, gate_up_fp8, down_fp8, experts, weights, partial=True, num_used=num_used, max_used=num_used
        )

    check(exact(weights), want, used_T, fill=True, limit=1e-2)
    assert placed_alone == ([case.num_tokens] if case == MOSTLY_ALONE else [])
    if case == MOSTLY_ALONE:
        assert torch.equal(exact(weights), call(rows, True)), "sums of one row"
        assert torch.equal(replayed(lambda: exact(weights)), exact(weights))
        assert not torch.equal(exact(weights.flip(0).nan_to_num(0.5)), exact(weights))
    if used_T.any():
        gate_up_fp8.scales[:, -1] *= 2
        assert error(call(rows, True)[used_T], want[used_T]) > 0.05


def test_a_graph_follows_the_choice_of_experts() -> None:
    case = FEW_BY_SLOT
    experts, weights, _ = routing(case)
    x = randn(case.num_tokens, case.width)
    gate, up, down = matrices(case)
    gate_up = torch.cat([gate, up], dim=1)
    choices = [experts, experts.roll(1000, dims=0), torch.full_like(experts, -1), experts.flip(0)]
    weights = weights.nan_to_num(0.5)

    def call(experts: Tensor) -> Tensor:
        return grouped_mlp(x, gate_up, down, experts, weights, partial=True, num_used=case.hint)

    wants = [call(chosen) for chosen in choices]
    held = experts.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(held)
    for chosen, want in zip(choices, wants, strict=True):
        held.copy_(chosen)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)
    assert not torch.equal(wants[0], wants[1])
