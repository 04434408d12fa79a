"""An executor whose steps the reporter hears of: announced before they start, timed when they have settled.

A step that hangs is one that was announced and does not settle; on a CPU it may hang in `launch` already. Knows no plan's
content and no scheduler.
"""

from __future__ import annotations

import time

from serving.engine.plan import Executor, Launched, SlotSpec, StepPlan, StepResult
from serving.reporter import Reporter


class WatchedExecutor:
    """An Executor: `executor`, watched. Both belong to one step loop."""

    def __init__(self, executor: Executor, reporter: Reporter) -> None:
        self._executor = executor
        self._reporter = reporter

    def open_slot(self, slot: int, spec: SlotSpec) -> None:
        self._executor.open_slot(slot, spec)

    def close_slot(self, slot: int) -> None:
        self._executor.close_slot(slot)

    def launch(self, plan: StepPlan) -> Launched:
        self._reporter.launched(plan.num_tokens, time.monotonic())
        return self._executor.launch(plan)

    def settle(self, launched: Launched) -> StepResult:
        result = self._executor.settle(launched)
        self._reporter.settled(time.monotonic())
        return result
