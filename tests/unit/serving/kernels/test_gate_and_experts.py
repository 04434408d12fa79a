"""The gate and the routed experts, against loops over tokens and experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels import packed as packing_rules
from serving.kernels.experts import grouped_mlp
from serving.kernels.gemm import (
    linear,
    linear_by_head,
    linear_by_head_reference,
    linear_fp32,
    linear_fp32_reference,
    linear_reference,
    linear_silu_mul,
    linear_silu_mul_reference,
    per_head,
    per_head_reference,
)
from serving.kernels.packed import pack, row_pieces
from serving.kernels.quant import BLOCK, Fp8Weight, QuantisedRows, quantise_block_fp8, silu_mul
from serving.kernels.topk import gate_topk


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gate_by_hand(logits: Tensor, bias: Tensor, groups: int, kept: int, top_k: int) -> dict[int, float]:
    """Expert -> weight before renormalisation, for one token."""
    scores = logits.sigmoid().tolist()
    biased = [score + b for score, b in zip(scores, bias.tolist(), strict=True)]
    size = len(scores) // groups
    value = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=value.__getitem__)[-kept:]
    allowed = [e for e in range(len(scores)) if e // size in best]
    return {e: scores[e] for e in sorted(allowed, key=biased.__getitem__)[-top_k:]}


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (8, 4), (4, 4)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_the_gate_chooses_and_weighs_as_written(groups: int, kept: int, renormalise: bool) -> None:
    logits, bias = randn(40, 16), randn(16, seed=1)
    settings: dict[str, Any] = {"num_groups": groups, "num_groups_kept": kept, "top_k": 3}
    experts, weights = gate_topk(logits, bias, **settings, renormalise=renormalise, scaling=2.5)
    for t in range(40):
        want = gate_by_hand(logits[t], bias, groups, kept, 3)
        total = sum(want.values()) if renormalise else 1.0
        got = dict(zip(experts[t].tolist(), weights[t].tolist(), strict=True))
        assert got == pytest.approx({e: 2.5 * score / total for e, score in want.items()}, rel=1e-5)


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.zeros(1, 4)
    bias = torch.tensor([0.0, 5.0, 0.0, 4.0])
    experts, weights = gate_topk(logits, bias, num_groups=1, num_groups_kept=1, top_k=2, renormalise=True, scaling=1.0)
    assert sorted(experts[0].tolist()) == [1, 3]
    assert weights[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("num_tokens", [1, 2, 37])
@pytest.mark.parametrize("packed", [False, True])
def test_grouped_experts_equal_a_loop_over_tokens(num_tokens: int, packed: bool) -> None:
    x, gate_up, down = randn(num_tokens, 16), randn(6, 24, 16, seed=1), randn(6, 16, 12, seed=2)
    experts = torch.stack(
        [torch.randperm(6, generator=torch.Generator().manual_seed(t))[:3] for t in range(num_tokens)]
    )
    weights = randn(num_tokens, 3, seed=3).abs()
    stored = ([pack(w) for w in gate_up], [pack(w) for w in down]) if packed else (gate_up, down)
    got = grouped_mlp(x, *stored, experts, weights)
    want = torch.zeros_like(x)
    for t in range(num_tokens):
        for k, e in enumerate(experts[t].tolist()):
            gate, up = gate_up[e, :12] @ x[t], gate_up[e, 12:] @ x[t]
            want[t] += weights[t, k] * (down[e] @ (F.silu(gate) * up))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    down[int(experts[0, 0])] += 0.5
    assert packed or not torch.allclose(grouped_mlp(x, *stored, experts, weights), want, atol=1e-2)


def test_an_expert_nobody_chose_is_not_read() -> None:
    gate_up, down = randn(3, 8, 4), randn(3, 4, 4, seed=1)
    gate_up[1], down[1] = float("nan"), float("nan")
    out = grouped_mlp(randn(2, 4), gate_up, down, torch.tensor([[0, 2], [2, 0]]), torch.ones(2, 2))
    assert torch.isfinite(out).all()


def fp8(stack: Tensor) -> Fp8Weight:
    quantised = [quantise_block_fp8(weight, (BLOCK, BLOCK)) for weight in stack]
    return Fp8Weight(quantised=torch.stack([q for q, _ in quantised]), scales=torch.stack([s for _, s in quantised]))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "packed", "fp8"])
@pytest.mark.parametrize("used", [0.0, 0.6], ids=["no picks at all", "some picks"])
def test_a_pick_of_no_expert_adds_nothing(kind: str, used: float) -> None:
    """As the same pick of an expert, with weight 0; the weight of no expert may be anything."""
    dtype = torch.float32 if kind in ("fp32", "packed") else torch.bfloat16
    gate_up, down = randn(5, 256, 128, seed=1).to(dtype) / 8, randn(5, 128, 128, seed=2).to(dtype) / 8
    x, weights = randn(20, 128).to(dtype), randn(20, 3, seed=3).abs()
    experts = torch.randint(5, (20, 3), generator=torch.Generator().manual_seed(4))
    taken = torch.rand(20, 3, generator=torch.Generator().manual_seed(5)) < used
    taken[:2], taken[19] = False, used > 0
    stored: dict[str, tuple[Any, Any]] = {
        "packed": ([pack(w) for w in gate_up], [pack(w) for w in down]),
        "fp8": (fp8(gate_up), fp8(down)),
    }
    up, out = stored.get(kind, (gate_up, down))
    got = grouped_mlp(x, up, out, experts.where(taken, -1), weights.where(taken, float("nan")))
    want = grouped_mlp(x, up, out, experts, weights.where(taken, 0.0))
    torch.testing.assert_close(got, want, rtol=0.0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert (got[:2] == 0).all()
    taken[19] = False
    lost = grouped_mlp(x, up, out, experts.where(taken, -1), weights)
    assert torch.allclose(lost, want, atol=2e-2) == (used == 0)


def test_no_rows_are_no_work() -> None:
    empty = torch.empty(0, 3, dtype=torch.int64)
    assert grouped_mlp(randn(0, 16), randn(2, 8, 16), randn(2, 16, 4), empty, torch.empty(0, 3)).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 8, 100])
def test_a_packed_weight_gives_the_plain_product(dtype: torch.dtype, num_rows: int) -> None:
    x, weight = randn(num_rows, 40).to(dtype), randn(24, 40, seed=1).to(dtype)
    packed = pack(weight)
    assert packed.shape == weight.shape
    want = x.double() @ weight.double().T
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(linear(x, packed).double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(linear(x[:, :24], pack(weight[:, :24])), linear(x[:, :24], weight[:, :24]))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed without oneDNN")
def test_only_matrices_that_are_large_enough_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_rules, "WORTH_PACKING_BYTES", 4096)
    large, small = randn(32, 32), randn(31, 32)
    assert pack(large).is_mkldnn
    assert pack(small) is small
    x = randn(3, 32)
    torch.testing.assert_close(linear(x, pack(small)), x @ small.T)


def test_silu_mul_takes_the_gate_first() -> None:
    torch.testing.assert_close(silu_mul(torch.tensor([[2.0, 3.0]])), F.silu(torch.tensor([[2.0]])) * 3)


def test_products_meet_few_numbers_of_rows_and_waste_little() -> None:
    pieces = {num_rows: row_pieces(num_rows) for num_rows in range(1, 4097)}
    assert {size for sizes in pieces.values() for size in sizes} == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert all(n <= sum(sizes) < 1.34 * n + 16 for n, sizes in pieces.items())
    assert all(len(sizes) <= n // 256 + 2 for n, sizes in pieces.items())
    assert [row_pieces(n) for n in (0, 8, 200, 300)] == [[], [8], [256], [256, 32, 16]]


@pytest.mark.parametrize("num_rows", [1, 16, 17, 65, 500])
def test_padded_rows_leave_no_trace_in_a_product(num_rows: int) -> None:
    weight, x = torch.randn(48, 32), torch.randn(num_rows, 32)
    out = linear(x, pack(weight))
    assert out.shape == (num_rows, 48)
    torch.testing.assert_close(out, x @ weight.T)
    x[-1] += 1
    assert not torch.allclose(linear(x, pack(weight))[-1], out[-1])


def test_sums_of_bf16_factors_are_fp32() -> None:
    x, w = randn(3, 200).bfloat16(), randn(5, 200, seed=1).bfloat16()
    want = linear_fp32_reference(x.double(), w.double())
    torch.testing.assert_close(linear_fp32(x, w).double(), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose((x @ w.T).double(), want, rtol=1e-5, atol=1e-5)


def test_products_of_a_cpu_are_those_of_the_references() -> None:
    x, w, by_head = randn(5, 3 * 64), randn(512, 3 * 64, seed=1), randn(3, 128, 64, seed=2)
    heads = x.unflatten(1, (3, 64))
    out, want = torch.empty(5, 3, 64), torch.empty(5, 3, 64)
    per_head(heads, by_head[:, :64], out)
    per_head_reference(heads, by_head[:, :64], want)
    pairs = [
        (linear(x, w), linear_reference(x, w)),
        (linear_silu_mul(x, w), linear_silu_mul_reference(x, w)),
        (linear_by_head(heads, by_head, quantise=False), linear_by_head_reference(heads, by_head, quantise=False)),
        (linear_by_head(heads, by_head, quantise=True), linear_by_head_reference(heads, by_head, quantise=True)),
        (out, want),
    ]
    for got, exact in pairs:
        assert type(got) is type(exact)
        wide, exact = (y.dequantise(torch.float32) if isinstance(y, QuantisedRows) else y for y in (got, exact))
        assert float((wide - exact).norm() / exact.norm()) < 1e-2
        assert float((wide - exact.roll(1, dims=0)).norm() / exact.norm()) > 0.5
