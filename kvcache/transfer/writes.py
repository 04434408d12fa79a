"""The I/O thread's side of what a rank writes: orders in, pages written, results out.

The step loop submits through `Mailbox.call`; the mailbox polls while a write is open. A PageSource knows pages and
agents; this adds which job and which worker a write belongs to. Knows no tickets and no epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.transfer.base import PageSource
from serving.core.errors import PeerError
from serving.core.messages import WriteOrder


@dataclass(frozen=True, slots=True)
class WriteDone:
    """Nothing of this order is in flight any more; `error` None: all of it has arrived."""

    order: WriteOrder
    error: str | None


class Writes:
    """A mailbox driver around a PageSource."""

    def __init__(self, source: PageSource) -> None:
        self._source = source
        self._open: dict[int, WriteOrder] = {}
        self._refused: list[WriteDone] = []
        self._peers: dict[str, set[str]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._open or self._refused)

    @property
    def pause_s(self) -> float:
        return self._source.pause_s

    def submit(self, order: WriteOrder) -> None:
        try:
            peer = self._source.connect(order.agent)
        except PeerError as error:
            self._refused.append(WriteDone(order, str(error)))
            return
        self._peers.setdefault(order.worker_id, set()).add(peer)
        handle = self._source.write(peer, order.source_page_ids, order.target_page_ids, order.notice)
        self._open[handle] = order

    def poll(self) -> list[WriteDone]:
        done, self._refused = self._refused, []
        for completed in self._source.poll():
            done.append(WriteDone(self._open.pop(completed.handle), completed.error))
        return done

    def part(self, worker_id: str) -> None:
        """The worker is gone: forget its agents as soon as nothing is open towards them."""
        for peer in self._peers.pop(worker_id, ()):
            self._source.disconnect(peer)

    def close(self) -> None:
        self._source.close()
