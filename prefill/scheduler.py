"""Which prompt tokens are computed in the next step: chunked prefill, earliest deadline first.

    waiting --(slot and pages)--> running --(last chunk sampled)--> done --finish / hand_over--> gone
       |  late: dropped before it starts, unless its request has sent tokens in an earlier life
       +--abort, from any state; while a step is in flight the slot and the pages are given back when that step has settled

Pure: time is an argument; no torch, no clock, no sockets. Steps may be scheduled before the one before is settled; they settle in order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from kvcache.layout import num_pages_for
from kvcache.manager import KVManager
from serving.core.errors import PagesExhausted, PeerError, StaleError
from serving.core.prefill_work import prefill_work
from serving.core.request import FinishReason, Sequence
from serving.engine.ending import finish_reason
from serving.engine.plan import PrefillChunk, SampledToken, StepPlan, StepResult
from serving.engine.slots import Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """`opened` were admitted by this plan: open their slots before launching. `late` are gone. An empty step (only late ones) is not launched."""

    step: StepPlan
    opened: tuple[Sequence, ...] = ()
    late: tuple[Sequence, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDone:
    """The latents of tokens [start, end) of `sequence` are in its pages; what is before `start` was there already."""

    sequence: Sequence
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """The prompt is computed and `token` was appended. `finish`: the request ends with it, there is nothing to hand off."""

    sequence: Sequence
    token: SampledToken
    finish: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSettled:
    """Progress of a step, aborted sequences left out. A finished sequence is in both."""

    chunks: tuple[ChunkDone, ...]
    finished: tuple[FirstToken, ...]


@dataclass(slots=True, eq=False)
class _Job:
    """A sequence and what is planned of it: tokens below `num_planned` are computed or in flight.

    `hit`: it starts after a cached prefix, whose last token is to be computed again. `sampling`: all of it is planned.
    """

    sequence: Sequence
    order: int
    num_planned: int = 0
    num_in_flight: int = 0
    hit: bool = False
    sampling: bool = False
    gone: bool = False


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk in flight; its sequence's tokens below `end` are computed when it has settled."""

    job: _Job
    plan: PrefillChunk
    end: int


@dataclass(frozen=True, slots=True)
class _Step:
    plan: StepPlan
    chunks: list[_Chunk]


class PrefillScheduler:
    """`max_num_seqs` sequences hold a slot and pages at once (hand-off included); a step has at most `max_batched_tokens` tokens."""

    def __init__(
        self,
        manager: KVManager,
        slots: Slots,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_model_len: int | None = None,
    ) -> None:
        assert min(max_num_seqs, max_batched_tokens) > 0
        self._manager = manager
        self._slots = slots
        self._max_num_seqs = max_num_seqs
        self._max_batched_tokens = max_batched_tokens
        self._max_model_len = max_model_len
        self._waiting: dict[str, _Job] = {}
        self._admitted: dict[str, _Job] = {}
        self._in_flight: deque[_Step] = deque()
        self._next_order = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot, those in hand-off included."""
        return len(self._admitted)

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not settled."""
        return len(self._in_flight)

    def waiting_work(self, pair_cost: float) -> int:
        """Prompt tokens not yet planned, of waiting and running sequences, with what they attend to: see `prefill_work`."""
        jobs = [*self._waiting.values(), *self._admitted.values()]
        return sum(
            prefill_work(job.num_planned, job.sequence.num_tokens, pair_cost) for job in jobs if not job.sampling
        )

    def add(self, sequence: Sequence) -> None:
        """Raises PagesExhausted if the text can never fit, StaleError if the job is here already, PeerError if it has no tokens."""
        if sequence.job_id in self._waiting or sequence.job_id in self._admitted:
            raise StaleError(f"job {sequence.job_id} is here already; a job id is used once, drop the message")
        if not sequence.token_ids:
            raise PeerError(f"job {sequence.job_id} has an empty prompt; the router must refuse it")
        if self._max_model_len is not None and sequence.num_tokens > self._max_model_len:
            raise PagesExhausted(
                f"{sequence.num_tokens} tokens are more than the {self._max_model_len} of a text here; raise model.max_model_len"
            )
        num_pages = num_pages_for(sequence.num_tokens)
        if num_pages > self._manager.num_pages:
            raise PagesExhausted(
                f"a prompt of {sequence.num_tokens} tokens needs {num_pages} pages, the prefill pool has {self._manager.num_pages}; "
                "raise kv.prefill_pages or lower model.max_model_len"
            )
        self._waiting[sequence.job_id] = _Job(sequence, self._next_order)
        self._next_order += 1

    def schedule(self, now_s: float) -> PrefillPlan | None:
        """The next step, or None if there is nothing to compute and nothing to report now."""
        late = self._drop_late(now_s)
        chunks: list[_Chunk] = []
        opened: list[Sequence] = []
        budget, admitting = self._max_batched_tokens, True
        for job in self._by_deadline():
            if budget == 0:
                break
            if job.sequence.slot is None:
                # The first that finds no room keeps those behind it out, so that a long prompt is not overtaken for ever.
                admitting = admitting and self._admit(job)
                if not admitting:
                    continue
                opened.append(job.sequence)
            chunks.append(self._chunk(job, budget))
            budget -= len(chunks[-1].plan.token_ids)
        if not chunks and not late:
            return None
        step = StepPlan(chunks=tuple(chunk.plan for chunk in chunks))
        if chunks:
            self._in_flight.append(_Step(step, chunks))
        return PrefillPlan(step=step, opened=tuple(opened), late=late)

    def settle(self, step: StepPlan, result: StepResult) -> PrefillSettled:
        """`step` is the oldest in flight; `result` may also hold tokens of other slots (mode both)."""
        settled = self._in_flight.popleft()
        assert settled.plan is step, "steps settle in the order in which they were scheduled"
        tokens = {token.slot: token for token in result.tokens}
        done: list[ChunkDone] = []
        finished: list[FirstToken] = []
        for chunk in settled.chunks:
            job, sequence = chunk.job, chunk.job.sequence
            job.num_in_flight -= 1
            if job.gone:
                self._give_back(job)
                continue
            sequence.num_computed = chunk.end
            self._manager.publish(sequence.token_ids, sequence.page_ids, chunk.end)
            done.append(ChunkDone(sequence=sequence, start=chunk.plan.store_from, end=chunk.end))
            if chunk.plan.sample:
                finished.append(self._finished(sequence, tokens[chunk.plan.slot]))
        return PrefillSettled(chunks=tuple(done), finished=tuple(finished))

    def finish(self, job_id: str) -> None:
        """After the hand-off, or where there is none: slot and pages are given back."""
        self._give_back(self._leave(job_id))

    def hand_over(self, job_id: str) -> Sequence:
        """Leaves with slot and pages (mode both)."""
        return self._leave(job_id).sequence

    def abort(self, job_id: str) -> Sequence | None:
        """None: not here (any more)."""
        job = self._waiting.pop(job_id, None) or self._admitted.pop(job_id, None)
        if job is None:
            return None
        job.gone = True
        self._give_back(job)
        return job.sequence

    def _by_deadline(self) -> list[_Job]:
        """Whoever has tokens left to plan, earliest deadline first, then in order of arrival."""
        jobs = [job for job in self._admitted.values() if not job.sampling]
        return sorted([*jobs, *self._waiting.values()], key=lambda job: (job.sequence.deadline_s, job.order))

    def _drop_late(self, now_s: float) -> tuple[Sequence, ...]:
        """A request that has sent a token has met its deadline, whatever became of that life."""
        waiting = [job.sequence for job in self._waiting.values()]
        late = tuple(s for s in waiting if s.deadline_s < now_s and s.num_tokens == s.num_prompt_tokens)
        for sequence in late:
            del self._waiting[sequence.job_id]
        return late

    def _admit(self, job: _Job) -> bool:
        """Slot and pages for the whole prompt; False: no room now."""
        sequence = job.sequence
        if len(self._admitted) >= self._max_num_seqs or self._slots.num_free == 0:
            return False
        allocation = self._manager.acquire(sequence.token_ids, sequence.num_tokens)
        if allocation is None:
            return False
        sequence.slot = self._slots.take()
        sequence.page_ids = allocation.page_ids
        sequence.num_cached = sequence.num_computed = job.num_planned = allocation.num_cached
        self._admitted[sequence.job_id] = self._waiting.pop(sequence.job_id)
        job.hit = allocation.num_cached > 0
        return True

    def _chunk(self, job: _Job, budget: int) -> _Chunk:
        sequence, store_from = job.sequence, job.num_planned
        # After a prefix hit the last cached token is computed again: its hidden state is needed, its latents are there.
        start = store_from - 1 if job.hit else store_from
        end = min(start + budget, sequence.num_tokens)
        job.num_planned, job.hit, job.sampling = end, False, end == sequence.num_tokens
        job.num_in_flight += 1
        assert sequence.slot is not None
        plan = PrefillChunk(
            slot=sequence.slot,
            token_ids=sequence.token_ids[start:end],
            start=start,
            store_from=store_from,
            page_ids=list(sequence.page_ids),
            sample=job.sampling,
        )
        return _Chunk(job, plan, end)

    def _leave(self, job_id: str) -> _Job:
        job = self._admitted.pop(job_id, None)
        assert job is not None, f"job {job_id} is not running here"
        assert job.sampling, f"job {job_id} leaves before its prompt is computed"
        assert job.num_in_flight == 0, f"job {job_id} leaves while its step is in flight"
        return job

    def _finished(self, sequence: Sequence, token: SampledToken) -> FirstToken:
        sequence.token_ids.append(token.token_id)
        sequence.num_new_tokens += 1
        return FirstToken(sequence=sequence, token=token, finish=finish_reason(sequence, self._max_model_len))

    def _give_back(self, job: _Job) -> None:
        sequence = job.sequence
        if job.num_in_flight > 0 or sequence.slot is None:
            return
        self._manager.release(sequence.page_ids)
        self._slots.give(sequence.slot)
        sequence.page_ids, sequence.slot = [], None
