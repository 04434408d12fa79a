"""The decode worker: latents in from prefill workers, tokens out to the routers, all running sequences in every step.

    DecodeJob -> credit -> pages exposed -> latents verified -> waiting -> running -> last token -> gone
       |  no room (Preempted), aborted, or failed (JobFailed), anywhere on the way

One step loop owns scheduler, pages and engine: take what has arrived, promise pages, launch a step, settle the one
before (or this one, where the device is the CPU and has finished when `launch` returns), send one TokenBatch a router.
With nothing to do it waits for messages. A wrong peer never stops it; an exception of our own does, loudly.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from decode.arrivals import Arrivals, Arrived, Outcome
from decode.credit import num_credit
from decode.news import by_job, job_tokens
from decode.quarantine import QuarantineBudget
from decode.scheduler import DecodeScheduler, TokenEvent
from kvcache.manager import KVManager
from kvcache.transfer.base import PageSource, PageTarget
from kvcache.transfer.nixl import NixlSource, NixlTarget
from kvcache.transfer.notices import Notices
from kvcache.transfer.traffic import Traffic
from kvcache.transfer.writes import WriteDone, Writes
from serving.core.errors import PagesExhausted, PeerError, StaleError
from serving.core.messages import (
    Abort,
    AnyMessage,
    DecodeJob,
    JobTokens,
    KVBind,
    KVClosed,
    KVReady,
    PagesArrived,
    PagesReady,
    PagesSums,
    PagesWritten,
    Preempted,
    Roster,
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


@dataclass(slots=True)
class _Job:
    """What the worker adds to a running sequence: who hears its tokens, and the stages of its hand-off gap."""

    router: str
    hidden: bytes
    exposed_s: float
    arrived_s: float
    opened_s: float = 0.0


class DecodeWorker(Worker[_Job, WriteDone | bytes]):
    """Constructing loads the model, makes the pool and binds the socket; `run` serves until drained or stopped.

    `engine`, `manager`, `target` and, where it has followers, `source` are made from `spec` unless they are given (both workers in one
    process). `run_ahead` None: as configured, except on a CPU, where it would only delay tokens.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        engine: Engine | None = None,
        manager: KVManager | None = None,
        target: PageTarget | None = None,
        source: PageSource | None = None,
        run_ahead: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises ModelFolderError, ConfigError, StartupError."""
        config, engine = spec.config, engine or build_engine_for(spec, progress)
        name = f"{spec.worker_id}.{spec.incarnation}"
        notices = Notices(target or NixlTarget(f"{name}.target", engine.pool))
        writes: Writes | None = None
        if engine.lockstep is not None and engine.lockstep.tp > 1:
            writes = Writes(source or NixlSource(f"{name}.source", engine.pool))
        super().__init__(spec, engine, manager=manager, driver=Traffic(writes, notices), run_ahead=run_ahead)
        self._ranks = self._page_ranks(writes=writes, notices=notices)
        self._settled_round = -1
        self._scheduler = DecodeScheduler(
            self._manager,
            Slots(engine.max_num_seqs, on_give=self._executor.close_slot),
            max_num_seqs=engine.max_num_seqs,
            max_model_len=engine.max_model_len,
            drafting=self._drafting,
        )
        model = engine.model_config
        self._arrivals = Arrivals(
            self._mailbox,
            self._ranks,
            self._manager,
            engine.pool,
            self._metrics,
            config.transfer,
            identity=engine.identity,
            hidden_bytes=model.hidden_size * engine.layout.element_bytes if model.num_mtp_layers else 0,
            vocab_size=model.vocab_size,
        )
        self._expected_new_tokens = config.kv.expected_new_tokens
        self._in_flight: deque[Launched] = deque()
        self._quarantine = QuarantineBudget(self._manager)

    def _turn(self) -> None:
        for event in self._mailbox.get(self._patience_s(self._arrivals.due_s())):
            self._take(event)
        now_s = time.monotonic()
        self._grant(now_s)
        self._arrivals.expire(now_s)
        for outcome in self._arrivals.outcomes():
            self._conclude(outcome, now_s)
        step = self._launch(now_s)
        if step is not None:
            self._in_flight.append(step)
            if self._ranks.tp > 1:
                self._grant(now_s)
        may_take_back = self._scheduler.num_stalled > 0 and self._arrivals.has_unbound_credit
        self._moved = step is not None or bool(self._in_flight) or may_take_back
        if self._in_flight and (step is None or len(self._in_flight) > int(self._run_ahead)):
            self._settle(self._in_flight.popleft())
        self._audit.after_turn(idle=self._is_empty())
        self._quarantine.check(now_s)
        self._reporter.tick(time.monotonic())

    def _grant(self, now_s: float) -> None:
        """A page that was freed by a step may be in use by it on a follower until that has come to the next round."""
        may_expose = self._ranks.tp == 1 or self._ranks.rounds() > self._settled_round
        self._arrivals.grant(now_s, may_promise=self._scheduler.num_stalled == 0, may_expose=may_expose)

    # Messages.

    def _take(self, event: Received | PeerGone | Driven[WriteDone | bytes]) -> None:
        self._reporter.touch()
        now_s = time.monotonic()
        if isinstance(event, Driven):
            with self._bearing_with("a write"):
                self._on_page_news(event.item, now_s)
        elif isinstance(event, PeerGone):
            self._on_gone(event, now_s)
        else:
            with self._bearing_with(event.sender):
                self._on_message(event, event.message, now_s)
        for outcome in self._arrivals.outcomes():  # before the next event, which may abort what has just arrived
            self._conclude(outcome, now_s)

    def _on_message(self, event: Received, message: AnyMessage, now_s: float) -> None:
        sender, incarnation = event.sender, event.incarnation
        match message:
            case DecodeJob():
                self._on_job(sender, message, now_s)
            case Abort():
                self._abort(message.job_id, now_s)
            case KVBind():
                self._arrivals.bind(sender, incarnation, message, now_s)
            case KVReady():
                self._arrivals.ready(sender, incarnation, message, now_s)
            case KVClosed():
                self._arrivals.closed(sender, incarnation, message.job_id)
            case PagesReady():
                self._ranks.ready(sender, message)
            case PagesArrived():
                self._arrivals.notice(self._ranks.rank_of(sender), message.notice, now_s)
            case PagesSums():
                self._arrivals.checked(self._ranks.rank_of(sender), message, now_s)
            case PagesWritten():
                self._arrivals.copied(self._ranks.written(sender, message), now_s)
            case Roster():
                self._on_roster(message, now_s)
            case _:
                self._on_any(sender, message)

    def _on_page_news(self, item: WriteDone | bytes, now_s: float) -> None:
        if isinstance(item, bytes):
            self._arrivals.notice(0, item, now_s)
        else:
            self._arrivals.copied(item, now_s)

    def _on_job(self, router: str, job: DecodeJob, now_s: float) -> None:
        if job.job_id in self._jobs or job.job_id in self._arrivals:
            raise StaleError(f"job {job.job_id} is here already; a job id is used once, drop the message")
        if self._draining:
            self._reporter.fail(router, job.job_id, "the worker drains", retryable=True)
            return
        try:
            sequence = sequence_of(job, vocab_size=self._engine.model_config.vocab_size, now_s=now_s)
            credit = num_credit(
                sequence,
                num_pages=self._manager.num_pages,
                max_model_len=self._engine.max_model_len,
                expected_new_tokens=self._expected_new_tokens,
            )
        except (PeerError, PagesExhausted) as error:
            self._reporter.fail(router, job.job_id, str(error), retryable=False)
            return
        self._arrivals.offer(sequence, router, credit)

    def _abort(self, job_id: str, now_s: float) -> None:
        self._arrivals.abort(job_id, now_s)
        if self._jobs.pop(job_id, None) is not None:
            self._scheduler.abort(job_id)

    def _on_gone(self, event: PeerGone, now_s: float) -> None:
        self._log.warning("%s", event.reason)
        self._reporter.gone(event)
        self._arrivals.writer_gone(event.peer, event.incarnation, proven=event.proven, reason=event.reason, now_s=now_s)
        self._arrivals.router_gone(event.peer, event.reason, now_s)
        for job_id in self._jobs_of(event.peer):
            self._scheduler.abort(job_id)
            self._fail(job_id, event.reason, retryable=True)

    def _on_roster(self, roster: Roster, now_s: float) -> None:
        """Who is listed as dead, or in a later life, has ended: its supervisor has seen the exit. A leader's word stands for all ranks of its
        group, which write too, so its death counts when no rank of its unit is left."""
        alive = {worker.unit for worker in roster.workers if worker.unit and worker.state != "dead"}
        for worker in roster.workers:
            has_ended = worker.state == "dead" and worker.unit not in alive
            incarnation = worker.address.incarnation - (not has_ended)
            reason = f"{worker.address.worker_id} has ended: {worker.detail or worker.state}"
            self._arrivals.writer_gone(worker.address.worker_id, incarnation, proven=True, reason=reason, now_s=now_s)

    def _conclude(self, outcome: Outcome, now_s: float) -> None:
        if isinstance(outcome, Arrived):
            self._admit(outcome, now_s)
        elif outcome.no_room:
            self._preempt(outcome.job_id, outcome.router)
        else:
            self._log.warning("job %s: %s", outcome.job_id, outcome.reason)
            self._reporter.fail(outcome.router, outcome.job_id, outcome.reason, retryable=outcome.retryable)

    def _admit(self, arrived: Arrived, now_s: float) -> None:
        sequence = arrived.sequence
        try:
            self._scheduler.add(sequence)
        except (PeerError, PagesExhausted) as error:
            self._manager.cancel(sequence.job_id)
            self._manager.release(sequence.page_ids)
            self._reporter.fail(arrived.router, sequence.job_id, str(error), retryable=False)
            return
        self._jobs[sequence.job_id] = _Job(arrived.router, arrived.hidden, arrived.exposed_s, now_s)

    # Steps.

    def _launch(self, now_s: float) -> Launched | None:
        plan = self._scheduler.schedule(now_s)
        if plan is None:
            return None
        for sequence in plan.preempted:
            self._preempt(sequence.job_id, self._jobs.pop(sequence.job_id).router)
        for sequence in plan.opened:
            self._open(sequence, now_s)
        if not plan.step.rows:
            return None
        return self._executor.launch(plan.step)

    def _open(self, sequence: Sequence, now_s: float) -> None:
        assert sequence.slot is not None
        job = self._jobs[sequence.job_id]
        spec = SlotSpec(
            sampling=sequence.sampling,
            token_ids=list(sequence.token_ids),
            num_prompt_tokens=sequence.num_prompt_tokens,
            page_ids=list(sequence.page_ids),
            hidden=job.hidden,
        )
        self._executor.open_slot(sequence.slot, spec)
        job.opened_s, job.hidden = now_s, b""

    def _settle(self, step: Launched) -> None:
        result = self._executor.settle(step)
        self._settled_round = self._ranks.rounds()
        events = self._scheduler.settle(step.plan, result)
        now_s = time.monotonic()
        self._metrics.add("baton_tokens_total", len(events), phase="decode")
        self._count_drafts()
        self._reporter.tokens([self._news(of_job, now_s) for of_job in by_job(events)])

    def _news(self, events: list[TokenEvent], now_s: float) -> tuple[str, JobTokens, dict[str, float]]:
        """What one step brought to one job."""
        tokens = job_tokens(events)
        job_id, sequence = tokens.job_id, events[-1].sequence
        job = self._jobs[job_id] if tokens.finish is None else self._jobs.pop(job_id)
        if sequence.num_new_tokens - len(events) > 1:
            return job.router, tokens, {}
        stages = {
            "transfer_exposed": job.exposed_s,
            "decode_join": job.opened_s - job.arrived_s,
            "first_step": now_s - job.opened_s,
        }
        return job.router, tokens, stages

    # Bookkeeping.

    def _preempt(self, job_id: str, router: str) -> None:
        self._metrics.add("baton_preemptions_total")
        self._mailbox.post(router, Preempted(job_id=job_id))

    def _fail_all(self, reason: str) -> None:
        super()._fail_all(reason)
        for job_id, router in self._arrivals.jobs():
            self._reporter.fail(router, job_id, reason, retryable=True)

    def _is_empty(self) -> bool:
        return not (self._jobs or self._in_flight or self._arrivals.num_waiting or self._arrivals.num_closing)

    def _state(self, step_s: float) -> WorkerState:
        may_promise = self._scheduler.num_stalled == 0
        return WorkerState(
            role="decode",
            ready=self._ranks.complete and not self._draining,
            draining=self._draining,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + self._arrivals.num_waiting,
            waiting_work=self._arrivals.num_waiting_tokens,
            num_pages=self._manager.num_pages,
            credit_pages=self._arrivals.num_unpromised if may_promise else 0,
            page_states=self._manager.counts(),
            step_s=step_s,
        )
