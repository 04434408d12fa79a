"""When a worker checks its pages: the sum after every step, each page when the work ends. A violation stops the worker."""

from __future__ import annotations

from kvcache.manager import KVManager


class Audit:
    def __init__(self, manager: KVManager) -> None:
        self._manager = manager
        self._checked = True

    def after_turn(self, *, idle: bool) -> None:
        """`idle`: no job is left here. The full check runs once each time that becomes true."""
        assert sum(self._manager.counts().values()) == self._manager.num_pages
        if idle and not self._checked:
            self._manager.check()
        self._checked = idle
