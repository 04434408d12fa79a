"""What a hand-off claims to hold, and how that is checked: write notices and checksums of pages.

A notice travels with each write through the transfer backend, so it arrives after the bytes. Checksums are CRC-32 of
the valid rows of a page, layer by layer, MTP last: what lies beyond the last token may be anything on either side.
"""

from __future__ import annotations

import zlib

import msgspec
import torch

from kvcache.layout import PAGE_TOKENS
from kvcache.pool import KVPool
from serving.core.errors import PeerError


class WriteNotice(msgspec.Struct, frozen=True, array_like=True):
    """One write of a job: pages [first, first + len(epochs)) of its ticket, in the ticket's epochs."""

    job_id: str
    number: int
    first: int
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


def page_checksum(pool: KVPool, page_id: int, num_rows: int) -> int:
    """CRC-32 of the first `num_rows` rows of every layer of a page."""
    rows = pool.page(page_id)[:, :num_rows].contiguous()
    return zlib.crc32(rows.view(torch.uint8).cpu().numpy().data)
