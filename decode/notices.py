"""The I/O thread's side of the arrivals: the pool that others write, driven only while somebody may.

The step loop says how many jobs have pages exposed or draining; while there are any, the mailbox polls the backend (a
write may need both ends to move) and hands on what its notifications say.
"""

from __future__ import annotations

from kvcache.transfer.base import PageTarget


class Notices:
    """A mailbox driver around a PageTarget."""

    def __init__(self, target: PageTarget) -> None:
        self._target = target
        self._num_watched = 0
        self.agent = target.agent

    @property
    def busy(self) -> bool:
        return self._num_watched > 0

    def watch(self, num_jobs: int) -> None:
        """So many jobs may be written to from now on."""
        self._num_watched = num_jobs

    def poll(self) -> list[bytes]:
        return self._target.notifications()

    def close(self) -> None:
        self._target.close()
