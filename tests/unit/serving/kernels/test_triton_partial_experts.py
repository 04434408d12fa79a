"""Tokens that have an expert for some of their picks or for none, in Triton's interpreter; memory is poisoned before it is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp, grouped_mlp_fp8_reference
from serving.kernels.quant import Fp8Weight, quantise_block_fp8, quantise_rows_fp8_reference, silu_mul_reference

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import expert_rows, placing
from serving.kernels.triton import experts as device
from serving.kernels.triton.gemm import Tiles, sum_splits

# What pads a tile is whatever was there; the interpreter computes with it too, and NumPy warns.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poison")]

WIDTH, INNER, NUM_EXPERTS = 36, 20, 4
# Tokens, picks, share of picks with an expert.
CASES = [(7, 8, 0.3), (5, 8, 0.0), (20, 3, 0.08)]


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody has written is NaN, or the largest number there is."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["at once", "by token", "by slot"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Few pairs are placed and sent by one launch; of many, rows are sent by token or fetched by slot."""
    way: str = request.param
    if way != "at once":
        monkeypatch.setattr(expert_rows, "_COUNTED_BY_ALL", 2)
    monkeypatch.setattr(placing.Partial, "is_sparse", lambda *_: way == "by slot")
    return way


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(num_tokens: int, top_k: int, share: float, num_experts: int = NUM_EXPERTS) -> Tensor:
    """Distinct experts a token, in any of its places."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(num_tokens, max(top_k, num_experts), generator=generator).argsort(dim=1)[:, :top_k]
    used = (order < num_experts) & (torch.rand(num_tokens, top_k, generator=generator) < share)
    return torch.where(used, order, -1)


def poisoned(x: Tensor, experts: Tensor) -> Tensor:
    return torch.where((experts >= 0).any(dim=1)[:, None], x, float("nan"))


def weights_for(experts: Tensor) -> Tensor:
    return torch.where(experts >= 0, randn(*experts.shape, seed=3).abs(), float("nan"))


def fp8_stack(*parts: Tensor) -> Fp8Weight:
    experts = [[quantise_block_fp8(part[e], (128, 128)) for part in parts] for e in range(len(parts[0]))]
    return Fp8Weight(
        quantised=torch.stack([torch.cat([q for q, _ in expert]) for expert in experts]),
        scales=torch.stack([torch.cat([s for _, s in expert]) for expert in experts]),
    )


@pytest.mark.parametrize(("num_tokens", "top_k", "share"), CASES)
@pytest.mark.parametrize("tile", [16, 128])
def test_only_pairs_with_an_expert_have_slots(num_tokens: int, top_k: int, share: float, tile: int) -> None:
    experts, x = choices(num_tokens, top_k, share), randn(num_tokens, 200)
    slots, sent = expert_rows.send(
        poisoned(x, experts), experts, NUM_EXPERTS, tile, quantise=False, partial=placing.Partial()
    )
    used = experts >= 0
    assert torch.equal(slots.slots_TK >= 0, used)
    assert bool((slots.slots_TK[~used] == -1).all())
    taken, chosen = slots.slots_TK[used].long(), experts[used]
    counts = torch.bincount(chosen, minlength=NUM_EXPERTS)
    num_tiles = int(slots.tiles.num_used)
    assert num_tiles == int((counts + tile - 1).div(tile, rounding_mode="floor").sum()) <= slots.tiles.max_tiles
    assert torch.equal(slots.tiles.expert[taken // tile].long(), chosen)
    for expert in range(NUM_EXPERTS):
        own = taken[chosen == expert]
        assert torch.equal(own, own[:1] + torch.arange(own.numel()))
    assert isinstance(sent, Tensor)
    assert torch.equal(sent[taken], x[used.nonzero()[:, 0]])
    others = torch.ones(slots.num_slots, dtype=torch.bool)
    others[taken] = False
    assert bool(sent[others].isnan().all()), "written for nobody"


@pytest.mark.parametrize(("num_tokens", "top_k", "share"), CASES[:2])
@pytest.mark.parametrize("fill", [True, False])
def test_fp32_experts_are_the_cpus(num_tokens: int, top_k: int, share: float, fill: bool) -> None:
    experts = choices(num_tokens, top_k, share)
    x, weights = poisoned(randn(num_tokens, WIDTH), experts), weights_for(experts)
    gate_up, down = randn(NUM_EXPERTS, 2 * INNER, WIDTH, seed=1), randn(NUM_EXPERTS, WIDTH, INNER, seed=2)
    want = grouped_mlp(x, gate_up, down, experts, weights, partial=True)
    got = device.grouped_mlp(x, gate_up, down, experts, weights, partial=placing.Partial(), fill=fill)
    used = (experts >= 0).any(dim=1)
    torch.testing.assert_close(got[used], want[used], rtol=1e-3, atol=1e-2)
    assert bool((got[~used] == 0).all() if fill else got[~used].isnan().all())
    if used.any():
        down[int(experts[used].max())] += 0.5
        hint = placing.Partial(num_used=3, max_used=int((experts >= 0).sum()))
        other = device.grouped_mlp(x, gate_up, down, experts, weights, partial=hint, fill=fill)
        assert not torch.allclose(other[used], want[used], rtol=1e-3, atol=1e-2)
        want = grouped_mlp(x, gate_up, down, experts, weights, partial=True)
        torch.testing.assert_close(other[used], want[used], rtol=1e-3, atol=1e-2)


def test_all_pairs_with_an_expert_are_as_those_that_may_lack_none() -> None:
    experts, x = choices(7, NUM_EXPERTS, 1.0), randn(7, WIDTH)
    weights = weights_for(experts)
    gate_up, down = randn(NUM_EXPERTS, 2 * INNER, WIDTH, seed=1), randn(NUM_EXPERTS, WIDTH, INNER, seed=2)
    want = device.grouped_mlp(x, gate_up, down, experts, weights)
    for fill in (True, False):
        assert torch.equal(
            device.grouped_mlp(x, gate_up, down, experts, weights, partial=placing.Partial(), fill=fill), want
        )
    assert not torch.equal(device.grouped_mlp(x.flip(0), gate_up, down, experts, weights), want)


def test_many_pairs_are_counted_by_many_programs(way: str) -> None:
    experts = choices(600, 8, 0.3)
    slots = placing.place(experts, NUM_EXPERTS, 16, placing.Partial())
    used = experts >= 0
    assert torch.equal(slots.slots_TK >= 0, used)
    assert (slots.source_S is not None) == (way == "by slot")
    if slots.source_S is not None:
        assert torch.equal(slots.source_S[slots.slots_TK[used].long()].long(), used.flatten().nonzero()[:, 0])
        assert int((slots.source_S >= 0).sum()) == int(used.sum())
    for expert in range(NUM_EXPERTS):
        own = slots.slots_TK[experts == expert]
        assert torch.equal(own, own[:1] + torch.arange(own.numel(), dtype=torch.int32))


def test_one_slot_of_many_picks_takes_memory_for_one_row_a_token() -> None:
    experts = choices(200, 9, 0.1, num_experts=1)
    assert 1 < int((experts == 0).sum()) <= 30
    slots = placing.place(experts, 1, 16, placing.Partial(num_used=20))
    assert slots.num_slots <= 200 + 16
    assert slots.tiles.num_expected == 2
    assert int(slots.tiles.num_used) == -(-int((experts == 0).sum()) // 16)
    assert placing.place(experts, 1, 16, placing.Partial(max_used=30)).num_slots <= 48


@pytest.mark.parametrize("way", ["by token"], indirect=True)
def test_rows_are_fetched_where_most_tokens_have_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    experts = choices(200, 8, 0.1)
    assert placing.Partial(num_used=99).is_sparse(experts, 1)
    assert not placing.Partial(num_used=100).is_sparse(experts, 1)
    assert not placing.Partial().is_sparse(experts, 1)


@pytest.mark.parametrize(("num_tokens", "share"), [(4, 0.4), (5, 0.0)])
def test_what_every_token_takes_is_added_to_nothing_too(num_tokens: int, share: float) -> None:
    experts = choices(num_tokens, 8, share)
    x, weights = randn(num_tokens, WIDTH), weights_for(experts)
    gate_up, down = randn(NUM_EXPERTS, 2 * INNER, WIDTH, seed=1), randn(NUM_EXPERTS, WIDTH, INNER, seed=2)
    shared = randn(4 * INNER, WIDTH, seed=4), randn(WIDTH, 2 * INNER, seed=5)
    routed = grouped_mlp(x, gate_up, down, experts, weights, partial=True)
    want = routed + silu_mul_reference(x @ shared[0].T) @ shared[1].T
    got = device.grouped_mlp(x, gate_up, down, experts, weights, shared, partial=placing.Partial())
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-1)
    assert not torch.allclose(got, routed, rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize(("num_tokens", "share", "num_used", "fill"), [(5, 0.3, 1, True), (4, 0.3, 500, False)])
def test_fp8_experts_are_the_references(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, share: float, num_used: int, fill: bool
) -> None:
    """With so many pairs expected, in the tiles of many rows."""
    if num_used > 100:
        monkeypatch.setattr(device, "grouped_tile", lambda *_: 128)
    width, inner = 144, 160
    experts = choices(num_tokens, 8, share)
    x, weights = randn(num_tokens, width), weights_for(experts)
    gate, up, down = (
        randn(NUM_EXPERTS, *shape, seed=1 + i) for i, shape in enumerate([(inner, width)] * 2 + [(width, inner)])
    )
    gate_up_fp8, down_fp8 = fp8_stack(gate, 4 * up), fp8_stack(down)
    rows = quantise_rows_fp8_reference(x)
    want = grouped_mlp_fp8_reference(rows, gate_up_fp8, down_fp8, experts, weights).float()
    used = (experts >= 0).any(dim=1)
    rows.scales[~used] = float("nan")
    partial = placing.Partial(num_used=num_used)

    def error(got: Tensor) -> float:
        assert bool((got[~used] == 0).all() if fill else got[~used].isnan().all())
        return float((got.float() - want)[used].norm() / want.norm().clamp(min=1e-9))

    assert error(device.grouped_mlp(rows, gate_up_fp8, down_fp8, experts, weights, partial=partial, fill=fill)) < 0.1
    if fill:
        plain = poisoned(x, experts)
        got = device.grouped_mlp(plain, gate_up_fp8, down_fp8, experts, weights, partial=partial, fill=fill)
        assert error(got) < 0.15
    else:
        gate_up_fp8.scales[:, -1] *= 2
        assert (
            error(device.grouped_mlp(rows, gate_up_fp8, down_fp8, experts, weights, partial=partial, fill=fill)) > 0.2
        )


@pytest.mark.parametrize("way", ["by token"], indirect=True)
@pytest.mark.parametrize(("num_tokens", "top_k", "share"), [*CASES[:2], (30, 8, 0.15)])
def test_sums_of_one_row_may_come_from_the_product(num_tokens: int, top_k: int, share: float) -> None:
    experts = choices(num_tokens, top_k, share)
    weights = weights_for(experts)
    slots = placing.place(experts, NUM_EXPERTS, 16, placing.Partial())
    alone = expert_rows.Alone.of(slots, weights)
    sent = expert_rows.scatter(randn(num_tokens, 200), slots, quantise=False, alone=alone)
    assert isinstance(sent, Tensor)
    # What the product leaves at each place.
    into = torch.full((slots.num_slots + num_tokens, 200), float("nan"))
    is_alone = alone.place_S >= slots.num_slots
    into[alone.place_S.long()] = torch.where(is_alone[:, None], sent * alone.factor_S[:, None], sent)
    got = expert_rows.combine(into[: slots.num_slots], slots, weights, into_TD=into[slots.num_slots :])
    want = expert_rows.combine(sent, slots, weights)
    assert torch.equal(got, want)
    used_T = (experts >= 0).sum(1)
    assert int(is_alone.sum()) == int((used_T == 1).sum())
    assert bool((want[used_T == 0] == 0).all())
    if used_T.any():
        assert not torch.equal(expert_rows.combine(sent, slots, 2 * weights), got)


@pytest.mark.parametrize("way", ["by token"], indirect=True)
@pytest.mark.parametrize("share", [0.05, 0.12, 0.3])
def test_places_are_for_many_tokens_of_which_most_have_one_expert(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    experts = choices(100, 8, 1.0, num_experts=8)
    hint = placing.Partial(num_used=int(800 * share))
    assert not expert_rows.mostly_alone(experts, 8, 128, hint), "few tokens"
    monkeypatch.setattr(expert_rows, "_MANY_TOKENS", 100)
    assert expert_rows.mostly_alone(experts, 8, 128, hint) == (share == 0.12)
    assert not expert_rows.mostly_alone(experts, 8, 16, hint), "tiles of few rows"


@pytest.mark.parametrize("way", ["by token"], indirect=True)
@pytest.mark.parametrize("silu", [False, True])
def test_parts_of_rows_in_no_tile_are_not_summed(silu: bool) -> None:
    rows, columns = 48, 130
    tiles = Tiles(
        expert=torch.zeros(3, dtype=torch.int32), num_used=torch.tensor([2]), max_tiles=3, num_rows=16, num_expected=1
    )
    parts = randn(2 * rows, 2 * columns if silu else columns)
    total = parts.view(2, rows, -1).sum(0)
    out = torch.full((rows, columns), 7.0)
    sum_splits(parts, out, num_splits=2, silu=silu, tiles=tiles)
    torch.testing.assert_close(out[:32], (silu_mul_reference(total) if silu else total)[:32])
    assert bool((out[32:] == 7).all())
    sum_splits(parts, out, num_splits=2, silu=silu)
    assert bool((out[32:] != 7).all())
