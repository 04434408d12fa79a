"""Mode `both` without its process: prefill and decode schedulers over one executor, one pool and one set of slots.

    add -> waiting -> prefill chunks -> first token -> the same slot decodes -> finished
                         ^------ pre-empted: prompt + everything drawn so far, ahead of all others

One `step` plans, launches and settles; with run-ahead it settles the step before the one it launched. Decode is planned
first, so running sequences get pages before new ones. The reference for a disaggregated run: same schedulers, no transfer.
Must not know sockets, Ray or wall clocks.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from decode.scheduler import DecodeScheduler, TokenEvent
from kvcache.layout import num_pages_for
from kvcache.manager import KVManager
from prefill.scheduler import FirstToken, PrefillPlan, PrefillScheduler
from serving.core.errors import PagesExhausted
from serving.core.request import SamplingParams, Sequence
from serving.engine.drafting import Drafting
from serving.engine.plan import Executor, Launched, SlotSpec, StepPlan
from serving.engine.slots import Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """What one call of `step` brought: new tokens, first tokens among them; sequences that began to be computed; those dropped as late.

    `num_prefill_tokens`: computed by the step that has settled. `num_decode_tokens`: events that are no first tokens.
    """

    events: tuple[TokenEvent, ...] = ()
    opened: tuple[Sequence, ...] = ()
    late: tuple[Sequence, ...] = ()
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    """A launched step and the parts of it that each scheduler planned."""

    launched: Launched
    prefill: StepPlan | None
    decode: StepPlan | None


class Aggregated:
    """Owns both schedulers and the slots; `executor` and `manager` belong to the same pool. Not thread-safe.

    `num_slots`: sequences admitted at once. `max_batched_tokens`: prefill tokens of one step. `drafting` None: no drafts.
    """

    def __init__(
        self,
        executor: Executor,
        manager: KVManager,
        *,
        num_slots: int,
        max_batched_tokens: int,
        max_model_len: int,
        run_ahead: bool = True,
        drafting: Drafting | None = None,
    ) -> None:
        self.manager = manager
        self._executor = executor
        self._max_model_len = max_model_len
        self._run_ahead = run_ahead
        slots = Slots(num_slots, on_give=executor.close_slot)
        self._prefill = PrefillScheduler(
            manager,
            slots,
            max_num_seqs=num_slots,
            max_batched_tokens=max_batched_tokens,
            max_model_len=max_model_len,
        )
        self._decode = DecodeScheduler(
            manager, slots, max_num_seqs=num_slots, max_model_len=max_model_len, drafting=drafting
        )
        self._in_flight: deque[_InFlight] = deque()
        self.num_preempted = 0

    @property
    def num_waiting(self) -> int:
        return self._prefill.num_waiting + self._decode.num_waiting

    def waiting_work(self, pair_cost: float) -> int:
        """As `PrefillScheduler.waiting_work`."""
        return self._prefill.waiting_work(pair_cost)

    @property
    def num_running(self) -> int:
        return self._prefill.num_running + self._decode.num_running

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self.num_waiting + self.num_running > 0

    def add(self, sequence: Sequence) -> None:
        """Raises PagesExhausted if the sequence could never be finished here."""
        num_left = sequence.max_new_tokens - sequence.num_new_tokens
        longest = max(min(sequence.num_tokens + num_left, self._max_model_len) - 1, sequence.num_tokens)
        if num_pages_for(longest) > self.manager.num_pages:
            raise PagesExhausted(
                f"{sequence.num_tokens} tokens and {num_left} more need {num_pages_for(longest)} pages, the pool has "
                f"{self.manager.num_pages}; raise kv.decode_pages or lower max_tokens"
            )
        self._prefill.add(sequence)

    def abort(self, job_id: str) -> Sequence | None:
        """None: not here (any more)."""
        return self._prefill.abort(job_id) or self._decode.abort(job_id)

    def step(self, now_s: float) -> Stepped:
        """Launch the next step, if there is one, and settle the oldest, unless it is the only one and runs ahead.

        Nothing to launch and nothing in flight: returns at once, empty; some event must come before that changes.
        """
        launched, prefill = self._launch(now_s)
        opened, late = (prefill.opened, prefill.late) if prefill is not None else ((), ())
        if launched is not None:
            self._in_flight.append(launched)
        if not self._in_flight or (launched is not None and len(self._in_flight) <= int(self._run_ahead)):
            return Stepped(opened=opened, late=late)
        step = self._in_flight.popleft()
        first, further = self._settle(step)
        return Stepped(
            events=(*first, *further),
            opened=opened,
            late=late,
            num_prefill_tokens=step.prefill.num_tokens if step.prefill is not None else 0,
            num_decode_tokens=len(further),
        )

    def generate(
        self, prompts: Seq[Seq[int]], sampling: SamplingParams | Seq[SamplingParams], max_new_tokens: int
    ) -> list[list[int]]:
        """New tokens of each prompt, all run together; for tests and measurements. A step takes one second of its clock."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        answers: dict[str, list[int]] = {f"generate-{i}": [] for i in range(len(prompts))}
        for job_id, prompt, params in zip(answers, prompts, each, strict=True):
            self.add(
                Sequence(
                    job_id=job_id,
                    token_ids=list(prompt),
                    num_prompt_tokens=len(prompt),
                    sampling=params,
                    max_new_tokens=max_new_tokens,
                    deadline_s=float("inf"),
                )
            )
        now_s = 0.0
        while self.has_work:
            now_s += 1.0
            for event in self.step(now_s).events:
                answers[event.sequence.job_id].append(event.token_id)
        return list(answers.values())

    def _launch(self, now_s: float) -> tuple[_InFlight | None, PrefillPlan | None]:
        decode = self._decode.schedule(now_s)
        preempted = decode.preempted if decode is not None else ()
        self.num_preempted += len(preempted)
        for sequence in preempted:
            self._resume(sequence, now_s)
        # Pages that a pre-emption freed are not given to a newcomer at once.
        prefill = self._prefill.schedule(now_s) if not preempted else None
        assert decode is None or not decode.opened, "a sequence brings its slot from prefill"
        for sequence in prefill.opened if prefill is not None else ():
            self._open(sequence)
        step = StepPlan(
            chunks=prefill.step.chunks if prefill is not None else (),
            rows=decode.step.rows if decode is not None else (),
            num_drafts=decode.step.num_drafts if decode is not None else 0,
        )
        if not step.chunks and not step.rows:
            return None, prefill
        in_flight = _InFlight(
            launched=self._executor.launch(step),
            prefill=prefill.step if prefill is not None and step.chunks else None,
            decode=decode.step if decode is not None and step.rows else None,
        )
        return in_flight, prefill

    def _settle(self, step: _InFlight) -> tuple[list[TokenEvent], list[TokenEvent]]:
        """First tokens, and those of running sequences."""
        result = self._executor.settle(step.launched)
        first: list[TokenEvent] = []
        further: list[TokenEvent] = []
        if step.prefill is not None:
            first = [self._first_token(token) for token in self._prefill.settle(step.prefill, result).finished]
        if step.decode is not None:
            further = self._decode.settle(step.decode, result)
        return first, further

    def _first_token(self, first: FirstToken) -> TokenEvent:
        sequence = first.sequence
        if first.finish is not None:
            self._prefill.finish(sequence.job_id)
        else:
            self._decode.add(self._prefill.hand_over(sequence.job_id))
        return TokenEvent(
            sequence=sequence, token_id=first.token.token_id, logprobs=first.token.logprobs, finish=first.finish
        )

    def _open(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        spec = SlotSpec(
            sampling=sequence.sampling,
            token_ids=list(sequence.token_ids),
            num_prompt_tokens=sequence.num_prompt_tokens,
            page_ids=list(sequence.page_ids),
        )
        self._executor.open_slot(sequence.slot, spec)

    def _resume(self, sequence: Sequence, now_s: float) -> None:
        """Prompt + tokens drawn become the prompt of a new life. The old object still belongs to steps in flight."""
        resumed = dataclasses.replace(
            sequence, token_ids=list(sequence.token_ids), slot=None, num_computed=0, page_ids=[], deadline_s=now_s
        )
        self._prefill.add(resumed)
