"""Which sequences draw a token in the next step: continuous batching over owned pages, oldest first.

    waiting --(slot)--> running --(stop, length)--> gone
       |                   |  stalled: no page now, planned again as soon as there is one
       |                   |  pre-empted: an older sequence needs its pages; the job is over and is reported
       +--abort, at any time; while a step is in flight the slot and the pages are given back when that step has settled

The oldest sequence always goes on: it takes pages from the youngest, never the other way round. Pure: time is an argument; no torch, no clock, no
sockets. Steps may be scheduled before the one before is settled (run-ahead); they settle in order, and the token drawn for a sequence that has ended
meanwhile is dropped.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from kvcache.layout import PAGE_TOKENS, num_pages_for
from kvcache.manager import KVManager
from serving.core.errors import PagesExhausted
from serving.core.request import FinishReason, Sequence, TokenLogprobs
from serving.engine.ending import finish_reason
from serving.engine.plan import DecodeRow, StepPlan, StepResult
from serving.engine.slots import Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """`opened` got a slot by this plan: open it with `sequence.page_ids` before launching. `preempted` are over. An empty step is not launched."""

    step: StepPlan
    opened: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One new token of one sequence (appended to it). `finish`: it was the last, slot and pages are given back."""

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None


@dataclass(slots=True, eq=False)
class _Job:
    sequence: Sequence
    num_in_flight: int = 0
    gone: bool = False


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in flight and the job of each row."""

    plan: StepPlan
    jobs: list[_Job]


class DecodeScheduler:
    """At most `max_num_seqs` sequences run together; none grows beyond `max_model_len` tokens."""

    def __init__(self, manager: KVManager, slots: Slots, *, max_num_seqs: int, max_model_len: int) -> None:
        assert max_num_seqs > 0
        self._manager = manager
        self._slots = slots
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._jobs: dict[str, _Job] = {}
        """In order of arrival, which is the order of precedence."""
        self._num_running = 0
        self._in_flight: deque[_Step] = deque()

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_waiting(self) -> int:
        return len(self._jobs) - self._num_running

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not settled."""
        return len(self._in_flight)

    def add(self, sequence: Sequence) -> None:
        """Pages are owned and computed up to the last token, which is the next input. Raises PagesExhausted if the sequence could never be finished."""
        assert sequence.job_id not in self._jobs, f"job {sequence.job_id} is here already"
        assert finish_reason(sequence, self._max_model_len) is None, f"job {sequence.job_id} has ended already"
        num_left = sequence.max_new_tokens - sequence.num_new_tokens
        num_pages = num_pages_for(min(sequence.num_tokens + num_left, self._max_model_len) - 1)
        if num_pages > self._manager.num_pages:
            raise PagesExhausted(
                f"{sequence.num_tokens} tokens and {num_left} more need {num_pages} pages, the decode pool has {self._manager.num_pages}; "
                "raise kv.decode_pages or lower model.max_model_len"
            )
        sequence.num_computed = sequence.num_tokens - 1
        self._manager.publish(sequence.token_ids, sequence.page_ids, sequence.num_computed)
        self._jobs[sequence.job_id] = _Job(sequence)
        if sequence.slot is not None:
            self._num_running += 1

    def schedule(self, now_s: float) -> DecodePlan | None:
        """The next step, or None if there is nothing to run and nothing to report now."""
        del now_s
        opened: list[Sequence] = []
        preempted: list[Sequence] = []
        rows: list[DecodeRow] = []
        jobs: list[_Job] = []
        for job in list(self._jobs.values()):
            sequence = job.sequence
            if job.gone or self._ends_in_flight(job):
                continue
            if sequence.slot is None and (self._num_running >= self._max_num_seqs or self._slots.num_free == 0):
                continue
            position = sequence.num_tokens - 1 + job.num_in_flight
            new_page_id = None
            if position >= len(sequence.page_ids) * PAGE_TOKENS:
                new_page_id = self._page(job, preempted)
                if new_page_id is None:
                    continue
            if sequence.slot is None:
                sequence.slot = self._slots.take()
                self._num_running += 1
                opened.append(sequence)
                # The slot is opened with the page.
                new_page_id = None
            assert sequence.slot is not None
            rows.append(DecodeRow(slot=sequence.slot, position=position, new_page_id=new_page_id))
            jobs.append(job)
            job.num_in_flight += 1
        if not rows and not preempted:
            return None
        step = StepPlan(rows=tuple(rows))
        if rows:
            self._in_flight.append(_Step(step, jobs))
        return DecodePlan(step=step, opened=tuple(opened), preempted=tuple(preempted))

    def settle(self, step: StepPlan, result: StepResult) -> list[TokenEvent]:
        """`step` is the oldest in flight; `result` may also hold tokens of other slots (mode both)."""
        assert self._in_flight and self._in_flight[0].plan is step, "steps settle in the order in which they were scheduled"
        tokens = {token.slot: token for token in result.tokens}
        events: list[TokenEvent] = []
        for job, row in zip(self._in_flight.popleft().jobs, step.rows, strict=True):
            job.num_in_flight -= 1
            if job.gone:
                self._give_back(job)
                continue
            sequence, token = job.sequence, tokens[row.slot]
            sequence.token_ids.append(token.token_id)
            sequence.num_new_tokens += 1
            sequence.num_computed += 1
            if sequence.num_computed % PAGE_TOKENS == 0:
                self._manager.publish(sequence.token_ids, sequence.page_ids, sequence.num_computed)
            finish = finish_reason(sequence, self._max_model_len)
            events.append(TokenEvent(sequence=sequence, token_id=token.token_id, logprobs=token.logprobs, finish=finish))
            if finish is not None:
                self._remove(job)
        return events

    def abort(self, job_id: str) -> Sequence | None:
        """None: not here (any more)."""
        job = self._jobs.get(job_id)
        if job is None:
            return None
        self._remove(job)
        return job.sequence

    def _ends_in_flight(self, job: _Job) -> bool:
        """The steps in flight reach the length limit, whatever they draw."""
        sequence, ahead = job.sequence, job.num_in_flight
        return sequence.num_new_tokens + ahead >= sequence.max_new_tokens or sequence.num_tokens + ahead >= self._max_model_len

    def _page(self, job: _Job, preempted: list[Sequence]) -> int | None:
        """One more page, if need be from the youngest sequences behind this one. None: wait."""
        sequence = job.sequence
        while (page_id := self._manager.grow(sequence.page_ids, job_id=sequence.job_id)) is None:
            if sequence.slot is None and self._num_running > 0:
                return None
            victim = next(reversed(self._jobs.values()))
            if victim is job:
                return None
            self._remove(victim)
            preempted.append(victim.sequence)
        return page_id

    def _remove(self, job: _Job) -> None:
        del self._jobs[job.sequence.job_id]
        if job.sequence.slot is not None:
            self._num_running -= 1
        job.gone = True
        self._give_back(job)

    def _give_back(self, job: _Job) -> None:
        sequence = job.sequence
        if job.num_in_flight > 0:
            return
        self._manager.release(sequence.page_ids)
        self._manager.cancel(sequence.job_id)
        if sequence.slot is not None:
            self._slots.give(sequence.slot)
        sequence.page_ids, sequence.slot = [], None
