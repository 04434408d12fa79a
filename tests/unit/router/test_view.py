"""Lives of workers, silence, and the ledger between sending and being counted."""

from __future__ import annotations

import pytest

from router.view import Ledger, View, Worker
from serving.core.messages import Heartbeat, PeerAddress, Roster, WorkerInfo
from tests.unit.router.test_policy import state


def info(worker_id: str, incarnation: int = 1, status: str = "ready", endpoint: str | None = None) -> WorkerInfo:
    address = PeerAddress(worker_id, f"tcp://{worker_id}:{incarnation}" if endpoint is None else endpoint, incarnation)
    return WorkerInfo(address=address, role="decode", state=status)


def ids(workers: list[Worker]) -> list[str]:
    return [worker.worker_id for worker in workers]


def test_the_roster_decides_who_lives() -> None:
    view = View()
    assert ids(view.apply(Roster(workers=[info("a"), info("b"), info("unborn", endpoint="")]), 0.0).joined) == [
        "a",
        "b",
    ]
    change = view.apply(Roster(workers=[info("a", status="draining"), info("b", status="dead")]), 1.0)
    assert (ids(change.joined), ids(change.left)) == ([], ["b"])
    assert view.get("a").roster_state == "draining"


def test_a_rank_that_leads_no_dp_group_is_none_of_ours() -> None:
    view = View()
    follower = WorkerInfo(address=info("b").address, role="decode", state="ready", leads=False)
    assert ids(view.apply(Roster(workers=[info("a"), follower]), 0.0).joined) == ["a"]


def test_a_restart_is_another_worker() -> None:
    view = View()
    old = view.apply(Roster(workers=[info("a")]), 0.0).joined[0]
    old.hear(state("decode"), 0.0)
    change = view.apply(Roster(workers=[info("a", incarnation=2)]), 1.0)
    assert change.left == [old]
    assert change.joined != [old]
    assert not old.usable
    assert not change.joined[0].usable, "it has not been heard yet"


def test_two_seconds_of_silence_are_noticed_once_and_end_with_a_word() -> None:
    view = View()
    worker = view.apply(Roster(workers=[info("a")]), 0.0).joined[0]
    assert view.newly_silent(10.0) == [], "it has never spoken, so it cannot fall silent"
    worker.hear(state("decode"), 10.0)
    assert view.newly_silent(12.0) == []
    assert view.newly_silent(12.1) == [worker]
    assert view.newly_silent(12.2) == []
    assert not worker.usable
    worker.hear(Heartbeat(progress=1), 13.0)
    assert worker.usable


def test_a_beating_heart_without_progress_is_stuck_only_while_a_step_is_in_flight() -> None:
    worker = View().apply(Roster(workers=[info("a")]), 0.0).joined[0]
    worker.hear(Heartbeat(progress=7, step_budget_s=1.0), 0.0)
    worker.hear(Heartbeat(progress=7, step_budget_s=1.0), 4.9)
    assert not worker.stuck(4.9), "five times the announced second are not over"
    assert worker.stuck(5.1)
    worker.hear(Heartbeat(progress=8, step_budget_s=0.0), 6.0)
    assert not worker.stuck(100.0), "idle workers do not move"


def test_the_ledger_holds_what_a_state_cannot_know_yet() -> None:
    worker = View().apply(Roster(workers=[info("a")]), 0.0).joined[0]
    worker.hear(state("decode", credit_pages=10), 0.0)
    worker.pages.spend("old", 3, 1.0)
    worker.pages.spend("new", 4, 1.99)
    assert worker.credit_pages == 3
    worker.hear(state("decode", credit_pages=7), 2.0)
    assert worker.credit_pages == 3, "the state counts the old job; the new one may have crossed it"
    worker.pages.drop("new")
    assert worker.credit_pages == 7


def test_without_a_new_state_the_last_one_counts_after_a_while() -> None:
    worker = View().apply(Roster(workers=[info("a")]), 0.0).joined[0]
    worker.hear(state("decode", credit_pages=10), 0.0)
    worker.pages.spend("job", 3, 1.0)
    worker.hear(state("decode", credit_pages=7), 1.001)
    worker.settle(1.2)
    assert worker.credit_pages == 4, "the state may have crossed the job"
    worker.settle(1.4)
    assert worker.credit_pages == 7, "it would have changed since"


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_ledger_forgets_exactly_what_it_is_told(order: tuple[str, str]) -> None:
    ledger = Ledger()
    ledger.spend("a", 5, 0.0)
    ledger.spend("b", 7, 0.0)
    ledger.drop(order[0])
    ledger.drop(order[0])
    assert ledger.total == (7 if order[0] == "a" else 5)
    ledger.drop(order[1])
    assert ledger.total == 0
