"""Requests and their jobs: places them, follows their tokens, starts another life when one ends too early, ends each exactly once.

Every method runs on the event loop and returns at once. A worker's message is matched by job id; a message of an earlier life, or of
a request that is over, finds no job and is dropped. Must not know sockets (`post` sends), HTTP or text.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from router.account import Account
from router.admission import Admission
from router.generation import Generation, Life, Order, Outcome
from router.policy import Demand, Placement, choose, demand, missing_role
from router.view import View, Worker
from serving.core.errors import BatonError, Overloaded, Unavailable
from serving.core.messages import (
    Abort,
    AnyMessage,
    DecodeJob,
    JobFailed,
    JobTokens,
    Preempted,
    PrefillJob,
    TokenBatch,
    WorkerState,
)
from serving.core.prefill_work import prefill_work
from serving.core.request import FinishReason

_MAX_FAILURES = 4
_BACK_OFF_S = 0.02
_LONGEST_BACK_OFF_S = 1.0
_GRACE_S = 2.0
"""How long a request that lost its worker waits for one to exist. With 2 s to notice, its client hears within 5 s."""

_BUDGET_S = 600.0
"""Time a request may take until its first token, waiting included; what prefill orders its queue by."""

_RESUMED_BUDGET_S = 60.0
"""The same for each later life of a request that has had its first token, however old it is."""

Post = Callable[[Worker, AnyMessage], None]
Later = Callable[[float, Callable[[], None]], object]


class Dispatcher:
    """All requests of one router process."""

    def __init__(
        self,
        view: View,
        admission: Admission[Generation],
        account: Account,
        *,
        post: Post,
        later: Later,
        clock: Callable[[], float],
        expected_new_tokens: int,
    ) -> None:
        """`later(seconds, call)` calls back once; `clock` is monotonic, in seconds."""
        self._view = view
        self._admission = admission
        self._account = account
        self._post = post
        self._later = later
        self._clock = clock
        self._expected_new_tokens = expected_new_tokens
        self._jobs: dict[str, Generation] = {}
        self._pausing: set[Generation] = set()
        self._turn = 0
        self._missing_since_s: float | None = None
        self.draining = False

    @property
    def num_running(self) -> int:
        return len(self._jobs)

    @property
    def num_waiting(self) -> int:
        return len(self._admission)

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._pausing or len(self._admission))

    # -- the client's side ----------------------------------------------------------------------------------------------

    def submit(self, order: Order, notify: Callable[[], None]) -> Generation:
        """Admit or queue. Raises Overloaded when the queue is full, Unavailable when nothing could serve it."""
        now_s = self._clock()
        self._refuse_if_closed()
        generation = Generation(order=order, notify=notify, arrived_s=now_s)
        self._admission.enter(generation, now_s)
        self._pump()
        if generation.life is None:
            try:
                self._admission.check(now_s)
            except Overloaded:
                self._admission.leave(generation)
                self._account.rejected("queue_full")
                raise
        return generation

    def stop(self, generation: Generation) -> None:
        """The text is complete: a stop string was found."""
        if generation.outcome is None:
            generation.finish = FinishReason.STOP
            self._leave(generation)
            self._end(generation, Outcome.FINISHED)

    def cancel(self, generation: Generation) -> None:
        """The client is gone."""
        if generation.outcome is None:
            self._leave(generation)
            self._end(generation, Outcome.CANCELLED)

    def end_all(self, error: BatonError) -> None:
        """Nobody is served any further: every client is told `error`, every job aborted."""
        for generation in [*self._jobs.values(), *self._admission.drain(), *self._pausing]:
            if generation.outcome is None:
                self._leave(generation)
                self._fail(generation, error, "unavailable")

    def _refuse_if_closed(self) -> None:
        role = missing_role(self._view)
        if role is not None or self.draining:
            self._account.rejected("unavailable")
            raise Unavailable("this router is going down; try another") if role is None else _none_ready(role)

    # -- the workers' side ----------------------------------------------------------------------------------------------

    def on_message(self, worker: Worker, message: AnyMessage) -> None:
        """A message of a worker in its present life; `view` has seen it already."""
        match message:
            case TokenBatch():
                self._on_tokens(worker, message)
            case WorkerState():
                self._pump()
            case Preempted():
                self._on_preempted(worker, message.job_id)
            case JobFailed():
                self._on_failed(worker, message)
            case _:
                pass

    def on_lost(self, worker: Worker) -> None:
        """The worker's life is over, or it has been silent for too long."""
        for generation in list(self._jobs.values()):
            life = generation.life
            if life is not None and worker in life.workers and not _handed_off(life, worker):
                self._retry(generation, f"{worker.role} worker {worker.worker_id} was lost")
        self._pump()

    def on_stalled(self) -> None:
        """Workers may have given up our jobs while this process stood still, and will not say so."""
        for generation in list(self._jobs.values()):
            self._leave(generation)
            self._resume_after(generation, 0.0)

    def tick(self) -> None:
        """Called a few times a second while there are requests: time-outs of the queue, and the end of hope when a role has had no worker for too long."""
        now_s = self._clock()
        for generation in self._admission.expired(now_s):
            waited_s = now_s - generation.arrived_s
            retry_after_s = self._admission.retry_after_s(now_s)
            error = Overloaded(f"no room within {waited_s:.0f} s; try again later", retry_after_s=retry_after_s)
            self._fail(generation, error, "queue_timeout")
        role = missing_role(self._view)
        if role is None:
            self._missing_since_s = None
        elif self._missing_since_s is None:
            self._missing_since_s = now_s
        elif now_s - self._missing_since_s > _GRACE_S:
            for generation in self._admission.drain():
                self._fail(generation, _none_ready(role), "unavailable")
        for worker in self._view:
            worker.settle(now_s)
        self._pump()

    def _on_tokens(self, worker: Worker, batch: TokenBatch) -> None:
        now_s = self._clock()
        for job_id, seconds in batch.stages.items():
            generation = self._jobs.get(job_id)
            if generation is not None:
                self._account.stages(generation, seconds)
        for news in batch.jobs:
            generation = self._jobs.get(news.job_id)
            if generation is not None:
                self._on_job_tokens(worker, generation, news, now_s)

    def _on_job_tokens(self, worker: Worker, generation: Generation, news: JobTokens, now_s: float) -> None:
        life = generation.life
        assert life is not None
        if worker is life.prefill:
            worker.work.drop(life.job_id)
        elif worker is not life.decode:
            return
        elif not life.has_first:
            life.held.append(news)
            return
        else:
            life.has_decode = True
        self._take(generation, life, news, now_s)
        if worker is life.prefill and not life.has_first:
            life.has_first, life.has_decode = True, bool(life.held)
            for held in life.held:
                self._take(generation, life, held, now_s)
        generation.notify()

    def _take(self, generation: Generation, life: Life, news: JobTokens, now_s: float) -> None:
        if generation.outcome is not None:
            return
        is_first = generation.first_s is None
        generation.take(news, now_s)
        if is_first and generation.first_s is not None:
            self._account.first_token(generation)
        if generation.finish is None:
            return
        if life.decode is not None and not life.has_first:
            self._post(life.decode, Abort(job_id=life.job_id))
        self._forget(life)
        self._end(generation, Outcome.FINISHED)

    def _on_preempted(self, worker: Worker, job_id: str) -> None:
        generation = self._job_of(worker, job_id)
        if generation is not None:
            generation.num_preemptions += 1
            self._leave(generation)
            self._resume_after(generation, _back_off_s(generation.num_preemptions))

    def _on_failed(self, worker: Worker, message: JobFailed) -> None:
        generation = self._job_of(worker, message.job_id)
        if generation is None:
            return
        if message.retryable:
            generation.avoid |= {worker.worker_id}
            self._retry(generation, message.reason)
        else:
            self._leave(generation)
            self._fail(generation, self._failure(worker, message))

    def _failure(self, worker: Worker, message: JobFailed) -> BatonError:
        text = f"{worker.role} worker {worker.worker_id}: {message.reason}"
        if not message.overloaded:
            return BatonError(text)
        return Unavailable(f"{text}; try again later", retry_after_s=self._admission.retry_after_s(self._clock()))

    def _job_of(self, worker: Worker, job_id: str) -> Generation | None:
        generation = self._jobs.get(job_id)
        if generation is None or generation.life is None or worker not in generation.life.workers:
            return None
        return generation

    # -- lives ----------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        now_s = self._clock()
        for generation, life in self._admission.admit(self._place, now_s):
            self._start(generation, life)

    def _place(self, generation: Generation) -> Life | None:
        need = self._demand(generation)
        self._turn += 1
        placement = choose(self._view, need, self._turn)
        return None if placement is None else self._spend(placement, need)

    def _demand(self, generation: Generation) -> Demand:
        return demand(generation.num_tokens, generation.max_new_tokens, self._expected_new_tokens, generation.avoid)

    def _spend(self, placement: Placement, need: Demand) -> Life:
        now_s = self._clock()
        life = Life(job_id=secrets.token_hex(8), prefill=placement.prefill, decode=placement.decode, started_s=now_s)
        life.prefill.work.spend(life.job_id, prefill_work(0, need.num_tokens, life.prefill.pair_cost), now_s)
        holder = life.prefill if life.prefill.role == "both" else life.decode
        if holder is not None:
            holder.pages.spend(life.job_id, need.credit_pages, now_s)
        return life

    def _start(self, generation: Generation, life: Life) -> None:
        """Decode first, so that its credit is there when prefill asks for pages."""
        if generation.placed_s is None:
            generation.placed_s = life.started_s
        generation.life = life
        generation.num_lives += 1
        generation.prefill_id = life.prefill.worker_id
        generation.decode_id = (life.decode or life.prefill).worker_id
        self._jobs[life.job_id] = generation
        order, token_ids = generation.order, generation.all_ids()
        num_prompt_tokens, max_new_tokens = len(order.prompt_ids), generation.max_new_tokens
        budget_s = _RESUMED_BUDGET_S
        if generation.first_s is None:
            budget_s = max(1.0, _BUDGET_S - (life.started_s - generation.arrived_s))
        if life.decode is not None:
            decode_job = DecodeJob(
                job_id=life.job_id,
                token_ids=token_ids,
                num_prompt_tokens=num_prompt_tokens,
                sampling=order.sampling,
                max_new_tokens=max_new_tokens,
                budget_s=budget_s,
            )
            self._post(life.decode, decode_job)
        prefill_job = PrefillJob(
            job_id=life.job_id,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens,
            sampling=order.sampling,
            max_new_tokens=max_new_tokens,
            budget_s=budget_s,
            decode=None if life.decode is None else life.decode.address,
        )
        self._post(life.prefill, prefill_job)

    def _retry(self, generation: Generation, reason: str) -> None:
        """Another life after a fault, a few times; nothing that was emitted is lost or repeated."""
        self._leave(generation)
        generation.num_failures += 1
        if generation.num_failures >= _MAX_FAILURES:
            self._fail(generation, Unavailable(f"{reason}; gave up after {generation.num_failures} attempts"))
        else:
            self._resume_after(generation, _back_off_s(generation.num_failures))

    def _resume_after(self, generation: Generation, delay_s: float) -> None:
        def resume() -> None:
            self._pausing.discard(generation)
            if generation.outcome is None and generation.life is None:
                self._admission.enter(generation, self._clock(), resumed=True)
                self._pump()

        self._pausing.add(generation)
        self._later(delay_s, resume)

    def _leave(self, generation: Generation) -> None:
        """Out of the queue, and its job aborted on both sides."""
        life, generation.life = generation.life, None
        if life is None:
            self._admission.leave(generation)
            return
        for worker in life.workers:
            self._post(worker, Abort(job_id=life.job_id))
        self._forget(life)

    def _forget(self, life: Life) -> None:
        self._jobs.pop(life.job_id, None)
        life.prefill.work.drop(life.job_id)
        for worker in life.workers:
            worker.pages.drop(life.job_id)

    # -- ends -----------------------------------------------------------------------------------------------------------

    def _fail(self, generation: Generation, error: BatonError, reason: str = "failed") -> None:
        """Whoever never had a life was not admitted: it is counted as rejected for `reason`, not as failed."""
        generation.error = error
        if generation.num_lives:
            self._end(generation, Outcome.FAILED)
        else:
            self._account.rejected(reason)
            generation.outcome = Outcome.FAILED
            generation.notify()

    def _end(self, generation: Generation, outcome: Outcome) -> None:
        assert generation.outcome is None
        generation.outcome, generation.life = outcome, None
        self._account.ended(generation, outcome)
        generation.notify()


def _back_off_s(attempt: int) -> float:
    return min(_BACK_OFF_S * 2.0 ** min(attempt - 1, 10), _LONGEST_BACK_OFF_S)


def _handed_off(life: Life, worker: Worker) -> bool:
    """Decode goes on by itself and prefill is no longer needed. Known only once a decode token is there."""
    return worker is life.prefill and life.has_decode


def _none_ready(role: str) -> Unavailable:
    return Unavailable(f"no {role} worker is ready; try again in a few seconds")
