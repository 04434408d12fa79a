"""Tokens, one a step and sequence."""

from collections import Counter, deque

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from decode.scheduler import DecodeScheduler, TokenEvent, _Job, _Turn
from kvcache.layout import PAGE_TOKENS, num_pages_for
from serving.core.errors import PagesExhausted, PeerError, StaleError
from serving.core.request import FinishReason, Sequence
from serving.engine.drafting import Drafting
from serving.engine.plan import StepPlan
from tests.scheduler_factory import (
    SETTINGS,
    TEXT,
    SchedulerStage,
    create_sequence,
    expected_tokens,
    rows_of,
)


class Decode(SchedulerStage):
    """With a peer that hands prompts over."""

    def __init__(
        self,
        num_pages: int = 32,
        *,
        num_slots: int = 4,
        max_num_seqs: int = 4,
        max_model_len: int = 400,
        eager: bool = False,
        scheduler_type: type[DecodeScheduler] = DecodeScheduler,
        drafting: Drafting | None = None,
    ) -> None:
        super().__init__(num_pages, num_slots=num_slots, eager=eager)
        self.scheduler = scheduler_type(
            self.manager, self.slots, max_num_seqs=max_num_seqs, max_model_len=max_model_len, drafting=drafting
        )
        self.preempted: list[Sequence] = []

    def receive(
        self,
        job_id: str,
        prompt: list[int],
        *,
        max_new_tokens: int = 8,
        growth_pages: int = 0,
        stop_token_ids: list[int] | None = None,
    ) -> Sequence | None:
        """The whole hand-off: credit, ticket, writes, acceptance. None: no room now."""
        if not self.manager.reserve(job_id, num_pages_for(len(prompt)) + growth_pages, prompt):
            return None
        binding = self.manager.bind(job_id, prompt)
        assert binding is not None
        page_ids = binding.held_page_ids + binding.page_ids
        for position, row in enumerate(rows_of(prompt)):
            if position >= binding.first_page * PAGE_TOKENS:
                self.store.write(page_ids, position, row)
        sequence = create_sequence(
            job_id,
            prompt + expected_tokens(prompt, 1),
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids or [],
        )
        sequence.num_new_tokens = 1
        sequence.page_ids = self.manager.accept(job_id, binding.epochs)
        self.scheduler.add(sequence)
        return sequence

    def must_receive(
        self, job_id: str, prompt: list[int], *, max_new_tokens: int = 8, growth_pages: int = 0
    ) -> Sequence:
        sequence = self.receive(job_id, prompt, max_new_tokens=max_new_tokens, growth_pages=growth_pages)
        assert sequence is not None
        return sequence

    def launch(self) -> StepPlan | None:
        plan = self.scheduler.schedule(0.0)
        if plan is None:
            return None
        self.preempted.extend(plan.preempted)
        self.start(plan.step, plan.opened)
        return plan.step

    def settle(self) -> list[TokenEvent]:
        return self.scheduler.settle(*self.oldest())

    def step(self) -> list[TokenEvent]:
        assert self.launch() is not None
        return self.settle()

    def run(self, *, run_ahead: bool = False) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        while True:
            launched = self.launch()
            while len(self.in_flight) > (1 if run_ahead and launched is not None else 0):
                events += self.settle()
            if launched is None and not self.in_flight:
                return events


def slots_of(step: StepPlan | None) -> list[int]:
    assert step is not None
    return [row.slot for row in step.rows]


@pytest.mark.parametrize("run_ahead", [False, True])
def test_sequences_of_different_lengths_decode_together(run_ahead: bool) -> None:
    decode = Decode()
    sequences = [decode.must_receive(f"job-{i}", TEXT[i : i + 30 * i + 1], max_new_tokens=5 + i) for i in range(6)]
    texts = {s.job_id: s.token_ids[: s.num_prompt_tokens - 1] for s in sequences}
    events = decode.run(run_ahead=run_ahead)
    for i, sequence in enumerate(sequences):
        prompt = texts[sequence.job_id]
        assert sequence.token_ids == prompt + expected_tokens(prompt, 5 + i)
    assert Counter(e.sequence.job_id for e in events) == {f"job-{i}": 4 + i for i in range(6)}
    assert Counter(e.finish for e in events)[FinishReason.LENGTH] == 6
    assert decode.num_used() == 0
    assert decode.slots.num_free == 4


def test_a_stop_token_ends_the_sequence_and_what_was_planned_ahead_is_dropped() -> None:
    stop = expected_tokens(TEXT[:20], 6)[-1]
    decode = Decode()
    sequence = decode.receive("job", TEXT[:20], max_new_tokens=50, stop_token_ids=[stop])
    assert sequence is not None
    num_drawn = expected_tokens(TEXT[:20], 50).index(stop) + 1
    while decode.launch() is not None:
        if len(decode.in_flight) == 2 and decode.settle()[0].finish is not None:
            break
    assert sequence.num_new_tokens == num_drawn
    assert decode.num_used() == 1
    assert decode.settle() == []
    assert decode.num_used() == 0


def test_no_step_is_planned_beyond_a_length_that_is_known_beforehand() -> None:
    decode = Decode(max_model_len=30)
    decode.must_receive("tokens", TEXT[:20], max_new_tokens=3)
    decode.must_receive("model", TEXT[:28], max_new_tokens=50)
    assert len(slots_of(decode.launch())) == 2
    assert len(slots_of(decode.launch())) == 1
    assert decode.launch() is None
    assert [(e.sequence.job_id, e.finish) for e in decode.settle()] == [
        ("tokens", None),
        ("model", FinishReason.LENGTH),
    ]
    assert [(e.sequence.job_id, e.finish) for e in decode.settle()] == [("tokens", FinishReason.LENGTH)]


def test_a_new_page_is_named_in_the_row_that_needs_it_unless_the_slot_is_opened_with_it() -> None:
    decode = Decode()
    at_the_edge = decode.must_receive("edge", TEXT[:64])
    decode.must_receive("inside", TEXT[100:162])
    rows = []
    for _ in range(3):
        step = decode.launch()
        assert step is not None
        rows.append([(row.position, row.new_page_id is not None) for row in step.rows])
        decode.settle()
    assert rows == [[(64, False), (62, False)], [(65, False), (63, False)], [(66, False), (64, True)]]
    assert len(at_the_edge.page_ids) == 2


def test_waiting_sequences_join_as_slots_come_free() -> None:
    decode = Decode(max_num_seqs=2)
    for index, max_new_tokens in enumerate((3, 9, 9)):
        decode.must_receive(f"job-{index}", TEXT[index : index + 9], max_new_tokens=max_new_tokens)
    assert (decode.scheduler.num_running, decode.scheduler.num_waiting) == (0, 3)
    decode.step()
    assert (decode.scheduler.num_running, decode.scheduler.num_waiting) == (2, 1)
    decode.step()
    assert [e.sequence.job_id for e in decode.step()] == ["job-1", "job-2"]


def test_the_youngest_is_preempted_for_the_oldest_and_its_job_is_over() -> None:
    decode = Decode(num_pages=4)
    for index in range(3):
        decode.must_receive(f"job-{index}", TEXT[100 * index : 100 * index + 60], max_new_tokens=60)
    for _ in range(5):
        decode.step()
    decode.step()
    assert [sequence.job_id for sequence in decode.preempted] == ["job-2"]
    victim = decode.preempted[0]
    assert victim.page_ids == []
    assert decode.scheduler.abort("job-2") is None
    done = {e.sequence.job_id for e in decode.run() if e.finish}
    assert done == {"job-0", "job-1"}


def test_the_youngest_waits_for_a_page_instead_of_preempting_itself_or_others() -> None:
    decode = Decode(num_pages=3)
    decode.must_receive("old", TEXT[:62], max_new_tokens=20)
    young = decode.must_receive("young", TEXT[100:164], max_new_tokens=5)
    held = decode.manager.acquire([], 64)
    assert held is not None
    assert [e.sequence.job_id for e in decode.step()] == ["old"]
    assert decode.scheduler.num_stalled == 1
    decode.manager.release(held.page_ids)
    assert [e.sequence.job_id for e in decode.step()] == ["old", "young"]
    assert decode.scheduler.num_stalled == 0
    assert decode.preempted == []
    assert young.num_new_tokens == 2


@pytest.mark.parametrize(("promised", "num_drafts"), [(0, 1), (1, 0)])
def test_a_page_that_only_a_draft_needs_is_taken_from_nobody(promised: int, num_drafts: int) -> None:
    stage = Decode(2, drafting=Drafting(1, lambda num_rows, num_drafts: 1.0))
    stage.must_receive("a", TEXT[: PAGE_TOKENS - 1])
    if promised:
        assert stage.manager.reserve("b", promised, [])
    plan = stage.scheduler.schedule(0.0)
    assert plan is not None
    assert plan.step.num_drafts == num_drafts
    assert len(plan.step.rows) == 1
    assert not plan.preempted
    assert stage.scheduler.num_stalled == 0


def test_pages_that_are_coming_are_waited_for_before_anybody_is_preempted() -> None:
    decode = Decode(num_pages=4)
    for index in range(4):
        decode.must_receive(f"job-{index}", TEXT[50 * index : 50 * index + 62], max_new_tokens=30)
    decode.launch()
    decode.launch()
    decode.scheduler.abort("job-3")
    decode.settle()
    # All three need a page now, one comes with the abort, one from job-2; both are used by a step in flight.
    step = decode.launch()
    assert step is not None
    assert step.rows == ()
    assert [sequence.job_id for sequence in decode.preempted] == ["job-2"]
    decode.settle()
    assert len(slots_of(decode.launch())) == 2


def test_who_draws_its_last_token_in_flight_is_not_preempted() -> None:
    decode = Decode(num_pages=2)
    decode.must_receive("old", TEXT[:62], max_new_tokens=20)
    decode.must_receive("young", TEXT[100:110], max_new_tokens=3)
    decode.step()
    decode.launch()
    assert decode.launch() is None
    assert decode.scheduler.num_stalled == 1
    assert [(e.sequence.job_id, e.finish) for e in decode.settle()] == [("old", None), ("young", FinishReason.LENGTH)]
    assert decode.preempted == []
    assert [e.sequence.job_id for e in decode.step()] == ["old"]


def test_a_sequence_grows_out_of_its_own_credit() -> None:
    decode = Decode(num_pages=2)
    sequence = decode.must_receive("job", TEXT[:62], max_new_tokens=20, growth_pages=1)
    assert decode.manager.num_available == 0
    decode.run()
    assert sequence.num_new_tokens == 20
    assert decode.num_used() == 0


def test_what_is_left_of_the_credit_is_given_back_at_the_end() -> None:
    decode = Decode()
    decode.must_receive("ends", TEXT[:10], max_new_tokens=3, growth_pages=5)
    decode.must_receive("aborted", TEXT[10:20], growth_pages=5)
    decode.step()
    decode.scheduler.abort("aborted")
    decode.run()
    assert decode.num_used() == 0
    assert decode.manager.counts()["reserved"] == 0


def test_an_abort_while_the_step_is_in_flight_gives_pages_back_when_it_has_settled() -> None:
    decode = Decode()
    decode.must_receive("job", TEXT[:60])
    decode.launch()
    decode.launch()
    assert decode.scheduler.abort("job") is not None
    assert decode.scheduler.num_running == 0
    for num_used in (1, 1, 0):
        assert decode.num_used() == num_used
        assert decode.slots.num_free == 4 - num_used
        if decode.in_flight:
            assert decode.settle() == []


def test_generated_pages_are_found_by_the_next_turn_of_a_conversation() -> None:
    decode = Decode()
    decode.must_receive("first", TEXT[:60], max_new_tokens=80)
    decode.run()
    turn = TEXT[:60] + expected_tokens(TEXT[:60], 80) + [1, 2, 3]
    assert decode.manager.reserve("second", 3, turn)
    binding = decode.manager.bind("second", turn)
    assert binding is not None
    assert binding.first_page == 2
    assert decode.store.read(binding.held_page_ids, 128) == rows_of(turn)[:128]


def test_a_spoilt_page_changes_the_text() -> None:
    decode = Decode()
    sequence = decode.must_receive("job", TEXT[:60])
    decode.store.spoil(sequence.page_ids[0])
    decode.run()
    assert sequence.token_ids[60:] != expected_tokens(TEXT[:60], 8)


def test_what_could_never_be_finished_is_refused_at_once() -> None:
    decode = Decode(num_pages=2)
    # 60 prompt tokens and 69 new ones: the last is never stored.
    decode.must_receive("fits", TEXT[:60], max_new_tokens=69)
    decode.scheduler.abort("fits")
    with pytest.raises(PagesExhausted, match=r"need 3 pages, the decode pool has 2; raise kv.decode_pages"):
        decode.receive("never", TEXT[:60], max_new_tokens=70)


def test_peers_faults_are_refused() -> None:
    decode = Decode()
    decode.must_receive("job", TEXT[:10])
    with pytest.raises(StaleError, match="here already"):
        decode.scheduler.add(create_sequence("job", TEXT[:10]))
    with pytest.raises(PeerError, match="ended with the token"):
        decode.receive("ended", TEXT[:20], max_new_tokens=1)


def finish_all(
    requests: list[tuple[list[int], int]], *, num_pages: int, run_ahead: bool, eager: bool
) -> list[list[int]]:
    """Every request to its end, resumed after each pre-emption with everything drawn so far, as the router does."""
    decode = Decode(num_pages, num_slots=3, max_num_seqs=3, max_model_len=3 * 64, eager=eager)
    answers: list[list[int]] = [[] for _ in requests]
    todo = deque((number, 0) for number in range(len(requests)))
    lives: dict[str, int] = {}
    for _ in range(3000):
        while todo:
            number, life = todo[0]
            prompt, max_new_tokens = requests[number]
            job_id = f"{number}/{life}"
            text = prompt + answers[number]
            sequence = decode.receive(job_id, text, max_new_tokens=max_new_tokens - len(answers[number]))
            if sequence is None:
                break
            lives[job_id] = number
            answers[number].append(sequence.token_ids[-1])
            todo.popleft()
        launched = decode.launch()
        for victim in decode.preempted:
            number = lives[victim.job_id]
            if len(answers[number]) < requests[number][1] - 1:
                todo.append((number, int(victim.job_id.split("/")[1]) + 1))
            else:
                answers[number] += expected_tokens(requests[number][0] + answers[number], 1)
        decode.preempted.clear()
        while len(decode.in_flight) > (1 if run_ahead and launched is not None else 0):
            for event in decode.settle():
                answers[lives[event.sequence.job_id]].append(event.token_id)
        idle = launched is None and not todo and not decode.in_flight
        if idle and decode.scheduler.num_waiting == decode.scheduler.num_running == 0:  # running: it waited for a page
            assert decode.num_used() == 0
            return answers
    raise AssertionError("livelock")


REQUEST = st.tuples(st.integers(1, 100), st.sampled_from([0, 64, 1000]), st.integers(2, 60))


@settings(SETTINGS, max_examples=25)
@given(shapes=st.lists(REQUEST, min_size=2, max_size=6), num_pages=st.integers(3, 6), eager=st.booleans())
def test_under_pressure_every_request_ends_with_its_own_text_run_ahead_or_not(
    shapes: list[tuple[int, int, int]], num_pages: int, eager: bool
) -> None:
    requests = [([i if i < fork else 900 + i for i in range(n)], new) for n, fork, new in shapes]
    wanted = [expected_tokens(prompt, max_new_tokens) for prompt, max_new_tokens in requests]
    for run_ahead in (False, True):
        assert finish_all(requests, num_pages=num_pages, run_ahead=run_ahead, eager=eager) == wanted


class DecodeMachine(RuleBasedStateMachine):
    """Random hand-offs into a small pool, aborts at any moment, up to two steps in flight."""

    scheduler_type = DecodeScheduler

    @initialize(num_pages=st.integers(4, 10), num_slots=st.integers(1, 4), eager=st.booleans())
    def start(self, num_pages: int, num_slots: int, eager: bool) -> None:
        self._decode = Decode(
            num_pages, num_slots=num_slots, max_model_len=4 * 64, eager=eager, scheduler_type=self.scheduler_type
        )
        self._live: dict[str, tuple[Sequence, list[int]]] = {}
        self._gone: list[Sequence] = []
        self._num_jobs = 0

    @rule(
        num_tokens=st.sampled_from([1, 30, 60, 63, 64, 65, 126, 190]),
        fork=st.sampled_from([0, 64, 1000]),
        max_new_tokens=st.integers(2, 70),
        growth_pages=st.integers(0, 1),
        stop_token_id=st.integers(0, 200),
    )
    def receive(self, num_tokens: int, fork: int, max_new_tokens: int, growth_pages: int, stop_token_id: int) -> None:
        prompt = [i if i < fork else 900 + i for i in range(num_tokens)]
        if expected_tokens(prompt, 1) == [stop_token_id]:
            return
        self._num_jobs += 1
        job_id = f"job-{self._num_jobs}"
        sequence = self._decode.receive(
            job_id,
            prompt,
            max_new_tokens=max_new_tokens,
            growth_pages=growth_pages,
            stop_token_ids=[stop_token_id],
        )
        if sequence is not None:
            self._live[job_id] = (sequence, prompt)

    @precondition(lambda self: len(self._decode.in_flight) < 2)
    @rule()
    def launch(self) -> None:
        self._decode.launch()
        for sequence in self._decode.preempted:
            del self._live[sequence.job_id]
            self._gone.append(sequence)
        self._decode.preempted.clear()

    @precondition(lambda self: self._decode.in_flight)
    @rule()
    def settle(self) -> None:
        for event in self._decode.settle():
            sequence, prompt = self._live[event.sequence.job_id]
            assert event.sequence is sequence
            wanted = expected_tokens(prompt, sequence.num_new_tokens)
            assert sequence.token_ids == prompt + wanted
            stopped = event.token_id in sequence.sampling.stop_token_ids
            full = sequence.num_new_tokens == sequence.max_new_tokens or sequence.num_tokens == 4 * 64
            assert (event.finish is not None) == (stopped or full)
            if event.finish is not None:
                del self._live[sequence.job_id]
                self._gone.append(sequence)

    @rule(num_steps=st.integers(1, 40))
    def go_on(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if len(self._decode.in_flight) < 2:
                self.launch()
            if self._decode.in_flight:
                self.settle()

    @precondition(lambda self: self._live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self._live)))
        sequence, _ = self._live.pop(job_id)
        assert self._decode.scheduler.abort(job_id) is sequence
        self._gone.append(sequence)

    @invariant()
    def pages_and_slots_are_where_they_should_be(self) -> None:
        self._decode.check([*(sequence for sequence, _ in self._live.values()), *self._gone])
        self._gone = [sequence for sequence in self._gone if sequence.page_ids]

    def teardown(self) -> None:
        if not hasattr(self, "_decode"):
            return
        for _ in range(4 * 64 * self._num_jobs + 10):
            oldest = next(iter(self._live.values()), None)
            before = oldest[0].num_new_tokens if oldest else 0
            self.go_on(6)
            if not self._live and not self._decode.in_flight:
                break
            assert oldest is None or oldest[0].num_new_tokens > before, "the oldest does not move"
        assert self._decode.num_used() == 0
        assert self._decode.slots.num_free == self._decode.slots.num_slots


def test_random_hand_offs_and_aborts() -> None:
    run_state_machine_as_test(DecodeMachine, settings=SETTINGS)


class TooEarly(DecodeScheduler):
    """Gives slot and pages back while a step in flight uses them."""

    def _remove(self, job: _Job) -> int:
        job.num_in_flight = 0
        return super()._remove(job)


class OldestFirst(DecodeScheduler):
    """Takes pages from whoever is at hand, also from older sequences."""

    def _grow(self, job: _Job, turn: _Turn) -> int | None:
        self._jobs = {job_id: self._jobs[job_id] for job_id in reversed(self._jobs)}
        return super()._grow(job, turn)


@pytest.mark.parametrize("broken", [TooEarly, OldestFirst])
def test_the_machine_catches_a_scheduler_that_breaks_the_rules(broken: type[DecodeScheduler]) -> None:
    machine = type("BrokenMachine", (DecodeMachine,), {"scheduler_type": broken})
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(machine, settings=settings(SETTINGS, phases=[Phase.generate]))
