"""The product of few rows in Triton's interpreter, and how products are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.gemm import linear, linear_fp8_reference, linear_silu_mul_reference
from serving.kernels.quant import Fp8Weight, QuantisedRows, quantise_block_fp8, quantise_rows_fp8_reference

pytest.importorskip("triton", reason="Triton is not installed")
from serving.engine.graphs import prefill_sizes
from serving.kernels.triton.gemm import FewRows, few_rows
from serving.kernels.triton.product import grouped_tile, many_cut, product


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fp8_weight(weight: Tensor) -> Fp8Weight:
    quantised, scales = quantise_block_fp8(weight, (128, 128))
    return Fp8Weight(quantised=quantised, scales=scales)


def fp8_rows(x: Tensor) -> QuantisedRows:
    rows = quantise_rows_fp8_reference(x)
    # What pads the scales' rows reaches nothing.
    whole = rows.scales.as_strided((rows.scales.stride(1), rows.scales.shape[1]), rows.scales.stride())
    whole[x.shape[0] :] = float("nan")
    return rows


CUTS = [
    FewRows(block_t=16),
    FewRows(block_t=32, block_n=64, num_splits=2),
    FewRows(block_t=16, block_n=64, num_splits=3, unroll=2),
]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 128, 256), (5, 160, 100), (37, 60, 420)])
def test_fp32_products(cut: FewRows, rows: int, columns: int, width: int) -> None:
    x, w = randn(rows, width), randn(columns, width, seed=1)
    got = few_rows(x, w, cut)
    torch.testing.assert_close(got, x @ w.T, rtol=1e-4, atol=1e-4)
    w[0, -1] += 1
    assert not torch.allclose(few_rows(x, w, cut), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 128, 256), (5, 160, 208), (19, 300, 640)])
def test_fp8_products_are_those_of_the_dequantised_numbers(cut: FewRows, rows: int, columns: int, width: int) -> None:
    scale = torch.logspace(-2, 2, width)
    x, w = fp8_rows(randn(rows, width) / scale), fp8_weight(randn(columns, width, seed=1) * scale)
    got, want = few_rows(x, w, cut), linear_fp8_reference(x, w)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-2)
    w.scales[-1, -1] *= 2
    assert not torch.allclose(got, linear_fp8_reference(x, w), rtol=2**-7, atol=1e-2)


def test_silu_of_gate_and_up_at_once() -> None:
    x, w = randn(5, 64), randn(2 * 40, 64, seed=1)
    want = linear_silu_mul_reference(x, w)
    for cut in CUTS:
        torch.testing.assert_close(few_rows(x, w, cut, silu=True), want, rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_begin_on_16_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        few_rows(randn(2, 66), randn(8, 66), CUTS[0])


def test_an_fp8_weight_on_the_cpu_is_multiplied_by_the_reference() -> None:
    x, w = randn(3, 256), fp8_weight(randn(130, 256, seed=1))
    assert torch.equal(linear(x, w), linear(quantise_rows_fp8_reference(x), w))
    exact = x @ (w.quantised.float() * w.scales.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)).T
    assert float((linear(x, w) - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("rows", [1, 17, 64, 65, 200])
def test_every_number_of_rows_finds_a_cut(rows: int) -> None:
    x, w = randn(rows, 512), randn(96, 512, seed=1)
    torch.testing.assert_close(product(x, w), x @ w.T, rtol=1e-4, atol=1e-4)


def test_measured_shapes_are_cut_as_measured_best() -> None:
    def cut(rows: int, columns: int, width: int, silu: bool = False) -> tuple[bool, int]:
        return many_cut(-(-rows // 128), columns, width // 128, silu=silu, processors=132)

    for columns, width in [(7168, 2048), (24576, 1536), (4096, 7168)]:
        assert cut(4096, columns, width) == (True, 1)
    assert cut(128, 7168, 16384) == (False, 2)
    assert cut(128, 24576, 1536) == (True, 1)
    assert cut(256, 7168, 2048) == (False, 1)
    assert cut(256, 4096, 7168) == (False, 2)
    assert cut(512, 2112, 7168) == (False, 1)
    assert cut(256, 4096, 7168, silu=True) == (False, 2), "one expert of a wide unit"
    assert cut(9 * 1024, 4096, 7168, silu=True) == (True, 1), "SiLU in the product"


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("most", [512, 4096, 8192, 16384])
def test_no_number_of_rows_is_cut_as_none_that_is_warmed_up(tp: int, most: int) -> None:
    """Of V3's matrices: a request would wait for the compiler."""
    warm = [size for size in prefill_sizes(4096) if size <= most] + [most]
    heads = 128 // tp
    shapes = [
        (2112, 7168),
        (heads * 192, 1536),
        (7168, heads * 128),
        (36864, 7168),
        (7168, 18432),
        (4096, 7168),
        (7168, 2048),
    ]
    for columns, width in shapes:

        def cut(rows: int, columns: int = columns, width: int = width) -> tuple[bool, int]:
            return many_cut(-(-rows // 128), columns, width // 128, silu=False, processors=132)

        met = {cut(rows) for rows in warm if rows > 64}
        assert {cut(rows) for rows in range(65, most + 1)} == met
    assert len({cut(rows) for rows in (65, 512)}) == 2, "cuts differ by rows"


def test_tiles_grow_with_the_tokens_of_an_expert() -> None:
    fp8, bf16, fp32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
    assert [grouped_tile(8 * tokens, 256, fp8) for tokens in (1, 256, 512, 1024, 32768)] == [16, 16, 16, 128, 128]
    assert [grouped_tile(6 * tokens, 64, bf16) for tokens in (1, 128, 256, 512)] == [16, 16, 32, 128]
    assert grouped_tile(10**6, 64, fp32) == 16
