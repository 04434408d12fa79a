"""The decode side of the hand-offs: from the credit of a DecodeJob to a sequence that can run.

    offer -> waiting --credit--> reserved --KVBind, KVTicket--> exposed --KVReady and all notices, verified--> Arrived
       given up (abort, bad manifest, nothing moves, the prefill worker is gone) --KVClose--> closing --KVClosed--> gone

Exposed pages of a job that was given up are free only by the writer's KVClosed or proof that its process has ended;
until then KVClose is repeated, and a writer that does not answer leaves them in quarantine. Owned by the step loop;
sends through the mailbox. Knows neither the scheduler nor the engine: the worker asks for `outcomes` and acts.

Every TP rank holds every page. A page is written into its owner's pool, the owner copies it to the other ranks, and only then has it
arrived; a copy that is under way keeps its pages as a write does. The checksums are those of every rank's pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvcache.layout import PAGE_TOKENS
from kvcache.manager import Binding, KVManager
from kvcache.pool import KVPool
from kvcache.transfer.manifest import WriteNotice, checked_pages, decode_notice, page_checksums, rows_of_page
from kvcache.transfer.notices import COPY
from kvcache.transfer.owners import owner_of
from kvcache.transfer.ranks import PageRanks
from kvcache.transfer.writes import WriteDone
from serving.core.config import TransferTable
from serving.core.errors import ManifestError, PeerError, StaleError
from serving.core.messages import KVBind, KVClose, KVReady, KVRefused, KVTicket, PagesSums, WriteOrder
from serving.core.request import Sequence
from serving.mailbox import Mailbox
from serving.metrics import Metrics

BIND_WAIT_S = 2.0
"""How long a KVBind waits for its DecodeJob, or for room."""
_ASK_AGAIN_S = 1.0
_MAX_EARLY = 4096


@dataclass(frozen=True, slots=True)
class Arrived:
    """All latents are here. `sequence` ends with the first token and owns its pages; `hidden` is for its MTP row."""

    sequence: Sequence
    hidden: bytes
    router: str
    exposed_s: float


@dataclass(frozen=True, slots=True)
class ArrivalFailed:
    """The job is over. `no_room`: nothing failed, there were no pages; the router resumes it elsewhere."""

    job_id: str
    router: str
    reason: str
    retryable: bool = True
    no_room: bool = False


Outcome = Arrived | ArrivalFailed


@dataclass(frozen=True, slots=True)
class _Writer:
    """A prefill worker in one life, which was told or will be told where to write."""

    worker_id: str
    incarnation: int


@dataclass(slots=True)
class _Bind:
    writer: _Writer
    identity: str
    received_s: float


@dataclass(slots=True, eq=False)
class _Arrival:
    """One job. Without `has_credit` it waits; with `binding` it is exposed to `bind.writer`.

    `notices`: writes that are on every rank. `unchecked`: ranks whose checksums are awaited; None: this one's were not right yet.
    """

    sequence: Sequence
    router: str
    num_credit: int
    has_credit: bool = False
    bind: _Bind | None = None
    binding: Binding | None = None
    notices: dict[int, WriteNotice] = field(default_factory=dict)
    ready: KVReady | None = None
    unchecked: set[int] | None = None
    ready_s: float = 0.0
    moved_s: float = 0.0

    @property
    def job_id(self) -> str:
        return self.sequence.job_id


@dataclass(slots=True)
class _Copying:
    """A write that its owner copies to the other ranks, `num_open` of which do not have it yet."""

    notice: WriteNotice
    num_open: int
    error: str | None = None


@dataclass(slots=True)
class _Closing:
    """`closed`: by the writer, so that only our own copies are waited for."""

    writer: _Writer
    asked_s: float
    quarantined: bool = False
    closed: bool = False


class Arrivals:
    """All jobs of one decode worker that cannot run yet. `hidden_bytes`: length of KVReady.hidden, 0 without MTP."""

    def __init__(
        self,
        mailbox: Mailbox[Any],
        ranks: PageRanks,
        manager: KVManager,
        pool: KVPool,
        metrics: Metrics,
        config: TransferTable,
        *,
        identity: str,
        hidden_bytes: int,
        vocab_size: int,
    ) -> None:
        self._mailbox = mailbox
        self._ranks = ranks
        self._manager = manager
        self._pool = pool
        self._metrics = metrics
        self._config = config
        self._identity = identity
        self._hidden_bytes = hidden_bytes
        self._vocab_size = vocab_size
        self._arrivals: dict[str, _Arrival] = {}
        self._early: dict[str, _Bind] = {}
        self._closing: dict[str, _Closing] = {}
        self._copying: dict[str, dict[int, _Copying]] = {}
        self._watched = (0, 0)
        self._outcomes: list[Outcome] = []

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._arrivals or job_id in self._closing

    @property
    def num_waiting(self) -> int:
        return len(self._arrivals)

    @property
    def num_waiting_tokens(self) -> int:
        return sum(arrival.sequence.num_tokens for arrival in self._arrivals.values())

    @property
    def num_closing(self) -> int:
        """Jobs that are over but whose pages a writer, who answers, or a rank of ours may still touch."""
        return sum(not closing.quarantined or job_id in self._copying for job_id, closing in self._closing.items())

    @property
    def num_unpromised(self) -> int:
        """Pages that a new job could have a credit on, those that wait in line before it subtracted."""
        owed = sum(arrival.num_credit for arrival in self._arrivals.values() if not arrival.has_credit)
        return max(0, self._manager.num_available - owed)

    @property
    def has_unbound_credit(self) -> bool:
        """`grant` could take pages back."""
        return any(arrival.has_credit and arrival.binding is None for arrival in self._arrivals.values())

    def jobs(self) -> list[tuple[str, str]]:
        """(job id, router) of every job here."""
        return [(arrival.job_id, arrival.router) for arrival in self._arrivals.values()]

    def outcomes(self) -> list[Outcome]:
        """What has come to an end since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def offer(self, sequence: Sequence, router: str, num_credit: int) -> None:
        """A DecodeJob: it waits for `grant`."""
        arrival = _Arrival(sequence, router, num_credit, bind=self._early.pop(sequence.job_id, None))
        self._arrivals[sequence.job_id] = arrival

    def grant(self, now_s: float, *, may_promise: bool, may_expose: bool = True) -> None:
        """Credits for those in line while there is room, and pages for those who have been asked to name them.

        Without `may_promise` a running sequence stalls for want of a page: no new credit, and one that nobody has bound
        yet, the last in line first, goes back; it keeps its place. Without `may_expose` some rank may still compute on free pages.
        """
        if may_promise:
            self._promise()
        if may_expose and self._ranks.complete:
            for arrival in [a for a in self._arrivals.values() if a.has_credit and a.bind and not a.binding]:
                self._expose(arrival, now_s)
        if not may_promise:
            self._take_back()

    def bind(self, sender: str, incarnation: int, message: KVBind, now_s: float) -> None:
        """A prefill worker asks for pages; it may come before the DecodeJob, by another road."""
        bind = _Bind(_Writer(sender, incarnation), message.identity, now_s)
        arrival = self._arrivals.get(message.job_id)
        if arrival is None and len(self._early) < _MAX_EARLY and message.job_id not in self._closing:
            self._early[message.job_id] = bind
        elif arrival is None:
            self._refuse(bind, message.job_id, "the job is over or never came", router_told=False)
        elif arrival.bind is not None:
            raise StaleError(f"job {message.job_id} is bound already; drop the message")
        else:
            arrival.bind = bind

    def ready(self, sender: str, incarnation: int, message: KVReady, now_s: float) -> None:
        """The manifest. Raises StaleError if the job is not exposed to this writer."""
        arrival = self._exposed(message.job_id)
        if arrival.bind is None or arrival.bind.writer != _Writer(sender, incarnation) or arrival.ready is not None:
            raise StaleError(f"job {message.job_id} expects no manifest of {sender}; drop the message")
        arrival.ready = message
        arrival.ready_s = arrival.moved_s = now_s
        self._accept_if_complete(arrival, now_s)
        self._watch()

    def notice(self, rank: int, data: bytes, now_s: float) -> None:
        """A write has arrived at one of our TP ranks. Raises StaleError if it is of an earlier use of its pages, PeerError if it is none."""
        notice = decode_notice(data)
        arrival = self._exposed(notice.job_id)
        binding, copying = arrival.binding, self._copying.get(notice.job_id, {})
        assert binding is not None
        if arrival.unchecked is not None:
            raise StaleError(f"job {notice.job_id} has all its pages; a further write is dropped")
        known = [index for index in notice.pages if 0 <= index < len(binding.epochs)]
        expected = [binding.epochs[index] for index in known]
        if known != notice.pages or notice.epochs != expected or notice.number in arrival.notices | copying.keys():
            raise StaleError(f"job {notice.job_id}: a write of epochs {notice.epochs}, exposed are {expected}; dropped")
        page_ids = [binding.page_ids[index] for index in known]
        if any(owner_of(page_id, self._ranks.tp) != rank for page_id in page_ids):
            raise PeerError(
                f"job {notice.job_id}: pages {page_ids} came to rank {rank}, which does not own all; dropped"
            )
        arrival.moved_s = now_s
        if self._ranks.tp > 1:
            self._copy(notice, rank, page_ids)
        else:
            arrival.notices[notice.number] = notice
            self._accept_if_complete(arrival, now_s)

    def copied(self, done: WriteDone, now_s: float) -> None:
        """A rank has pages of another of ours, or will not get them."""
        order = done.order
        of_job = self._copying[order.job_id]
        copying = of_job[order.number]
        copying.num_open -= 1
        copying.error = done.error or copying.error
        if done.error is None:
            num_bytes = len(order.target_page_ids) * self._pool.layout.page_bytes
            self._metrics.add("baton_kv_handoff_bytes_total", num_bytes, kind="peer")
        if copying.num_open:
            return
        del of_job[order.number]
        if not of_job:
            del self._copying[order.job_id]
        self._finish_copy(order.job_id, copying, now_s)

    def checked(self, rank: int, message: PagesSums, now_s: float) -> None:
        """What a follower has in its pool; of a job that is over meanwhile, nothing."""
        arrival = self._arrivals.get(message.job_id)
        if arrival is None or arrival.ready is None or arrival.unchecked is None or rank not in arrival.unchecked:
            return
        arrival.unchecked.remove(rank)
        arrival.moved_s = now_s
        announced = arrival.ready.checksums
        wrong = [index for index, found in message.checksums.items() if announced[index] != found]
        if wrong:
            self._refuse_manifest(arrival, ManifestError(f"pages {wrong} have other checksums on rank {rank}"), now_s)
        else:
            self._accept_if_complete(arrival, now_s)

    def closed(self, sender: str, incarnation: int, job_id: str) -> None:
        """The writer's word that nothing is in flight. Unasked, the job has ended there, and the router knows from it."""
        closing, arrival = self._closing.get(job_id), self._arrivals.get(job_id)
        writer = _Writer(sender, incarnation)
        if closing is not None and closing.writer == writer:
            self._close(job_id)
        elif arrival is not None and arrival.bind is not None and arrival.bind.writer == writer:
            self._give_up(arrival, 0.0)
            if job_id in self._closing:
                self._close(job_id)
        elif job_id in self._early and self._early[job_id].writer == writer:
            del self._early[job_id]

    def abort(self, job_id: str, now_s: float) -> None:
        """The router does not want the job any more; it hears nothing of it."""
        arrival = self._arrivals.get(job_id)
        if arrival is not None:
            self._give_up(arrival, now_s)

    def router_gone(self, router: str, reason: str, now_s: float) -> None:
        for arrival in [arrival for arrival in self._arrivals.values() if arrival.router == router]:
            self._fail(arrival, reason, now_s=now_s)

    def writer_gone(self, worker_id: str, incarnation: int, *, proven: bool, reason: str, now_s: float) -> None:
        """Lives of a prefill worker up to `incarnation` answer no more. Only `proven`, its process has ended, frees what it may write."""

        def is_it(writer: _Writer) -> bool:
            return writer.worker_id == worker_id and writer.incarnation <= incarnation

        self._early = {job_id: bind for job_id, bind in self._early.items() if not is_it(bind.writer)}
        for arrival in [a for a in self._arrivals.values() if a.bind is not None and is_it(a.bind.writer)]:
            self._fail(arrival, reason, now_s=now_s)
        for job_id, closing in [item for item in self._closing.items() if is_it(item[1].writer)]:
            if proven:
                self._close(job_id)
            elif not closing.quarantined and not closing.closed:
                closing.quarantined = True
                self._manager.quarantine(job_id)
        self._watch()

    def expire(self, now_s: float) -> None:
        """Time's part: binds that wait in vain, hand-offs that do not move, writers that have not closed yet."""
        for job_id, early in [item for item in self._early.items() if item[1].received_s + BIND_WAIT_S <= now_s]:
            del self._early[job_id]
            self._refuse(early, job_id, "the decode job never came", router_told=False)
        for arrival in list(self._arrivals.values()):
            bind = arrival.bind
            if bind is not None and arrival.binding is None and bind.received_s + BIND_WAIT_S <= now_s:
                self._fail(arrival, "the decode pool has no room", no_room=True, now_s=now_s)
            elif arrival.ready is not None and arrival.moved_s + self._config.progress_timeout_s <= now_s:
                self._fail(arrival, f"no latents came for {self._config.progress_timeout_s:g} s", now_s=now_s)
        for job_id, closing in self._closing.items():
            if not closing.closed and closing.asked_s + _ASK_AGAIN_S <= now_s:
                closing.asked_s = now_s
                self._mailbox.post(closing.writer.worker_id, KVClose(job_id=job_id))

    def due_s(self) -> float | None:
        """When `expire` may have something to do."""
        return min(self._due_times(), default=None)

    def _due_times(self) -> Iterator[float]:
        for bind in self._early.values():
            yield bind.received_s + BIND_WAIT_S
        for arrival in self._arrivals.values():
            if arrival.ready is not None:
                yield arrival.moved_s + self._config.progress_timeout_s
            elif arrival.bind is not None and arrival.binding is None:
                yield arrival.bind.received_s + BIND_WAIT_S
        for closing in self._closing.values():
            if not closing.closed:
                yield closing.asked_s + _ASK_AGAIN_S

    def _exposed(self, job_id: str) -> _Arrival:
        arrival = self._arrivals.get(job_id)
        if arrival is None or arrival.binding is None:
            raise StaleError(f"job {job_id} has no pages exposed here (any more); drop the message")
        return arrival

    def _promise(self) -> None:
        for arrival in self._arrivals.values():
            if not arrival.has_credit:
                token_ids = arrival.sequence.token_ids
                if not self._manager.reserve(arrival.job_id, arrival.num_credit, token_ids):
                    break
                arrival.has_credit = True

    def _take_back(self) -> None:
        for arrival in reversed(self._arrivals.values()):
            if self._manager.num_available > 0:
                break
            if arrival.has_credit and arrival.binding is None:
                arrival.has_credit = False
                self._manager.cancel(arrival.job_id)

    def _expose(self, arrival: _Arrival, now_s: float) -> None:
        """Credit -> pages, if both pools mean the same by a page; without room now it is tried again."""
        bind = arrival.bind
        assert bind is not None
        if bind.identity != self._identity:
            self._fail(arrival, "model, dtype, page layout or protocol differ between the two workers", now_s=now_s)
            return
        binding = self._manager.bind(arrival.job_id, arrival.sequence.token_ids)
        if binding is None:
            return
        arrival.binding = binding
        self._watch()
        self._metrics.add("baton_prefix_hit_tokens_total", len(binding.held_page_ids) * PAGE_TOKENS)
        ticket = KVTicket(
            job_id=arrival.job_id,
            first_page=binding.first_page,
            page_ids=binding.page_ids,
            epochs=binding.epochs,
            agents=self._ranks.agents,
        )
        # The I/O thread watches before the writer can know where to write.
        self._mailbox.post(bind.writer.worker_id, ticket)

    def _copy(self, notice: WriteNotice, rank: int, page_ids: list[int]) -> None:
        """From their owner to every other rank, outside the steps."""
        others = [other for other in range(self._ranks.tp) if other != rank]
        self._copying.setdefault(notice.job_id, {})[notice.number] = _Copying(notice, len(others))
        for other in others:
            order = WriteOrder(
                job_id=notice.job_id,
                number=notice.number,
                rank=rank,
                worker_id=f"rank {other}",
                agent=self._ranks.agents[other],
                source_page_ids=page_ids,
                target_page_ids=page_ids,
                num_tokens=len(page_ids) * PAGE_TOKENS,
                notice=COPY,
            )
            self._ranks.write(order)

    def _finish_copy(self, job_id: str, copying: _Copying, now_s: float) -> None:
        """All have the pages of a write, or never will."""
        arrival, closing = self._arrivals.get(job_id), self._closing.get(job_id)
        if closing is not None and closing.closed:
            self._close(job_id)
        elif arrival is not None and copying.error is not None:
            self._fail(arrival, f"pages do not reach every rank: {copying.error}", now_s=now_s)
        elif arrival is not None:
            arrival.moved_s = now_s
            arrival.notices[copying.notice.number] = copying.notice
            self._accept_if_complete(arrival, now_s)
        self._watch()

    def _accept_if_complete(self, arrival: _Arrival, now_s: float) -> None:
        if arrival.ready is None or len(arrival.notices) < arrival.ready.num_writes:
            return
        if arrival.job_id in self._copying:  # more than was announced: known to be wrong when nothing touches the pages
            return
        try:
            if arrival.unchecked is None:
                arrival.unchecked = self._ranks.check(arrival.job_id, self._verify(arrival, arrival.ready))
            if arrival.unchecked:
                return
            page_ids = self._manager.accept(arrival.job_id, arrival.ready.epochs)
        except PeerError as error:
            self._refuse_manifest(arrival, error, now_s)
            return
        del self._arrivals[arrival.job_id]
        self._watch()
        sequence = arrival.sequence
        sequence.page_ids = page_ids
        sequence.token_ids.append(arrival.ready.first_token)
        sequence.num_new_tokens = 1
        self._outcomes.append(Arrived(sequence, arrival.ready.hidden, arrival.router, now_s - arrival.ready_s))

    def _refuse_manifest(self, arrival: _Arrival, error: PeerError, now_s: float) -> None:
        self._metrics.add("baton_kv_handoff_failures_total", reason="manifest")
        self._fail(arrival, f"{type(error).__name__}: {error}", now_s=now_s)

    def _verify(self, arrival: _Arrival, ready: KVReady) -> dict[int, tuple[int, int]]:
        """What was summed up: index of a page -> (page id, valid rows). Raises ManifestError unless what arrived is what was announced
        and what this job needs."""
        assert arrival.binding is not None
        num_pages, num_tokens = len(arrival.binding.page_ids), arrival.sequence.num_tokens
        written = sorted(index for notice in arrival.notices.values() for index in notice.pages)
        num_bytes = sum(notice.num_bytes for notice in arrival.notices.values())
        _require(ready.num_tokens == num_tokens, f"{ready.num_tokens} tokens, the job has {num_tokens}")
        _require(
            len(arrival.notices) == ready.num_writes, f"{len(arrival.notices)} writes, {ready.num_writes} announced"
        )
        _require(written == list(range(num_pages)), f"pages {written} were written, {num_pages} were exposed")
        _require(
            num_bytes == ready.num_bytes == num_pages * self._pool.layout.page_bytes,
            f"{num_bytes} bytes came, {ready.num_bytes} were announced, {num_pages} pages were exposed",
        )
        _require(0 <= ready.first_token < self._vocab_size, f"first token {ready.first_token}")
        _require(len(ready.hidden) == self._hidden_bytes, f"a hidden state of {len(ready.hidden)} bytes")
        for index in sorted(checked_pages(arrival.job_id, num_pages, self._config.checksum)):
            _require(index in ready.checksums, f"page {index} has no checksum; set transfer.checksum alike everywhere")
        checked = ready.checksums if self._config.checksum != "off" else {}
        for index in checked:
            _require(0 <= index < num_pages, f"a checksum of page {index} of {num_pages}")
        first_page, page_ids = arrival.binding.first_page, arrival.binding.page_ids
        rows = {index: (page_ids[index], rows_of_page(first_page + index, num_tokens)) for index in checked}
        for index, found in page_checksums(self._pool, rows).items():
            announced = checked[index]
            _require(found == announced, f"page {index} has checksum {found:08x}, announced is {announced:08x}")
        return rows

    def _fail(self, arrival: _Arrival, reason: str, *, now_s: float, no_room: bool = False) -> None:
        """The router hears of it from here, whatever the writer makes of it."""
        self._outcomes.append(ArrivalFailed(arrival.job_id, arrival.router, reason, no_room=no_room))
        if arrival.binding is not None:
            self._metrics.add("baton_kv_handoff_failures_total", reason="decode")
        self._give_up(arrival, now_s, reason)

    def _give_up(self, arrival: _Arrival, now_s: float, reason: str = "the job was aborted") -> None:
        job_id, bind = arrival.job_id, arrival.bind
        del self._arrivals[job_id]
        drains = self._manager.cancel(job_id)
        if drains:
            assert bind is not None
            self._closing[job_id] = _Closing(bind.writer, now_s)
        if bind is not None and arrival.binding is not None:
            self._mailbox.post(bind.writer.worker_id, KVClose(job_id=job_id))
        elif bind is not None:
            self._refuse(bind, job_id, reason)
        self._watch()

    def _close(self, job_id: str) -> None:
        """The writer is done with its pages: free, unless our own ranks are not."""
        self._closing[job_id].closed = True
        if job_id not in self._copying:
            del self._closing[job_id]
            self._manager.closed(job_id)
        self._watch()

    def _refuse(self, bind: _Bind, job_id: str, reason: str, *, router_told: bool = True) -> None:
        refusal = KVRefused(job_id=job_id, reason=reason, router_told=router_told)
        self._mailbox.post(bind.writer.worker_id, refusal)

    def _watch(self) -> None:
        """Tell the I/O thread how many jobs may still be written to by somebody who is there, and how many await their last writes."""
        exposed = [arrival for arrival in self._arrivals.values() if arrival.binding is not None]
        num = len(exposed) + self.num_closing
        num_due = sum(arrival.ready is not None for arrival in exposed) if self._ranks.hurries else 0
        if (num, num_due) != self._watched:
            self._watched = (num, num_due)
            self._ranks.watch(num, num_due)


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise ManifestError(f"the hand-off is not what the job needs: {found}")
