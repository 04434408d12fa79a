"""Which sequences draw a token in the next step: continuous batching over owned pages, oldest first.

    waiting --(slot)--> running --(stop, length)--> gone
       |                   |  stalled: no page now, planned again as soon as there is one
       |                   |  pre-empted: an older sequence needs its pages; the job is over and is reported
       +--abort, at any time; while a step is in flight the slot and the pages are given back when that step has settled

The oldest sequence always goes on: it takes pages from the youngest, never the other way round. Pure: time is an argument; no torch, no clock, no
sockets. Steps may be scheduled before the one before is settled (run-ahead); they settle in order, and the token drawn for a sequence that has ended
meanwhile is dropped. With drafts a step yields one token or more: pages are taken for the most, lengths are known for the least.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvcache.layout import PAGE_TOKENS, num_pages_for
from kvcache.manager import KVManager
from serving.core.errors import PagesExhausted, PeerError, StaleError
from serving.core.request import FinishReason, Sequence, TokenLogprobs
from serving.engine.drafting import Drafting
from serving.engine.ending import finish_reason
from serving.engine.plan import DecodeRow, SampledToken, StepPlan, StepResult
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
    """`num_in_flight` steps yield at least one token each, and at most `num_ahead` in all."""

    sequence: Sequence
    num_in_flight: int = 0
    num_ahead: int = 0
    gone: bool = False


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in flight and the job of each row."""

    plan: StepPlan
    jobs: list[_Job]


@dataclass(slots=True)
class _Turn:
    """A plan in the making. `num_coming` pages come free when steps in flight settle: who needs one waits for it instead of pre-empting."""

    num_coming: int
    num_drafts: int
    num_stalled: int = 0
    rows: list[DecodeRow] = field(default_factory=list)
    jobs: list[_Job] = field(default_factory=list)
    opened: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class DecodeScheduler:
    """At most `max_num_seqs` sequences run together; none grows beyond `max_model_len` tokens. `drafting` None: no drafts."""

    def __init__(
        self,
        manager: KVManager,
        slots: Slots,
        *,
        max_num_seqs: int,
        max_model_len: int,
        drafting: Drafting | None = None,
    ) -> None:
        assert max_num_seqs > 0
        self._manager = manager
        self._slots = slots
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._drafting = drafting
        self._jobs: dict[str, _Job] = {}
        """In order of arrival, which is the order of precedence."""
        self._leaving: list[_Job] = []
        """Over, but their slot and pages are used by a step in flight."""
        self._num_running = 0
        self.num_stalled = 0
        """Sequences that the last plan left out for want of a page: no moment to promise pages to others."""
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
        """`page_ids` are owned and hold all tokens but the last, which is the next input; `num_new_tokens` counts it if this job drew it.

        Raises PagesExhausted if the sequence could never be finished, StaleError if the job is here already, PeerError if it has ended already.
        """
        if sequence.job_id in self._jobs:
            raise StaleError(f"job {sequence.job_id} is here already; a job id is used once, drop the message")
        if finish_reason(sequence, self._max_model_len) is not None:
            raise PeerError(
                f"job {sequence.job_id} ended with the token that it comes with; there is nothing to decode"
            )
        self._require_room(sequence)
        sequence.num_computed = sequence.num_tokens - 1
        assert num_pages_for(sequence.num_computed) <= len(sequence.page_ids), (
            f"job {sequence.job_id} comes with too few pages"
        )
        self._manager.publish(sequence.token_ids, sequence.page_ids, sequence.num_computed)
        self._jobs[sequence.job_id] = _Job(sequence)
        self._num_running += sequence.slot is not None

    def schedule(self, now_s: float) -> DecodePlan | None:
        """The next step, or None if there is nothing to run and nothing to report now."""
        del now_s  # every admitted sequence is as urgent as the other: each draws a token in each step
        num_coming = sum(self._manager.num_released(job.sequence.page_ids) for job in self._leaving)
        turn = _Turn(num_coming=num_coming, num_drafts=self._choose_drafts())
        for job in list(self._jobs.values()):
            if not job.gone and not self._ends_in_flight(job):
                self._plan(job, turn)
        self.num_stalled = turn.num_stalled
        if not turn.rows and not turn.preempted:
            return None
        step = StepPlan(rows=tuple(turn.rows), num_drafts=turn.num_drafts)
        if turn.rows:
            self._in_flight.append(_Step(step, turn.jobs))
        return DecodePlan(step=step, opened=tuple(turn.opened), preempted=tuple(turn.preempted))

    def settle(self, step: StepPlan, result: StepResult) -> list[TokenEvent]:
        """`step` is the oldest in flight; `result` may also hold tokens of other slots (mode both)."""
        settled = self._in_flight.popleft()
        assert settled.plan is step, "steps settle in the order in which they were scheduled"
        tokens: dict[int, list[SampledToken]] = {}
        for token in result.tokens:
            tokens.setdefault(token.slot, []).append(token)
        events: list[TokenEvent] = []
        accepted: list[int] = []
        for job, row in zip(settled.jobs, step.rows, strict=True):
            job.num_in_flight -= 1
            job.num_ahead -= 1 + step.num_drafts
            if not job.gone:
                accepted.append(len(tokens[row.slot]) - 1)
                events += self._events(job, tokens[row.slot])
            elif job.num_in_flight == 0:
                self._leaving.remove(job)
                self._give_back(job)
        if self._drafting is not None:
            self._drafting.settled(step.num_drafts, accepted)
        return events

    def abort(self, job_id: str) -> Sequence | None:
        """None: not here (any more)."""
        job = self._jobs.get(job_id)
        if job is None:
            return None
        self._remove(job)
        return job.sequence

    def _require_room(self, sequence: Sequence) -> None:
        num_tokens = self._longest(sequence)
        num_pages = num_pages_for(num_tokens - 1)  # the last token is never an input
        if num_pages > self._manager.num_pages:
            raise PagesExhausted(
                f"{num_tokens} tokens need {num_pages} pages, the decode pool has {self._manager.num_pages}; "
                "raise kv.decode_pages or lower model.max_model_len"
            )

    def _longest(self, sequence: Sequence) -> int:
        """Tokens that it may have in the end."""
        return min(sequence.num_tokens + sequence.max_new_tokens - sequence.num_new_tokens, self._max_model_len)

    def _choose_drafts(self) -> int:
        """None for a text's last token, nor where the pages that they need are not all free: drafts take none from anybody."""
        if self._drafting is None or not self._jobs:
            return 0
        most = max(
            self._longest(job.sequence) - job.sequence.num_tokens - job.num_in_flight - 1 for job in self._jobs.values()
        )
        number = self._drafting.choose(min(len(self._jobs), self._max_num_seqs), most)
        num_short = sum(self._lacks_a_page(job, number) for job in self._jobs.values())
        return number if num_short <= self._manager.num_available else 0

    def _lacks_a_page(self, job: _Job, num_drafts: int) -> bool:
        """If all that is in flight is accepted, and all of this step's drafts; the last token is never an input."""
        sequence = job.sequence
        num_rows = min(sequence.num_tokens + job.num_ahead + num_drafts, self._longest(sequence) - 1)
        return num_rows > len(sequence.page_ids) * PAGE_TOKENS

    def _ends_in_flight(self, job: _Job) -> bool:
        """The steps in flight reach the length limit, whatever they draw."""
        sequence, ahead = job.sequence, job.num_in_flight
        return (
            sequence.num_new_tokens + ahead >= sequence.max_new_tokens
            or sequence.num_tokens + ahead >= self._max_model_len
        )

    def _plan(self, job: _Job, turn: _Turn) -> None:
        """One row for this sequence, if it has or gets a slot and a page."""
        sequence = job.sequence
        waiting = sequence.slot is None
        if waiting and (self._num_running >= self._max_num_seqs or self._slots.num_free == 0):
            return
        new_page_id = None
        if self._lacks_a_page(job, turn.num_drafts):
            new_page_id = self._grow(job, turn)
            if new_page_id is None:
                turn.num_stalled += 1
                return
        if waiting:
            sequence.slot = self._slots.take()
            self._num_running += 1
            turn.opened.append(sequence)
            new_page_id = None  # the slot is opened with it
        assert sequence.slot is not None
        certain = job.num_ahead == job.num_in_flight
        position = sequence.num_tokens - 1 + job.num_in_flight if certain else None
        turn.rows.append(DecodeRow(slot=sequence.slot, position=position, new_page_id=new_page_id))
        turn.jobs.append(job)
        job.num_in_flight += 1
        job.num_ahead += 1 + turn.num_drafts

    def _grow(self, job: _Job, turn: _Turn) -> int | None:
        """One more page, if need be from the youngest sequence behind this one. None: wait."""
        sequence = job.sequence
        while (page_id := self._manager.grow(sequence.page_ids, job_id=sequence.job_id)) is None:
            if turn.num_coming > 0:
                turn.num_coming -= 1
                return None
            victim = next(reversed(self._jobs.values()))
            if victim is job or (sequence.slot is None and self._num_running > 0):
                return None
            if self._ends_in_flight(victim):
                return None  # its pages come by themselves, and its last token would be lost
            assert victim not in turn.jobs, "an older sequence takes pages from one that is planned already"
            turn.preempted.append(victim.sequence)
            turn.num_coming += self._remove(victim)
        return page_id

    def _events(self, job: _Job, tokens: list[SampledToken]) -> list[TokenEvent]:
        """Up to the one that ends the text; what was drawn after it is dropped."""
        events: list[TokenEvent] = []
        for token in tokens:
            if not job.gone:
                events.append(self._event(job, token))
        return events

    def _event(self, job: _Job, token: SampledToken) -> TokenEvent:
        """The token is appended; a page that it has filled is published; with its last token the sequence leaves."""
        sequence = job.sequence
        sequence.token_ids.append(token.token_id)
        sequence.num_new_tokens += 1
        sequence.num_computed += 1
        if sequence.num_computed % PAGE_TOKENS == 0:
            self._manager.publish(sequence.token_ids, sequence.page_ids, sequence.num_computed)
        finish = finish_reason(sequence, self._max_model_len)
        if finish is not None:
            self._remove(job)
        return TokenEvent(sequence=sequence, token_id=token.token_id, logprobs=token.logprobs, finish=finish)

    def _remove(self, job: _Job) -> int:
        """The job is over. Returns how many pages come free when its steps in flight have settled; without any, they are free now."""
        sequence = job.sequence
        del self._jobs[sequence.job_id]
        self._num_running -= sequence.slot is not None
        self._manager.cancel(sequence.job_id)
        job.gone = True
        if job.num_in_flight == 0:
            self._give_back(job)
            return 0
        self._leaving.append(job)
        return self._manager.num_released(sequence.page_ids)

    def _give_back(self, job: _Job) -> None:
        sequence = job.sequence
        self._manager.release(sequence.page_ids)
        if sequence.slot is not None:
            self._slots.give(sequence.slot)
        sequence.page_ids, sequence.slot = [], None
