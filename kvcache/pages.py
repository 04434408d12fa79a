"""States and epochs of the pages of one pool; illegal moves stop the worker.

    free --credit--> reserved --ticket--> exposed(epoch) --bytes here--> filled --accepted--> owned
     |                  |                     |                                               ^  |
     |                  +-- growth -----------|-----------------------------------------------+  |
     +-- prompt, growth ----------------------|-----------------------------------------------+  |
                                           given up                                  last reference gone
                                              v                                                  v
                                          draining --no answer--> quarantined       free, or if published: cached

    reserved --given back--> free           draining, quarantined --the writer has closed, or is proven dead--> free
    cached --hit--> owned                   cached --evicted--> free

An epoch rises each time a page leaves `free`: a message that names an old epoch speaks of an earlier use. Who may still write into an exposed,
draining or quarantined page is a peer; only its word, or proof of its death, frees it. Time does not. What a drained page holds is unknown, so
it is never cached.

Knows no jobs, no tokens and no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType

from kvcache.free import FreePages


class PageState(StrEnum):
    """Where a page is; the values name the samples of `baton_kv_pages`."""

    FREE = "free"
    CACHED = "cached"
    RESERVED = "reserved"
    EXPOSED = "exposed"
    FILLED = "filled"
    OWNED = "owned"
    DRAINING = "draining"
    QUARANTINED = "quarantined"


LEGAL_MOVES: Mapping[PageState, frozenset[PageState]] = MappingProxyType(
    {
        PageState.FREE: frozenset({PageState.RESERVED, PageState.OWNED}),
        PageState.CACHED: frozenset({PageState.OWNED, PageState.FREE}),
        PageState.RESERVED: frozenset({PageState.FREE, PageState.EXPOSED, PageState.OWNED}),
        PageState.EXPOSED: frozenset({PageState.FILLED, PageState.DRAINING}),
        PageState.FILLED: frozenset({PageState.OWNED}),
        PageState.OWNED: frozenset({PageState.FREE, PageState.CACHED}),
        PageState.DRAINING: frozenset({PageState.FREE, PageState.QUARANTINED}),
        PageState.QUARANTINED: frozenset({PageState.FREE}),
    }
)


class Pages:
    """State and epoch of `num_pages` pages, and the free ones among them."""

    def __init__(self, num_pages: int, on_free: Callable[[int], None] | None = None) -> None:
        """`on_free` is told each page whose content is given up (tests poison it)."""
        assert num_pages > 0
        self.num_pages = num_pages
        self._on_free = on_free
        self._states = [PageState.FREE] * num_pages
        self._epochs = [0] * num_pages
        self._counts = dict.fromkeys(PageState, 0)
        self._counts[PageState.FREE] = num_pages
        self._free = FreePages(num_pages)

    def state(self, page_id: int) -> PageState:
        return self._states[page_id]

    def epoch(self, page_id: int) -> int:
        return self._epochs[page_id]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, state: PageState) -> int:
        return self._counts[state]

    def take(self, num: int, state: PageState) -> list[int]:
        """`num` free pages, neighbours where there are such, enter `state` in a new epoch. There must be so many."""
        page_ids = self._free.take(num)
        for page_id in page_ids:
            self._epochs[page_id] += 1
            self._set(page_id, state)
        return page_ids

    def move(self, page_id: int, state: PageState) -> None:
        """Out of any state but free, along the diagram."""
        assert self._states[page_id] is not PageState.FREE, f"page {page_id} is free: it is taken, not moved"
        self._set(page_id, state)
        if state is PageState.FREE:
            self._free.add(page_id)
            if self._on_free is not None:
                self._on_free(page_id)

    def check(self) -> None:
        """The conservation law, counted from scratch; a violation is a bug that must stop the worker."""
        counted = dict.fromkeys(PageState, 0)
        for state in self._states:
            counted[state] += 1
        assert counted == self._counts, f"page counts drifted: {self._counts} claimed, {counted} found"
        assert sum(self._counts.values()) == self.num_pages, (
            f"{sum(self._counts.values())} of {self.num_pages} pages accounted for"
        )
        free = [page_id for page_id, state in enumerate(self._states) if state is PageState.FREE]
        assert self._free.page_ids() == free, "the free list is not the set of free pages"

    def _set(self, page_id: int, state: PageState) -> None:
        before = self._states[page_id]
        assert state in LEGAL_MOVES[before], f"page {page_id} cannot go from {before} to {state}"
        self._states[page_id] = state
        self._counts[before] -= 1
        self._counts[state] += 1
