"""What one rank writes and what others write into its pool, as one mailbox driver."""

from __future__ import annotations

from kvcache.transfer.notices import Notices
from kvcache.transfer.writes import WriteDone, Writes


class Traffic:
    """A mailbox driver around a Writes, a Notices, or both."""

    def __init__(self, writes: Writes | None, notices: Notices | None) -> None:
        self._parts = [part for part in (writes, notices) if part is not None]

    @property
    def busy(self) -> bool:
        return any(part.busy for part in self._parts)

    @property
    def pause_s(self) -> float:
        return min(part.pause_s for part in self._parts if part.busy)

    def poll(self) -> list[WriteDone | bytes]:
        return [item for part in self._parts if part.busy for item in part.poll()]

    def close(self) -> None:
        for part in self._parts:
            part.close()
