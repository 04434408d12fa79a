"""FP8 products on the device, as they are cut for each shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.gemm import (
    linear,
    linear_by_head,
    linear_by_head_reference,
    linear_fp8_reference,
    linear_fp32,
    linear_fp32_reference,
    linear_silu_mul_reference,
)
from serving.kernels.quant import (
    Fp8Weight,
    QuantisedRows,
    quantise_block_fp8,
    quantise_rows_fp8,
)
from serving.kernels.triton.gemm import FewRows, few_rows
from tests.gpu.graphs import replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def operands(rows: int, columns: int, width: int) -> tuple[QuantisedRows, Fp8Weight]:
    """Columns of K differ in size by a million, so that a wrong scale shows."""
    scale = torch.logspace(-3, 3, width, device="cuda")[torch.randperm(width, device="cuda")]
    quantised, scales = quantise_block_fp8(randn(columns, width, seed=1) * scale, (128, 128))
    x = quantise_rows_fp8((randn(rows, width) / scale).to(torch.bfloat16))
    # What pads the scales' rows is not to be read.
    x.scales.as_strided((x.scales.stride(1), x.scales.shape[1]), x.scales.stride())[rows:] = float("nan")
    return x, Fp8Weight(quantised=quantised, scales=scales)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


SHAPES = [
    (1, 7168, 2048),
    (3, 160, 256),
    (5, 24576, 1536),
    (1, 2112, 7168),
    (16, 2112, 7168),
    (9, 300, 7104),
    (16, 4096, 7168),
    (16, 7168, 16384),
    (33, 24576, 1536),
    (64, 2112, 7168),
    (65, 160, 64),
    (128, 7168, 16384),
    (130, 2112, 7168),
    (256, 4096, 7168),
    (300, 1000, 1408),
    (513, 7168, 2048),
    (4096, 4096, 7168),
]


@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
def test_graph_and_eager_equal_the_reference(rows: int, columns: int, width: int) -> None:
    x, w = operands(rows, columns, width)
    got, want = linear(x, w), linear_fp8_reference(x, w)
    assert got.shape == (rows, columns)
    assert error(got, want) < 3e-3
    assert torch.equal(replayed(lambda: linear(x, w)), got)
    assert torch.equal(linear(x, w), got)
    w.scales[-1, -1] *= 1.5
    assert not torch.equal(linear(x, w), got)


# K for few SMs is parted; so many columns are not.
@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [(1, 256, 7168), (16, 256, 7168), (33, 250, 7160), (64, 2048, 10944), (5, 20000, 4352)],
)
def test_plain_products_of_long_rows_in_fp32(rows: int, columns: int, width: int) -> None:
    x, w = randn(rows, width).bfloat16(), randn(columns, width, seed=1).bfloat16() / width**0.5
    got, want = linear_fp32(x, w), linear_fp32_reference(x.double(), w.double())
    assert got.dtype == torch.float32
    assert error(got, want) < 1e-5
    assert error(got.bfloat16(), want) > 1e-4
    assert torch.equal(replayed(lambda: linear_fp32(x, w)), got)
    assert torch.equal(linear_fp32(x, w), got)


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize(("rows", "heads"), [(1, 128), (16, 128), (17, 128), (64, 128), (65, 128), (16, 16)])
def test_each_head_has_a_matrix_of_its_own(rows: int, heads: int, quantise: bool) -> None:
    x = randn(rows, heads, 512).bfloat16()
    w = (randn(heads, 256, 512, seed=1) / 512**0.5).bfloat16()[:, 128:]
    want = linear_by_head_reference(x.double(), w.double(), quantise=False)
    assert isinstance(want, Tensor)
    got = linear_by_head(x, w, quantise=quantise)
    again = replayed(lambda: linear_by_head(x, w, quantise=quantise))
    if quantise:
        assert isinstance(got, QuantisedRows)
        assert isinstance(again, QuantisedRows)
        exact = linear_by_head_reference(x, w, quantise=True)
        assert isinstance(exact, QuantisedRows)
        torch.testing.assert_close(got.scales, exact.scales, rtol=1e-2, atol=0)
        got, again = got.dequantise(torch.float32), again.dequantise(torch.float32)
    assert isinstance(got, Tensor)
    assert isinstance(again, Tensor)
    assert error(got, want) < (4e-2 if quantise else 4e-3)
    assert error(got.roll(128, dims=1), want) > 0.5
    assert torch.equal(again, got)


def test_plain_rows_are_quantised_first() -> None:
    x, (_, w) = randn(40, 2048).to(torch.bfloat16), operands(1, 512, 2048)
    assert torch.equal(linear(x, w), linear(quantise_rows_fp8(x), w))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_every_cut_gives_the_product(many: bool, num_splits: int) -> None:
    from serving.kernels.gluon.gemm import ManyRows, many_rows

    x, w = operands(200, 640, 2176)
    want = linear_fp8_reference(x, w)
    if many:
        outs = [many_rows(x, w, ManyRows(wide=wide, num_splits=num_splits)) for wide in (False, True)]
    else:
        cuts = [(16, 64, 2), (32, 128, 1), (64, 128, 3)]
        outs = [few_rows(x, w, FewRows(block_t=t, block_n=n, unroll=u, num_splits=num_splits)) for t, n, u in cuts]
    for out in outs:
        assert isinstance(out, Tensor)
        assert error(out, want) < 3e-3


def test_rows_that_end_within_a_tile_leave_the_other_scales_alone() -> None:
    from serving.kernels.gluon.gemm import ManyRows, many_rows

    x, w = operands(200, 1024, 512)
    got, want = many_rows(x, w, ManyRows(), silu=True), linear_silu_mul_reference(x, w)
    assert isinstance(got, QuantisedRows)
    assert isinstance(want, QuantisedRows)
    assert error(got.dequantise(torch.float32), want.dequantise(torch.float32)) < 2e-2
    assert error(got.dequantise(torch.float32), want.dequantise(torch.float32).roll(1, dims=0)) > 0.5
