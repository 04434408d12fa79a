"""Products of few rows on Hopper's ring, the kernel's own source in `tests.gluon_interpreter`: who computes what from where.

The launchers are the real ones, the processors three, so that each has several units and its ring turns. What nobody has
written is NaN, or points far away: rows that pad a tile, tiles behind the last, slots of the ring.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp_fp8_reference, grouped_mlp_reference
from serving.kernels.gemm import linear_by_head_reference, linear_fp8_reference
from serving.kernels.quant import (
    Fp8Weight,
    QuantisedRows,
    quantise_block_fp8,
    quantise_rows_fp8_reference,
    silu_mul_reference,
)

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.gluon import few_rows as ring
from serving.kernels.gluon import few_rows_ring, mla_segments
from serving.kernels.triton import expert_rows, placing
from serving.kernels.triton import experts as device
from serving.kernels.triton.product import RING_TILE
from tests import gluon_interpreter

# What pads a tile is NaN; Triton's interpreter computes with it too, and NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NUM_PROCESSORS = 3
# Sums have another order: a hidden value between two of FP8 goes either way.
FP8_BOUND = 1e-2


def early(*, KNOWN: bool, **_: object) -> set[str]:
    """Weights always are; which expert has which tile, if the launcher says so."""
    weights = {"w_desc", "sw_desc", "w_scale_ptr", "sw_scale_ptr"}
    return weights | ({"tile_expert_ptr", "num_tiles_ptr"} if KNOWN else set())


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    gluon_interpreter.install(monkeypatch, few_rows_ring, mla_segments, name="few_rows_kernel", early=early)
    monkeypatch.setattr(few_rows_ring, "FP8_MAX", 448.0)
    monkeypatch.setattr(ring, "few_rows_kernel", few_rows_ring.few_rows_kernel)
    monkeypatch.setattr(ring, "num_processors", lambda _device: NUM_PROCESSORS)
    monkeypatch.setattr(ring, "_descriptor", gluon_interpreter.Descriptor)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 1 << 30)

    return of


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Distinct experts a token, the low ones more often."""
    odds = torch.linspace(3, 0.1, num_experts).expand(num_tokens, -1)
    return torch.multinomial(odds, top_k, generator=torch.Generator().manual_seed(1))


def error(got: Tensor, want: Tensor) -> float:
    """Infinite where something is NaN."""
    ratio = float((got.double() - want.double()).norm() / want.double().norm())
    return math.inf if math.isnan(ratio) else ratio


def fp8(*parts: Tensor) -> Fp8Weight:
    """Matrices [N, K], each with blocks of its own, one above the other."""
    quantised = [quantise_block_fp8(part, (128, 128)) for part in parts]
    return Fp8Weight(quantised=torch.cat([q for q, _ in quantised]), scales=torch.cat([s for _, s in quantised]))


def stacked(weights: list[Fp8Weight]) -> Fp8Weight:
    return Fp8Weight(
        quantised=torch.stack([w.quantised for w in weights]), scales=torch.stack([w.scales for w in weights])
    )


class Layer:
    """Weights of routed and shared experts, and tokens with their experts."""

    def __init__(self, num_tokens: int, num_experts: int, top_k: int, width: int, inner: int, num_shared: int) -> None:
        self.x, self.experts = randn(num_tokens, width), choices(num_tokens, num_experts, top_k)
        self.weights = randn(num_tokens, top_k, seed=3).abs()
        self.gate, self.up = (randn(num_experts, inner, width, seed=seed) / width**0.5 for seed in (4, 5))
        self.down = randn(num_experts, width, inner, seed=6) / inner**0.5
        self.shared_gate, self.shared_up = (randn(num_shared * inner, width, seed=seed) / width**0.5 for seed in (7, 8))
        self.shared_down = randn(width, num_shared * inner, seed=9) / inner**0.5

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What the ring computes, the exact sum, and that without the shared experts."""
        x, gate_up, down = self.x.to(dtype), torch.cat([self.gate, self.up], dim=1).to(dtype), self.down.to(dtype)
        shared = torch.cat([self.shared_gate, self.shared_up]).to(dtype), self.shared_down.to(dtype)
        got = device._few(x, gate_up, down, self.experts, self.weights, shared, RING_TILE)
        routed = grouped_mlp_reference(x.double(), gate_up.double(), down.double(), self.experts, self.weights.double())
        return got, routed + silu_mul_reference(x.double() @ shared[0].double().T) @ shared[1].double().T, routed

    def fp8(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same in FP8, by the references."""
        rows = quantise_rows_fp8_reference(self.x)
        gate_up = stacked([fp8(gate, 4 * up) for gate, up in zip(self.gate, self.up, strict=True)])
        down = stacked([fp8(expert) for expert in self.down])
        shared = fp8(self.shared_gate, self.shared_up), fp8(self.shared_down)
        got = device._few(rows, gate_up, down, self.experts, self.weights, shared, RING_TILE)
        routed = grouped_mlp_fp8_reference(rows, gate_up, down, self.experts, self.weights).float()
        everyone = torch.zeros(len(self.x), 1, dtype=torch.int64)
        all_shared = stacked([shared[0]]), stacked([shared[1]])
        return got, routed + grouped_mlp_fp8_reference(rows, *all_shared, everyone, torch.ones(len(self.x), 1)), routed


# Tokens, experts, experts a token, width, inner width, shared experts. At 272, 208 and 144 K ends within a step and a scale.
LAYERS = [(1, 6, 3, 256, 128, 1), (5, 4, 2, 144, 208, 1), (16, 4, 2, 128, 128, 3), (17, 2, 1, 272, 128, 2)]
# Shared experts computed by launches of their own: too many tokens, and a second one that begins within a step.
APART = [(65, 2, 1, 64, 32, 1), (5, 4, 2, 64, 72, 2)]


@pytest.mark.parametrize("shape", [*LAYERS, *APART])
def test_experts_and_shared_ones_beside_them(shape: tuple[int, ...]) -> None:
    got, want, routed = Layer(*shape).plain(torch.float32)
    assert error(got, want) < 1e-5
    assert error(got, routed) > 0.1


@pytest.mark.parametrize("shape", [LAYERS[1], LAYERS[3]])
def test_bf16_experts_whose_steps_are_longer(shape: tuple[int, ...]) -> None:
    got, want, routed = Layer(*shape).plain(torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert error(got, want) < 6e-3
    assert error(got, routed) > 0.1


@pytest.mark.parametrize("shape", LAYERS)
def test_fp8_experts_and_shared_ones_beside_them(shape: tuple[int, ...]) -> None:
    got, want, routed = Layer(*shape).fp8()
    assert error(got, want) < FP8_BOUND
    assert error(got, routed) > 0.1


BESIDE = (
    "num_shared", "per_expert", "row_step", "k_step", "second", "x_rows", "x_row", "row_tiles", "out_row",
    "x_scale_stride", "scale_row_step", "scale_second", "scale_width", "scale_k_step",
)  # fmt: skip


def test_each_number_of_the_shared_experts_place_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    right, send = ring._beside, expert_rows.send
    sent: list[Any] = []

    def send_once(*args: Any, **kwargs: Any) -> Any:
        # Triton's interpreter takes longer for this than all else does.
        sent.extend([] if sent else [send(*args, **kwargs)])
        return sent[0]

    def is_wrong(number: str | None) -> bool:
        def one_off(*args: Any, **kwargs: Any) -> tuple[Any, tuple[int, ...]]:
            beside, numbers = right(*args, **kwargs)
            by_name = dict(zip(BESIDE, numbers, strict=True))
            if number is not None:
                by_name[number] -= 1 if by_name[number] > 1 else -1
            return beside, tuple(by_name.values())

        monkeypatch.setattr(ring, "_beside", one_off)
        try:
            got, want, _ = Layer(*LAYERS[-1]).fp8()
        except AssertionError:
            return True
        return error(got, want) > 2 * FP8_BOUND

    monkeypatch.setattr(device, "send", send_once)
    assert not is_wrong(None)
    assert [number for number in BESIDE if not is_wrong(number)] == []


def test_experts_nobody_chose_are_not_read() -> None:
    layer = Layer(5, 8, 1, 64, 32, 1)
    got, want, _ = layer.plain(torch.float32)
    unchosen = [expert for expert in range(8) if expert not in layer.experts]
    assert unchosen
    for weights in (layer.gate, layer.up, layer.down):
        weights[unchosen] = float("nan")
    assert torch.equal(layer.plain(torch.float32)[0], got)
    layer.down[int(layer.experts[0, 0])] += 0.5
    assert error(layer.plain(torch.float32)[0], want) > 0.1


@pytest.mark.parametrize("all_at_once", [True, False])
@pytest.mark.parametrize("used", [0.0, 0.4])
def test_pairs_without_an_expert_are_in_no_tile(
    used: float, all_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And shared experts beside no routed ones at all."""
    monkeypatch.setattr(expert_rows, "_COUNTED_BY_ALL", 1024 if all_at_once else 2)
    layer = Layer(5, 4, 3, 144, 208, 1)
    taken = torch.rand(5, 3, generator=torch.Generator().manual_seed(7)) < used
    taken[0] = False
    partial = placing.Partial(num_used=1)
    layer.experts = layer.experts.where(taken, -1)
    layer.weights = layer.weights.where(taken, float("nan"))
    assert partial.is_sparse(layer.experts, 4)
    monkeypatch.setattr(device, "_few", functools.partial(device._few, partial=partial))
    for got, want, routed in (layer.plain(torch.float32), layer.fp8()):
        assert error(got, want) < FP8_BOUND
        assert error(got, routed) > 0.1
        assert (routed[0] == 0).all()
    chosen = layer.experts, layer.weights
    gate_up = torch.cat([layer.gate, layer.up], dim=1)
    got = device._few(layer.x, gate_up, layer.down, *chosen, None, RING_TILE, fill=False)
    has_expert = taken.any(dim=1)
    want = grouped_mlp_reference(layer.x, gate_up, layer.down, *chosen)
    torch.testing.assert_close(got[has_expert], want[has_expert], rtol=1e-3, atol=1e-4)
    assert got[~has_expert].isnan().all()


def test_a_token_does_not_depend_on_its_batch() -> None:
    layer = Layer(17, 3, 1, 64, 32, 2)
    together, _, _ = layer.plain(torch.float32)
    layer.x[:16] = float("nan")
    alone, _, _ = layer.plain(torch.float32)
    assert torch.equal(alone[16], together[16])
    assert alone[:16].isnan().all()


# The first has fewer units than processors, the last several a processor; the rows lie within wider ones.
@pytest.mark.parametrize(("num_rows", "columns", "width"), [(3, 34, 208), (5, 64, 8), (33, 130, 72), (16, 1030, 40)])
@pytest.mark.parametrize("silu", [False, True])
def test_dense_products(num_rows: int, columns: int, width: int, silu: bool) -> None:
    x, w = randn(num_rows, width + 8)[:, :width], randn(columns, width, seed=1) / width**0.5
    want = x.double() @ w.double().T
    want = silu_mul_reference(want) if silu else want
    got = ring.few_rows(x, w, silu=silu)
    assert isinstance(got, Tensor)
    assert error(got, want) < 1e-5
    w[columns // 2 - 1] *= 2
    other = ring.few_rows(x, w, silu=silu)
    assert isinstance(other, Tensor)
    assert error(other, want) > 1e-3


def test_a_dense_bf16_product_in_fp32() -> None:
    x, w = randn(5, 136).bfloat16(), randn(72, 136, seed=1).bfloat16()
    got = ring.few_rows(x, w, dtype=torch.float32)
    assert isinstance(got, Tensor)
    assert error(got, x.double() @ w.double().T) < 1e-5
    assert error(got.bfloat16(), x.double() @ w.double().T) > 1e-4


@pytest.mark.parametrize(("num_rows", "columns", "width"), [(1, 200, 144), (5, 130, 272), (16, 34, 1040)])
def test_dense_fp8_products(num_rows: int, columns: int, width: int) -> None:
    rows, w = quantise_rows_fp8_reference(randn(num_rows, width)), fp8(randn(columns, width, seed=1))
    want = linear_fp8_reference(rows, w)
    got = ring.few_rows(rows, w)
    assert isinstance(got, Tensor)
    assert error(got, want) < 1e-3
    w.scales[-1, -1] *= 2
    other = ring.few_rows(rows, w)
    assert isinstance(other, Tensor)
    assert error(other, want) > 1e-2


# Parts of K of one, two and an odd number of steps, the last one shorter or beyond the end.
@pytest.mark.parametrize(
    ("num_rows", "columns", "width", "num_splits"),
    [(5, 70, 272, 2), (16, 34, 1040, 3), (33, 130, 72, 2), (1, 200, 912, 7)],
)
def test_parts_of_k_that_are_units_of_their_own(num_rows: int, columns: int, width: int, num_splits: int) -> None:
    x, w = randn(num_rows, width).bfloat16(), randn(columns, width, seed=1).bfloat16()
    want = x.double() @ w.double().T
    got = ring.few_rows(x, w, dtype=torch.float32, num_splits=num_splits)
    assert isinstance(got, Tensor)
    assert error(got, want) < 1e-5
    w[:, -1] *= 3
    other = ring.few_rows(x, w, dtype=torch.float32, num_splits=num_splits)
    assert isinstance(other, Tensor)
    assert error(other, want) > 1e-3
    if num_rows <= RING_TILE:
        rows, weight = quantise_rows_fp8_reference(randn(num_rows, width)), fp8(randn(columns, width, seed=1))
        exact = linear_fp8_reference(rows, weight)
        quantised = ring.few_rows(rows, weight, num_splits=num_splits)
        assert isinstance(quantised, Tensor)
        # Triton's interpreter cuts a sum off where it becomes bf16.
        assert error(quantised, exact) < 6e-3
        weight.scales[:, -1] *= 2
        assert error(linear_fp8_reference(rows, weight), quantised) > 1e-2


@pytest.mark.parametrize(
    ("num_k", "columns", "want"), [(56, 2112, 4), (112, 256, 14), (56, 4096, 1), (128, 7168, 1), (2, 64, 1), (3, 64, 2)]
)
def test_parts_of_k_fill_the_processors_and_none_is_empty(num_k: int, columns: int, want: int) -> None:
    num_splits = ring.splits_for(columns, num_k, 132)
    assert num_splits == want
    assert num_splits * -(-columns // 64) <= 132
    assert (num_splits - 1) * -(-num_k // 2 // num_splits) < -(-num_k // 2)


@pytest.mark.parametrize("head", [0, 1, 3])
@pytest.mark.parametrize("early", [1, 2, 4])
def test_every_unit_is_dealt_out_once_and_those_in_front_to_early_programs(early: int, head: int) -> None:
    order = (early * head, early)
    for total in range(40):
        units: list[list[int]] = []
        for program in range(4):
            gluon_interpreter.be_program(program, 4)
            index, own = few_rows_ring._first_unit(order), []
            while index < total:
                own.append(int(index))
                index = few_rows_ring._next_unit(index, order)
            units.append(own)
        assert sorted(itertools.chain(*units)) == list(range(total))
        if early < 4 and total >= early * head + 4:
            assert {len(own) - len(units[3]) for own in units[:early]} <= {head, head + 1}


@pytest.mark.parametrize("num_rows", [1, 16, 20])
@pytest.mark.parametrize("quantise", [False, True])
def test_heads_with_a_matrix_each(num_rows: int, quantise: bool) -> None:
    num_heads, width, columns = 5, 512, 128
    x = randn(num_rows, num_heads, width).bfloat16()
    w = (randn(num_heads, columns + 32, width, seed=1) / width**0.5).bfloat16()[:, 32:]
    want = linear_by_head_reference(x.double(), w.double(), quantise=False)
    assert isinstance(want, Tensor)
    got = ring.few_rows_by_head(x, w, quantise=quantise)
    if quantise:
        assert isinstance(got, QuantisedRows)
        assert error(got.dequantise(torch.float32), want) < 4e-2
        exact = linear_by_head_reference(x, w, quantise=True)
        assert isinstance(exact, QuantisedRows)
        torch.testing.assert_close(got.scales, exact.scales, rtol=1e-5, atol=0)
        got = got.dequantise(torch.float32)
    else:
        assert isinstance(got, Tensor)
        assert got.dtype == torch.bfloat16
        assert error(got, want) < 6e-3
    assert error(got.roll(columns, dims=1), want) > 0.5


def test_a_kernel_that_does_not_wait_for_the_one_before_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows_ring, "gdc_wait", lambda: None)
    with pytest.raises(AssertionError, match="before the kernel"):
        ring.few_rows(randn(3, 64), randn(32, 64, seed=1))


def test_a_ring_whose_slots_nobody_frees_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_interpreter, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(gluon_interpreter.mbarrier, "arrive", lambda barrier, count: None)
    with pytest.raises(AssertionError, match="for ever"):
        ring.few_rows(randn(3, 2560), randn(32, 2560, seed=1))
