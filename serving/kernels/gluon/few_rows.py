"""Products of few rows on Hopper: how they are cut into units for the rings of the SMs (`few_rows_ring`), and the launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from serving.kernels.gluon.few_rows_ring import few_rows_kernel
from serving.kernels.quant import BLOCK, Fp8Weight, QuantisedRows, empty_rows
from serving.kernels.triton.device import num_processors
from serving.kernels.triton.gemm import Operands, Tiles, empty_product, operands, sum_splits

# Of the 227 KB of shared memory, what the ring may have.
_RING_BYTES = 219 << 10
# Each costs the sum behind it a row of fp32 more. And steps of two blocks of K that a ring holds for 64 columns and 16 rows: a part
# that is longer is read no sooner (16 x 4096 x 7168: 13.5 us for 10.9).
_MOST_SPLITS = 16
_HELD_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Experts that every one of `num_tokens` tokens takes, computed beside the routed ones and put behind their rows.

    `w`: gate_up [2 S I, D] or down [D, S I] of the S = `num_experts` of them. `x`: the tokens' rows [T, D]; None: for down, what
    gate_up has put behind the routed rows.
    """

    x: Tensor | QuantisedRows | None
    w: Tensor | Fp8Weight
    num_experts: int
    num_tokens: int

    def num_tiles(self, block_t: int) -> int:
        """Of one expert."""
        return -(-self.num_tokens // block_t)


def few_rows(
    x: Tensor | QuantisedRows,
    w: Tensor | Fp8Weight,
    *,
    silu: bool = False,
    tiles: Tiles | None = None,
    shared: Shared | None = None,
    known: bool = False,
    dtype: torch.dtype | None = None,
    block_n: int | None = None,
    unroll: int | None = None,
    num_splits: int = 1,
) -> Tensor | QuantisedRows:
    """As `triton.gemm.few_rows`, bf16 or FP8. With `shared` the result has S * ceil(T / tile) * tile rows more than `tiles` may use.

    `dtype`: of the result, fp32 from bf16. `known`: weights are read by `tiles` before the wait. So the kernel launched directly before
    must wait itself before it lets this one start, and `tiles` must be older than it; another that has only passed by is not enough. With
    `tiles.done` that kernel is the product with `silu` by the same tiles, whose SMs end at different times: a tile's rows are read here
    as soon as all of them are there. `num_splits`: parts of K of a plain product, summed by a second kernel in one order.
    """
    op = operands(x, w, silu=silu)
    block_t = tiles.num_rows if tiles else min(64, max(16, triton.next_power_of_2(op.num_rows)))
    num_routed = tiles.max_tiles if tiles else triton.cdiv(op.num_rows, block_t)
    num_shared = shared.num_experts * shared.num_tiles(block_t) if shared else 0
    num_rows = (num_routed + num_shared) * block_t if shared else op.num_rows
    out = empty_product(op, silu=silu, num_rows=num_rows, dtype=dtype)
    split = num_splits > 1
    target = out
    if split:
        assert not silu
        assert tiles is None
        assert num_routed == 1
        num_routed, num_rows = num_splits, num_splits * block_t
        target = empty_product(op, silu=False, num_rows=num_rows, dtype=torch.float32)
    processors = num_processors(op.x_SK.device)
    if block_n is None:
        expected = (tiles.num_expected if tiles else num_routed) + num_shared
        block_n = 64 if split else _block_n(op, silu=silu, num_tiles=expected, processors=processors)
    assert not (silu and op.fp8) or block_n == BLOCK, "a unit writes one scale a row"
    if unroll is None:
        unroll = 4 if block_t == 16 and not silu and not split else 2
    cut = _Cut(
        block_t=block_t,
        block_n=block_n,
        unroll=unroll,
        num_tiles=num_routed,
        num_steps=triton.cdiv(triton.cdiv(op.num_k, unroll), num_splits),
    )
    beside = _beside(shared, x, op, block_t=block_t, first_row=num_routed * block_t, silu=silu) if shared else None
    _launch(
        op, target, cut, num_rows=num_rows, silu=silu, tiles=tiles, beside=beside, num_shared=num_shared, known=known, split=split
    )  # fmt: skip
    if split:
        assert isinstance(target, Tensor)
        sum_splits(target, out, num_splits=num_splits, silu=False, rows_apart=block_t)
    return out


def splits_for(num_rows_w: int, num_k: int, processors: int) -> int:
    """Parts of K for `few_rows` such that the rings of all SMs hold the whole matrix before the rows come; 1: they cannot."""
    num_steps = -(-num_k // 2)
    most = min(_MOST_SPLITS, processors // -(-num_rows_w // 64), num_steps)
    if most < 2:
        return 1
    steps = -(-num_steps // most)
    return -(-num_steps // steps) if steps <= _HELD_STEPS else 1


def few_rows_by_head(x_BHC: Tensor, w_HVC: Tensor, *, quantise: bool) -> Tensor | QuantisedRows:
    """x[:, h] W[h]^T of every head h, side by side: [B, H V] in bf16, or FP8 where V is a scale's width.

    bf16; x contiguous, B up to 64, C a multiple of 256; rows of W contiguous, heads of W a whole number of its rows apart.
    """
    num_rows, num_heads, width = x_BHC.shape
    num_columns, row_stride = w_HVC.shape[1], w_HVC.stride(1)
    assert x_BHC.is_contiguous()
    assert w_HVC.stride(2) == 1
    assert w_HVC.stride(0) % row_stride == 0
    rows_apart = w_HVC.stride(0) // row_stride
    w_NC = w_HVC.as_strided(((num_heads - 1) * rows_apart + num_columns, width), (row_stride, 1))
    x_BK = x_BHC.flatten(1)
    op = Operands(
        x_SK=x_BK, x_scales=x_BK, w_EK=w_NC, w_scales=w_NC, expert_rows=rows_apart, expert_scale_rows=0,
        num_columns=num_columns, fp8=False,
    )  # fmt: skip
    unroll = 4 if num_rows <= 16 else 2
    assert width % (op.block_k * unroll) == 0, "a step of one head would reach into the next"
    assert not quantise or num_columns == BLOCK, "a unit writes one scale a row"
    cut = _Cut(
        block_t=max(16, triton.next_power_of_2(num_rows)),
        block_n=BLOCK if quantise else 64,
        unroll=unroll,
        num_tiles=num_heads,
        num_steps=width // (op.block_k * unroll),
    )
    out: Tensor | QuantisedRows
    if quantise:
        out = empty_rows(num_rows, num_heads * num_columns, x_BHC.device)
    else:
        out = torch.empty(num_rows, num_heads * num_columns, dtype=x_BHC.dtype, device=x_BHC.device)
    _launch(op, out, cut, num_rows=num_rows, heads=True)
    return out


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """Units of `block_t` rows and `block_n` columns, `num_tiles` of rows (of parts of K, of heads), `unroll` blocks of K a step."""

    block_t: int
    block_n: int
    unroll: int
    num_tiles: int
    num_steps: int


def _launch(
    op: Operands,
    out: Tensor | QuantisedRows,
    cut: _Cut,
    *,
    num_rows: int,
    silu: bool = False,
    tiles: Tiles | None = None,
    beside: tuple[Operands, tuple[int, ...]] | None = None,
    num_shared: int = 0,
    known: bool = False,
    split: bool = False,
    heads: bool = False,
) -> None:
    """`num_rows`: of `out`, which has FP8 rows if a unit is to quantise its own."""
    target = out.values if isinstance(out, QuantisedRows) else out
    out_scales = out.scales if isinstance(out, QuantisedRows) else target
    block_t, block_n, unroll = cut.block_t, cut.block_n, cut.unroll
    num_n = triton.cdiv(op.num_columns, block_n)
    stages = _RING_BYTES // (unroll * 128 * (block_n * (2 if silu else 1) + block_t))
    shared, shared_numbers = beside or (op, (0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0))
    done = tiles.done if tiles and (silu or known) else None
    assert done is None or len(done) == num_shared + cut.num_tiles, "a tile would have no counter of its own"
    assert done is None or not silu or block_n == _silu_block(op), "more or fewer units of a tile than are awaited"
    processors = num_processors(target.device)
    before = _before(op, cut, num_shared, processors) if known else (1, 1, 0)
    few_rows_kernel[(min(processors, (cut.num_tiles + num_shared) * num_n),)](
        _descriptor(op.x_SK, [block_t, op.block_k]), _descriptor(op.w_EK, [block_n, op.block_k]),
        _descriptor(shared.x_SK, [block_t, op.block_k]), _descriptor(shared.w_EK, [block_n, op.block_k]),
        target, out_scales, tiles.expert if tiles else target, tiles.num_used if tiles else target, target if done is None else done, *before,
        op.x_scales, op.w_scales, shared.x_scales, shared.w_scales,
        cut.num_tiles, op.num_rows, num_rows, op.num_columns, num_n, op.num_k, cut.num_steps, op.expert_rows, op.num_columns,
        op.x_scales.stride(-1), op.expert_scale_rows, op.second_scale_row, target.stride(0), out_scales.stride(-1),
        *shared_numbers,
        FP8=op.fp8, SILU=silu, QUANTISE=isinstance(out, QuantisedRows), GROUPED=tiles is not None, SHARED=beside is not None, KNOWN=known,
        SPLIT=split, HEADS=heads, NOTES=done is not None and silu, AWAITS=done is not None and known, BLOCK_T=block_t, BLOCK_N=block_n,
        BLOCK_K=op.block_k, UNROLL=unroll, STAGES=stages, num_warps=4, maxnreg=128, launch_pdl=True,
    )  # fmt: skip


def _block_n(op: Operands, *, silu: bool, num_tiles: int, processors: int) -> int:
    """Columns of a unit: few where there are few units; a scale's 128 in one where the result is quantised."""
    if silu:
        return _silu_block(op)
    return 128 if num_tiles * triton.cdiv(op.num_columns, 128) >= 4 * processors else 64


def _silu_block(op: Operands) -> int:
    return BLOCK if op.fp8 else 64


def _before(op: Operands, cut: _Cut, num_shared: int, processors: int) -> tuple[int, int, int]:
    """Of the product with `silu` that has made this one's rows: units a tile, programs, and as how many units of this one each of its lasts."""
    width, inner = op.num_columns, op.x_SK.shape[1]
    num_units = triton.cdiv(inner, _silu_block(op))
    num_programs = min(processors, (cut.num_tiles + num_shared) * num_units)
    return num_units, num_programs, round(2 * _silu_block(op) * width / (cut.block_n * inner))


def _beside(
    shared: Shared, x: Tensor | QuantisedRows, op: Operands, *, block_t: int, first_row: int, silu: bool
) -> tuple[Operands, tuple[int, ...]]:
    """The shared experts' operands, and how the kernel finds each expert's part of them."""
    beside = operands(x if shared.x is None else shared.x, shared.w, silu=silu)
    per_expert = shared.num_tiles(block_t)
    num_shared = shared.num_experts * per_expert
    inner = op.num_columns if silu else op.x_SK.shape[1]
    assert shared.num_experts == 1 or inner % (BLOCK if op.fp8 else op.block_k) == 0
    # Experts follow each other in the rows of gate_up, gates above ups, and in the columns of down.
    row_step, k_step, second = (inner, 0, beside.num_columns) if silu else (0, inner // op.block_k, 0)
    scale_width = triton.cdiv(beside.w_EK.shape[1], beside.block_k)
    x_row, row_tiles = (0, per_expert) if shared.x is not None else (first_row, num_shared)
    return beside, (
        num_shared, per_expert, row_step, k_step, second, beside.num_rows, x_row, row_tiles, first_row,
        beside.x_scales.stride(-1), row_step // BLOCK, beside.second_scale_row if silu else 0, scale_width, k_step,
    )  # fmt: skip


def _descriptor(x: Tensor, block: list[int]) -> Any:
    dtype = gl.float8e4nv if x.dtype == torch.float8_e4m3fn else gl.bfloat16
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, dtype))
