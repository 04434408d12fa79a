"""Steps are announced from their launch to their end, and last from the end of the one before."""

from __future__ import annotations

from typing import Any

import pytest

from serving.core.messages import WorkerState
from serving.engine.plan import Launched, SlotSpec, StepPlan, StepResult
from serving.metrics import Metrics
from serving.reporter import FIRST_STEP_S, Reporter
from serving.watched import WatchedExecutor


class Announcements:
    """What a reporter needs of a mailbox: the last step time that was announced."""

    budget_s = -1.0

    def progress(self, step_budget_s: float) -> None:
        self.budget_s = step_budget_s


def no_state(step_s: float) -> WorkerState:
    raise AssertionError("nobody asked for a state")


@pytest.fixture
def announced() -> Announcements:
    return Announcements()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("worker", worker="w")


@pytest.fixture
def reporter(announced: Any, metrics: Metrics) -> Reporter:
    return Reporter(announced, metrics, no_state)


def test_a_step_behind_another_lasts_from_the_end_of_that_one(reporter: Reporter, metrics: Metrics) -> None:
    """Launched at 10, 11 and 20, settled at 13, 15 and 21: together 3 + 2 + 1 seconds."""
    reporter.launched(8, 10.0)
    reporter.launched(8, 11.0)
    reporter.settled(13.0)
    assert metrics.value("baton_step_seconds_sum") == 3.0
    reporter.settled(15.0)
    reporter.launched(8, 20.0)
    reporter.settled(21.0)
    assert metrics.value("baton_step_seconds_sum") == 6.0
    assert metrics.value("baton_step_seconds_count") == 3.0


def test_what_is_announced_holds_until_the_last_step_in_flight_has_ended(
    reporter: Reporter, announced: Announcements
) -> None:
    reporter.launched(100, 0.0)
    assert announced.budget_s == FIRST_STEP_S
    reporter.settled(2.0)
    assert announced.budget_s == 0.0
    reporter.launched(100, 3.0)
    reporter.launched(1000, 3.1)
    assert announced.budget_s == pytest.approx(20.0)  # 0.02 s a token
    reporter.settled(5.0)
    assert announced.budget_s == pytest.approx(20.0)
    reporter.launched(100, 5.1)
    assert announced.budget_s == pytest.approx(20.0), "the long step is still waited for"
    reporter.settled(23.0)
    assert 0.0 < announced.budget_s < 20.0
    reporter.settled(24.0)
    assert announced.budget_s == 0.0


class Hanging:
    """An executor that says what was announced while somebody waited for it."""

    def __init__(self, announced: Announcements) -> None:
        self._announced = announced
        self.waited: list[tuple[str, float]] = []

    def open_slot(self, slot: int, spec: SlotSpec) -> None: ...

    def close_slot(self, slot: int) -> None: ...

    def launch(self, plan: StepPlan) -> Launched:
        self.waited.append(("launch", self._announced.budget_s))
        return self  # type: ignore[return-value]

    def settle(self, launched: Launched) -> StepResult:
        self.waited.append(("settle", self._announced.budget_s))
        return StepResult(tokens=())


def test_whoever_waits_for_the_executor_has_announced_it(reporter: Reporter, announced: Announcements) -> None:
    hanging = Hanging(announced)
    watched = WatchedExecutor(hanging, reporter)
    first, second = watched.launch(StepPlan()), watched.launch(StepPlan())
    watched.settle(first)
    watched.settle(second)
    assert [what for what, _ in hanging.waited] == ["launch", "launch", "settle", "settle"]
    assert all(budget_s > 0.0 for _, budget_s in hanging.waited)
    assert announced.budget_s == 0.0
