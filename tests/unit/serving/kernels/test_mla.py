"""Attention over expanded heads and over paged latents, against plain softmax, over pages that are NaN where unowned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from serving.kernels import mla
from serving.kernels.attention import merge_into
from serving.kernels.kv_store import store_rows
from serving.kernels.rows import context_slots, layer_rows, packed_context_slots, slots

LATENT, ROPE, HEADS, SCALE = 12, 4, 3, 0.3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("qk", "v"), [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_attend_equals_its_reference(qk: int, v: int, causal: bool) -> None:
    num_queries, num_keys = (70, 70) if causal else (33, 90)
    q, k, value = randn(num_queries, HEADS, qk), randn(num_keys, HEADS, qk, seed=1), randn(num_keys, HEADS, v, seed=2)
    out, lse = mla.attend(q, k, value, scale=SCALE, causal=causal)
    want_out, want_lse = mla.attend_reference(q, k, value, scale=SCALE, causal=causal, piece=16)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    shifted, _ = mla.attend(q, k.roll(1, 0), value, scale=SCALE, causal=causal)
    assert not torch.allclose(shifted, want_out, atol=1e-3)


def test_merged_parts_equal_the_whole() -> None:
    q, k, v = randn(5, HEADS, 8), randn(50, HEADS, 8, seed=1), randn(50, HEADS, 8, seed=2)
    want_out, want_lse = mla.attend_reference(q, k, v, scale=SCALE, causal=False)
    parts = [mla.attend(q, k[at], v[at], scale=SCALE, causal=False) for at in (slice(0, 7), slice(7, 50))]
    assert not torch.allclose(parts[0][0], want_out, atol=1e-3)
    merge_into(*parts[0], *parts[1])
    torch.testing.assert_close(parts[0], (want_out, want_lse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_without_keys_merges_to_the_other_and_two_of_them_to_nothing(dtype: torch.dtype) -> None:
    out, lse = randn(5, HEADS, 8).to(dtype), randn(5, HEADS, seed=1)
    nothing, never = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for part in ((out, lse), (nothing, never)):
        merged = part[0].clone(), part[1].clone()
        merge_into(*merged, nothing, never)
        assert torch.equal(merged[0], part[0])
        assert torch.equal(merged[1], part[1])
    merged = nothing.clone(), never.clone()
    merge_into(*merged, out, lse)
    torch.testing.assert_close(merged, (out, lse))


class Pool:
    """A poisoned pool and the rows that sequences of given lengths own, on scattered pages."""

    def __init__(self, lens: list[int], num_layers: int = 2) -> None:
        num_pages = sum(-(-n // 64) for n in lens) + 2
        self.tensor = torch.full((num_pages + 1, num_layers, 64, LATENT + ROPE), float("nan"))
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(3)).tolist()
        widest = max(-(-n // 64) for n in lens) + 1
        self.lens = torch.tensor(lens)
        self.table = torch.full((len(lens), widest), -(1 << 40))
        self.rows: list[Tensor] = []
        self.last_rows = torch.empty(len(lens), dtype=torch.int64)
        for i, n in enumerate(lens):
            pages = torch.tensor([order.pop() for _ in range(-(-n // 64))])
            self.table[i, : len(pages)] = pages
            row_ids = pages[torch.arange(n) // 64] * 64 + torch.arange(n) % 64
            self.rows.append(randn(n, LATENT + ROPE, seed=10 + i))
            store_rows(self.tensor, 1, slots(self.tensor, row_ids), self.rows[-1])
            self.last_rows[i] = row_ids[-1]

    def plan(self, first: int = 0) -> tuple[mla.DecodeGroup, ...]:
        return mla.plan_decode(self.tensor, self.last_rows, self.table, self.lens, first=first)


def wanted(q_HW: Tensor, rows_SW: Tensor) -> tuple[Tensor, Tensor]:
    scores_HS = q_HW @ rows_SW.T * SCALE
    return scores_HS.softmax(-1) @ rows_SW[:, :LATENT], scores_HS.logsumexp(-1)


@pytest.mark.parametrize("lens", [[1], [64], [65, 64], [130, 70, 128, 1, 3], [200, 5, 90]])
@pytest.mark.parametrize("first", [0, 1])
def test_decode_attends_each_sequence_over_its_own_rows(lens: list[int], first: int) -> None:
    lens = [n + first for n in lens]
    pool = Pool(lens)
    q = randn(len(lens), HEADS, LATENT + ROPE, seed=5)
    out, lse = mla.decode_latent(q, pool.tensor, 1, pool.plan(first), latent=LATENT, scale=SCALE)
    for i, rows in enumerate(pool.rows):
        want_out, want_lse = wanted(q[i], rows[first:])
        torch.testing.assert_close(out[i], want_out)
        torch.testing.assert_close(lse[i], want_lse)


def test_a_changed_row_changes_its_sequence_only() -> None:
    pool = Pool([100, 90])
    q = randn(2, HEADS, LATENT + ROPE, seed=5)
    before, _ = mla.decode_latent(q, pool.tensor, 1, pool.plan(), latent=LATENT, scale=SCALE)
    pool.tensor[pool.table[0, 0], 1, 40] += 2.0
    after, _ = mla.decode_latent(q, pool.tensor, 1, pool.plan(), latent=LATENT, scale=SCALE)
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert torch.equal(before[1], after[1])


def test_sequences_of_very_different_lengths_are_not_padded_to_the_longest() -> None:
    pool = Pool([600, 20, 18, 500])
    gathered = sum(group.slots_GS.numel() for group in pool.plan())
    assert gathered <= 2 * 600 + 2 * 20
    everyone = sorted(int(i) for group in pool.plan() if group.members is not None for i in group.members)
    assert everyone == [0, 1, 2, 3]


def test_a_strided_pool_of_many_pages_is_addressed_past_32_bits() -> None:
    # Pages of the published model lie 62 * 64 * 576 elements apart; stride alone passes 2^31 at page 940.
    pool = torch.empty(1, device="meta").expand(2000, 62, 64, 576).contiguous()
    row_ids = torch.tensor([1999 * 64 + 63])
    expected = (1999 * 62 * 64 + 63) * 576
    assert int(slots(pool, row_ids)) * 576 == expected
    assert expected > 2**31
    assert layer_rows(pool, 61).shape[0] > int(slots(pool, row_ids))


def test_a_view_of_some_layers_is_a_pool_too() -> None:
    whole = torch.zeros(4, 6, 64, 8)
    part = whole[:, 2:4]
    row_ids = torch.tensor([130, 5])
    store_rows(part, 1, slots(part, row_ids), torch.ones(2, 8))
    assert whole[2, 3, 2].sum() == 8
    assert whole[0, 3, 5].sum() == 8
    assert whole.sum() == 16


def test_context_slots_follow_the_pages_and_look_at_no_more_than_needed() -> None:
    pool = torch.zeros(8, 3, 64, 4)
    pages = torch.tensor([5, 2, -(1 << 40)])
    found = context_slots(pool, pages, 60, 68)
    want = slots(pool, torch.tensor([5 * 64 + 60 + i for i in range(4)] + [2 * 64 + i for i in range(4)]))
    assert torch.equal(found, want)
    assert math.prod(context_slots(pool, pages, 0, 128).shape) == 128


@pytest.mark.parametrize("lens", [[4], [64, 65], [130, 70, 128, 5, 6]])
@pytest.mark.parametrize("num_tokens", [2, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_the_last_tokens_of_a_sequence_each_see_what_lies_before_them(
    lens: list[int], num_tokens: int, first: int
) -> None:
    pool = Pool([n + first for n in lens])
    q = randn(len(lens) * num_tokens, HEADS, LATENT + ROPE, seed=5).unflatten(0, (-1, num_tokens))
    plan = mla.plan_decode(pool.tensor, pool.last_rows, pool.table, pool.lens, first=first, num_tokens=num_tokens)
    out, lse = mla.decode_latent(q, pool.tensor, 1, plan, latent=LATENT, scale=SCALE)
    for i, rows in enumerate(pool.rows):
        for t in range(num_tokens):
            seen = rows[first : len(rows) - num_tokens + 1 + t]
            want_out, want_lse = wanted(q[i, t], seen)
            torch.testing.assert_close(out[i, t], want_out)
            torch.testing.assert_close(lse[i, t], want_lse)
        want_out, _ = wanted(q[i, 0], rows[first:])
        assert not torch.allclose(out[i, 0], want_out, atol=1e-3)


def test_packed_context_slots_are_those_of_each_sequence_and_then_scratch() -> None:
    pool = torch.zeros(8, 3, 64, 4)[:, 1:]
    table = torch.tensor([[5, 2, 7], [7, 7, 7], [1, 7, 7], [0, 3, 4]], dtype=torch.int32)
    lens = [130, 0, 64, 7]
    # Two borders more than sequences, as a captured step has.
    starts = torch.tensor([0, *lens, 0, 0]).cumsum(0).to(torch.int32)
    want = [context_slots(pool, pages, 0, n) for pages, n in zip(table, lens, strict=True) if n]
    for size in (201, 202, 1000):
        got = packed_context_slots(pool, table, starts, size)
        scratch = slots(pool, torch.full((size - 201,), 7 * 64))
        assert torch.equal(got, torch.cat([*want, scratch]))
    nothing = packed_context_slots(pool, table, torch.zeros_like(starts), 5)
    assert torch.equal(nothing, slots(pool, torch.full((5,), 7 * 64)))
