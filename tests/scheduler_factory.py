"""Sequences, and an executor that computes with remembered rows instead of tensors, for tests of managers and schedulers.

A row stands for a latent: it is a function of the row before it, read from the page, and of its token. A token is drawn from all rows of its
sequence, read from the pages. So a page in two hands, a page freed too early or a wrong position changes the text or is caught in the act.
`expected_tokens` is the same function without pages, slots or steps.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hypothesis import settings

from kvcache.layout import PAGE_TOKENS
from kvcache.manager import KVManager
from serving.core.request import SamplingParams, Sequence
from serving.engine.plan import PrefillChunk, SampledToken, SlotSpec, StepPlan, StepResult
from serving.engine.slots import Slots

VOCABULARY = 50
TEXT = list(range(1000, 1400))
SETTINGS = settings(max_examples=50, stateful_step_count=40, deadline=None, derandomize=True, database=None)


def create_sequence(
    job_id: str,
    token_ids: Iterable[int],
    *,
    max_new_tokens: int = 8,
    deadline_s: float = float("inf"),
    stop_token_ids: Iterable[int] = (),
) -> Sequence:
    tokens = list(token_ids)
    return Sequence(
        job_id=job_id,
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(stop_token_ids=list(stop_token_ids)),
        max_new_tokens=max_new_tokens,
        deadline_s=deadline_s,
    )


def _row(before: int, token_id: int) -> int:
    return zlib.crc32(b"%d %d" % (before, token_id))


def _draw(rows: list[int]) -> int:
    return zlib.crc32(repr(rows).encode()) % VOCABULARY


def rows_of(token_ids: Iterable[int]) -> list[int]:
    rows: list[int] = []
    for token_id in token_ids:
        rows.append(_row(rows[-1] if rows else 0, token_id))
    return rows


def expected_tokens(token_ids: Iterable[int], num_new_tokens: int) -> list[int]:
    """What `num_new_tokens` draws after `token_ids` give."""
    tokens = list(token_ids)
    num_tokens, rows = len(tokens), rows_of(tokens)
    while len(tokens) < num_tokens + num_new_tokens:
        tokens.append(_draw(rows))
        rows.append(_row(rows[-1], tokens[-1]))
    return tokens[num_tokens:]


class RowStore:
    """The pages of one pool. A row is written once between two moments at which its page was free; what nobody wrote cannot be read.

    Rows of drafts may be written anew, and cannot be read before they are `settled`.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], int] = {}
        self._drafts: set[tuple[int, int]] = set()

    def clear(self, page_id: int) -> None:
        """`KVManager(on_free=...)`."""
        for offset in range(PAGE_TOKENS):
            self._rows.pop((page_id, offset), None)
            self._drafts.discard((page_id, offset))

    def write(self, page_ids: list[int], position: int, row: int, *, draft: bool = False) -> None:
        at = (page_ids[position // PAGE_TOKENS], position % PAGE_TOKENS)
        if at in self._drafts:
            self._drafts.remove(at)
            del self._rows[at]
        assert self._rows.setdefault(at, row) == row, f"row {at} belongs to somebody else"
        if draft:
            self._drafts.add(at)

    def settle(self, page_ids: list[int], position: int) -> None:
        """The draft at this position was accepted."""
        self._drafts.remove((page_ids[position // PAGE_TOKENS], position % PAGE_TOKENS))

    def read(self, page_ids: list[int], num_rows: int) -> list[int]:
        places = [(page_ids[i // PAGE_TOKENS], i % PAGE_TOKENS) for i in range(num_rows)]
        assert not self._drafts.intersection(places), "a row of a draft that nobody accepted is read"
        return [self._rows[at] for at in places]

    def spoil(self, page_id: int) -> None:
        """Another value in row 0, for negative controls."""
        self._rows[page_id, 0] += 1


@dataclass
class _Slot:
    token_id: int
    page_ids: list[int]
    position: int | None = None


@dataclass
class FakeLaunched:
    plan: StepPlan
    tokens: list[SampledToken] | None = field(default=None)


class FakeExecutor:
    """In order, like a device. `eager`: a step runs when it is launched; otherwise as late as possible, when it is settled.

    One draft of four is wrong. What is drafted where a sequence has no page is written nowhere.
    """

    def __init__(self, store: RowStore, *, eager: bool = False) -> None:
        self._store = store
        self._eager = eager
        self._slots: dict[int, _Slot] = {}
        self._queue: deque[Callable[[], None]] = deque()

    def open_slot(self, slot: int, spec: SlotSpec) -> None:
        state = _Slot(spec.token_ids[-1], list(spec.page_ids))
        self._submit(lambda: self._slots.__setitem__(slot, state))

    def close_slot(self, slot: int) -> None:
        self._submit(lambda: self._slots.__delitem__(slot))

    def launch(self, plan: StepPlan) -> FakeLaunched:
        assert plan.num_tokens > 0, "an empty step is not launched"
        slots = [work.slot for work in (*plan.chunks, *plan.rows)]
        assert len(set(slots)) == len(slots), "a slot appears twice in a step"
        launched = FakeLaunched(plan)
        self._submit(lambda: self._run(launched))
        return launched

    def settle(self, launched: FakeLaunched) -> StepResult:
        while launched.tokens is None:
            self._queue.popleft()()
        return StepResult(tokens=tuple(launched.tokens))

    def _submit(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        while self._eager and self._queue:
            self._queue.popleft()()

    def _run(self, launched: FakeLaunched) -> None:
        tokens: list[SampledToken] = []
        for chunk in launched.plan.chunks:
            rows = self._prefill(chunk)
            if chunk.sample:
                tokens.append(self._sample(chunk.slot, rows))
        for row in launched.plan.rows:
            slot = self._slots[row.slot]
            if row.new_page_id is not None:
                slot.page_ids.append(row.new_page_id)
            if row.position is not None:
                assert slot.position in (None, row.position), "the host is wrong about a position"
                slot.position = row.position
            tokens += self._decode(row.slot, slot, launched.plan.num_drafts)
        launched.tokens = tokens

    def _decode(self, number: int, slot: _Slot, num_drafts: int) -> list[SampledToken]:
        assert slot.position is not None, "nobody knows the position of this row"
        num_places = len(slot.page_ids) * PAGE_TOKENS
        if slot.position >= num_places:  # past the end of its text, or a wrong token
            return [SampledToken(slot=number, token_id=VOCABULARY)]
        rows = self._store.read(slot.page_ids, slot.position)
        input_id, input_ids, drawn_ids = slot.token_id, [], []
        for position in range(slot.position, slot.position + num_drafts + 1):
            rows.append(_row(rows[-1], input_id))
            if position < num_places:
                self._store.write(slot.page_ids, position, rows[-1], draft=position > slot.position)
            input_ids.append(input_id)
            drawn_ids.append(_draw(rows))
            input_id = drawn_ids[-1] if rows[-1] % 4 else VOCABULARY
        num_accepted = 0
        while num_accepted < num_drafts and input_ids[num_accepted + 1] == drawn_ids[num_accepted]:
            num_accepted += 1
            if slot.position + num_accepted < num_places:
                self._store.settle(slot.page_ids, slot.position + num_accepted)
        slot.token_id = drawn_ids[num_accepted]
        slot.position += num_accepted + 1
        return [SampledToken(slot=number, token_id=token_id) for token_id in drawn_ids[: num_accepted + 1]]

    def _prefill(self, chunk: PrefillChunk) -> list[int]:
        rows = self._store.read(chunk.page_ids, chunk.start)
        for position, token_id in enumerate(chunk.token_ids, chunk.start):
            rows.append(_row(rows[-1] if rows else 0, token_id))
            if position >= chunk.store_from:
                self._store.write(chunk.page_ids, position, rows[-1])
        return rows

    def _sample(self, slot: int, rows: list[int]) -> SampledToken:
        self._slots[slot].token_id = _draw(rows)
        return SampledToken(slot=slot, token_id=self._slots[slot].token_id)


def open_slots(executor: FakeExecutor, opened: Iterable[Sequence]) -> None:
    """What a worker does with the `opened` of a plan."""
    for sequence in opened:
        assert sequence.slot is not None
        executor.open_slot(
            sequence.slot,
            SlotSpec(
                sampling=sequence.sampling,
                token_ids=list(sequence.token_ids),
                num_prompt_tokens=sequence.num_prompt_tokens,
                page_ids=list(sequence.page_ids),
            ),
        )


class SchedulerStage:
    """What a worker has around its scheduler: pages, slots, an executor, and the steps in flight."""

    def __init__(self, num_pages: int, *, num_slots: int, eager: bool) -> None:
        self.store = RowStore()
        self.executor = FakeExecutor(self.store, eager=eager)
        self.manager = KVManager(num_pages, salt=b"test", on_free=self.store.clear)
        self.slots = Slots(num_slots, on_give=self.executor.close_slot)
        self.in_flight: deque[FakeLaunched] = deque()

    def start(self, step: StepPlan, opened: Iterable[Sequence]) -> None:
        open_slots(self.executor, opened)
        if step.num_tokens:
            self.in_flight.append(self.executor.launch(step))

    def oldest(self) -> tuple[StepPlan, StepResult]:
        """The step that settles next, and what it drew."""
        launched = self.in_flight.popleft()
        return launched.plan, self.executor.settle(launched)

    def num_used(self) -> int:
        self.manager.check()
        return self.manager.num_pages - self.manager.num_available

    def check(self, holders: Iterable[Sequence]) -> None:
        """Every reference to a page and every slot that is taken is that of one of `holders`."""
        self.manager.check()
        holders, refs = list(holders), self.manager._refs
        references = Counter(page_id for sequence in holders for page_id in sequence.page_ids)
        assert all(refs[page_id] == references[page_id] for page_id in range(len(refs)))
        slots = [sequence.slot for sequence in holders if sequence.slot is not None]
        assert len(set(slots)) == len(slots) == self.slots.num_slots - self.slots.num_free
