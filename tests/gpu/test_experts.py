"""The routed experts on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp, grouped_mlp_fp8_reference, grouped_mlp_reference
from serving.kernels.quant import Fp8Weight, quantise_block_fp8, quantise_rows_fp8, silu_mul_reference
from serving.kernels.triton import experts as device
from tests.gpu.graphs import replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def routing(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distinct experts a token, the low ones more often, and weights."""
    odds = torch.linspace(3, 0.1, num_experts, device="cuda").expand(num_tokens, -1)
    experts = torch.multinomial(odds, top_k, generator=torch.Generator("cuda").manual_seed(0))
    return experts, randn(num_tokens, top_k, seed=3).float().abs()


def fp8_stack(*parts: Tensor) -> Fp8Weight:
    experts = [[quantise_block_fp8(part[e], (128, 128)) for part in parts] for e in range(len(parts[0]))]
    return Fp8Weight(
        quantised=torch.stack([torch.cat([q for q, _ in expert]) for expert in experts]),
        scales=torch.stack([torch.cat([s for _, s in expert]) for expert in experts]),
    )


def fp8_rows(*parts: Tensor) -> Fp8Weight:
    pairs = [quantise_block_fp8(part, (128, 128)) for part in parts]
    return Fp8Weight(quantised=torch.cat([q for q, _ in pairs]), scales=torch.cat([scales for _, scales in pairs]))


def shared_experts(num_shared: int, width: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = randn(2 * num_shared * inner, width, seed=5) / width**0.5
    return gate_up.to(dtype), (randn(width, num_shared * inner, seed=6) / inner**0.5).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


# Tokens from decode to prefill; widths with and without whole blocks of 128.
CASES = [(1, 8, 4, 256, 128), (5, 16, 4, 256, 64), (40, 64, 6, 2048, 1408), (300, 16, 4, 256, 64)]
CASES += [(700, 16, 4, 512, 208), (3000, 12, 4, 1024, 384)]
# Shared experts beside the routed ones and apart; more pairs than one launch places, more experts than 256.
CASES += [(64, 64, 6, 512, 256), (65, 64, 6, 512, 256), (200, 256, 8, 256, 128), (20, 300, 8, 256, 128)]


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k", "width", "inner"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_experts(
    num_tokens: int, num_experts: int, top_k: int, width: int, inner: int, dtype: torch.dtype
) -> None:
    x = randn(num_tokens, width).to(dtype)
    gate_up = (randn(num_experts, 2 * inner, width, seed=1) / width**0.5).to(dtype)
    down = (randn(num_experts, width, inner, seed=2) / inner**0.5).to(dtype)
    experts, weights = routing(num_tokens, num_experts, top_k)
    got = grouped_mlp(x, gate_up, down, experts, weights)
    want = grouped_mlp_reference(x.double(), gate_up.double(), down.double(), experts, weights.double())
    assert got.dtype == dtype
    assert error(got, want) < (5e-3 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(replayed(lambda: grouped_mlp(x, gate_up, down, experts, weights)), got)
    for num_shared in (1, 2):
        shared = shared_experts(num_shared, width, inner, dtype)
        more = grouped_mlp(x, gate_up, down, experts, weights, shared)
        expected = want + silu_mul_reference(x.double() @ shared[0].double().T) @ shared[1].double().T
        assert error(more, expected) < (5e-3 if dtype == torch.bfloat16 else 1e-5)
        assert error(more, want) > 0.05
        assert torch.equal(replayed(lambda: grouped_mlp(x, gate_up, down, experts, weights, shared)), more)  # noqa: B023
    assert error(grouped_mlp(x, gate_up.roll(1, dims=0), down, experts, weights), want) > 0.5


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k", "width", "inner"), [*CASES, (256, 1, 1, 7168, 2048)])
def test_fp8_experts(num_tokens: int, num_experts: int, top_k: int, width: int, inner: int) -> None:
    x = randn(num_tokens, width)
    gate, up = (randn(num_experts, inner, width, seed=seed) / width**0.5 for seed in (1, 2))
    gate_up, down = fp8_stack(gate, 4 * up), fp8_stack(randn(num_experts, width, inner, seed=4) / inner**0.5)
    experts, weights = routing(num_tokens, num_experts, top_k)
    got = grouped_mlp(x, gate_up, down, experts, weights)
    rows = quantise_rows_fp8(x)
    # The hidden values are rounded to FP8 from sums of another order: a few part.
    assert error(got, grouped_mlp_fp8_reference(rows, gate_up, down, experts, weights)) < 1e-2
    assert torch.equal(grouped_mlp(rows, gate_up, down, experts, weights), got)
    assert torch.equal(replayed(lambda: grouped_mlp(x, gate_up, down, experts, weights)), got)
    everyone = torch.zeros(num_tokens, 1, dtype=torch.int64, device="cuda")
    for num_shared in (1, 2):
        hidden = num_shared * inner
        if hidden % 128:
            # Gate and up of one matrix may not share a scale's block: such models are not kept in FP8.
            continue
        stacked = (
            fp8_stack(randn(1, hidden, width, seed=7) / width**0.5, randn(1, hidden, width, seed=8) / width**0.5),
            fp8_stack(randn(1, width, hidden, seed=9) / inner**0.5),
        )
        beside, below = (Fp8Weight(quantised=part.quantised[0], scales=part.scales[0]) for part in stacked)
        added = grouped_mlp_fp8_reference(rows, *stacked, everyone, torch.ones_like(everyone).float())
        more = grouped_mlp(rows, gate_up, down, experts, weights, (beside, below))
        assert error(more, got + added) < 1.5e-2
        assert error(more, got) > 0.05
        again = replayed(lambda: grouped_mlp(rows, gate_up, down, experts, weights, (beside, below)))  # noqa: B023
        assert torch.equal(again, more)
    gate_up.scales[:, -1] *= 2
    assert error(grouped_mlp(x, gate_up, down, experts, weights), got) > 0.05


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 16, 40])
def test_rows_taken_as_soon_as_their_tile_is_done_are_those_of_the_whole_product(
    num_tokens: int, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second product beside the end of the first, and behind it: the same bits every time, whatever lay in memory."""
    num_experts, width, inner = 48, 2048, 768
    x = [randn(num_tokens, width, seed=seed) for seed in (0, 1)]
    gate_up, down = (
        randn(num_experts, *shape, seed=7) / shape[1] ** 0.5 for shape in ((2 * inner, width), (width, inner))
    )
    shared = shared_experts(1, width, inner, torch.bfloat16)
    if fp8:
        weights = fp8_stack(gate_up[:, :inner], gate_up[:, inner:]), fp8_stack(down)
        beside = fp8_rows(shared[0][:inner], shared[0][inner:]), fp8_rows(shared[1])
    choice, factors = routing(num_tokens, num_experts, 6)

    def both() -> list[Tensor]:
        if fp8:
            return [grouped_mlp(quantise_rows_fp8(each), *weights, choice, factors, beside) for each in x]
        return [grouped_mlp(each, gate_up, down, choice, factors, shared) for each in x]

    send = device.send
    monkeypatch.setattr(device, "send", lambda *args, num_beside, **kwargs: send(*args, **kwargs))
    want = both()
    monkeypatch.setattr(device, "send", send)
    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    for _ in range(200):
        for out in got:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert not torch.equal(got[0], want[1])


def test_a_graph_follows_the_choice_of_experts() -> None:
    x, gate_up, down = randn(64, 512), randn(16, 512, 512, seed=1) / 20, randn(16, 512, 256, seed=2) / 16
    experts, weights = routing(64, 16, 4)
    choices = [experts.clone(), (experts + 5) % 16]
    wants = [grouped_mlp(x, gate_up, down, choice, weights) for choice in choices]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_mlp(x, gate_up, down, experts, weights)
    for choice, want in zip(choices, wants, strict=True):
        experts.copy_(choice)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)
    assert error(wants[0], wants[1]) > 0.5


# In large tiles, and in the ring's of 16: placed by one launch, and by more.
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(500, 8), (100, 8), (200, 32), (1100, 80)])
def test_all_tokens_to_one_expert_and_none_to_the_rest(num_tokens: int, num_experts: int) -> None:
    x = randn(num_tokens, 256)
    gate_up, down = randn(num_experts, 512, 256, seed=1) / 16, randn(num_experts, 256, 256, seed=2) / 16
    chosen = torch.arange(num_experts, device="cuda") == 3
    gate_up[~chosen], down[~chosen] = float("nan"), float("nan")
    experts, ones = torch.full((num_tokens, 1), 3, device="cuda"), torch.ones(num_tokens, 1, device="cuda")
    got = grouped_mlp(x, gate_up, down, experts, ones)
    want = grouped_mlp_reference(x.float(), gate_up.float(), down.float(), experts, ones)
    assert error(got, want) < 5e-3
    assert error(got.roll(1, dims=0), want) > 0.5
