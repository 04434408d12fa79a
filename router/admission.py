"""Who waits for room, in which order, for how long.

    enter --admit--> (the dispatcher's)      enter --queue_timeout_s--> expired      leave: the client went away

First come, first served: whoever does not fit holds up those behind, so that nobody starves. Requests that come back from a
pre-emption or a dead worker wait in front of all others; they have been admitted once. Pure: time is an argument.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from serving.core.errors import Overloaded

Item = TypeVar("Item", bound=Hashable)
Place = TypeVar("Place")

_MEMORY = 64
_LONGEST_RETRY_S = 600.0


@dataclass(frozen=True)
class _Entry(Generic[Item]):
    item: Item
    deadline_s: float


class Admission(Generic[Item]):
    """Two queues, the resumed one served first."""

    def __init__(self, *, max_waiting: int, queue_timeout_s: float) -> None:
        self._max_waiting = max_waiting
        self._queue_timeout_s = queue_timeout_s
        self._resumed: deque[_Entry[Item]] = deque()
        self._new: deque[_Entry[Item]] = deque()
        self._admitted_s: deque[float] = deque(maxlen=_MEMORY)

    def __len__(self) -> int:
        return len(self._resumed) + len(self._new)

    def enter(self, item: Item, now_s: float, *, resumed: bool = False) -> None:
        (self._resumed if resumed else self._new).append(_Entry(item, now_s + self._queue_timeout_s))

    def check(self, now_s: float) -> None:
        """Raises Overloaded when as many wait as may; call it when somebody new had to stay in the queue."""
        if len(self._new) > self._max_waiting:
            raise Overloaded(
                f"{len(self)} requests are waiting for room; try again later", retry_after_s=self.retry_after_s(now_s)
            )

    def leave(self, item: Item) -> None:
        for queue in (self._resumed, self._new):
            for entry in queue:
                if entry.item == item:
                    queue.remove(entry)
                    return

    def admit(self, place: Callable[[Item], Place | None], now_s: float) -> list[tuple[Item, Place]]:
        """Everybody who fits, in order; `place` spends what it returns."""
        admitted: list[tuple[Item, Place]] = []
        for queue in (self._resumed, self._new):
            while queue:
                placed = place(queue[0].item)
                if placed is None:
                    return admitted
                admitted.append((queue.popleft().item, placed))
                self._admitted_s.append(now_s)
        return admitted

    def expired(self, now_s: float) -> list[Item]:
        """Those whose time is over, removed."""
        over = []
        for queue in (self._resumed, self._new):
            while queue and queue[0].deadline_s <= now_s:
                over.append(queue.popleft().item)
        return over

    def drain(self) -> list[Item]:
        """Everybody, removed."""
        everybody = [entry.item for queue in (self._resumed, self._new) for entry in queue]
        self._resumed.clear()
        self._new.clear()
        return everybody

    def retry_after_s(self, now_s: float) -> float:
        """How long the queue as it stands will take, at the rate of the last 64 admissions; the time-out where there were none."""
        if len(self._admitted_s) < 2:
            return max(1.0, min(self._queue_timeout_s, _LONGEST_RETRY_S))
        mean_s = (now_s - self._admitted_s[0]) / len(self._admitted_s)
        return max(1.0, min(mean_s * (len(self) + 1), _LONGEST_RETRY_S))
