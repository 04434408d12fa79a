"""Prompts in chunks."""

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from prefill.scheduler import FirstToken, PrefillScheduler, PrefillSettled
from serving.core.errors import PagesExhausted, PeerError, StaleError
from serving.core.request import FinishReason, Sequence
from serving.engine.plan import StepPlan
from tests.scheduler_factory import SETTINGS, TEXT, SchedulerStage, create_sequence, expected_tokens


class Prefill(SchedulerStage):
    def __init__(
        self,
        num_pages: int = 32,
        *,
        num_slots: int = 4,
        max_num_seqs: int = 4,
        max_batched_tokens: int = 128,
        eager: bool = False,
    ) -> None:
        super().__init__(num_pages, num_slots=num_slots, eager=eager)
        self.scheduler = PrefillScheduler(
            self.manager, self.slots, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens
        )
        self.late: list[Sequence] = []
        self.finished: list[FirstToken] = []

    def add(self, job_id: str, token_ids: list[int], *, deadline_s: float = float("inf")) -> Sequence:
        sequence = create_sequence(job_id, token_ids, deadline_s=deadline_s)
        self.scheduler.add(sequence)
        return sequence

    def launch(self, now_s: float = 0.0) -> StepPlan | None:
        plan = self.scheduler.schedule(now_s)
        if plan is None:
            return None
        self.late.extend(plan.late)
        self.start(plan.step, plan.opened)
        return plan.step

    def settle(self) -> PrefillSettled:
        settled = self.scheduler.settle(*self.oldest())
        self.finished.extend(settled.finished)
        return settled

    def step(self, now_s: float = 0.0) -> PrefillSettled:
        assert self.launch(now_s) is not None
        return self.settle()

    def run(self) -> None:
        while self.launch() is not None or self.in_flight:
            self.settle()


def chunk_sizes(step: StepPlan | None) -> list[int]:
    assert step is not None
    return [len(chunk.token_ids) for chunk in step.chunks]


def test_a_long_prompt_is_computed_in_chunks_and_its_first_token_is_right() -> None:
    prefill = Prefill(max_batched_tokens=128)
    sequence = prefill.add("job", TEXT[:300])
    sizes = []
    while not prefill.finished:
        sizes.append(chunk_sizes(prefill.launch()))
        settled = prefill.settle()
        assert settled.chunks[0].end == sequence.num_computed
    assert sizes == [[128], [128], [44]]
    assert sequence.token_ids[300:] == [prefill.finished[0].token.token_id] == expected_tokens(TEXT[:300], 1)
    assert (sequence.num_computed, sequence.num_new_tokens) == (300, 1)
    prefill.scheduler.finish("job")
    assert prefill.num_used() == 0
    assert prefill.slots.num_free == 4


def test_one_step_is_shared_by_several_prompts_the_most_urgent_first() -> None:
    prefill = Prefill(max_batched_tokens=128)
    for job_id, num_tokens, deadline_s in (("relaxed", 100, 9.0), ("urgent", 90, 1.0), ("next", 20, 5.0)):
        prefill.add(job_id, TEXT[:num_tokens], deadline_s=deadline_s)
    settled = prefill.step()
    assert [(c.sequence.job_id, c.end) for c in settled.chunks] == [("urgent", 90), ("next", 20), ("relaxed", 18)]
    assert [first.sequence.job_id for first in settled.finished] == ["urgent", "next"]


def test_an_urgent_prompt_overtakes_one_that_has_begun() -> None:
    prefill = Prefill(max_batched_tokens=128)
    prefill.add("long", TEXT[:300], deadline_s=9.0)
    prefill.step()
    prefill.add("urgent", list(range(100)), deadline_s=1.0)
    settled = prefill.step()
    assert [(c.sequence.job_id, c.end) for c in settled.chunks] == [("urgent", 100), ("long", 156)]


def test_a_prompt_that_is_late_before_it_starts_is_dropped_and_one_that_has_started_is_not() -> None:
    prefill = Prefill(max_batched_tokens=128)
    prefill.add("started", TEXT[:200], deadline_s=1.0)
    prefill.step(now_s=0.5)
    prefill.add("late", TEXT[:10], deadline_s=1.0)
    settled = prefill.step(now_s=1.5)
    assert [sequence.job_id for sequence in prefill.late] == ["late"]
    assert [c.sequence.job_id for c in settled.chunks] == ["started"]
    assert prefill.scheduler.num_waiting == 0


def test_a_resumed_request_is_never_late() -> None:
    prefill = Prefill()
    resumed = create_sequence("resumed", TEXT[:10], deadline_s=1.0)
    resumed.num_prompt_tokens = 9
    prefill.scheduler.add(resumed)
    prefill.add("fresh", TEXT[:10], deadline_s=1.0)
    assert chunk_sizes(prefill.launch(now_s=2.0)) == [10]
    assert [sequence.job_id for sequence in prefill.late] == ["fresh"]


def test_late_prompts_are_reported_even_when_nothing_is_left_to_compute() -> None:
    prefill = Prefill()
    prefill.add("late", TEXT[:10], deadline_s=1.0)
    step = prefill.launch(now_s=2.0)
    assert step is not None
    assert step.num_tokens == 0
    assert [sequence.job_id for sequence in prefill.late] == ["late"]
    assert prefill.launch(now_s=3.0) is None


def test_a_cached_prefix_is_not_computed_again_but_for_its_last_token() -> None:
    prefill = Prefill(max_batched_tokens=512)
    prefill.add("first", TEXT[:200])
    prefill.run()
    sequence = prefill.add("second", [*TEXT[:150], 7, 8])
    step = prefill.launch()
    assert step is not None
    chunk = step.chunks[0]
    assert (chunk.start, chunk.store_from, len(chunk.token_ids)) == (127, 128, 25)
    assert sequence.num_computed == 128
    prefill.settle()
    assert sequence.token_ids[-1:] == expected_tokens([*TEXT[:150], 7, 8], 1)


def test_a_prompt_that_is_cached_entirely_computes_one_token() -> None:
    prefill = Prefill()
    prefill.add("first", TEXT[:128])
    prefill.run()
    prefill.add("second", TEXT[:128])
    assert chunk_sizes(prefill.launch()) == [1]
    settled = prefill.settle()
    assert settled.finished[0].token.token_id == expected_tokens(TEXT[:128], 1)[0]
    assert (settled.chunks[0].start, settled.chunks[0].end) == (128, 128)


def test_a_spoilt_page_in_the_cache_changes_the_answer() -> None:
    prefill = Prefill()
    first = prefill.add("first", TEXT[:128])
    prefill.run()
    prefill.store.spoil(first.page_ids[0])
    prefill.add("second", TEXT[:128])
    assert prefill.step().finished[0].token.token_id != expected_tokens(TEXT[:128], 1)[0]


def test_pages_can_be_found_only_after_the_step_that_computed_them_has_settled() -> None:
    prefill = Prefill(max_batched_tokens=128)
    prefill.add("first", TEXT[:128])
    prefill.launch()
    second = prefill.add("second", TEXT[:130])
    prefill.launch()
    assert second.num_computed == 0
    prefill.settle()
    third = prefill.add("third", TEXT[:130])
    prefill.launch()
    assert third.num_computed == 128


def test_the_next_chunk_is_planned_before_the_one_before_has_settled() -> None:
    prefill = Prefill(max_batched_tokens=128)
    sequence = prefill.add("job", TEXT[:300])
    prefill.launch()
    prefill.launch()
    prefill.settle()
    prefill.launch()
    assert prefill.launch() is None
    assert prefill.settle().chunks[0].end == 256
    assert prefill.settle().finished[0].token.token_id == expected_tokens(TEXT[:300], 1)[0]
    assert sequence.num_computed == 300


def test_who_finds_no_room_keeps_those_behind_out_but_not_those_that_run() -> None:
    prefill = Prefill(num_pages=6, max_batched_tokens=64)
    prefill.add("running", TEXT[:256], deadline_s=5.0)
    prefill.step()
    prefill.add("big", list(range(192)), deadline_s=1.0)
    prefill.add("small", list(range(500, 510)), deadline_s=2.0)
    settled = prefill.step()
    assert [c.sequence.job_id for c in settled.chunks] == ["running"]
    assert prefill.scheduler.num_waiting == 2
    prefill.run()
    prefill.scheduler.finish("running")
    assert [c.sequence.job_id for c in prefill.step().chunks] == ["big"]


def test_at_most_max_num_seqs_hold_a_slot_hand_off_included() -> None:
    prefill = Prefill(max_num_seqs=2)
    for index in range(3):
        prefill.add(f"job-{index}", TEXT[index : index + 10])
    prefill.run()
    assert (prefill.scheduler.num_running, prefill.scheduler.num_waiting) == (2, 1)
    prefill.scheduler.finish("job-0")
    prefill.run()
    assert [first.sequence.job_id for first in prefill.finished] == ["job-0", "job-1", "job-2"]


def test_an_abort_while_the_step_is_in_flight_gives_pages_back_when_it_has_settled() -> None:
    prefill = Prefill(max_batched_tokens=128)
    prefill.add("job", TEXT[:300])
    prefill.launch()
    prefill.launch()
    assert prefill.scheduler.abort("job") is not None
    assert prefill.num_used() == 5
    assert prefill.slots.num_free == 3
    prefill.settle()
    assert prefill.num_used() == 5
    assert prefill.settle().chunks == ()
    assert prefill.num_used() == 0
    assert prefill.slots.num_free == 4
    assert prefill.scheduler.abort("job") is None


def test_an_abort_before_the_start_and_after_the_end() -> None:
    prefill = Prefill()
    prefill.add("waiting", TEXT[:10])
    assert prefill.scheduler.abort("waiting") is not None
    assert prefill.launch() is None
    prefill.add("done", TEXT[:10])
    prefill.run()
    assert prefill.num_used() == 1
    assert prefill.scheduler.abort("done") is not None
    assert prefill.num_used() == 0


def test_a_sequence_handed_over_keeps_its_slot_and_its_pages() -> None:
    prefill = Prefill()
    prefill.add("job", TEXT[:100])
    prefill.run()
    sequence = prefill.scheduler.hand_over("job")
    assert sequence.slot is not None
    assert len(sequence.page_ids) == 2
    assert prefill.scheduler.num_running == 0
    assert prefill.num_used() == 2


@pytest.mark.parametrize(
    ("stop", "max_new_tokens", "max_model_len", "finish"),
    [
        (True, 9, None, FinishReason.STOP),
        (True, 1, None, FinishReason.STOP),
        (False, 1, None, FinishReason.LENGTH),
        (False, 9, 101, FinishReason.LENGTH),
        (False, 9, 102, None),
    ],
)
def test_the_first_token_says_whether_it_is_the_last(
    stop: bool, max_new_tokens: int, max_model_len: int | None, finish: FinishReason | None
) -> None:
    prefill = Prefill()
    prefill.scheduler._max_model_len = max_model_len
    sequence = create_sequence(
        "job",
        TEXT[:100],
        max_new_tokens=max_new_tokens,
        stop_token_ids=expected_tokens(TEXT[:100], 1) if stop else [],
    )
    prefill.scheduler.add(sequence)
    assert prefill.step().finished[0].finish is finish


def test_a_prompt_larger_than_the_pool_is_refused_at_once() -> None:
    prefill = Prefill(num_pages=4)
    prefill.add("fits", TEXT[:256])
    with pytest.raises(PagesExhausted, match=r"needs 5 pages, the prefill pool has 4; raise kv.prefill_pages"):
        prefill.add("never", TEXT[:257])
    assert prefill.scheduler.num_waiting == 1


def test_a_job_sent_twice_or_without_tokens_is_the_peers_fault() -> None:
    prefill = Prefill()
    prefill.add("job", TEXT[:10])
    with pytest.raises(StaleError, match="here already"):
        prefill.add("job", TEXT[:10])
    with pytest.raises(PeerError, match="empty prompt"):
        prefill.add("empty", [])


def test_waiting_tokens_count_what_is_not_planned_yet() -> None:
    prefill = Prefill(max_batched_tokens=128)
    prefill.add("job", TEXT[:300])
    prefill.add("other", TEXT[:10])
    assert prefill.scheduler.waiting_work(0.0) == 310
    prefill.launch()
    assert prefill.scheduler.waiting_work(0.0) == 182
    # The first 128 tokens are planned; the rest attend to them too.
    pairs = 300 * 301 // 2 - 128 * 129 // 2 + 10 * 11 // 2
    assert abs(prefill.scheduler.waiting_work(0.5) - (182 + pairs / 2)) <= 1


class PrefillMachine(RuleBasedStateMachine):
    """Random prompts with common beginnings, small pools, aborts at any moment, up to two steps in flight."""

    @initialize(
        num_pages=st.integers(5, 16),
        num_slots=st.integers(1, 4),
        max_batched_tokens=st.sampled_from([1, 50, 64, 200, 1000]),
        eager=st.booleans(),
    )
    def start(self, num_pages: int, num_slots: int, max_batched_tokens: int, eager: bool) -> None:
        self._prefill = Prefill(num_pages, num_slots=num_slots, max_batched_tokens=max_batched_tokens, eager=eager)
        self._live: dict[str, Sequence] = {}
        self._prompts: dict[str, list[int]] = {}
        self._gone: list[Sequence] = []
        self._now_s = 0.0

    @rule(num_tokens=st.integers(1, 5 * 64), fork=st.sampled_from([0, 64, 130, 1000]), patience_s=st.integers(0, 20))
    def add(self, num_tokens: int, fork: int, patience_s: int) -> None:
        job_id = f"job-{len(self._prompts)}"
        self._prompts[job_id] = [i if i < fork else 500 + i for i in range(num_tokens)]
        self._live[job_id] = self._prefill.add(job_id, self._prompts[job_id], deadline_s=self._now_s + patience_s)

    @precondition(lambda self: len(self._prefill.in_flight) < 2)
    @rule()
    def launch(self) -> None:
        step = self._prefill.launch(self._now_s)
        if step is not None:
            assert step.num_tokens <= self._prefill.scheduler._max_batched_tokens
        for sequence in self._prefill.late:
            assert self._live.pop(sequence.job_id).deadline_s < self._now_s
        self._prefill.late.clear()

    @precondition(lambda self: self._prefill.in_flight)
    @rule()
    def settle(self) -> None:
        for first in self._prefill.settle().finished:
            sequence = first.sequence
            prompt = self._prompts[sequence.job_id]
            assert self._live[sequence.job_id] is sequence
            assert sequence.token_ids == prompt + expected_tokens(prompt, 1)

    @precondition(lambda self: any(sequence.num_new_tokens for sequence in self._live.values()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        done = [job_id for job_id, sequence in self._live.items() if sequence.num_new_tokens]
        job_id = data.draw(st.sampled_from(done))
        self._prefill.scheduler.finish(job_id)
        del self._live[job_id]

    @precondition(lambda self: self._live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self._live)))
        assert self._prefill.scheduler.abort(job_id) is self._live[job_id]
        self._gone.append(self._live.pop(job_id))

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds: int) -> None:
        self._now_s += seconds

    @invariant()
    def pages_and_slots_are_where_they_should_be(self) -> None:
        self._prefill.check([*self._live.values(), *self._gone])
        self._gone = [sequence for sequence in self._gone if sequence.slot is not None]

    def teardown(self) -> None:
        if not hasattr(self, "_prefill"):
            return
        for job_id, sequence in list(self._live.items()):
            sequence.deadline_s = float("inf")
            if sequence.num_new_tokens and random.Random(job_id).random() < 0.5:
                self.finish_one(job_id)
        while self._live:
            self._prefill.run()
            done = [job_id for job_id, sequence in self._live.items() if sequence.num_new_tokens]
            assert done, "nothing moves"
            for job_id in done:
                self.finish_one(job_id)
        while self._prefill.in_flight:
            self._prefill.settle()
        assert self._prefill.num_used() == 0
        assert self._prefill.slots.num_free == self._prefill.slots.num_slots

    def finish_one(self, job_id: str) -> None:
        self._prefill.scheduler.finish(job_id)
        del self._live[job_id]


def test_random_prompts_and_aborts() -> None:
    run_state_machine_as_test(PrefillMachine, settings=SETTINGS)


def test_a_scheduler_that_gives_pages_back_too_early_is_caught() -> None:
    """The negative control of the machine and of the executor below it."""
    early = Prefill(num_pages=3, max_batched_tokens=64)
    early.add("aborted", TEXT[:192])
    early.launch()
    sequence = early.scheduler.abort("aborted")
    assert sequence is not None
    early.manager.release(sequence.page_ids)
    sequence.page_ids = []
    early.add("next", list(range(192)))
    early.launch()
    early.settle()
    with pytest.raises(AssertionError, match="belongs to somebody else"):
        early.settle()
