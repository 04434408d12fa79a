"""The prefill attention kernel in Triton's interpreter, against plain products a sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from serving.kernels.attention import attend_varlen_reference, merge_into_reference

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import attention as device

HEADS, NOPE, ROPE, V_WIDTH = 2, 32, 16, 16


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def starts(lens: list[int]) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


def inputs(lens_q: list[int], lens_k: list[int]) -> tuple[Tensor, ...]:
    q = randn(sum(lens_q), HEADS, NOPE + ROPE, seed=0)
    both = randn(sum(lens_k), HEADS, NOPE + V_WIDTH, seed=1)
    k, v = both[:, :, :NOPE], both[:, :, NOPE:]
    return q, k, randn(sum(lens_k), ROPE, seed=2), v, starts(lens_q), starts(lens_k)


SMALL = device.Config(block_m=32, block_n=16, num_warps=4, num_stages=1, tma=False)
TMA = SMALL._replace(tma=True)


@pytest.mark.parametrize("config", [SMALL, TMA])
@pytest.mark.parametrize(
    ("lens_q", "lens_k", "causal"),
    [([1, 32, 47, 17], [1, 32, 47, 17], True), ([5, 33, 2], [40, 0, 16], False)],
)
def test_every_sequence_is_attended_by_itself(
    lens_q: list[int], lens_k: list[int], causal: bool, config: device.Config
) -> None:
    x = inputs(lens_q, lens_k)
    out, lse = device.attend_varlen(*x, scale=0.3, causal=causal, config=config)
    want_out, want_lse = attend_varlen_reference(*x, scale=0.3, causal=causal)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    other, _ = device.attend_varlen(*x, scale=0.31, causal=causal, config=config)
    assert not torch.allclose(other, want_out, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("config", [SMALL, TMA])
def test_rows_of_other_sequences_do_not_leak(config: device.Config) -> None:
    q, k, rope, v, cu_q, cu_k = inputs([20, 19, 20], [20, 19, 20])
    for x in (k, rope, v):
        x[:20] = math.nan
        x[39:] = math.nan
    out, lse = device.attend_varlen(q, k, rope, v, cu_q, cu_k, scale=0.3, causal=True, config=config)
    assert out[20:39].isfinite().all()
    assert lse[20:39].isfinite().all()
    assert out[39:].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("config", [SMALL, TMA])
def test_keys_past_the_last_border_are_nobodys(config: device.Config) -> None:
    """Borders of keys that differ from those of queries, with sequences without keys or without queries."""
    x = inputs([20, 3, 0, 7], [18, 0, 0, 5])
    want_out, want_lse = attend_varlen_reference(*x, scale=0.3, causal=False)
    q, k, rope, v, cu_q, cu_k = x
    k, rope, v = (torch.cat([t, torch.full((41, *t.shape[1:]), math.nan)]) for t in (k, rope, v))
    out, lse = device.attend_varlen(q, k, rope, v, cu_q, cu_k, scale=0.3, causal=False, config=config)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    assert not out[20:23].any()
    assert (lse[20:23] == -math.inf).all()


def test_parts_of_one_context_merge_into_the_whole() -> None:
    q, k, rope, v, cu_q, _ = inputs([7], [50])
    parts = []
    for keys in (slice(0, 20), slice(20, 50)):
        size = starts([keys.stop - keys.start])
        parts += attend_varlen_reference(q, k[keys], rope[keys], v[keys], cu_q, size, scale=0.3, causal=False)
    whole_out, whole_lse = attend_varlen_reference(q, k, rope, v, cu_q, starts([50]), scale=0.3, causal=False)
    out, lse = device.merge(*parts)
    torch.testing.assert_close(out, whole_out)
    torch.testing.assert_close(lse, whole_lse)
    assert not torch.allclose(parts[0], whole_out, atol=1e-3)
    merge_into_reference(*parts)
    torch.testing.assert_close((out, lse), (parts[0], parts[1]))
    nothing, never = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    torch.testing.assert_close(device.merge(nothing, never, out, lse), (out, lse))
    unchanged = device.merge(out, lse, nothing, never)
    assert torch.equal(unchanged[0], out)
    assert torch.equal(unchanged[1], lse)
    assert torch.equal(device.merge(nothing, never, nothing, never)[0], nothing)
