"""How long too many quarantined pages are borne."""

from __future__ import annotations

import pytest

from decode.quarantine import QuarantineBudget
from kvcache.manager import KVManager
from serving.core.errors import PagesExhausted


def quarantine(manager: KVManager, job_id: str, num_pages: int) -> None:
    manager.reserve(job_id, num_pages)
    manager.bind(job_id, range(num_pages * 64))
    manager.quarantine(job_id)


def test_more_than_half_of_the_pool_for_longer_than_half_a_minute_ends_the_worker() -> None:
    manager = KVManager(8, prefix_cache=False)
    budget = QuarantineBudget(manager)
    quarantine(manager, "half", 4)
    for now_s in (0.0, 100.0):
        budget.check(now_s)
    quarantine(manager, "more", 1)
    for now_s in (200.0, 230.0):
        budget.check(now_s)
    with pytest.raises(PagesExhausted, match="5 pages wait"):
        budget.check(230.1)


def test_pages_that_come_back_in_time_begin_the_count_anew() -> None:
    manager = KVManager(8, prefix_cache=False)
    budget = QuarantineBudget(manager)
    for now_s in (0.0, 40.0):
        quarantine(manager, f"at-{now_s}", 5)
        budget.check(now_s)
        budget.check(now_s + 29.0)
        manager.closed(f"at-{now_s}")
        budget.check(now_s + 31.0)
