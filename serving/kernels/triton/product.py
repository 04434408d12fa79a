"""Which kernel computes x W^T on a GPU, and how it is cut. Figures measured on an H200."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from serving.kernels.quant import BLOCK, Fp8Weight, QuantisedRows
from serving.kernels.triton import gemm, quant
from serving.kernels.triton.device import num_processors
from serving.kernels.triton.gemm import FewRows, Tiles
from serving.kernels.triton.thin import MOST_COLUMNS, MOST_ROWS, thin_product

if TYPE_CHECKING:
    from serving.kernels.gluon.gemm import Places

# Up to so many rows the weights' bytes are the bound and rows are the narrow side of a tile.
_FEW = 64
# The same of plain dense products; and rows of a tile by expert whose products go through `gluon.few_rows`.
_FEW_DENSE = 64
RING_TILE = 16
# Rows of a tile of `many_rows`.
_MANY = 128
_STAYS_IN_L2_BYTES = 16 << 20
# Microseconds of `many_rows`: a step of 128 bytes of K of a tile of 256 columns, of 128, and a megabyte of parts of a split.
_WIDE_STEP_US, _NARROW_STEP_US, _SPLIT_MB_US = 0.82, 0.52, 1.0
# From so many tiles on the library's product and a SiLU-mul behind it take longer than one kernel.
_FUSED_TILES = 4 * 132


def linear(x: Tensor, w: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """x W^T [M, N], plain; in `dtype`, fp32, from bf16."""
    if is_thin(x, w):
        return thin_product(x, w, dtype=dtype)
    if is_few(x, w):
        from serving.kernels.gluon.few_rows import few_rows

        out = few_rows(x, w, dtype=dtype)
        assert isinstance(out, Tensor)
        return out
    if _takes_ring(x, w) and (num_splits := _ring_splits(x, w)) > 1:
        from serving.kernels.gluon.few_rows import few_rows

        out = few_rows(x, w, dtype=dtype, num_splits=num_splits)
        assert isinstance(out, Tensor)
        return out
    return F.linear(x, w) if dtype in (None, x.dtype) else torch.mm(x, w.t(), out_dtype=dtype)


def linear_silu_mul(x: Tensor, w: Tensor) -> Tensor:
    """See `serving.kernels.gemm.linear_silu_mul`; plain."""
    if is_thin(x, w):
        return thin_product(x, w, silu=True)
    if is_few(x, w):
        from serving.kernels.gluon.few_rows import few_rows

        out = few_rows(x, w, silu=True)
        assert isinstance(out, Tensor)
        return out
    num_tiles = triton.cdiv(x.shape[0], _MANY) * triton.cdiv(w.shape[0], 256)
    if x.dtype == torch.bfloat16 and num_tiles >= _FUSED_TILES:
        hidden = product(x, w, silu=True)
        assert isinstance(hidden, Tensor)
        return hidden
    return quant.silu_mul(F.linear(x, w))


def is_thin(x: Tensor, w: Tensor) -> bool:
    """Whether `thin_product` is the quickest."""
    return x.dim() == 2 and 0 < x.shape[0] <= MOST_ROWS and x.shape[1] <= MOST_COLUMNS and x.dtype != torch.float64


def is_few(x: Tensor, w: Tensor) -> bool:
    """Whether `gluon.few_rows` is the quickest, of plain weights: with longer rows the library is."""
    return _takes_ring(x, w) and x.shape[1] <= MOST_COLUMNS


def _takes_ring(x: Tensor, w: Tensor) -> bool:
    """Whether `gluon.few_rows` multiplies these, plain."""
    few = x.dim() == 2 and 0 < x.shape[0] <= _FEW_DENSE and x.shape[1] % 8 == 0
    return few and has_ring(x) and x.dtype == w.dtype and _is_copied_in_bulk(x)


def _ring_splits(x: Tensor, w: Tensor | Fp8Weight) -> int:
    """Parts of K such that a matrix with columns for few SMs lies in the rings of all."""
    from serving.kernels.gluon.few_rows import splits_for

    return splits_for(w.shape[0], triton.cdiv(x.shape[1] * x.element_size(), 128), num_processors(x.device))


def _is_copied_in_bulk(x_TK: Tensor) -> bool:
    """Whether its rows begin at multiples of 16 bytes, as bulk copies want them; part of a wider matrix may not."""
    return x_TK.stride(0) * x_TK.element_size() % 16 == 0 and x_TK.data_ptr() % 16 == 0


def is_few_by_head(x_THC: Tensor, w_HVC: Tensor) -> bool:
    """Whether `gluon.few_rows_by_head` is the quickest: heads for most processors."""
    num_rows, num_heads, width = x_THC.shape
    fits = width % 256 == 0 and w_HVC.shape[1] == BLOCK and x_THC.is_contiguous() and w_HVC.stride(2) == 1
    return fits and 0 < num_rows <= _FEW_DENSE and num_heads >= 100 and has_ring(x_THC) and x_THC.dtype == w_HVC.dtype


def has_ring(x: Tensor) -> bool:
    """Whether `gluon.few_rows` multiplies such values."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float8_e4m3fn)


def _fills_ring(x: Tensor | QuantisedRows, w: Tensor | Fp8Weight) -> bool:
    """Whether `gluon.few_rows` is the quickest, dense FP8: not without work for most processors, where K is split."""
    return isinstance(x, QuantisedRows) and 0 < len(x.values) <= RING_TILE and w.shape[0] >= 64 * 100


def product(
    x: Tensor | QuantisedRows, w: Tensor | Fp8Weight, *, silu: bool = False, tiles: Tiles | None = None
) -> Tensor | QuantisedRows:
    """x W^T [S, N]; with `silu` silu(x gate^T) * (x up^T) [S, N / 2], FP8 if the weight is.

    `x` [S, K], FP8 rows where the weight is FP8; `w` [N, K], or [E, N, K] with `tiles`. FP8 without `silu` gives bf16.
    """
    values = x.values if isinstance(x, QuantisedRows) else x
    num_rows = tiles.num_rows if tiles else values.shape[0]
    if has_ring(values) and (num_rows == RING_TILE if tiles else _fills_ring(x, w)):
        from serving.kernels.gluon.few_rows import few_rows

        return few_rows(x, w, silu=silu, tiles=tiles)
    if (
        has_ring(values)
        and not tiles
        and not silu
        and 0 < num_rows <= RING_TILE
        and (splits := _ring_splits(values, w)) > 1
    ):
        from serving.kernels.gluon.few_rows import few_rows

        return few_rows(x, w, num_splits=splits)
    if num_rows <= _FEW or values.dtype == torch.float32 or not values.is_cuda:
        return gemm.few_rows(x, w, _few(values, w.shape[-2], silu=silu, tiles=tiles), silu=silu, tiles=tiles)
    from serving.kernels.gluon import gemm as gluon_gemm

    num_m = tiles.num_expected if tiles else triton.cdiv(num_rows, _MANY)
    num_k = triton.cdiv(values.shape[1] * values.element_size(), 128)
    wide, num_splits = many_cut(
        num_m,
        w.shape[-2],
        num_k,
        silu=silu,
        processors=num_processors(values.device),
    )
    group_m = 8 if tiles is None else _grouped_m(x, w)
    cut = gluon_gemm.ManyRows(wide=wide, num_splits=num_splits, group_m=group_m)
    return gluon_gemm.many_rows(x, w, cut, silu=silu, tiles=tiles)


def placed_product(x: Tensor | QuantisedRows, w: Tensor | Fp8Weight, tiles: Tiles, places: Places) -> None:
    """`product` by expert in tiles of `many_rows`, each row to its place."""
    from serving.kernels.gluon import gemm as gluon_gemm

    gluon_gemm.many_rows(x, w, gluon_gemm.ManyRows(group_m=_grouped_m(x, w)), tiles=tiles, places=places)


def _grouped_m(x: Tensor | QuantisedRows, w: Tensor | Fp8Weight) -> int:
    """An expert's weights that stay in L2 beside the rows are swept for few rows at a time."""
    values = x.values if isinstance(x, QuantisedRows) else x
    return 4 if w.shape[-2] * values.shape[1] * values.element_size() <= _STAYS_IN_L2_BYTES else 16


def grouped_tile(num_pairs: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile that meets one expert: tiles of few rows waste less, of many read their weights less often."""
    average = num_pairs / num_experts
    if average <= 16 or dtype == torch.float32:
        return 16
    return 32 if average <= 32 and dtype == torch.bfloat16 else _MANY


def _few(x_SK: Tensor, num_rows_w: int, *, silu: bool, tiles: Tiles | None) -> FewRows:
    num_k = triton.cdiv(x_SK.shape[1] * x_SK.element_size(), 128)
    fp8 = x_SK.dtype == torch.float8_e4m3fn
    if tiles is not None:
        if tiles.num_rows > 16:
            return FewRows(block_t=tiles.num_rows, stages=3 if silu else 4)
        return FewRows(block_t=16, block_n=128 if fp8 else 64, unroll=2)
    block_t = min(_FEW, max(16, triton.next_power_of_2(x_SK.shape[0])))
    if num_rows_w >= 128 * 132:
        return FewRows(block_t=block_t, stages=4)
    num_blocks = triton.cdiv(num_rows_w, 64)
    num_splits = 1
    while num_blocks * num_splits < 200 and num_k >= 24 * num_splits:
        num_splits *= 2
    return FewRows(block_t=block_t, block_n=64, num_splits=num_splits, unroll=2)


def many_cut(num_m: int, num_rows_w: int, num_k: int, *, silu: bool, processors: int) -> tuple[bool, int]:
    """Wide tiles or not, and the parts of K, for the least time by a model: waves of tiles, their steps, the parts' bytes.

    By whole tiles of rows: each cut has code of its own, and the sizes that are warmed up meet all that other numbers of rows do.
    """

    def cost_us(wide: bool, num_splits: int) -> float:
        num_n = -(-num_rows_w // (256 if wide else 128))
        waves = -(-num_m * num_n * num_splits // processors)
        steps_us = waves * -(-num_k // num_splits) * (_WIDE_STEP_US if wide else _NARROW_STEP_US)
        parts_mb = num_m * _MANY * num_rows_w * 4e-6 * num_splits if num_splits > 1 else 0.0
        return steps_us + parts_mb * _SPLIT_MB_US

    # SiLU needs gate and up in one tile, or the parts of a split.
    cuts = [(wide, splits) for wide in (True, False) for splits in (1, 2, 4, 8) if num_k >= 6 * splits]
    cuts = [cut for cut in cuts if cut[0] or cut[1] > 1 or not silu] or [(True, 1)]
    return min(cuts, key=lambda cut: cost_us(*cut))
