"""Prefill attention on the device: every kernel that may serve a shape, against fp64 products a sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from serving.kernels.attention import (
    attend_varlen,
    attend_varlen_quantised,
    attend_varlen_reference,
    merge_into,
    merge_into_reference,
)
from serving.kernels.quant import quantise_rows_fp8
from tests.gpu.graphs import replayed

pytestmark = pytest.mark.gpu

SCALE = 0.07


def inputs(
    lens_q: list[int], lens_k: list[int], heads: int, dtype: torch.dtype, widths: tuple[int, int, int]
) -> list[Tensor]:
    nope, rope, v_width = widths
    torch.manual_seed(0)
    q = torch.randn(sum(lens_q), heads, nope + rope, device="cuda").to(dtype)
    both = torch.randn(sum(lens_k), heads, nope + v_width, device="cuda").to(dtype)
    k_rope = torch.randn(sum(lens_k), 64 + rope, device="cuda").to(dtype)[:, 64:]
    starts = [torch.tensor([0, *lens], device="cuda").cumsum(0).to(torch.int32) for lens in (lens_q, lens_k)]
    return [q, both[:, :, :nope], k_rope, both[:, :, nope:], *starts]


def wide(x: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in x]


V3, SMALL = (128, 64, 128), (32, 32, 64)


@pytest.mark.parametrize(
    ("dtype", "widths", "heads"),
    [(torch.bfloat16, V3, 16), (torch.bfloat16, SMALL, 8), (torch.float32, SMALL, 8), (torch.float32, V3, 3)],
)
@pytest.mark.parametrize(
    ("lens_q", "lens_k", "causal"),
    [([1, 128, 130, 700], [1, 128, 130, 700], True), ([300, 5, 129], [257, 0, 1024], False)],
)
def test_graph_and_eager_equal_the_reference(
    lens_q: list[int], lens_k: list[int], causal: bool, dtype: torch.dtype, widths: tuple[int, int, int], heads: int
) -> None:
    x = inputs(lens_q, lens_k, heads, dtype, widths)
    out, lse = attend_varlen(*x, scale=SCALE, causal=causal)
    want_out, want_lse = attend_varlen_reference(*wide(x), scale=SCALE, causal=causal)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), want_out, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    again, again_lse = replayed(lambda: attend_varlen(*x, scale=SCALE, causal=causal))
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)
    other, _ = attend_varlen(*x, scale=2 * SCALE, causal=causal)
    assert not torch.allclose(other.double(), want_out, rtol=bound, atol=bound)


@pytest.mark.parametrize(("heads", "widths"), [(16, V3), (3, V3), (8, SMALL)])
def test_quantised_output_is_the_outputs_own(heads: int, widths: tuple[int, int, int]) -> None:
    x = inputs([1, 128, 130, 700], [1, 128, 130, 700], heads, torch.bfloat16, widths)
    want = quantise_rows_fp8(attend_varlen(*x, scale=SCALE, causal=True)[0].flatten(1))
    got = attend_varlen_quantised(*x, scale=SCALE, causal=True)
    assert torch.equal(got.scales, want.scales)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    again = replayed(lambda: attend_varlen_quantised(*x, scale=SCALE, causal=True).values.view(torch.uint8))
    assert torch.equal(again, want.values.view(torch.uint8))
    other = attend_varlen_quantised(*x, scale=2 * SCALE, causal=True)
    assert not torch.equal(other.values.view(torch.uint8), want.values.view(torch.uint8))


def test_rows_of_other_sequences_do_not_leak() -> None:
    x = inputs([200, 300, 100], [200, 300, 100], 4, torch.bfloat16, V3)
    for t in x[1:4]:
        t[:200] = math.nan
        t[500:] = math.nan
    out, lse = attend_varlen(*x, scale=SCALE, causal=True)
    assert out[200:500].isfinite().all()
    assert lse[200:500].isfinite().all()
    assert out[500:].isnan().all()


@pytest.mark.parametrize(("dtype", "widths"), [(torch.bfloat16, V3), (torch.bfloat16, SMALL), (torch.float32, SMALL)])
def test_keys_past_the_last_border_are_nobodys(dtype: torch.dtype, widths: tuple[int, int, int]) -> None:
    """As in a captured step behind a context: borders within room for more keys, of some sequences none, some without queries."""
    x = inputs([300, 5, 129, 0, 0, 78], [257, 0, 1024, 1, 0, 0], 8, dtype, widths)
    want_out, want_lse = attend_varlen_reference(*wide(x), scale=SCALE, causal=False)
    room = [torch.cat([t, t.new_full((814, *t.shape[1:]), math.nan)]) for t in x[1:4]]
    out, lse = replayed(lambda: attend_varlen(x[0], *room, *x[4:], scale=SCALE, causal=False))
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), want_out, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert (lse[300:305] == -math.inf).all()
    own = torch.randn_like(out), torch.randn_like(lse)
    merged = own[0].clone(), own[1].clone()
    merge_into(*merged, out, lse)
    for rows in (slice(300, 305), slice(434, 512)):
        assert torch.equal(merged[0][rows], own[0][rows])
        assert torch.equal(merged[1][rows], own[1][rows])


def test_parts_merged_in_graph_and_eager_equal_the_reference() -> None:
    torch.manual_seed(0)
    outs = torch.randn(2, 300, 16, 128, device="cuda", dtype=torch.bfloat16)
    lses = 3 * torch.randn(2, 300, 16, device="cuda")
    lses[0, 5] = -math.inf

    def merged() -> tuple[Tensor, Tensor]:
        part = outs[0].clone(), lses[0].clone()
        merge_into(*part, outs[1], lses[1])
        return part

    got, again, want = merged(), replayed(merged), (outs[0].double(), lses[0].double())
    assert torch.equal(again[0], got[0])
    assert torch.equal(again[1], got[1])
    merge_into_reference(*want, outs[1].double(), lses[1].double())
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[0][5], outs[1][5])
    assert not torch.allclose(got[0], outs[0], rtol=1e-2, atol=1e-2)
