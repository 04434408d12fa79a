"""When a worker checks its pages: the sum after every step, each page when the work ends. A violation stops the worker."""

from __future__ import annotations

import time

from kvcache.manager import KVManager

_QUICK_PAGES = 10_000
_SHARE = 0.01


class Audit:
    def __init__(self, manager: KVManager) -> None:
        self._manager = manager
        self._checked = True
        self._next_s = 0.0

    def after_turn(self, *, idle: bool) -> None:
        """`idle`: no job is left here. The full check runs once then.

        A pool of a GPU has so many pages that whoever asks next would wait for it (35 ms for 50,000): there it takes a hundredth of
        the time at most.
        """
        assert sum(self._manager.counts().values()) == self._manager.num_pages
        if not idle:
            self._checked = False
        elif not self._checked and (self._manager.num_pages <= _QUICK_PAGES or time.monotonic() >= self._next_s):
            begin_s = time.monotonic()
            self._manager.check()
            end_s = time.monotonic()
            self._next_s = end_s + (end_s - begin_s) / _SHARE
            self._checked = True
