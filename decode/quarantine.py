"""How long a decode worker lives with pages that it may not touch: half of the pool for half a minute, then it needs new memory."""

from __future__ import annotations

from kvcache.manager import KVManager
from serving.core.errors import PagesExhausted

_SHARE = 0.5
_PATIENCE_S = 30.0


class QuarantineBudget:
    def __init__(self, manager: KVManager) -> None:
        self._manager = manager
        self._since_s: float | None = None

    def check(self, now_s: float) -> None:
        """Raises PagesExhausted when the budget is spent: the worker ends, and its supervisor starts another."""
        num_quarantined = self._manager.counts()["quarantined"]
        if num_quarantined <= _SHARE * self._manager.num_pages:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s
        elif now_s - self._since_s > _PATIENCE_S:
            raise PagesExhausted(
                f"{num_quarantined} pages wait for writers that do not answer; restart with new memory"
            )
