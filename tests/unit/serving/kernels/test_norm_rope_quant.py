"""RMSNorm, rotary embedding and FP8 blocks, against their formulas written element by element."""

from __future__ import annotations

import cmath

import pytest
import torch
from torch import Tensor

from serving.kernels.norm_rope import inverse_frequencies, rms_norm, rope_, rotations, yarn_inverse_frequencies
from serving.kernels.quant import dequantise_block_fp8, quantise_block_fp8

V3_YARN = {"factor": 40.0, "original_max_positions": 4096, "beta_fast": 32.0, "beta_slow": 1.0}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_is_its_formula() -> None:
    x, weight = randn(3, 10) * 5, randn(10, seed=1)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rope_turns_neighbouring_pairs_in_place(dtype: torch.dtype) -> None:
    whole = randn(4, 2, 10).to(dtype)
    x = whole[:, :, 4:]
    before = x.clone()
    positions, freqs = torch.tensor([0, 1, 7, 300]), inverse_frequencies(6, 10000.0)
    rope_(x, rotations(positions, freqs, torch.ones(1)))
    for t, position in enumerate(positions.tolist()):
        for i, freq in enumerate(freqs.tolist()):
            pair = complex(float(before[t, 1, 2 * i]), float(before[t, 1, 2 * i + 1]))
            turned = pair * cmath.exp(1j * position * freq)
            got = complex(float(x[t, 1, 2 * i]), float(x[t, 1, 2 * i + 1]))
            assert abs(got - turned) < (0.03 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(whole[:, :, :4], randn(4, 2, 10).to(dtype)[:, :, :4])


def test_yarn_keeps_fast_pairs_and_slows_slow_ones_by_the_factor() -> None:
    plain, yarn = inverse_frequencies(64, 10000.0), yarn_inverse_frequencies(64, 10000.0, **V3_YARN)
    ratio = plain / yarn
    torch.testing.assert_close(ratio[:10], torch.ones(10))
    torch.testing.assert_close(ratio[-8:], torch.full((8,), 40.0))
    assert (ratio[10:24].diff() > 0).all()


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 200), (1, 5)])
def test_fp8_blocks_return_within_their_rounding(shape: tuple[int, int]) -> None:
    weight = randn(*shape) * torch.linspace(0.01, 100, shape[1])
    quantised, scales = quantise_block_fp8(weight, (128, 128))
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = dequantise_block_fp8(quantised, scales, (128, 128), torch.float32)
    for i in range(shape[0]):
        block = weight[i // 128 * 128 : i // 128 * 128 + 128]
        for j in range(0, shape[1], 37):
            largest = float(block[:, j // 128 * 128 : j // 128 * 128 + 128].abs().max())
            bound = max(abs(float(weight[i, j])) / 16, largest / 448 / 512)
            assert abs(float(back[i, j] - weight[i, j])) <= bound * 1.01


def test_a_scale_reaches_its_own_block_only() -> None:
    quantised = torch.ones(130, 130).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    wide = dequantise_block_fp8(quantised, scales, (128, 128), torch.float32)
    assert (wide[:128, :128] == 1).all()
    assert (wide[:128, 128:] == 2).all()
    assert (wide[128:, :128] == 3).all()
    assert (wide[128:, 128:] == 4).all()


def test_a_block_of_zeros_stays_zero() -> None:
    quantised, scales = quantise_block_fp8(torch.zeros(4, 4), (128, 128))
    assert (dequantise_block_fp8(quantised, scales, (128, 128), torch.float32) == 0).all()
