"""The I/O thread's side of the arrivals: the pool that others write, driven only while somebody may.

The step loop says how many jobs have pages exposed or draining; while there are any, the mailbox polls the backend (a
write may need both ends to move) and hands on what the notifications of other units say. What a TP rank of the same group
copies here is known from that rank.
"""

from __future__ import annotations

from kvcache.transfer.base import PageTarget
from serving.mailbox import PAUSE_S

COPY = b"copy"
"""The notification of pages that come from a TP rank of the same group."""


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
        return [notification for notification in self._target.notifications() if notification != COPY]

    def close(self) -> None:
        self._target.close()
