"""Pages as schedulers and workers see them: for a sequence, or as a decode credit that a hand-off fills.

    prefill, mode both      acquire -> (grow, publish)* -> release
    decode                  reserve -> bind -> accept -> (grow, publish)* -> release + cancel (what is left of the credit)
    given up                cancel: reserved pages are free at once, exposed ones drain until closed
                            quarantine: the writer does not answer; still only `closed` frees the pages

Nothing here waits. `None` and `False` mean no room now; StaleError means that a peer spoke of a job or an epoch that is over. Pure: no torch, no
clock, no sockets. Owned by one thread, the worker's step loop.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType

from kvcache.layout import PAGE_TOKENS, num_pages_for
from kvcache.pages import Pages, PageState
from kvcache.prefix import PrefixIndex
from serving.core.errors import StaleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Pages of a sequence in order; the first `num_cached` tokens (whole pages) have their latents already."""

    page_ids: list[int]
    num_cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What a KVTicket says. `page_ids[i]`, exposed in `epochs[i]`, receives tokens [(first_page + i) * 64, ...); `held_page_ids` hold what is before."""

    first_page: int
    held_page_ids: list[int]
    page_ids: list[int]
    epochs: list[int]


class _Phase(Enum):
    RESERVED = auto()
    EXPOSED = auto()
    ACCEPTED = auto()
    DRAINING = auto()
    QUARANTINED = auto()


_EXPOSED_STATE = MappingProxyType(
    {
        _Phase.EXPOSED: PageState.EXPOSED,
        _Phase.DRAINING: PageState.DRAINING,
        _Phase.QUARANTINED: PageState.QUARANTINED,
    }
)


@dataclass(slots=True)
class _Credit:
    """One job's pages on the decode side. `held` are references to shared pages, `exposed` what the peer may write, `reserved` the rest."""

    phase: _Phase
    held: list[int]
    reserved: deque[int]
    exposed: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)


class KVManager:
    """All pages of one pool. `prefix_cache=False` publishes nothing and finds nothing; `salt` is drawn unless a test fixes it.

    `on_free` is told each page whose content is given up (tests poison it).
    """

    def __init__(
        self,
        num_pages: int,
        *,
        prefix_cache: bool = True,
        salt: bytes | None = None,
        on_free: Callable[[int], None] | None = None,
    ) -> None:
        self.num_pages = num_pages
        self._pages = Pages(num_pages, on_free)
        self._index = PrefixIndex(os.urandom(32) if salt is None else salt)
        self._refs = [0] * num_pages
        self._credits: dict[str, _Credit] = {}
        self._prefix_cache = prefix_cache

    @property
    def num_available(self) -> int:
        """Pages that a new request can have now: the free, and the cached that nobody refers to."""
        return self._pages.num_free + self._index.num_idle

    def counts(self) -> dict[str, int]:
        """The eight counts by state name; they sum to `num_pages`."""
        return {state.value: self._pages.count(state) for state in PageState}

    def acquire(self, token_ids: Sequence[int], num_tokens: int) -> Allocation | None:
        """Pages for `num_tokens` tokens, shared where the prefix of `token_ids` is cached, else owned. None: no room now, nothing changed."""
        num_pages = num_pages_for(num_tokens)
        held = self._hold_prefix(token_ids[:num_tokens])
        if num_pages - len(held) > self.num_available:
            self.release(held)
            return None
        return Allocation(page_ids=held + self._own(num_pages - len(held)), num_cached=len(held) * PAGE_TOKENS)

    def grow(self, page_ids: list[int], *, job_id: str | None = None) -> int | None:
        """Appends one more owned page to `page_ids` and returns its id; out of the credit of `job_id` first. None: no room now."""
        credit = self._credits.get(job_id) if job_id is not None else None
        if credit is not None and credit.phase is _Phase.ACCEPTED and credit.reserved:
            page_id = credit.reserved.popleft()
            self._pages.move(page_id, PageState.OWNED)
            self._refs[page_id] = 1
        elif self.num_available:
            (page_id,) = self._own(1)
        else:
            return None
        page_ids.append(page_id)
        return page_id

    def publish(self, token_ids: Sequence[int], page_ids: Sequence[int], num_computed: int) -> None:
        """Full pages below `num_computed` tokens become findable; idempotent. Only after the step that wrote their last row has settled."""
        assert num_computed <= len(token_ids), f"{num_computed} tokens computed of {len(token_ids)}"
        if self._prefix_cache:
            self._index.add(token_ids, page_ids, num_computed // PAGE_TOKENS)

    def hold(self, page_ids: Sequence[int]) -> None:
        """One reference more each (a write in flight reads them); `release` gives it back."""
        for page_id in page_ids:
            assert self._refs[page_id] > 0, f"page {page_id} has no owner to share it with"
            self._refs[page_id] += 1

    def release(self, page_ids: Sequence[int]) -> None:
        """One reference less each. At zero a published page is cached, any other is free. The end of a sequence is evicted first."""
        for page_id in reversed(page_ids):
            assert self._refs[page_id] > 0, f"page {page_id} is released but nobody refers to it"
            self._refs[page_id] -= 1
            if self._refs[page_id] > 0:
                continue
            if self._index.published(page_id):
                self._pages.move(page_id, PageState.CACHED)
                self._index.idle(page_id)
            else:
                self._pages.move(page_id, PageState.FREE)
                self._index.forget(page_id)

    def reserve(self, job_id: str, num_pages: int, token_ids: Sequence[int] = ()) -> bool:
        """A credit of `num_pages`; cached pages of the prefix of `token_ids` count towards it and stay until `bind`. False: no room now.

        Raises StaleError if the job has a credit already (a peer sent it twice).
        """
        if job_id in self._credits:
            raise StaleError(f"job {job_id} has its credit already; a job id is used once, drop the message")
        held = self._hold_prefix(token_ids[: num_pages * PAGE_TOKENS])
        if num_pages - len(held) > self.num_available:
            self.release(held)
            return False
        reserved = self._take(num_pages - len(held), PageState.RESERVED)
        self._credits[job_id] = _Credit(_Phase.RESERVED, held, deque(reserved))
        return True

    def bind(self, job_id: str, token_ids: Sequence[int]) -> Binding | None:
        """Credit -> pages that a peer may write, for the part of `token_ids` that is not cached here. None: no room now, the credit was too small.

        Raises StaleError if the job has no credit (never came, or is over) or is bound already.
        """
        credit = self._credit(job_id, _Phase.RESERVED)
        held = self._hold_prefix(token_ids)
        num_missing = num_pages_for(len(token_ids)) - len(held)
        num_short = num_missing - len(credit.reserved)
        if num_short > self.num_available:
            self.release(held)
            return None
        self.release(credit.held)
        num_surplus = len(held) - len(credit.held)
        credit.held = held
        credit.reserved += self._take(max(0, num_short), PageState.RESERVED)
        credit.exposed = [self._expose(credit.reserved.popleft()) for _ in range(num_missing)]
        credit.epochs = [self._pages.epoch(page_id) for page_id in credit.exposed]
        credit.phase = _Phase.EXPOSED
        for _ in range(min(num_surplus, len(credit.reserved))):
            self._pages.move(credit.reserved.pop(), PageState.FREE)
        return Binding(
            first_page=len(held), held_page_ids=list(held), page_ids=list(credit.exposed), epochs=list(credit.epochs)
        )

    def accept(self, job_id: str, epochs: Sequence[int] | None = None) -> list[int]:
        """All writes are here and verified: the prompt's pages, held and written, in order. What is left of the credit stays for `grow`.

        `epochs` is what the peer's manifest names. Raises StaleError if they are not the ticket's, or the job is not bound (any more).
        """
        credit = self._credit(job_id, _Phase.EXPOSED)
        if epochs is not None and list(epochs) != credit.epochs:
            raise StaleError(f"job {job_id}: the manifest names epochs of another ticket; drop the message")
        for page_id in credit.exposed:
            self._pages.move(page_id, PageState.FILLED)
        for page_id in credit.exposed:
            self._pages.move(page_id, PageState.OWNED)
            self._refs[page_id] = 1
        page_ids = credit.held + credit.exposed
        credit.held, credit.exposed, credit.epochs, credit.phase = [], [], [], _Phase.ACCEPTED
        return page_ids

    def cancel(self, job_id: str) -> bool:
        """Gives up what the job has here, at any time and any number of times. True: pages began to drain, so their writer must be told to close."""
        credit = self._credits.get(job_id)
        if credit is None or credit.phase in (_Phase.DRAINING, _Phase.QUARANTINED):
            return False
        self.release(credit.held)
        for page_id in credit.reserved:
            self._pages.move(page_id, PageState.FREE)
        for page_id in credit.exposed:
            self._pages.move(page_id, PageState.DRAINING)
        credit.held, credit.reserved, credit.phase = [], deque(), _Phase.DRAINING
        if not credit.exposed:
            del self._credits[job_id]
            return False
        return True

    def closed(self, job_id: str) -> None:
        """No write of this job is in flight and none will follow (its writer said so, or is proven dead): exposed and draining pages are free.

        Raises StaleError if no page of the job waits for that.
        """
        credit = self._credits.get(job_id)
        if credit is None or credit.phase in (_Phase.RESERVED, _Phase.ACCEPTED):
            raise StaleError(f"job {job_id} has no page that a peer may write; drop the message")
        self.cancel(job_id)
        for page_id in credit.exposed:
            self._pages.move(page_id, PageState.FREE)
        self._credits.pop(job_id, None)

    def quarantine(self, job_id: str) -> None:
        """The writer of these exposed or draining pages does not answer. They stay out of use until `closed`."""
        self.cancel(job_id)
        credit = self._credits.get(job_id)
        assert credit is not None, f"job {job_id} has no page that a peer may write"
        assert credit.phase is _Phase.DRAINING, f"job {job_id} is quarantined already"
        for page_id in credit.exposed:
            self._pages.move(page_id, PageState.QUARANTINED)
        credit.phase = _Phase.QUARANTINED

    def num_released(self, page_ids: Sequence[int]) -> int:
        """How many of these `release` would make available: those nobody else refers to."""
        return sum(self._refs[page_id] == 1 for page_id in page_ids)

    def check(self) -> None:
        """The conservation law, and that no page is in two hands. Cost: linear in the pages. A violation is a bug that must stop the worker."""
        self._pages.check()
        self._index.check()
        in_credit = self._check_credits()
        idle = set(self._index.idle_page_ids())
        for page_id in range(self.num_pages):
            state = self._pages.state(page_id)
            assert (self._refs[page_id] > 0) == (state is PageState.OWNED), (
                f"page {page_id} is {state} with {self._refs[page_id]} references"
            )
            assert (page_id in idle) == (state is PageState.CACHED), (
                f"page {page_id} is {state} and the cache disagrees"
            )
            shared = state in (PageState.FREE, PageState.CACHED, PageState.OWNED)
            assert (page_id in in_credit) != shared, f"page {page_id} is {state}; the credits disagree"
        for page_id in self._index.known_page_ids():
            state = self._pages.state(page_id)
            assert state in (PageState.OWNED, PageState.CACHED), f"page {page_id} is {state}, yet its content is known"

    def _check_credits(self) -> set[int]:
        """The pages that credits have to themselves."""
        pages: set[int] = set()
        for job_id, credit in self._credits.items():
            wanted = _EXPOSED_STATE.get(credit.phase)
            for page_id in credit.exposed:
                assert self._pages.state(page_id) is wanted, (
                    f"job {job_id} is {credit.phase.name} with a page {self._pages.state(page_id)}"
                )
            for page_id in credit.reserved:
                assert self._pages.state(page_id) is PageState.RESERVED, (
                    f"page {page_id} of job {job_id} is not reserved"
                )
            assert all(self._refs[page_id] > 0 for page_id in credit.held), (
                f"job {job_id} holds a page without a reference"
            )
            for page_id in [*credit.exposed, *credit.reserved]:
                assert page_id not in pages, f"page {page_id} of job {job_id} is in two hands"
                pages.add(page_id)
        return pages

    def _credit(self, job_id: str, phase: _Phase) -> _Credit:
        credit = self._credits.get(job_id)
        if credit is None:
            raise StaleError(f"job {job_id} has no credit here: it is over or never came; drop the message")
        if credit.phase is not phase:
            raise StaleError(f"job {job_id} is {credit.phase.name.lower()}, not {phase.name.lower()}; drop the message")
        return credit

    def _hold_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """The longest cached prefix, one reference more on each of its pages."""
        page_ids = self._index.find(token_ids) if self._prefix_cache else []
        for page_id in page_ids:
            if self._refs[page_id] == 0:
                self._index.wake(page_id)
                self._pages.move(page_id, PageState.OWNED)
            self._refs[page_id] += 1
        return page_ids

    def _own(self, num: int) -> list[int]:
        page_ids = self._take(num, PageState.OWNED)
        for page_id in page_ids:
            self._refs[page_id] = 1
        return page_ids

    def _take(self, num: int, state: PageState) -> list[int]:
        """Free pages, and least recently used cached ones if those are too few. There must be so many."""
        for _ in range(num - self._pages.num_free):
            self._pages.move(self._index.evict(), PageState.FREE)
        return self._pages.take(num, state)

    def _expose(self, page_id: int) -> int:
        self._pages.move(page_id, PageState.EXPOSED)
        return page_id
