"""What jobs say, with a clock of our own: no sockets, no loop, nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from router.account import Account
from router.admission import Admission
from router.dispatch import Dispatcher
from router.generation import Generation, Order, Outcome, Slo
from router.view import View, Worker
from serving.core.errors import Unavailable
from serving.core.messages import (
    Abort,
    AnyMessage,
    DecodeJob,
    JobTokens,
    PeerAddress,
    Preempted,
    PrefillJob,
    Roster,
    TokenBatch,
    WorkerInfo,
    WorkerState,
)
from serving.core.request import SamplingParams
from serving.metrics import Metrics

PREFILL, DECODE = "prefill", "decode"


@dataclass
class Stage:
    """A dispatcher, its two workers, everything it has posted and everything it wants to be called for."""

    now_s: float = 0.0
    posted: list[AnyMessage] = field(default_factory=list)
    due: list[Callable[[], None]] = field(default_factory=list)
    metrics: Metrics = field(default_factory=lambda: Metrics("router"))

    def __post_init__(self) -> None:
        self.view = View()
        infos = [WorkerInfo(address=PeerAddress(n, f"tcp://{n}", 1), role=n, state="ready") for n in (PREFILL, DECODE)]
        self.view.apply(Roster(workers=infos), 0.0)
        for worker in self.view:
            worker.hear(idle_state(worker.role), 0.0)
        self.dispatcher = Dispatcher(
            self.view,
            Admission[Generation](max_waiting=8, queue_timeout_s=60.0),
            Account(self.metrics),
            post=lambda worker, message: self.posted.append(message),
            later=lambda delay_s, call: self.due.append(call),
            clock=lambda: self.now_s,
            expected_new_tokens=64,
        )

    def submit(self, num_prompt_tokens: int = 9, max_new_tokens: int = 500) -> Generation:
        slo = Slo(ttft_s=1.0, tpot_s=1.0)
        prompt_ids = list(range(num_prompt_tokens))
        order = Order(prompt_ids=prompt_ids, sampling=SamplingParams(), max_new_tokens=max_new_tokens, slo=slo)
        return self.dispatcher.submit(order, lambda: None)

    def worker(self, name: str) -> Worker:
        worker = self.view.get(name)
        assert worker is not None
        return worker

    def token(self, name: str, generation: Generation) -> None:
        self.dispatcher.on_message(
            self.worker(name), TokenBatch(jobs=[JobTokens(job_id=job_id(generation), token_ids=[3])])
        )

    def preempt(self, generation: Generation) -> None:
        self.dispatcher.on_message(self.worker(DECODE), Preempted(job_id=job_id(generation)))

    def resume(self) -> None:
        self.due.pop()()

    def last_jobs(self) -> list[PrefillJob | DecodeJob]:
        return [message for message in self.posted if isinstance(message, PrefillJob | DecodeJob)][-2:]


def job_id(generation: Generation) -> str:
    assert generation.life is not None
    return generation.life.job_id


def idle_state(role: str) -> WorkerState:
    load = {"num_running": 0, "num_waiting": 0, "waiting_work": 0}
    pages = {"num_pages": 100, "credit_pages": 100}
    return WorkerState(role=role, ready=True, draining=False, page_states={}, step_s=0.01, **load, **pages)


@pytest.mark.parametrize("age_s", [1.0, 650.0, 86400.0])
def test_a_stream_of_any_age_has_a_minute_to_be_computed_again(age_s: float) -> None:
    stage = Stage()
    generation = stage.submit()
    stage.token(PREFILL, generation)
    stage.now_s = age_s
    stage.token(DECODE, generation)
    stage.preempt(generation)
    stage.resume()
    assert [job.budget_s for job in stage.last_jobs()] == [60.0, 60.0]


def test_until_its_first_token_a_request_has_ten_minutes_from_its_arrival() -> None:
    stage = Stage()
    generation = stage.submit()
    assert [job.budget_s for job in stage.last_jobs()] == [600.0, 600.0]
    stage.now_s = 200.0
    stage.preempt(generation)
    stage.resume()
    assert [job.budget_s for job in stage.last_jobs()] == [400.0, 400.0]


def test_when_the_server_stops_all_are_told_and_nothing_goes_on() -> None:
    stage = Stage()
    paused, running = stage.submit(), stage.submit()
    stage.preempt(paused)
    too_long_now = stage.submit(num_prompt_tokens=99 * 64)
    assert (stage.dispatcher.num_running, stage.dispatcher.num_waiting) == (1, 1)
    stage.dispatcher.draining = True
    stage.posted.clear()
    job = job_id(running)
    stage.dispatcher.end_all(Unavailable("the server stops"))
    for generation in (paused, running, too_long_now):
        assert (generation.outcome, str(generation.error)) == (Outcome.FAILED, "the server stops")
    assert stage.posted == [Abort(job_id=job)] * 2
    stage.resume()
    stage.dispatcher.tick()
    stage.dispatcher.end_all(Unavailable("again"))
    assert (stage.dispatcher.num_running, stage.dispatcher.num_waiting) == (0, 0)
    assert len(stage.posted) == 2
    assert stage.metrics.value("baton_requests_total", outcome="failed") == 2
    assert stage.metrics.value("baton_requests_rejected_total", reason="unavailable") == 1
