"""The free pages of a pool as runs of neighbours, so that pages taken together lie together: a transfer sends a run as one piece.

    run [start, end)  --take--> its first pages; the rest is a shorter run
    page  --add--> a run of its own, or one with the runs that end and begin beside it

Of the runs that hold what is asked for the shortest is taken, so that long ones stay. Adding a page and taking some cost no more in a
large pool than in a small one, but for a search among the lengths that runs have. Knows no states.
"""

from __future__ import annotations

from bisect import bisect_left, insort


class FreePages:
    """All of `num_pages` pages at first."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0
        self._num = 0
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._lengths: list[int] = []
        """Those that runs have, rising."""
        self._starts: dict[int, dict[int, None]] = {}
        """By length; the run that was made last is taken first."""
        self._join(0, num_pages)

    def __len__(self) -> int:
        return self._num

    def page_ids(self) -> list[int]:
        """Rising."""
        return [page_id for start in sorted(self._end_of) for page_id in range(start, self._end_of[start])]

    def add(self, page_id: int) -> None:
        start, end = page_id, page_id + 1
        if page_id in self._start_of:
            start = self._start_of[page_id]
            self._part(start)
        if page_id + 1 in self._end_of:
            end = self._part(page_id + 1)
        self._join(start, end)

    def take(self, num: int) -> list[int]:
        """`num` pages, one run of them if there is one that long, else the longest first. There must be so many."""
        assert num <= self._num, f"{num} pages are asked for, {self._num} are free"
        page_ids: list[int] = []
        while (num_left := num - len(page_ids)) > 0:
            start = self._fitting(num_left)
            end = self._part(start)
            cut = min(start + num_left, end)
            page_ids += range(start, cut)
            if cut < end:
                self._join(cut, end)
        return page_ids

    def _fitting(self, num: int) -> int:
        """Where the shortest run of `num` pages starts; without one that long, the longest."""
        place = min(bisect_left(self._lengths, num), len(self._lengths) - 1)
        return next(reversed(self._starts[self._lengths[place]]))

    def _join(self, start: int, end: int) -> None:
        length = end - start
        self._num += length
        self._end_of[start], self._start_of[end] = end, start
        if length not in self._starts:
            insort(self._lengths, length)
            self._starts[length] = {}
        self._starts[length][start] = None

    def _part(self, start: int) -> int:
        """The run is no more; its end."""
        end = self._end_of.pop(start)
        del self._start_of[end]
        length = end - start
        self._num -= length
        del self._starts[length][start]
        if not self._starts[length]:
            del self._starts[length], self._lengths[bisect_left(self._lengths, length)]
        return end
