"""Random lives of pages: after every step nothing is lost, nothing is in two hands, and only proof frees what a peer may write."""

from collections import Counter

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcache.layout import PAGE_TOKENS
from kvcache.manager import Binding, KVManager
from serving.core.errors import StaleError

SETTINGS = settings(max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, database=None)


class ManagerMachine(RuleBasedStateMachine):
    """Texts share beginnings. `_sequences` are the hands that hold pages, `_bound` the tickets that peers hold, `_old` those that are over."""

    manager_type = KVManager

    @initialize(num_pages=st.integers(4, 24), prefix_cache=st.booleans())
    def start(self, num_pages: int, prefix_cache: bool) -> None:
        self._manager = self.manager_type(num_pages, prefix_cache=prefix_cache, salt=b"machine")
        self._sequences: list[tuple[list[int], list[int], str | None]] = []
        self._reserved: list[tuple[str, list[int]]] = []
        self._bound: list[tuple[str, list[int], Binding]] = []
        self._draining: list[tuple[str, Binding]] = []
        self._old: list[str] = []
        self._num_jobs = 0

    def _text(self, data: st.DataObject) -> list[int]:
        num_tokens = data.draw(st.integers(1, 5 * PAGE_TOKENS))
        fork = data.draw(st.sampled_from([0, 64, 100, 1000]))
        return [position if position < fork else -1 - position for position in range(num_tokens)]

    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        text = self._text(data)
        available = self._manager.num_available
        allocation = self._manager.acquire(text, len(text))
        if allocation is None:
            assert available < -(-len(text) // PAGE_TOKENS)
            return
        assert len(allocation.page_ids) == -(-len(text) // PAGE_TOKENS)
        self._sequences.append((text, allocation.page_ids, None))

    @precondition(lambda self: self._sequences)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        text, page_ids, job_id = data.draw(st.sampled_from(self._sequences))
        reserved, available = self._manager.counts()["reserved"], self._manager.num_available
        if self._manager.grow(page_ids, job_id=job_id) is None:
            assert available == 0
        else:
            assert self._manager.counts()["reserved"] in (reserved, reserved - 1)
            text.extend(range(len(text), len(page_ids) * PAGE_TOKENS))

    @precondition(lambda self: self._sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        text, page_ids, _ = data.draw(st.sampled_from(self._sequences))
        self._manager.publish(text, page_ids, data.draw(st.integers(0, len(text))))

    @precondition(lambda self: self._sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self._sequences) - 1))
        _, page_ids, job_id = self._sequences.pop(index)
        self._manager.release(page_ids)
        if job_id is not None:
            assert self._manager.cancel(job_id) is False

    @rule(data=st.data(), num_more=st.integers(-1, 3), look_up=st.booleans())
    def reserve(self, data: st.DataObject, num_more: int, look_up: bool) -> None:
        text = self._text(data)
        self._num_jobs += 1
        job_id = f"job-{self._num_jobs}"
        num_pages = max(1, -(-len(text) // PAGE_TOKENS) + num_more)
        if self._manager.reserve(job_id, num_pages, text if look_up else ()):
            self._reserved.append((job_id, text))

    @precondition(lambda self: self._reserved)
    @rule(data=st.data())
    def bind(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self._reserved) - 1))
        job_id, text = self._reserved[index]
        binding = self._manager.bind(job_id, text)
        if binding is not None:
            assert binding.first_page + len(binding.page_ids) == -(-len(text) // PAGE_TOKENS)
            self._bound.append((job_id, text, binding))
            del self._reserved[index]

    @precondition(lambda self: self._bound)
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        job_id, text, binding = self._bound.pop(data.draw(st.integers(0, len(self._bound) - 1)))
        page_ids = self._manager.accept(job_id, binding.epochs)
        assert page_ids == binding.held_page_ids + binding.page_ids
        self._sequences.append((text, page_ids, job_id))
        self._old.append(job_id)

    @precondition(lambda self: self._reserved)
    @rule(data=st.data())
    def cancel_early(self, data: st.DataObject) -> None:
        job_id, _ = self._reserved.pop(data.draw(st.integers(0, len(self._reserved) - 1)))
        assert self._manager.cancel(job_id) is False

    @precondition(lambda self: self._bound)
    @rule(data=st.data())
    def cancel_late(self, data: st.DataObject) -> None:
        job_id, _, binding = self._bound.pop(data.draw(st.integers(0, len(self._bound) - 1)))
        assert self._manager.cancel(job_id) is bool(binding.page_ids)
        if binding.page_ids:
            self._draining.append((job_id, binding))
        else:
            self._old.append(job_id)

    @precondition(lambda self: self._draining)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        job_id, _ = self._draining[-1]
        if self._manager.counts()["quarantined"] == 0:
            self._manager.quarantine(job_id)

    @precondition(lambda self: self._draining)
    @rule(data=st.data())
    def closed(self, data: st.DataObject) -> None:
        job_id, _ = self._draining.pop(data.draw(st.integers(0, len(self._draining) - 1)))
        self._manager.closed(job_id)
        self._old.append(job_id)

    @precondition(lambda self: self._old)
    @rule(data=st.data())
    def a_late_message(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self._old))
        before = self._manager.counts()
        for late in (self._manager.closed, self._manager.accept):
            with pytest.raises(StaleError):
                late(job_id)
        assert self._manager.counts() == before

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self._manager.check()
        counts = self._manager.counts()
        assert sum(counts.values()) == self._manager.num_pages
        assert self._manager.num_available == counts["free"] + counts["cached"]
        assert counts["exposed"] == sum(len(binding.page_ids) for _, _, binding in self._bound)
        assert counts["draining"] + counts["quarantined"] == sum(len(b.page_ids) for _, b in self._draining)

    @invariant()
    def a_page_is_shared_only_by_equal_texts(self) -> None:
        readers: dict[int, set[tuple[int, ...]]] = {}
        references: Counter[int] = Counter()
        hands = [(text, page_ids) for text, page_ids, _ in self._sequences]
        hands += [(text, binding.held_page_ids) for _, text, binding in self._bound]
        for text, page_ids in hands:
            references.update(page_ids)
            for index, page_id in enumerate(page_ids):
                readers.setdefault(page_id, set()).add(tuple(text[: (index + 1) * PAGE_TOKENS]))
        assert all(len(texts) == 1 for texts in readers.values())
        peers = {page_id for _, _, binding in self._bound for page_id in binding.page_ids}
        peers |= {page_id for _, binding in self._draining for page_id in binding.page_ids}
        assert peers.isdisjoint(readers), "a peer may write what a sequence reads"

    def teardown(self) -> None:
        if not hasattr(self, "_manager"):
            return
        for _, page_ids, job_id in self._sequences:
            self._manager.release(page_ids)
            if job_id is not None:
                self._manager.cancel(job_id)
        for job_id, *_ in [*self._reserved, *self._bound]:
            self._manager.cancel(job_id)
        for job_id, binding in [*((job, b) for job, _, b in self._bound), *self._draining]:
            if binding.page_ids:
                self._manager.closed(job_id)
        self._manager.check()
        assert self._manager.num_available == self._manager.num_pages, "pages leaked"


def test_random_lives() -> None:
    run_state_machine_as_test(ManagerMachine, settings=SETTINGS)


class TooEager(KVManager):
    """Frees pages on cancel, without the writer's word."""

    def cancel(self, job_id: str) -> bool:
        draining = super().cancel(job_id)
        if draining:
            super().closed(job_id)
        return draining


class Forgetful(KVManager):
    """Keeps what is left of a credit."""

    def cancel(self, job_id: str) -> bool:
        credit = self._credits.get(job_id)
        if credit is not None and not credit.exposed:
            return False
        return super().cancel(job_id)


@pytest.mark.parametrize("broken", [TooEager, Forgetful])
def test_the_machine_catches_a_manager_that_breaks_the_rules(broken: type[KVManager]) -> None:
    machine = type("BrokenMachine", (ManagerMachine,), {"manager_type": broken})
    with pytest.raises((AssertionError, StaleError)):
        run_state_machine_as_test(machine, settings=settings(SETTINGS, phases=[Phase.generate]))
