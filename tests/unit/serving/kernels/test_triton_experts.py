"""The routed experts in Triton's interpreter, whose FP8 is right to one step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp, grouped_mlp_fp8_reference
from serving.kernels.libraries import expert_of_rows
from serving.kernels.quant import (
    Fp8Weight,
    quantise_block_fp8,
    quantise_rows_fp8_reference,
    silu_mul_reference,
)

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import expert_rows, placing
from serving.kernels.triton import experts as device

# What pads a tile is whatever was there; the interpreter computes with it too, and NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Distinct experts a token, the low ones more often."""
    odds = torch.linspace(3, 0.1, num_experts).expand(num_tokens, -1)
    return torch.multinomial(odds, top_k, generator=torch.Generator().manual_seed(0))


def fp8_stack(*parts: Tensor) -> Fp8Weight:
    """Matrices [E, N, K], each with blocks of its own, one above the other."""
    experts = [[quantise_block_fp8(part[e], (128, 128)) for part in parts] for e in range(len(parts[0]))]
    return Fp8Weight(
        quantised=torch.stack([torch.cat([q for q, _ in expert]) for expert in experts]),
        scales=torch.stack([torch.cat([s for _, s in expert]) for expert in experts]),
    )


def check_slots(placed: placing.Slots, experts: Tensor, num_experts: int) -> None:
    """Each expert's pairs together, in the order of tokens, from a tile's beginning on; each met by a tile of that expert."""
    tile, num_used = placed.tiles.num_rows, int(placed.tiles.num_used)
    slots, chosen = placed.slots_TK.view(-1).long(), experts.view(-1)
    counts = torch.bincount(chosen, minlength=num_experts)
    assert num_used == int((counts + tile - 1).div(tile, rounding_mode="floor").sum()) <= placed.tiles.max_tiles
    assert slots.unique().numel() == slots.numel()
    assert int(slots.max()) < num_used * tile <= placed.num_slots
    assert torch.equal(placed.tiles.expert[slots // tile].long(), chosen)
    for expert in range(num_experts):
        own = slots[chosen == expert]
        if own.numel():
            assert int(own[0]) % tile == 0
            assert torch.equal(own - own[0], torch.arange(own.numel()))


def test_a_librarys_rows_know_their_expert_and_those_behind_have_none() -> None:
    experts = choices(40, 6, 2)
    placed = placing.place(experts, 6, 16)
    placed.tiles.expert[int(placed.tiles.num_used) :] = 77
    rows = expert_of_rows(placed.tiles)
    assert rows.shape == (placed.num_slots,)
    assert rows.dtype == torch.int32
    assert torch.equal(rows[placed.slots_TK.long()].long(), experts)
    used = int(placed.tiles.num_used) * 16
    assert used < len(rows)
    assert (rows[used:] == -1).all()
    assert (rows[:used] >= 0).all()


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "tile"), [(1, 6, 3, 16), (5, 6, 3, 16), (200, 7, 3, 16), (600, 9, 2, 128)]
)
def test_pairs_lie_by_expert_and_in_the_order_of_tokens(
    num_tokens: int, num_experts: int, top_k: int, tile: int
) -> None:
    experts = choices(num_tokens, num_experts, top_k)
    check_slots(placing.place(experts, num_experts, tile), experts, num_experts)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "tile"), [(1, 6, 3, 16), (40, 7, 3, 16), (130, 9, 2, 32)]
)
def test_few_pairs_are_placed_and_sent_at_once(num_tokens: int, num_experts: int, top_k: int, tile: int) -> None:
    x, experts = randn(num_tokens, 200), choices(num_tokens, num_experts, top_k)
    placed, sent = expert_rows.send(x, experts, num_experts, tile, quantise=False)
    check_slots(placed, experts, num_experts)
    assert isinstance(sent, Tensor)
    assert torch.equal(sent[placed.slots_TK.long()], x[:, None].expand(-1, top_k, -1))
    assert torch.equal(placed.slots_TK, placing.place(experts, num_experts, tile).slots_TK)


@pytest.mark.parametrize(("num_tokens", "width", "inner"), [(1, 64, 48), (5, 64, 48), (20, 100, 160), (40, 36, 20)])
def test_fp32_experts_are_the_cpus(num_tokens: int, width: int, inner: int) -> None:
    x, gate_up, down = randn(num_tokens, width), randn(6, 2 * inner, width, seed=1), randn(6, width, inner, seed=2)
    experts, weights = choices(num_tokens, 6, 3), randn(num_tokens, 3, seed=3).abs()
    want = grouped_mlp(x, gate_up, down, experts, weights)
    got = device.grouped_mlp(x, gate_up, down, experts, weights)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)
    shared = randn(4 * inner, width, seed=4), randn(width, 2 * inner, seed=5)
    got = device.grouped_mlp(x, gate_up, down, experts, weights, shared)
    more = want + silu_mul_reference(x @ shared[0].T) @ shared[1].T
    torch.testing.assert_close(got, more, rtol=1e-3, atol=1e-1)
    torch.testing.assert_close(grouped_mlp(x, gate_up, down, experts, weights, shared), more, rtol=1e-3, atol=1e-1)
    assert not torch.allclose(got, want, rtol=1e-3, atol=1e-1)
    down[int(experts[-1, 0])] += 0.5
    assert not torch.allclose(device.grouped_mlp(x, gate_up, down, experts, weights), want, rtol=1e-3, atol=1e-2)


def test_parts_that_are_added_stand_apart() -> None:
    experts, weights = choices(5, 6, 3), randn(5, 3, seed=3).abs()
    slots = placing.place(experts, 6, 16)
    y, parts = randn(slots.num_slots, 40), randn(32, 40, seed=1)
    want = (weights[:, :, None] * y[slots.slots_TK.long()]).sum(1) + parts[:5] + parts[16:21]
    torch.testing.assert_close(expert_rows.combine(y, slots, weights, parts, num_added=2), want)
    assert not torch.allclose(expert_rows.combine(y, slots, weights, parts), want)


def test_experts_nobody_chose_are_not_read() -> None:
    gate_up, down = randn(4, 32, 16), randn(4, 16, 16, seed=1)
    gate_up[1], down[1] = float("nan"), float("nan")
    experts = torch.tensor([[0, 2], [2, 3], [3, 0]])
    assert torch.isfinite(device.grouped_mlp(randn(3, 16), gate_up, down, experts, torch.ones(3, 2))).all()


def test_a_token_does_not_depend_on_its_batch() -> None:
    x, gate_up, down = randn(20, 32), randn(6, 48, 32, seed=1), randn(6, 32, 24, seed=2)
    experts, weights = choices(20, 6, 3), randn(20, 3, seed=3).abs()
    together = device.grouped_mlp(x, gate_up, down, experts, weights)
    alone = device.grouped_mlp(x[7:8], gate_up, down, experts[7:8], weights[7:8])
    assert torch.equal(together[7:8], alone)


@pytest.mark.parametrize(("num_tokens", "width", "inner"), [(1, 128, 128), (5, 64, 48), (9, 208, 160)])
def test_fp8_experts_are_the_references(num_tokens: int, width: int, inner: int) -> None:
    x = randn(num_tokens, width)
    gate, up, down = (randn(6, *shape, seed=1 + i) for i, shape in enumerate([(inner, width)] * 2 + [(width, inner)]))
    gate_up_fp8, down_fp8 = fp8_stack(gate, 4 * up), fp8_stack(down)
    experts, weights = choices(num_tokens, 6, 3), randn(num_tokens, 3, seed=3).abs()
    rows = quantise_rows_fp8_reference(x)
    want = grouped_mlp_fp8_reference(rows, gate_up_fp8, down_fp8, experts, weights).float()

    def error(got: Tensor) -> float:
        return float((got.float() - want).norm() / want.norm())

    assert error(device.grouped_mlp(rows, gate_up_fp8, down_fp8, experts, weights)) < 0.1
    assert error(device.grouped_mlp(x, gate_up_fp8, down_fp8, experts, weights)) < 0.15
    gate_up_fp8.scales[:, -1] *= 2
    assert error(device.grouped_mlp(rows, gate_up_fp8, down_fp8, experts, weights)) > 0.2


def test_the_fp8_reference_is_near_the_exact_experts() -> None:
    x, gate, up, down = randn(20, 128), randn(6, 96, 128, seed=1), randn(6, 96, 128, seed=2), randn(6, 128, 96, seed=3)
    experts, weights = choices(20, 6, 3), randn(20, 3, seed=4).abs()
    want = grouped_mlp(x, torch.cat([gate, up], dim=1), down, experts, weights)
    got = grouped_mlp(x, fp8_stack(gate, up), fp8_stack(down), experts, weights).float()
    assert float((got - want).norm() / want.norm()) < 0.08


def test_no_tokens_make_no_rows() -> None:
    out = device.grouped_mlp(
        torch.empty(0, 16), randn(4, 32, 16), randn(4, 16, 16), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    )
    assert out.shape == (0, 16)
