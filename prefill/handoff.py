"""The prefill side of the hand-offs: from KVBind to the last completed write.

    begin --KVBind--> bound --KVTicket--> writing --last page, KVReady--> ready --all writes complete--> Done
      any of them --KVRefused, failed or stuck write, KVClose, abandon--> closing --nothing in flight--> KVClosed, gone

Pages are written as they become complete, one transfer a step, job and pair of owners: the TP rank of ours that sends a page, and the one
of the decode group that receives it. The source pages of a write are held until it is over, whatever becomes of the job. Owned by the step loop; sends through the mailbox, learns of completions by
`written`. Knows neither the scheduler nor the engine: the worker asks for `outcomes` and acts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvcache.layout import PAGE_TOKENS, num_pages_for
from kvcache.manager import KVManager
from kvcache.pool import KVPool
from kvcache.transfer.manifest import (
    WriteNotice,
    checked_pages,
    encode_notice,
    page_checksums,
    rows_of_page,
)
from kvcache.transfer.owners import Stripe, stripes
from kvcache.transfer.ranks import PageRanks
from kvcache.transfer.writes import WriteDone
from serving.core.config import TransferTable
from serving.core.errors import PeerError, StaleError
from serving.core.messages import KVBind, KVClose, KVClosed, KVReady, KVRefused, KVTicket, PeerAddress, WriteOrder
from serving.core.request import Sequence
from serving.engine.plan import SampledToken
from serving.mailbox import Mailbox
from serving.metrics import Metrics


@dataclass(frozen=True, slots=True)
class HandoffDone:
    """Every page is in the decode pool; ours may be given back."""

    job_id: str


@dataclass(frozen=True, slots=True)
class HandoffFailed:
    """The job cannot go on with this decode worker. `router_told`: the decode worker has said so."""

    job_id: str
    reason: str
    retryable: bool
    router_told: bool = False


Outcome = HandoffDone | HandoffFailed


@dataclass(slots=True, eq=False)
class _Handoff:
    """One job's. `num_sent` pages of the ticket are written or being written. `asked_s`: when KVBind went; `moved_s`: when a
    write last ended or the first began."""

    job_id: str
    sequence: Sequence
    num_tokens: int
    decode: PeerAddress
    asked_s: float
    ticket: KVTicket | None = None
    checked: frozenset[int] = frozenset()
    first: SampledToken | None = None
    num_sent: int = 0
    num_open: int = 0
    num_writes: int = 0
    num_bytes: int = 0
    checksums: dict[int, int] = field(default_factory=dict)
    began_s: float = 0.0
    moved_s: float = 0.0
    ready: bool = False
    closing: bool = False

    @property
    def waits_since_s(self) -> float | None:
        """Since when the decode worker's next word or the end of a write is awaited. None: it is our turn."""
        if self.closing or (self.ticket is not None and self.num_open == 0):
            return None
        return self.asked_s if self.ticket is None else self.moved_s


class Handoffs:
    """All hand-offs of one prefill worker. `identity` is what both pools must agree on."""

    def __init__(
        self,
        mailbox: Mailbox[Any],
        ranks: PageRanks,
        manager: KVManager,
        pool: KVPool,
        metrics: Metrics,
        config: TransferTable,
        identity: str,
    ) -> None:
        self._mailbox = mailbox
        self._ranks = ranks
        self._manager = manager
        self._pool = pool
        self._metrics = metrics
        self._config = config
        self._identity = identity
        self._handoffs: dict[str, _Handoff] = {}
        self._outcomes: list[Outcome] = []

    @property
    def num_open(self) -> int:
        """Hand-offs that are not done, those that close included."""
        return len(self._handoffs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._handoffs

    def outcomes(self) -> list[Outcome]:
        """What has come to an end since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def begin(self, sequence: Sequence, decode: PeerAddress, now_s: float) -> None:
        """The first chunk is planned: ask for pages."""
        assert sequence.job_id not in self._handoffs
        self._handoffs[sequence.job_id] = _Handoff(sequence.job_id, sequence, sequence.num_tokens, decode, now_s)
        self._mailbox.connect(decode)
        self._mailbox.post(decode.worker_id, KVBind(job_id=sequence.job_id, identity=self._identity))

    def ticket(self, sender: str, ticket: KVTicket, now_s: float) -> None:
        """Raises PeerError; a ticket for a job that is over here is dropped: KVClosed is on its way."""
        handoff = self._of(sender, ticket.job_id)
        if handoff is None or handoff.closing:
            return
        if handoff.ticket is not None:
            raise StaleError(f"job {ticket.job_id} has a ticket already; drop the second")
        num_pages = num_pages_for(handoff.num_tokens)
        if not (
            0 <= ticket.first_page <= num_pages
            and num_pages - ticket.first_page == len(ticket.page_ids) == len(ticket.epochs)
            and ticket.agents
        ):
            self._fail(handoff, "the ticket does not fit the prompt", retryable=False)
            raise PeerError(
                f"job {ticket.job_id}: a ticket for {len(ticket.page_ids)} pages from {ticket.first_page} of {num_pages}"
            )
        handoff.ticket = ticket
        handoff.checked = checked_pages(ticket.job_id, len(ticket.page_ids), self._config.checksum)
        self._advance(handoff, now_s)

    def refused(self, sender: str, message: KVRefused) -> None:
        handoff = self._of(sender, message.job_id)
        if handoff is not None and not handoff.closing:
            reason = f"{sender} refused the hand-off: {message.reason}"
            self._fail(handoff, reason, retryable=True, router_told=message.router_told)

    def close(self, sender: str, message: KVClose) -> None:
        """The decode worker gives up. It hears KVClosed when nothing is in flight, at once if the job is over here."""
        handoff = self._of(sender, message.job_id)
        if handoff is None:
            self._mailbox.post(sender, KVClosed(job_id=message.job_id))
        elif not handoff.closing:
            self._fail(handoff, f"{sender} gave the hand-off up", retryable=True, router_told=True)

    def advance(self, job_id: str, now_s: float) -> None:
        """A chunk has settled: write what is complete now."""
        handoff = self._handoffs.get(job_id)
        if handoff is not None and not handoff.closing:
            self._advance(handoff, now_s)

    def complete(self, job_id: str, first: SampledToken, now_s: float) -> None:
        """The prompt is computed: the last page can go, and the manifest with it."""
        handoff = self._handoffs.get(job_id)
        if handoff is not None and not handoff.closing:
            handoff.first = first
            self._advance(handoff, now_s)

    def abandon(self, job_id: str) -> None:
        """The job ends without a hand-off: write nothing more, and say so when nothing is in flight."""
        handoff = self._handoffs.get(job_id)
        if handoff is not None:
            self._close(handoff)

    def written(self, done: WriteDone, now_s: float) -> None:
        order = done.order
        self._manager.release(order.source_page_ids)
        handoff = self._handoffs[order.job_id]
        handoff.num_open -= 1
        handoff.moved_s = now_s
        if done.error is None:
            self._count(order.num_tokens)
        if done.error is not None and not handoff.closing:
            self._fail(handoff, f"writing to {order.worker_id} failed: {done.error}", retryable=True)
        elif handoff.closing:
            self._close(handoff)
        else:
            self._finish_if_done(handoff, now_s)

    def peer_gone(self, worker_id: str, incarnation: int, reason: str) -> None:
        """Lives of a decode worker up to `incarnation` wait for our word no more; writes in flight end by themselves."""
        self._ranks.part(worker_id)
        for handoff in list(self._handoffs.values()):
            decode = handoff.decode
            if decode.worker_id == worker_id and decode.incarnation <= incarnation and not handoff.closing:
                self._fail(handoff, reason, retryable=True)

    def expire(self, now_s: float) -> None:
        """Fails hand-offs that have not moved for too long, be it that a ticket was lost on its way or that a write is stuck.

        Their pages stay held until the writes are over.
        """
        timeout_s = self._config.progress_timeout_s
        for handoff in list(self._handoffs.values()):
            since_s = handoff.waits_since_s
            if since_s is not None and since_s + timeout_s <= now_s:
                what = "no ticket came from" if handoff.ticket is None else "nothing moved to"
                self._fail(handoff, f"{what} {handoff.decode.worker_id} for {timeout_s:g} s", retryable=True)

    def due_s(self) -> float | None:
        """When `expire` may have something to do."""
        since_s = [handoff.waits_since_s for handoff in self._handoffs.values()]
        earliest_s = min((s for s in since_s if s is not None), default=None)
        return None if earliest_s is None else earliest_s + self._config.progress_timeout_s

    def _of(self, sender: str, job_id: str) -> _Handoff | None:
        handoff = self._handoffs.get(job_id)
        if handoff is not None and handoff.decode.worker_id != sender:
            raise PeerError(f"{sender} speaks of job {job_id}, which goes to {handoff.decode.worker_id}; dropped")
        return handoff

    def _advance(self, handoff: _Handoff, now_s: float) -> None:
        ticket = handoff.ticket
        if ticket is None:
            return
        computed = handoff.first is not None
        num_complete = num_pages_for(handoff.num_tokens) if computed else handoff.sequence.num_computed // PAGE_TOKENS
        end = num_complete - ticket.first_page
        if end > handoff.num_sent:
            self._write(handoff, ticket, end, now_s)
        if computed and not handoff.ready:
            self._send_manifest(handoff, ticket)
            self._finish_if_done(handoff, now_s)

    def _write(self, handoff: _Handoff, ticket: KVTicket, end: int, now_s: float) -> None:
        """Pages [num_sent, end) of the ticket."""
        start, first_page = handoff.num_sent, ticket.first_page
        page_ids = handoff.sequence.page_ids[first_page + start : first_page + end]
        rows = {
            index: (page_ids[index - start], rows_of_page(first_page + index, handoff.num_tokens))
            for index in handoff.checked.intersection(range(start, end))
        }
        handoff.began_s = handoff.began_s or now_s
        handoff.moved_s = handoff.moved_s if handoff.num_open else now_s
        targets = ticket.page_ids[start:end]
        for stripe in stripes(page_ids, targets, source_tp=self._ranks.tp, target_tp=len(ticket.agents)):
            self._order(handoff, ticket, stripe, page_ids)
        # While the pages travel: nobody changes them as long as they are held.
        handoff.checksums |= page_checksums(self._pool, rows)
        handoff.num_sent = end

    def _order(self, handoff: _Handoff, ticket: KVTicket, stripe: Stripe, page_ids: list[int]) -> None:
        """`stripe` of `page_ids`, which are those of the ticket's pages from num_sent on."""
        pages = [handoff.num_sent + index for index in stripe.indices]
        source_page_ids = [page_ids[index] for index in stripe.indices]
        num_bytes = len(pages) * self._pool.layout.page_bytes
        epochs = [ticket.epochs[index] for index in pages]
        order = WriteOrder(
            job_id=handoff.job_id,
            number=handoff.num_writes,
            rank=stripe.source,
            worker_id=handoff.decode.worker_id,
            agent=ticket.agents[stripe.target],
            source_page_ids=source_page_ids,
            target_page_ids=[ticket.page_ids[index] for index in pages],
            num_tokens=sum(rows_of_page(ticket.first_page + index, handoff.num_tokens) for index in pages),
            notice=encode_notice(WriteNotice(handoff.job_id, handoff.num_writes, pages, epochs, num_bytes)),
        )
        self._manager.hold(source_page_ids)
        self._ranks.write(order)
        handoff.num_open += 1
        handoff.num_writes += 1
        handoff.num_bytes += num_bytes

    def _count(self, num_tokens: int) -> None:
        layout = self._pool.layout
        for kind, num_bytes in (
            ("latent", layout.latent_bytes(num_tokens)),
            ("mtp", layout.mtp_bytes(num_tokens)),
            ("padding", layout.padding_bytes(num_tokens)),
        ):
            self._metrics.add("baton_kv_handoff_bytes_total", num_bytes, kind=kind)

    def _send_manifest(self, handoff: _Handoff, ticket: KVTicket) -> None:
        assert handoff.first is not None
        manifest = KVReady(
            job_id=handoff.job_id,
            epochs=ticket.epochs,
            num_tokens=handoff.num_tokens,
            num_writes=handoff.num_writes,
            num_bytes=handoff.num_bytes,
            checksums=handoff.checksums,
            first_token=handoff.first.token_id,
            hidden=handoff.first.hidden,
        )
        self._mailbox.post(handoff.decode.worker_id, manifest)
        self._metrics.add("baton_kv_handoff_bytes_total", len(msgspec.msgpack.encode(manifest)), kind="manifest")
        handoff.ready = True

    def _finish_if_done(self, handoff: _Handoff, now_s: float) -> None:
        if handoff.ready and handoff.num_open == 0:
            del self._handoffs[handoff.job_id]
            if handoff.num_writes:
                self._metrics.observe("baton_kv_handoff_seconds", now_s - handoff.began_s)
            self._outcomes.append(HandoffDone(handoff.job_id))

    def _fail(self, handoff: _Handoff, reason: str, *, retryable: bool, router_told: bool = False) -> None:
        if not router_told:
            self._metrics.add("baton_kv_handoff_failures_total", reason="prefill")
        self._outcomes.append(HandoffFailed(handoff.job_id, reason, retryable, router_told))
        self._close(handoff)

    def _close(self, handoff: _Handoff) -> None:
        handoff.closing = True
        if handoff.num_open == 0:
            del self._handoffs[handoff.job_id]
            self._mailbox.post(handoff.decode.worker_id, KVClosed(job_id=handoff.job_id))
