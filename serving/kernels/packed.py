"""Weights packed for the CPU: oneDNN's own blocked copy of a matrix.

Opaque (no slices, no views), the same shape, dtype and size. It is read at about twice the rate of the plain layout by
the few rows of a decode step, and no slower by a prefill; but each shape holds half a megabyte of descriptors for each number
of rows that it meets, and a call costs 10 us, so small matrices stay plain, and all of who only prefills.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

# One row of fp32: packed 22 us for 20 to 28 at this size, 15 for 13 at half of it, 11 for 2.5 at an eighth; eight rows: 30 for 45, 21 for 28, 13 for 5.
WORTH_PACKING_BYTES = 512 << 10
# The number of rows a layout is chosen for; one choice serves every number.
_PACKED_FOR_ROWS = 8
# Rows that one call takes.
PIECES = tuple(1 << power for power in range(9))
_PIECE_SIZES = frozenset(PIECES)

_PACKS = ContextVar("packs", default=True)


@contextmanager
def packing(wanted: bool) -> Iterator[None]:
    """Inside, `pack` packs, or leaves every weight plain."""
    before = _PACKS.set(wanted)
    try:
        yield
    finally:
        _PACKS.reset(before)


def pack(weight_NK: Tensor) -> Tensor:
    """The weight as `linear` reads it fastest. Large, fp32 or bf16, on CPU: a packed copy; else the weight itself."""
    if not _PACKS.get() or weight_NK.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return weight_NK
    if not _is_worth_it(weight_NK):
        return weight_NK
    with torch.inference_mode():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), _PACKED_FOR_ROWS)
    return packed


def _is_worth_it(weight_NK: Tensor) -> bool:
    """oneDNN computes bf16 only on processors with AVX-512, and plain bf16 too, where it keeps as much for every number of rows."""
    if weight_NK.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_NK.dtype == torch.float32 and weight_NK.nbytes >= WORTH_PACKING_BYTES


def packed_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T, [M, N]; the weight packed."""
    num_rows = x_MK.shape[0]
    if num_rows in _PIECE_SIZES:
        return _product(x_MK, weight_NK)
    if not num_rows:
        return x_MK.new_empty(0, weight_NK.shape[0])
    pieces = row_pieces(num_rows)
    num_padded = sum(pieces) - num_rows
    if num_padded:
        x_MK = F.pad(x_MK, (0, 0, 0, num_padded))
    outs = [_product(x, weight_NK) for x in x_MK.split(pieces)]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out[:num_rows] if num_padded else out


def _product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_MK, weight_NK, None, "none", [], "")
    return out


def row_pieces(num_rows: int) -> list[int]:
    """Sizes of `PIECES` that hold `num_rows` rows: whole 256s, then one piece or two.

    oneDNN compiles a product for each number of rows that a shape meets and keeps half a megabyte for it, and experts meet every
    number: 91 of them took 50 MB, and 0.2 s of the 0.6 s of a first 512-token prompt.
    """
    pieces = [PIECES[-1]] * (num_rows // PIECES[-1])
    rest = num_rows % PIECES[-1]
    if rest:
        whole = _power_of_two_from(rest)
        last = _power_of_two_from(rest - whole // 2)
        # Calls cost as much as a few rows: small numbers are padded, not parted.
        pieces += [whole] if rest <= 32 or last == whole // 2 else [whole // 2, last]
    return pieces


def _power_of_two_from(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
