"""Mode `both` behind a socket: one worker that prefills and decodes, for small installations and as the reference.

    PrefillJob (decode is None) -> Aggregated -> TokenBatch after every step -> gone

A pre-empted sequence is resumed inside. One step loop owns everything, as in the other workers; a wrong peer never
stops it, an exception of our own does, loudly.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from decode.news import by_job, job_tokens
from decode.scheduler import TokenEvent
from kvcache.layout import num_pages_for
from serving.aggregated import Aggregated
from serving.core.errors import PagesExhausted, PeerError, StaleError
from serving.core.messages import (
    Abort,
    AnyMessage,
    JobTokens,
    KVBind,
    KVRefused,
    PrefillJob,
    Roster,
    WorkerState,
)
from serving.core.spec import WorkerSpec
from serving.engine.build import Engine, build_engine_for
from serving.jobs import sequence_of
from serving.mailbox import Driven, PeerGone, Received
from serving.model.weights import Progress
from serving.worker import Worker

_WAITING_S = 0.1  # how often late jobs are looked for while some wait


@dataclass(slots=True)
class _Job:
    """What the worker adds to a sequence: who hears its tokens, and when its stages ended (0.0: not yet)."""

    router: str
    received_s: float
    num_credit: int
    opened_s: float = 0.0
    first_s: float = 0.0


class AggregatedWorker(Worker[_Job, object]):
    """Constructing loads the model, makes the pool and binds the socket; `run` serves until drained or stopped.

    `engine` is made from `spec` unless it is given. `run_ahead` None: as configured, except on a CPU, where it would
    only delay tokens.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        engine: Engine | None = None,
        run_ahead: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises ModelFolderError, ConfigError, StartupError."""
        config, engine = spec.config, engine or build_engine_for(spec, progress)
        super().__init__(spec, engine, run_ahead=run_ahead)
        self._aggregated = Aggregated(
            self._executor,
            self._manager,
            num_slots=engine.max_num_seqs,
            max_batched_tokens=config.prefill.max_batched_tokens or engine.max_batched_tokens,
            max_model_len=engine.max_model_len,
            run_ahead=self._run_ahead,
            drafting=self._drafting,
        )
        self._expected_new_tokens = config.kv.expected_new_tokens
        self._num_preempted = 0

    def _turn(self) -> None:
        late_s = time.monotonic() + _WAITING_S if self._jobs else None
        for event in self._mailbox.get(self._patience_s(late_s)):
            self._take(event)
        self._moved = self._aggregated.has_work
        if self._moved:
            self._step(time.monotonic())
        self._audit.after_turn(idle=self._is_empty())
        self._reporter.tick(time.monotonic())

    def _step(self, now_s: float) -> None:
        stepped = self._aggregated.step(now_s)
        self._moved = bool(stepped.events or stepped.late) or self._aggregated.num_running > 0
        for sequence in stepped.opened:
            self._metrics.add("baton_prefix_hit_tokens_total", sequence.num_cached)
            job = self._jobs[sequence.job_id]
            job.opened_s = job.opened_s or now_s
        for sequence in stepped.late:
            self._fail(sequence.job_id, "the prompt was not started within its time budget", overloaded=True)
        self._reporter.touch()
        ended_s = time.monotonic()
        self._metrics.add("baton_preemptions_total", self._aggregated.num_preempted - self._num_preempted)
        self._num_preempted = self._aggregated.num_preempted
        self._metrics.add("baton_tokens_total", stepped.num_prefill_tokens, phase="prefill")
        self._metrics.add("baton_tokens_total", stepped.num_decode_tokens, phase="decode")
        self._count_drafts()
        self._reporter.tokens([self._news(of_job, ended_s) for of_job in by_job(stepped.events)])

    def _take(self, event: Received | PeerGone | Driven[object]) -> None:
        self._reporter.touch()
        if isinstance(event, PeerGone):
            self._on_gone(event)
        elif isinstance(event, Received):
            with self._bearing_with(event.sender):
                self._on_message(event.sender, event.message)

    def _on_message(self, sender: str, message: AnyMessage) -> None:
        match message:
            case PrefillJob():
                self._on_job(sender, message, time.monotonic())
            case Abort():
                if self._jobs.pop(message.job_id, None) is not None:
                    self._aggregated.abort(message.job_id)
            case KVBind():
                reason = "a worker of role both takes no hand-off"
                refusal = KVRefused(job_id=message.job_id, reason=reason, router_told=False)
                self._mailbox.post(sender, refusal)
            case Roster():
                pass
            case _:
                self._on_any(sender, message)

    def _on_job(self, router: str, job: PrefillJob, now_s: float) -> None:
        if job.job_id in self._jobs:
            raise StaleError(f"job {job.job_id} is here already; a job id is used once, drop the message")
        if self._draining:
            self._reporter.fail(router, job.job_id, "the worker drains", retryable=True)
            return
        if job.decode is not None:
            self._reporter.fail(router, job.job_id, "a worker of role both hands nothing off", retryable=False)
            return
        try:
            sequence = sequence_of(job, vocab_size=self._engine.model_config.vocab_size, now_s=now_s)
            self._aggregated.add(sequence)
        except (PeerError, PagesExhausted) as error:
            self._reporter.fail(router, job.job_id, str(error), retryable=False)
            return
        growth = min(job.max_new_tokens, self._expected_new_tokens)
        self._jobs[job.job_id] = _Job(router, now_s, num_pages_for(len(job.token_ids) + growth))

    def _on_gone(self, event: PeerGone) -> None:
        self._log.warning("%s", event.reason)
        self._reporter.gone(event)
        for job_id in self._jobs_of(event.peer):
            self._aggregated.abort(job_id)
            self._fail(job_id, event.reason, retryable=True)

    def _news(self, events: list[TokenEvent], now_s: float) -> tuple[str, JobTokens, dict[str, float]]:
        """There is no hand-off: the gap between first and second token is one step."""
        sequence, finish = events[-1].sequence, events[-1].finish
        job_id = sequence.job_id
        job = self._jobs[job_id] if finish is None else self._jobs.pop(job_id)
        is_first, stages = job.first_s == 0.0, {}
        if is_first:
            job.first_s = now_s
            stages = {"prefill_queue": job.opened_s - job.received_s, "prefill": now_s - job.opened_s}
        elif sequence.num_new_tokens - len(events) == 1:
            stages = {"first_step": now_s - job.first_s}
        return job.router, job_tokens(events, num_cached_tokens=sequence.num_cached if is_first else 0), stages

    def _is_empty(self) -> bool:
        return not self._jobs and not self._aggregated.has_work

    def _state(self, step_s: float) -> WorkerState:
        aggregated = self._aggregated
        promised = sum(job.num_credit for job in self._jobs.values())
        return WorkerState(
            role="both",
            ready=not self._draining,
            draining=self._draining,
            num_running=aggregated.num_running,
            num_waiting=aggregated.num_waiting,
            waiting_work=aggregated.waiting_work(self._pair_cost),
            num_pages=self._manager.num_pages,
            credit_pages=max(0, min(self._manager.num_available, self._manager.num_pages - promised)),
            page_states=self._manager.counts(),
            step_s=step_s,
            pair_cost=self._pair_cost,
        )
