"""Norm, rope and the cache write on the device, in a pool whose offsets pass 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from serving.kernels.kv_store import (
    absorb_and_store,
    absorb_and_store_reference,
    is_one_launch,
    norm_rope_store,
    norm_rope_store_reference,
)
from serving.kernels.norm_rope import inverse_frequencies, rotations
from serving.kernels.rows import fp8_row_bytes, layer_rows, pack_fp8_rows, slots, unpack_fp8_rows
from tests.gpu.graphs import replayed

pytestmark = pytest.mark.gpu

LATENT, ROPE, NOPE, LAYER = 512, 64, 128, 60


@pytest.mark.parametrize("heads", [0, 16, 128])
@pytest.mark.parametrize("fp8", [False, True])
def test_graph_and_eager_equal_the_reference(heads: int, fp8: bool) -> None:
    torch.manual_seed(0)
    num_tokens, width = 300, fp8_row_bytes(LATENT, ROPE) if fp8 else LATENT + ROPE
    num_pages = 1000
    assert (num_pages - 1) * 61 * 64 * width > 2**31
    pool = torch.zeros(num_pages, 61, 64, width, device="cuda", dtype=torch.uint8 if fp8 else torch.bfloat16)
    latent = torch.randn(num_tokens, 1536 + LATENT + ROPE, device="cuda", dtype=torch.bfloat16)[:, 1536:]
    weight = torch.randn(LATENT, device="cuda", dtype=torch.bfloat16)
    positions, magnitude = torch.randint(0, 9000, (num_tokens,), device="cuda"), torch.full((1,), 1.1, device="cuda")
    turns = rotations(positions, inverse_frequencies(ROPE, 1e4).to("cuda"), magnitude)
    query = torch.randn(num_tokens, heads, NOPE + ROPE, device="cuda", dtype=torch.bfloat16)
    row_ids = torch.randperm(num_pages * 64, device="cuda")[:num_tokens]
    row_ids[0] = num_pages * 64 - 1
    places = slots(pool, row_ids)
    target = torch.zeros_like(query)

    def call() -> torch.Tensor | None:
        turned = {"q_rope_THR": query[:, :, NOPE:], "q_out_THR": target[:, :, NOPE:]} if heads else {}
        return norm_rope_store(latent, weight, 1e-6, turns, pool, LAYER, places, keep=True, **turned)

    rows = replayed(call)
    assert rows is not None
    stored, turned = layer_rows(pool, LAYER)[places], target.clone()
    assert int((pool != 0).any(-1).sum()) == num_tokens
    pool.zero_()
    target.zero_()
    eager = call()
    assert eager is not None
    assert torch.equal(eager, rows)
    assert torch.equal(layer_rows(pool, LAYER)[places], stored)
    assert torch.equal(target, turned)
    want_query, small = (
        query.clone(),
        torch.zeros(-(-num_tokens // 64), 1, 64, LATENT + ROPE, device="cuda", dtype=torch.bfloat16),
    )
    want = norm_rope_store_reference(
        latent.clone(), weight, 1e-6, turns, small, 0, torch.arange(num_tokens, device="cuda"),
        q_rope_THR=want_query[:, :, NOPE:], keep=True,
    )  # fmt: skip
    torch.testing.assert_close(rows, want, rtol=1e-2, atol=1e-2)
    if fp8:
        want_stored = pack_fp8_rows(rows, LATENT)
        got, wanted = unpack_fp8_rows(stored, LATENT), unpack_fp8_rows(want_stored, LATENT)
        # A value at the middle between two, of which bf16 has many, may go to either: one step apart, of e4m3.
        scales = want_stored[:, LATENT : LATENT + LATENT // 32].contiguous().view(torch.float32)
        step = torch.nn.functional.pad(scales.repeat_interleave(128, dim=1), (0, ROPE)) / 512
        assert ((got - wanted).abs() <= torch.maximum(wanted.abs() / 8, step) * 1.001).all()
        assert (got == wanted).float().mean() > 0.9
    else:
        assert torch.equal(stored, rows)
    assert int((pool != 0).any(-1).sum()) == num_tokens
    torch.testing.assert_close(target[:, :, NOPE:], want_query[:, :, NOPE:], rtol=1e-2, atol=1e-2)
    assert heads == 0 or not torch.allclose(target[:, :, NOPE:], query[:, :, NOPE:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("num_tokens", "heads", "one_launch"), [(1, 128, True), (16, 128, True), (16, 32, True), (17, 128, False)]
)
def test_the_absorbed_query_is_that_of_products_apart(num_tokens: int, heads: int, one_launch: bool) -> None:
    torch.manual_seed(0)
    pool = torch.zeros(9, 2, 64, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    latent = torch.randn(num_tokens, 1536 + LATENT + ROPE, device="cuda", dtype=torch.bfloat16)[:, 1536:]
    weight = torch.randn(LATENT, device="cuda", dtype=torch.bfloat16)
    turns = rotations(
        torch.randint(0, 9000, (num_tokens,), device="cuda"),
        inverse_frequencies(ROPE, 1e4).to("cuda"),
        torch.full((1,), 1.1, device="cuda"),
    )
    query = torch.randn(num_tokens, heads, NOPE + ROPE, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(heads, 2 * NOPE, LATENT, device="cuda", dtype=torch.bfloat16)[:, :NOPE] / NOPE**0.5
    places = slots(pool, torch.randperm(8 * 64, device="cuda")[:num_tokens])
    assert is_one_launch(query, w, latent) == one_launch

    def call() -> torch.Tensor:
        return absorb_and_store(query, w, latent, weight, 1e-6, turns, pool, 1, places)

    asked, stored = replayed(call), pool.clone()
    pool.zero_()
    assert torch.equal(call(), asked)
    assert torch.equal(pool, stored)
    small = torch.zeros_like(pool)
    of_layer = latent.clone(), weight, 1e-6, turns, small, 1, places
    wanted = absorb_and_store_reference(query.clone(), w, *of_layer)
    torch.testing.assert_close(asked, wanted, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(asked[..., LATENT:], query[..., NOPE:], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(pool, small, rtol=1e-2, atol=1e-2)
    assert int((pool != 0).any(-1).sum()) == num_tokens
