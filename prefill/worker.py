"""The prefill worker: prompts in, first tokens to the router, latents to the decode workers.

    PrefillJob -> waiting -> chunks (KVBind with the first) -> first token (TokenBatch) -> handing off -> gone
       |  late, aborted, refused, failed: JobFailed where the router does not know it already

One step loop owns scheduler, pages and engine: take what has arrived, launch a step, settle the one before (or this
one, where the device is the CPU and has finished when `launch` returns), write what became complete, report. With
nothing to do it waits for messages. A wrong peer never stops it; an exception of our own does, loudly.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from kvcache.manager import KVManager
from kvcache.transfer.base import PageSource
from kvcache.transfer.nixl import NixlSource
from kvcache.transfer.writes import WriteDone, Writes
from prefill.handoff import HandoffDone, Handoffs, Outcome
from prefill.scheduler import FirstToken, PrefillScheduler
from serving.core.errors import PagesExhausted, PeerError, StaleError
from serving.core.messages import (
    Abort,
    AnyMessage,
    JobTokens,
    KVClose,
    KVRefused,
    KVTicket,
    PagesReady,
    PagesWritten,
    PeerAddress,
    PrefillJob,
    WorkerState,
)
from serving.core.request import Sequence
from serving.core.spec import WorkerSpec
from serving.engine.build import Engine, build_engine_for
from serving.engine.plan import Launched, SlotSpec
from serving.engine.slots import Slots
from serving.jobs import sequence_of
from serving.mailbox import Driven, PeerGone, Received
from serving.model.weights import Progress
from serving.worker import Worker

_WAITING_S = 0.1  # how often late jobs are looked for while some wait


@dataclass(slots=True)
class _Job:
    """What the worker adds to a sequence: who asked, where it goes, and when things happened."""

    router: str
    decode: PeerAddress | None
    received_s: float
    opened_s: float = 0.0


class PrefillWorker(Worker[_Job, WriteDone]):
    """Constructing loads the model, makes the pool and binds the socket; `run` serves until drained or stopped.

    `engine`, `manager` and `source` are made from `spec` unless they are given (both workers in one process). `run_ahead` None: as
    configured, except on a CPU, where it would only delay tokens.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        engine: Engine | None = None,
        manager: KVManager | None = None,
        source: PageSource | None = None,
        run_ahead: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises ModelFolderError, ConfigError, StartupError."""
        config, engine = spec.config, engine or build_engine_for(spec, progress)
        writes = Writes(source or NixlSource(f"{spec.worker_id}.{spec.incarnation}.source", engine.pool))
        super().__init__(spec, engine, manager=manager, driver=writes, run_ahead=run_ahead)
        self._scheduler = PrefillScheduler(
            self._manager,
            Slots(engine.max_num_seqs, on_give=self._executor.close_slot),
            max_num_seqs=engine.max_num_seqs,
            max_batched_tokens=config.prefill.max_batched_tokens or engine.max_batched_tokens,
            max_model_len=config.model.max_model_len or engine.model_config.max_position_embeddings,
        )
        self._ranks = self._page_ranks(writes=writes)
        self._handoffs = Handoffs(
            self._mailbox,
            self._ranks,
            self._manager,
            engine.pool,
            self._metrics,
            config.transfer,
            engine.identity,
        )
        self._in_flight: deque[Launched] = deque()

    def _turn(self) -> None:
        late_s = time.monotonic() + _WAITING_S if self._scheduler.num_waiting else None
        for event in self._mailbox.get(self._patience_s(self._handoffs.due_s(), late_s)):
            self._take(event)
        step = self._launch(time.monotonic())
        if step is not None:
            self._in_flight.append(step)
        self._moved = step is not None or bool(self._in_flight)
        if self._in_flight and (step is None or len(self._in_flight) > int(self._run_ahead)):
            self._settle(self._in_flight.popleft())
        now_s = time.monotonic()
        self._handoffs.expire(now_s)
        for outcome in self._handoffs.outcomes():
            self._moved = True
            self._conclude(outcome)
        self._audit.after_turn(idle=self._is_empty())
        self._reporter.tick(now_s)

    # Messages.

    def _take(self, event: Received | PeerGone | Driven[WriteDone]) -> None:
        self._reporter.touch()
        now_s = time.monotonic()
        if isinstance(event, Driven):
            self._handoffs.written(event.item, now_s)
        elif isinstance(event, PeerGone):
            self._on_gone(event)
        else:
            with self._bearing_with(event.sender):
                self._on_message(event.sender, event.message, now_s)

    def _on_message(self, sender: str, message: AnyMessage, now_s: float) -> None:
        match message:
            case PrefillJob():
                self._on_job(sender, message, now_s)
            case Abort():
                self._abort(message.job_id)
            case KVTicket():
                self._handoffs.ticket(sender, message, now_s)
            case KVRefused():
                self._handoffs.refused(sender, message)
            case KVClose():
                self._handoffs.close(sender, message)
            case PagesReady():
                self._ranks.ready(sender, message)
            case PagesWritten():
                self._handoffs.written(self._ranks.written(sender, message), now_s)
            case _:
                self._on_any(sender, message)

    def _on_job(self, router: str, job: PrefillJob, now_s: float) -> None:
        if job.job_id in self._jobs or job.job_id in self._handoffs:
            raise StaleError(f"job {job.job_id} is here already; a job id is used once, drop the message")
        if self._draining:
            self._reporter.fail(router, job.job_id, "the worker drains", retryable=True)
            return
        try:
            sequence = sequence_of(job, vocab_size=self._engine.model_config.vocab_size, now_s=now_s)
            self._scheduler.add(sequence)
        except (PeerError, PagesExhausted) as error:
            self._reporter.fail(router, job.job_id, str(error), retryable=False)
            return
        self._jobs[job.job_id] = _Job(router, job.decode, now_s)

    def _abort(self, job_id: str) -> None:
        if self._jobs.pop(job_id, None) is not None:
            self._scheduler.abort(job_id)
            self._handoffs.abandon(job_id)

    def _on_gone(self, event: PeerGone) -> None:
        self._log.warning("%s", event.reason)
        self._reporter.gone(event)
        self._handoffs.peer_gone(event.peer, event.incarnation, event.reason)
        for job_id in self._jobs_of(event.peer):
            self._scheduler.abort(job_id)
            self._handoffs.abandon(job_id)
            self._fail(job_id, event.reason, retryable=True)

    # Steps.

    def _launch(self, now_s: float) -> Launched | None:
        plan = self._scheduler.schedule(now_s)
        if plan is None:
            return None
        for sequence in plan.late:
            self._fail(sequence.job_id, "the prompt was not started within its time budget", overloaded=True)
        for sequence in plan.opened:
            self._open(sequence, now_s)
        if not plan.step.chunks:
            return None
        return self._executor.launch(plan.step)

    def _open(self, sequence: Sequence, now_s: float) -> None:
        assert sequence.slot is not None
        spec = SlotSpec(
            sampling=sequence.sampling,
            token_ids=list(sequence.token_ids),
            num_prompt_tokens=sequence.num_prompt_tokens,
            page_ids=list(sequence.page_ids),
        )
        self._executor.open_slot(sequence.slot, spec)
        self._metrics.add("baton_prefix_hit_tokens_total", sequence.num_cached)
        job = self._jobs[sequence.job_id]
        job.opened_s = now_s
        if job.decode is not None:
            self._handoffs.begin(sequence, job.decode, now_s)

    def _settle(self, step: Launched) -> None:
        result = self._executor.settle(step)
        settled = self._scheduler.settle(step.plan, result)
        now_s = time.monotonic()
        self._metrics.add("baton_tokens_total", step.plan.num_tokens, phase="prefill")
        # Before anything else: the first token does not wait for the hand-off.
        self._reporter.tokens([self._news(first, now_s) for first in settled.finished])
        for first in settled.finished:
            self._hand_off(first, now_s)
        for chunk in settled.chunks:
            self._handoffs.advance(chunk.sequence.job_id, now_s)

    def _news(self, first: FirstToken, now_s: float) -> tuple[str, JobTokens, dict[str, float]]:
        sequence, token = first.sequence, first.token
        job = self._jobs[sequence.job_id]
        tokens = JobTokens(
            job_id=sequence.job_id,
            token_ids=[token.token_id],
            logprobs=None if token.logprobs is None else [token.logprobs],
            finish=first.finish,
            num_cached_tokens=sequence.num_cached,
        )
        return job.router, tokens, {"prefill_queue": job.opened_s - job.received_s, "prefill": now_s - job.opened_s}

    def _hand_off(self, first: FirstToken, now_s: float) -> None:
        job_id = first.sequence.job_id
        if first.finish is None and self._jobs[job_id].decode is not None:
            self._handoffs.complete(job_id, first.token, now_s)
            return
        del self._jobs[job_id]
        self._handoffs.abandon(job_id)
        self._scheduler.finish(job_id)

    def _conclude(self, outcome: Outcome) -> None:
        job_id = outcome.job_id
        if job_id not in self._jobs:
            return  # aborted in the same turn
        if isinstance(outcome, HandoffDone):
            del self._jobs[job_id]
            self._scheduler.finish(job_id)
        elif outcome.router_told:
            self._log.info("job %s: %s", job_id, outcome.reason)
            self._scheduler.abort(job_id)
            del self._jobs[job_id]
        else:
            self._scheduler.abort(job_id)
            self._fail(job_id, outcome.reason, retryable=outcome.retryable)

    # Bookkeeping.

    def _is_empty(self) -> bool:
        return not (self._jobs or self._in_flight or self._handoffs.num_open)

    def _state(self, step_s: float) -> WorkerState:
        return WorkerState(
            role="prefill",
            ready=self._ranks.complete and not self._draining,
            draining=self._draining,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            waiting_work=self._scheduler.waiting_work(self._pair_cost),
            num_pages=self._manager.num_pages,
            credit_pages=self._manager.num_available,
            page_states=self._manager.counts(),
            step_s=step_s,
            pair_cost=self._pair_cost,
        )
