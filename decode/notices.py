"""The I/O thread's side of the arrivals: the pool that others write, driven only while somebody may.

The step loop says how many jobs have pages exposed or draining; while there are any, the mailbox polls the backend (a
write may need both ends to move) and hands on what its notifications say.
"""

from __future__ import annotations

from kvcache.transfer.base import PageTarget
from serving.mailbox import PAUSE_S


class Notices:
    """A mailbox driver around a PageTarget."""

    def __init__(self, target: PageTarget) -> None:
        self._target = target
        self._num_watched = 0
        self._num_due = 0
        self.agent = target.agent
        self.hurries = target.pause_s < PAUSE_S

    @property
    def busy(self) -> bool:
        return self._num_watched > 0

    @property
    def pause_s(self) -> float:
        return self._target.pause_s if self._num_due else PAUSE_S

    def watch(self, num_jobs: int, num_due: int = 0) -> None:
        """So many jobs may be written to from now on; the last writes of `num_due` of them have been posted."""
        self._num_watched, self._num_due = num_jobs, num_due

    def poll(self) -> list[bytes]:
        return self._target.notifications()

    def close(self) -> None:
        self._target.close()
