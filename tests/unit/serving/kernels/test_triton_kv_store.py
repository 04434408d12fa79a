"""Norm, rope and the cache write of one launch in Triton's interpreter, against the same done one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from serving.kernels.kv_store import absorb_and_store_reference, norm_rope_store_reference
from serving.kernels.norm_rope import inverse_frequencies, rotations
from serving.kernels.rows import layer_rows, slots

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import kv_store as device
from tests.fp8_steps import assert_one_step_apart, largest_moved

TOKENS, LATENT, ROPE, HEADS, NOPE, LAYER = 6, 128, 16, 5, 8, 1


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> dict[str, Tensor]:
    both = randn(TOKENS, 10 + LATENT + ROPE) * 3
    positions = torch.tensor([0, 1, 2, 700, 3, 63])
    return {
        "latent_TW": both[:, 10:],
        "weight_C": randn(LATENT, seed=1),
        "rotations_T": rotations(positions, inverse_frequencies(ROPE, 10000.0), torch.full((1,), 1.2)),
    }


def row_ids() -> Tensor:
    return torch.tensor([3 * 64 + 63, 0, 64, 2 * 64 + 7, 5, 4 * 64])


@pytest.mark.parametrize("keep", [True, False])
def test_the_row_lies_in_its_slot_and_nowhere_else(keep: bool) -> None:
    got, want = (torch.full((5, 3, 64, LATENT + ROPE), math.nan) for _ in range(2))
    x = inputs()
    places = slots(got, row_ids())
    query = randn(TOKENS, HEADS, NOPE + ROPE, seed=3)
    want_query = query.clone()
    want_rows = norm_rope_store_reference(
        **inputs(),
        eps=1e-3,
        kv_pool=want,
        layer=LAYER,
        slots_T=places,
        q_rope_THR=want_query[:, :, NOPE:],
        keep=keep,
    )
    rows = device.norm_rope_store(
        **x,
        eps=1e-3,
        rows_NW=layer_rows(got, LAYER),
        slots_T=places,
        q_rope_THR=query[:, :, NOPE:],
        q_out_THR=None,
        keep=keep,
    )
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(query, want_query)
    assert not torch.allclose(query, randn(TOKENS, HEADS, NOPE + ROPE, seed=3))
    assert torch.isnan(got).sum() == got.numel() - TOKENS * (LATENT + ROPE)
    assert (rows is not None) == keep
    if rows is not None:
        torch.testing.assert_close(rows, want_rows)


def test_the_query_goes_where_it_is_told_and_leaves_its_source() -> None:
    x, pool = inputs(), torch.zeros(5, 3, 64, LATENT + ROPE)
    query, target = randn(TOKENS, HEADS, NOPE + ROPE, seed=3), torch.full((TOKENS, HEADS, 20 + ROPE), math.nan)
    source = query.clone()
    places = slots(pool, row_ids())
    device.norm_rope_store(
        **x,
        eps=1e-3,
        rows_NW=layer_rows(pool, LAYER),
        slots_T=places,
        q_rope_THR=query[:, :, NOPE:],
        q_out_THR=target[:, :, 20:],
        keep=False,
    )
    assert torch.equal(query, source)
    assert target[:, :, :20].isnan().all()
    norm_rope_store_reference(
        **inputs(), eps=1e-3, kv_pool=pool, layer=LAYER, slots_T=places, q_rope_THR=source[:, :, NOPE:]
    )
    torch.testing.assert_close(target[:, :, 20:], source[:, :, NOPE:])


@pytest.mark.parametrize("fp8", [False, True])
def test_the_absorbed_query_in_the_launch_that_stores(fp8: bool) -> None:
    width = LATENT + 4 * LATENT // 128 + 2 * ROPE if fp8 else LATENT + ROPE
    got, want = (torch.zeros(5, 3, 64, width, dtype=torch.uint8 if fp8 else torch.float32) for _ in range(2))
    places = slots(got, row_ids())
    query, w = randn(TOKENS, HEADS, 16 + ROPE, seed=3), randn(HEADS, 40, LATENT, seed=4)[:, 24:]
    asked = device.absorb_and_store(query, w, **inputs(), eps=1e-3, rows_NW=layer_rows(got, LAYER), slots_T=places)
    wanted = absorb_and_store_reference(
        query.clone(), w, **inputs(), eps=1e-3, kv_pool=want, layer=LAYER, slots_T=places
    )
    torch.testing.assert_close(asked, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(asked[..., LATENT:], query[..., 16:])
    assert not torch.allclose(asked.roll(1, dims=1)[..., :LATENT], wanted[..., :LATENT], rtol=1e-2)
    apart = torch.zeros_like(got)
    query_and_rows = {"rows_NW": layer_rows(apart, LAYER), "q_rope_THR": None, "q_out_THR": None}
    device.norm_rope_store(**inputs(), eps=1e-3, slots_T=places, keep=False, **query_and_rows)
    assert torch.equal(got, apart)
    assert got.any()


def test_an_fp8_row_is_values_scales_and_rope() -> None:
    width = LATENT + 4 * LATENT // 128 + 2 * ROPE
    got, want = (torch.zeros(5, 3, 64, width, dtype=torch.uint8) for _ in range(2))
    places = slots(got, row_ids())
    norm_rope_store_reference(**inputs(), eps=1e-3, kv_pool=want, layer=LAYER, slots_T=places)
    device.norm_rope_store(
        **inputs(),
        eps=1e-3,
        rows_NW=layer_rows(got, LAYER),
        slots_T=places,
        q_rope_THR=None,
        q_out_THR=None,
        keep=False,
    )
    scales = slice(LATENT, LATENT + 4)
    values, wanted = (pool[..., :LATENT].contiguous().view(torch.float8_e4m3fn) for pool in (got, want))
    stored = (wanted.float() != 0).any(-1)
    assert stored.sum() == TOKENS
    assert_one_step_apart(values[stored], wanted[stored])
    with pytest.raises(AssertionError, match="is right"):
        assert_one_step_apart(largest_moved(values[stored], 2), wanted[stored])
    assert (values[~stored].float() == 0).all()
    assert values.float().abs().max() == 448
    torch.testing.assert_close(
        got[..., scales].contiguous().view(torch.float32), want[..., scales].contiguous().view(torch.float32)
    )
    ropes = [pool[..., LATENT + 4 :].contiguous().view(torch.bfloat16).float() for pool in (got, want)]
    torch.testing.assert_close(*ropes, rtol=2**-7, atol=0)
    assert ropes[0].abs().sum() > 1
