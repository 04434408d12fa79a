"""How pages travel: a source writes pages of its own pool into pages of somebody else's, one-sided.

    write -> open -> Completed(error None)   every byte is in the target's memory and the notification on its way
                  -> Completed(error ...)    nothing of it is in flight any more; the target's pages hold anything

The two Protocols are the seam between workers and backends (`local`, `nixl`). A write cannot be refused by its target
and cannot be taken back by its source. Knows page ids and bytes; no jobs, no epochs, no page states. One thread, the
worker's I/O thread, calls everything but the constructors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Completed:
    """A write is over. `error` None: the bytes are there."""

    handle: int
    error: str | None = None


class PageSource(Protocol):
    """Prefill side: reads the pool it was made with."""

    @property
    def num_open(self) -> int:
        """Writes not yet reported by `poll`."""
        ...

    @property
    def pause_s(self) -> float:
        """What to wait between two polls while writes are open."""
        ...

    def connect(self, agent: bytes) -> str:
        """The peer whose `PageTarget.agent` this is; idempotent. Raises PeerError if its pages cannot be written from here."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer, as soon as no write to it is open."""
        ...

    def write(
        self, peer: str, source_page_ids: Sequence[int], target_page_ids: Sequence[int], notification: bytes
    ) -> int:
        """Posts whole pages, source i to target i, and returns a handle; never blocks, never raises for what a peer does.

        What computed the source's pages has ended, on a GPU too: the backend waits for no stream.

        The target gets `notification` (not empty) once all pages have arrived.
        """
        ...

    def poll(self) -> list[Completed]:
        """Drives what is open; each write is reported once."""
        ...

    def close(self) -> None:
        """Releases everything; open writes are not waited for."""
        ...


class PageTarget(Protocol):
    """Decode side: the pool it was made with can be written by whoever knows `agent`."""

    @property
    def agent(self) -> bytes: ...

    @property
    def pause_s(self) -> float:
        """What to wait between two calls of `notifications` while one is due."""
        ...

    def notifications(self) -> list[bytes]:
        """Drives the backend; what has arrived since the last call, each notification once."""
        ...

    def close(self) -> None: ...


def runs(source_page_ids: Sequence[int], target_page_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first source page, first target page, number) of each stretch that is adjacent on both sides: one descriptor each."""
    assert len(source_page_ids) == len(target_page_ids)
    start = 0
    for i in range(1, len(source_page_ids) + 1):
        if i < len(source_page_ids) and (
            source_page_ids[i] == source_page_ids[i - 1] + 1 and target_page_ids[i] == target_page_ids[i - 1] + 1
        ):
            continue
        yield source_page_ids[start], target_page_ids[start], i - start
        start = i
