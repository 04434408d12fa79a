"""What a hand-off claims to hold, and how that is checked: write notices and checksums of pages.

A notice travels with each write through the transfer backend, so it arrives after the bytes. Checksums are over
the valid rows of a page, layer by layer, MTP last: what lies beyond the last token may be anything on either side.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from kvcache.layout import PAGE_TOKENS
from kvcache.pool import KVPool
from serving.core.errors import PeerError

_STRIDE = 0x9E3779B97F4A7C15 >> 1
_LOW_63_BITS = (1 << 63) - 1


class WriteNotice(msgspec.Struct, frozen=True, array_like=True):
    """One write of a job: `pages`, indices into its ticket's, all of one owner, in the ticket's epochs."""

    job_id: str
    number: int
    pages: list[int]
    epochs: list[int]
    num_bytes: int


def encode_notice(notice: WriteNotice) -> bytes:
    return msgspec.msgpack.encode(notice)


def decode_notice(data: bytes) -> WriteNotice:
    """Raises PeerError."""
    try:
        return msgspec.msgpack.decode(data, type=WriteNotice)
    except msgspec.MsgspecError as error:
        raise PeerError(f"a write was announced by something unreadable: {error}") from error


def checked_pages(job_id: str, num_pages: int, mode: str) -> frozenset[int]:
    """Which of a ticket's pages both sides sum up. mode: `all`, `off`, or `sampled`: the last and one more that depends on the job."""
    if mode == "off" or num_pages == 0:
        return frozenset()
    if mode == "all":
        return frozenset(range(num_pages))
    return frozenset((num_pages - 1, zlib.crc32(job_id.encode()) % num_pages))


def rows_of_page(index: int, num_tokens: int) -> int:
    """Valid rows of page `index` of a sequence of `num_tokens` tokens."""
    return min(PAGE_TOKENS, num_tokens - index * PAGE_TOKENS)


def page_checksums(pool: KVPool, pages: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """For each name, the checksum of the first `num_rows` rows of every layer of a page: {name: (page_id, num_rows)}.

    On a CPU a CRC-32. On a GPU, where that would cost a copy of the page to the host, a weighted sum of its 32-bit words modulo 2^63,
    which every changed byte changes; taken beside the step in flight, since what computed or wrote these pages has ended.
    """
    if not pages or not pool.tensor.is_cuda:
        return {name: zlib.crc32(_bytes(pool, *page).numpy().data) for name, page in pages.items()}
    device = pool.tensor.device
    with torch.cuda.stream(_side_stream(device)):
        sums = torch.stack([weighted_sum(_bytes(pool, *page)) for page in pages.values()])
        return {name: value & _LOW_63_BITS for name, value in zip(pages, sums.tolist(), strict=True)}


def weighted_sum(bytes_N: Tensor) -> Tensor:
    """int64 []: of uint8 [N], N a multiple of 4, each 32-bit word times an odd number of its own, modulo 2^64 with a sign."""
    words_W = bytes_N.view(torch.int32)
    num_words = words_W.shape[0]
    weights_W = _weights(1 << (num_words - 1).bit_length(), bytes_N.device)[:num_words]
    return (words_W * weights_W).sum()


def _bytes(pool: KVPool, page_id: int, num_rows: int) -> Tensor:
    """uint8 [N]."""
    return pool.page(page_id)[:, :num_rows].contiguous().view(torch.uint8).flatten()


@functools.cache
def _weights(num_words: int, device: torch.device) -> Tensor:
    """int64 [W]. Kept: to make them takes more launches than to use them. Powers of two, so that there are few."""
    return torch.arange(num_words, dtype=torch.int64, device=device) * _STRIDE | 1


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Of high priority: a checksum must not wait for the thousands of blocks of a prefill step."""
    return torch.cuda.Stream(device, priority=-1)
