"""Rows of the engine's static buffers, handed to one sequence at a time.

Shared by the prefill and the decode scheduler of one engine, so that in mode `both` a sequence keeps its slot from its first chunk to its last
token. A scheduler gives a slot back only when no step in flight uses it.
"""

from __future__ import annotations

from collections.abc import Callable


class Slots:
    """`num_slots` slots. `on_give` is told the moment a slot is given back (the executor's `close_slot`)."""

    def __init__(self, num_slots: int, on_give: Callable[[int], None] | None = None) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._taken: set[int] = set()
        self._on_give = on_give

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """None: all are in use."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._taken.add(slot)
        return slot

    def give(self, slot: int) -> None:
        assert slot in self._taken, f"slot {slot} is given back but nobody holds it"
        self._taken.remove(slot)
        self._free.append(slot)
        if self._on_give is not None:
            self._on_give(slot)
