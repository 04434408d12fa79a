"""The router's peers: one link to the directory, one to each worker; heartbeats both ways; metrics on request.

What the directory says decides who is linked. Losing it changes nothing: the last Roster stands, and Attach is repeated until it answers.
Must not know requests: messages of workers go to a `Listener`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import zmq

from router.link import Link
from router.view import SILENCE_S, View, Worker
from serving.core.errors import PeerError
from serving.core.messages import AnyMessage, Attach, Envelope, Heartbeat, MetricsQuery, MetricsReply, Roster
from serving.metrics import Metrics
from serving.wire import Codec

_TICK_S = 0.25
"""Between two looks while there are requests. Without any, the next heartbeat is soon enough."""

_METRICS_TIMEOUT_S = 1.0
_LAST_WORDS_MS = 500
_END_S = 1.5
_QUIET_S = 1.0
# The directory tells its news at once and beats seldom; so do we.
_DIRECTORY_BEAT_S = 1.5
_DIRECTORY_QUIET_S = 5.0
_STALL_S = 0.75 * SILENCE_S

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told; the dispatcher."""

    def on_message(self, worker: Worker, message: AnyMessage) -> None: ...
    def on_lost(self, worker: Worker) -> None: ...
    def on_stalled(self) -> None: ...
    def tick(self) -> None: ...

    @property
    def busy(self) -> bool:
        """There are requests, so `tick` is wanted a few times a second."""
        ...


class Fleet:
    """Start it on the event loop that serves HTTP. `view` is kept up to date here and nowhere else."""

    def __init__(
        self,
        view: View,
        codec: Codec,
        metrics: Metrics,
        *,
        directory: str,
        heartbeat_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view = view
        self._codec = codec
        self._metrics = metrics
        self._directory_endpoint = directory
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links: dict[Worker, Link] = {}
        self._directory: Link | None = None
        self._directory_heard_s = float("-inf")
        self._directory_beat_s = float("-inf")
        self._listener: Listener | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = clock()
        self._resting = False
        self._beat_s = clock()
        self._num_beats = 0
        self._queries: dict[int, tuple[set[str], list[str], asyncio.Future[None]]] = {}
        self._num_queries = 0

    def start(self, listener: Listener) -> None:
        self._listener = listener
        self._directory = Link(self._context, self._directory_endpoint, self._on_directory_frame)
        self._due_s = self._clock()
        self._beat(self._due_s)
        self._tick()

    def close(self) -> None:
        """What has been sent still leaves, for half a second at most: the last aborts matter. Returns within two, whatever a socket holds."""
        if self._timer is not None:
            self._timer.cancel()
        for link in self._links.values():
            link.close(linger_ms=_LAST_WORDS_MS)
        if self._directory is not None:
            self._directory.close()
        self._links.clear()
        # It closes what was left open, and waits for every socket's last words.
        ending = threading.Thread(target=self._context.destroy, kwargs={"linger": 0}, name="zmq-end", daemon=True)
        ending.start()
        ending.join(_END_S)
        if ending.is_alive():
            log.warning("ZeroMQ does not let go of a socket; it ends with the process")

    def post(self, worker: Worker, message: AnyMessage) -> None:
        """To a worker in this very life; dropped if that is over."""
        if self._resting:
            self._arrange(self._clock() + _TICK_S)
        link = self._links.get(worker)
        if link is not None:
            link.send(self._codec.encode(message))

    async def scrape(self) -> list[str]:
        """The metrics of every worker that answers within a second."""
        asked = {worker.worker_id for worker in self._links if not worker.silent}
        if not asked:
            return []
        self._num_queries += 1
        query_id = self._num_queries
        future = asyncio.get_running_loop().create_future()
        texts: list[str] = []
        self._queries[query_id] = (asked, texts, future)
        for worker in list(self._links):
            self.post(worker, MetricsQuery(query_id=query_id))
        await asyncio.wait([future], timeout=_METRICS_TIMEOUT_S)
        del self._queries[query_id]
        return texts

    # -- frames in ------------------------------------------------------------------------------------------------------

    def _decode(self, frame: bytes, source: str) -> Envelope | None:
        try:
            return self._codec.decode(frame)
        except PeerError as error:
            log.warning("%s: %s", source, error)
            return None

    def _on_directory_frame(self, frame: bytes) -> None:
        envelope = self._decode(frame, "directory")
        if envelope is None:
            return
        self._directory_heard_s = self._clock()
        if isinstance(envelope.message, Roster):
            self._on_roster(envelope.message)

    def _on_roster(self, roster: Roster) -> None:
        assert self._listener is not None
        change = self._view.apply(roster, self._clock())
        for worker in change.left:
            self._show(worker, up=False)
            self._links.pop(worker).close()
        for worker in change.joined:
            self._links[worker] = self._linked(worker)
            self._show(worker, up=False)
            self.post(worker, Attach())
        for worker in change.left:
            log.info("%s worker %s has left", worker.role, worker.worker_id)
            self._listener.on_lost(worker)

    def _linked(self, worker: Worker) -> Link:
        return Link(self._context, worker.address.endpoint, lambda frame: self._on_worker_frame(worker, frame))

    def _on_worker_frame(self, worker: Worker, frame: bytes) -> None:
        assert self._listener is not None
        envelope = self._decode(frame, worker.worker_id)
        if envelope is None:
            return
        if envelope.sender != worker.worker_id or envelope.incarnation != worker.address.incarnation:
            log.warning("%s: a message of another life (%d) was dropped", envelope.sender, envelope.incarnation)
            return
        was_usable = worker.usable
        worker.hear(envelope.message, self._clock())
        if worker.usable != was_usable:
            self._show(worker, up=worker.usable)
        if isinstance(envelope.message, MetricsReply):
            self._on_metrics(worker, envelope.message)
        else:
            self._listener.on_message(worker, envelope.message)

    def _on_metrics(self, worker: Worker, reply: MetricsReply) -> None:
        missing, texts, future = self._queries.get(reply.query_id, (set[str](), list[str](), None))
        if worker.worker_id in missing:
            missing.discard(worker.worker_id)
            texts.append(reply.exposition)
        if not missing and future is not None and not future.done():
            future.set_result(None)

    # -- time -----------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """A tick that comes late proves that we stood still, not that others were silent: they are judged at the next.

        The next one is arranged first: whatever is raised below ends this tick, not the timer.
        """
        assert self._listener is not None
        now_s = self._clock()
        late_s, unheard_s = now_s - self._due_s, now_s - self._beat_s
        beats = unheard_s > self._heartbeat_s - _TICK_S / 2
        self._arrange(self._next_s(now_s, now_s if beats else self._beat_s))
        for worker in [] if late_s > _TICK_S else self._view.newly_silent(now_s):
            log.warning("%s worker %s has been silent for %.0f s", worker.role, worker.worker_id, SILENCE_S)
            self._show(worker, up=False)
            self._listener.on_lost(worker)
        if self._links and unheard_s > _STALL_S:
            self._recover(unheard_s)
        if beats:
            self._beat(now_s)
        self._listener.tick()

    def _next_s(self, now_s: float, beat_s: float) -> float:
        """When the next tick is due if the last heartbeat leaves at `beat_s`. An idle router sleeps from one to the next."""
        assert self._listener is not None
        if self._listener.busy:
            return now_s + _TICK_S
        return max(now_s + _TICK_S, min(beat_s + self._heartbeat_s, self._view.silence_due_s()))

    def _arrange(self, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now_s = self._clock()
        self._due_s, self._resting = due_s, due_s > now_s + _TICK_S
        self._timer = asyncio.get_running_loop().call_later(due_s - now_s, self._tick)

    def _recover(self, gap_s: float) -> None:
        """We have been silent for so long ourselves that workers may have given us and our jobs up."""
        assert self._listener is not None
        log.warning("this router stood still for %.1f s; its requests start new lives", gap_s)
        for worker in self._links:
            self.post(worker, Attach())
        self._listener.on_stalled()

    def _beat(self, now_s: float) -> None:
        """Whoever is quiet may have forgotten us: it is asked for its state again."""
        self._beat_s = now_s
        self._num_beats += 1
        attach, heartbeat = self._codec.encode(Attach()), self._codec.encode(Heartbeat(progress=self._num_beats))
        for worker, link in self._links.items():
            quiet = worker.state is None or worker.heard_s is None or now_s - worker.heard_s > _QUIET_S
            link.send(attach if quiet else heartbeat)
        if self._directory is not None:
            quiet = now_s - self._directory_heard_s > _DIRECTORY_QUIET_S
            if quiet or now_s - self._directory_beat_s >= _DIRECTORY_BEAT_S:
                self._directory_beat_s = now_s
                self._directory.send(attach if quiet else heartbeat)

    def _show(self, worker: Worker, *, up: bool) -> None:
        self._metrics.set("baton_worker_up", float(up), worker=worker.worker_id, role=worker.role)
