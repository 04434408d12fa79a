"""Memory for experts that are not in force yet, as rows of bytes, and checksums of experts wherever they are.

Knows neither ranks nor placements: an expert is a list of tensors, of which all experts have alike ones.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.core.errors import PeerError

ROW_BYTES = 1024
"""Experts travel in rows of so many bytes; the last is filled up."""
_ALIGNMENT = 64
_STRIDE = 0x9E3779B97F4A7C15 >> 1
_BLOCK_WORDS = 1 << 20
_LOW_63_BITS = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Where one of an expert's tensors lies in its bytes."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Staging:
    """Memory on the device of `like` for `num_experts` experts with tensors like those. An expert is `num_rows` rows of ROW_BYTES."""

    def __init__(self, like: Sequence[Tensor], num_experts: int) -> None:
        self._parts: list[_Part] = []
        end = 0
        for tensor in like:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + tensor.numel() * tensor.element_size()
            self._parts.append(_Part(start=start, end=end, shape=tuple(tensor.shape), dtype=tensor.dtype))
        self.num_rows = -(-end // ROW_BYTES)
        self._device = like[0].device
        self._bytes = self.new_rows(num_experts * self.num_rows).view(num_experts, self.num_rows, ROW_BYTES)

    def new_rows(self, num_rows: int) -> Tensor:
        """uint8 [rows, ROW_BYTES] on the same device, for what is underway."""
        return torch.zeros(num_rows, ROW_BYTES, dtype=torch.uint8, device=self._device)

    def rows(self, index: int, first: int, end: int) -> Tensor:
        """uint8 [end - first, ROW_BYTES], a view of a staged expert."""
        return self._bytes[index, first:end]

    def expert(self, index: int) -> list[Tensor]:
        """The staged expert as tensors, views."""
        flat = self._bytes[index].view(-1)
        return [flat[part.start : part.end].view(part.dtype).view(part.shape) for part in self._parts]

    def checked(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous. Raises PeerError if they are not shaped as an expert's tensors."""
        found = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        expected = [(part.shape, part.dtype) for part in self._parts]
        if found != expected:
            raise PeerError(f"its tensors are {found} instead of {expected}; give them as the model's slots hold them")
        return [tensor.contiguous() for tensor in tensors]

    def copy_rows(self, tensors: Sequence[Tensor], first: int, into: Tensor) -> None:
        """`into` uint8 [rows, ROW_BYTES] gets what lies from row `first` on in the expert whose tensors these are. What fills up
        between tensors and at the end stays as it is."""
        flat = into.view(-1)
        begin, limit = first * ROW_BYTES, first * ROW_BYTES + len(flat)
        for part, tensor in zip(self._parts, tensors, strict=True):
            low, high = max(begin, part.start), min(limit, part.end)
            if low < high:
                source = _bytes(tensor)[low - part.start : high - part.start]
                flat[low - begin : high - begin].copy_(source, non_blocking=True)


def checksums(experts: Iterable[Sequence[Tensor]]) -> list[int]:
    """For each expert's tensors, contiguous ones, a number in [0, 2^63) by their bytes.

    On a CPU a CRC-32. On a GPU, where that would cost a copy to the host, sums weighted by place, read back once for all.
    """
    found = [_checksum(tensors) for tensors in experts]
    return [value & _LOW_63_BITS for value in torch.stack(found).tolist()] if found else []


def weighted_sum(bytes_N: Tensor) -> Tensor:
    """int64 []: of uint8 [N], N a multiple of 4, each 32-bit word times an odd number by its place, modulo 2^64 with a sign. A word
    that changes changes its low 63 bits. In blocks, since the products take twice the memory of the words."""
    total = torch.zeros((), dtype=torch.int64, device=bytes_N.device)
    for number, words_W in enumerate(bytes_N.view(torch.int32).split(_BLOCK_WORDS)):
        total += (words_W * _weights(bytes_N.device)[: len(words_W)]).sum() * (2 * number + 1)
    return total


def _checksum(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [], where the tensors are."""
    if not tensors[0].is_cuda:
        return torch.tensor(
            functools.reduce(lambda crc, tensor: zlib.crc32(_bytes(tensor).numpy().data, crc), tensors, 0)
        )
    terms = [weighted_sum(_bytes(tensor)) * (2 * number + 1) for number, tensor in enumerate(tensors)]
    return torch.stack(terms).sum()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """int64 [W], 8 MB. Kept: to make them takes more launches than to use them."""
    return torch.arange(_BLOCK_WORDS, dtype=torch.int64, device=device) * _STRIDE | 1
