"""A worker's sockets and the thread that owns them: decoded messages in, messages out, heartbeats, transfers driven.

    peers --frames--> ROUTER socket (bound)  \\                          / queue of events --> step loop
                                               I/O thread (blocks in poll)
    peers <--frames-- DEALER sockets (ours)  /                          \\ post, call, connect <-- any thread

A peer is whoever has sent an authentic frame, or whom we connected to. It gets heartbeats until it falls silent for
`peer_timeout_s` or returns in another incarnation; either is reported as `PeerGone`. Silence is not proof that its
process is gone; a later incarnation is, because a supervisor starts one only after the end of the one before.
A frame of an earlier incarnation than the last one heard is refused and counted.

With nobody attached and nothing open the thread sleeps for ever. Knows no jobs, no pages, no tensors: what moves pages
is a `Driver`, polled while it is busy.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import zmq

from serving.core.errors import PeerError, StartupError
from serving.core.messages import AnyMessage, Envelope, Heartbeat, PeerAddress
from serving.metrics import Metrics
from serving.wire import MAX_FRAME_BYTES, Codec

PEER_TIMEOUT_S = 2.0
_EARLY, _LATE = 0.75, 1.1
"""Periods after which a heartbeat leaves with whatever wakes the thread, and by itself. As a rule a peer's heartbeat wakes it: who answers
that one at once needs no timer of its own, and late is what keeps the two timers from racing."""

PAUSE_S = 1e-3
"""Between two polls of a busy driver whose work takes milliseconds."""
_LINGER_MS = 500
_READS_A_TURN = 64
"""Frames of one socket before heartbeats and transfers have their turn again: a noisy peer must not starve them."""

_SEND_HIGH_WATER = 100_000
_RECEIVE_HIGH_WATER = 1_000

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Received:
    """A message of a known peer in its present incarnation."""

    sender: str
    incarnation: int
    message: AnyMessage


@dataclass(frozen=True, slots=True)
class PeerGone:
    """Nothing more will come of this incarnation, as far as we can tell. `proven`: its process has ended for certain."""

    peer: str
    incarnation: int
    proven: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Driven(Generic[T]):
    """Something the driver reported."""

    item: T


class Driver(Protocol[T_co]):
    """What the I/O thread polls while it is busy. All its methods run on the I/O thread; none blocks."""

    @property
    def busy(self) -> bool: ...

    @property
    def pause_s(self) -> float:
        """Between two polls while it is busy, at most PAUSE_S."""
        ...

    def poll(self) -> Iterable[T_co]: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Peer:
    incarnation: int
    heard_s: float
    route: bytes | None = None
    dealer: zmq.Socket[bytes] | None = None


class Mailbox(Generic[T]):
    """Binds at once; the thread starts with `start`. `get` belongs to the step loop, everything else to any thread."""

    def __init__(
        self,
        *,
        worker_id: str,
        incarnation: int,
        host: str,
        secret: bytes,
        heartbeat_s: float,
        metrics: Metrics,
        driver: Driver[T] | None = None,
        peer_timeout_s: float = PEER_TIMEOUT_S,
    ) -> None:
        """Raises StartupError if no port of `host` can be bound."""
        self._codec = Codec(secret, worker_id, incarnation)
        self._heartbeat_s = heartbeat_s
        self._peer_timeout_s = peer_timeout_s
        self._metrics = metrics
        self._driver = driver
        self._log = logging.getLogger(f"baton.mailbox.{worker_id}")
        self._inbound: queue.SimpleQueue[Received | PeerGone | Driven[T] | None] = queue.SimpleQueue()
        self._commands: deque[Callable[[], None]] = deque()
        self._peers: dict[str, _Peer] = {}
        self._latest: dict[str, int] = {}
        self._silent_routes: dict[str, bytes] = {}
        self._dealers: dict[zmq.Socket[bytes], str] = {}
        self._progress, self._step_budget_s = 0, 0.0
        self._beat_s, self._beat_due_s = 0.0, 0.0
        self._patient_until_s = 0.0
        self._num_refused = 0
        self._failure: BaseException | None = None
        self._closing = False
        self._awake = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._bind(host)
        endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = PeerAddress(worker_id, endpoint, incarnation)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name=f"io-{worker_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def get(self, timeout_s: float | None) -> list[Received | PeerGone | Driven[T]]:
        """What has arrived, in order; waits up to `timeout_s` for the first (None: for ever). [] after that or `wake`.

        Raises RuntimeError if the I/O thread has failed: a bug, the worker must stop.
        """
        events: list[Received | PeerGone | Driven[T]] = []
        with contextlib.suppress(queue.Empty):
            event = self._inbound.get(block=timeout_s != 0, timeout=timeout_s or None)
            while True:
                if event is not None:
                    events.append(event)
                event = self._inbound.get_nowait()
        if self._failure is not None:
            raise RuntimeError("the I/O thread has failed") from self._failure
        return events

    def wake(self) -> None:
        """Ends a `get` that waits."""
        self._inbound.put(None)

    def post(self, peer: str, message: AnyMessage) -> None:
        """Sends to a peer, in order. One that is gone hears nothing, or what waits for it if it was only silent."""
        self.call(lambda: self._send(peer, message))

    def connect(self, address: PeerAddress) -> None:
        """Makes `address.worker_id` a peer by our own socket, replacing what was known of its earlier incarnations."""
        self.call(lambda: self._connect(address))

    def call(self, command: Callable[[], None]) -> None:
        """Runs `command` on the I/O thread, in order with what was posted; it must not block."""
        self._commands.append(command)
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody is left to run it
                self._wake_write.send(b"\0")

    def progress(self, step_budget_s: float) -> None:
        """A step starts, and will take about so long; 0.0: none is in flight."""
        self._progress += 1
        self._step_budget_s = step_budget_s

    def close(self) -> None:
        """Sends what was posted, closes sockets and driver, joins the thread. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._thread.ident is None:
            self._close_all()
            return
        self.call(lambda: None)
        self._thread.join()

    # What follows runs on the I/O thread.

    def _run(self) -> None:
        try:
            while not self._closing or self._commands:
                self._turn()
        except BaseException as error:
            self._log.exception("the I/O thread has failed")
            self._failure = error
            self._inbound.put(None)
        finally:
            self._close_all()

    def _turn(self) -> None:
        timeout_ms = self._timeout_ms()
        if timeout_ms == 0 and self._driver is not None and self._driver.busy and not self._commands:
            time.sleep(self._driver.pause_s)  # ZeroMQ waits for whole milliseconds
        ready = {source for source, _ in self._poller.poll(timeout_ms)}
        if self._wake_read.fileno() in ready:
            self._wake_read.recv(4096)
            self._awake = False
        self._run_commands()
        if self._router in ready:
            self._receive_router()
        for dealer in [source for source in ready if source in self._dealers]:
            self._receive_dealer(dealer)
        if self._driver is not None and self._driver.busy:
            for item in self._driver.poll():
                self._inbound.put(Driven(item))
        now_s = time.monotonic()
        if self._peers and now_s >= self._silence_due_s():
            self._judge(now_s)
        early_s = (_LATE - _EARLY) * self._heartbeat_s if ready else 0.0
        if self._peers and now_s >= self._beat_due_s - early_s:
            self._beat_due_s = now_s + _LATE * self._heartbeat_s
            self._beat(now_s)

    def _timeout_ms(self) -> int | None:
        if self._closing or self._commands:
            return 0
        if self._driver is not None and self._driver.busy:
            return int(1000 * self._driver.pause_s)
        if self._peers:
            due_s = min(self._beat_due_s, self._silence_due_s())
            return max(0, int((due_s - time.monotonic()) * 1000) + 1)
        return None

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _receive_router(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_READS_A_TURN):
                parts = self._router.recv_multipart(zmq.NOBLOCK)
                envelope = self._decoded(b"" if len(parts) != 2 else parts[1])
                if envelope is not None:
                    self._heard(envelope, route=parts[0])

    def _receive_dealer(self, dealer: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_READS_A_TURN):
                if dealer not in self._dealers:
                    return
                envelope = self._decoded(dealer.recv(zmq.NOBLOCK))
                if envelope is not None and envelope.sender == self._dealers[dealer]:
                    self._heard(envelope, route=None)

    def _decoded(self, frame: bytes) -> Envelope | None:
        try:
            return self._codec.decode(frame)
        except PeerError as error:
            self._refused(str(error))
            return None

    def _refused(self, reason: str) -> None:
        self._metrics.add("baton_frames_refused_total")
        self._num_refused += 1
        if self._num_refused & (self._num_refused - 1) == 0:  # 1, 2, 4, 8: a noisy stranger must not fill the log
            self._log.warning("refused %d frames so far; the last: %s", self._num_refused, reason)

    def _heard(self, envelope: Envelope, route: bytes | None) -> None:
        name, incarnation = envelope.sender, envelope.incarnation
        if incarnation < self._latest.get(name, incarnation):
            self._metrics.add("baton_kv_stale_total")
            return
        self._renew(name, incarnation)
        self._silent_routes.pop(name, None)
        peer = self._peers.setdefault(name, _Peer(incarnation, 0.0))
        peer.heard_s = time.monotonic()
        if route is not None:
            if peer.route is None and peer.dealer is None:
                self._beat_due_s = 0.0  # a new peer hears of us at once
            peer.route = route
        if not isinstance(envelope.message, Heartbeat):
            self._inbound.put(Received(name, incarnation, envelope.message))

    def _renew(self, name: str, incarnation: int) -> None:
        """The peer is in `incarnation`: an earlier one has ended for certain, known as a peer at the moment or not."""
        before = self._latest.get(name)
        self._latest[name] = incarnation
        if before is not None and before < incarnation:
            self._forget(name, PeerGone(name, before, True, f"{name} was restarted"))

    def _connect(self, address: PeerAddress) -> None:
        name = address.worker_id
        if address.incarnation < self._latest.get(name, address.incarnation):
            self._inbound.put(PeerGone(name, address.incarnation, True, f"{name} was restarted"))
            return
        self._renew(name, address.incarnation)
        peer = self._peers.setdefault(name, _Peer(address.incarnation, time.monotonic()))
        if peer.dealer is None:
            peer.dealer = self._socket(zmq.DEALER)
            peer.dealer.connect(address.endpoint)
            self._dealers[peer.dealer] = name
            self._poller.register(peer.dealer, zmq.POLLIN)
            self._send(name, self._heartbeat())

    def _send(self, name: str, message: AnyMessage) -> None:
        peer = self._peers.get(name) or _Peer(0, 0.0, route=self._silent_routes.get(name))
        frame = self._codec.encode(message)
        try:
            if peer.dealer is not None:
                peer.dealer.send(frame, zmq.NOBLOCK)
            elif peer.route is not None:
                self._router.send_multipart([peer.route, frame], zmq.NOBLOCK)
        except zmq.Again:
            if name in self._peers:
                self._forget(name, PeerGone(name, peer.incarnation, False, f"{name} does not read its messages"))
        except zmq.ZMQError as error:  # EHOSTUNREACH: its connection has closed; it may come back by another one
            self._silent_routes.pop(name, None)
            self._log.debug("%s is not connected: %s", name, error)

    def _beat(self, now_s: float) -> None:
        self._beat_s = now_s
        for name in list(self._peers):
            self._send(name, self._heartbeat())

    def _silence_due_s(self) -> float:
        """When the peer that was not heard for longest will be dead, if it says nothing more."""
        heard_s = min(peer.heard_s for peer in self._peers.values())
        return max(heard_s + self._peer_timeout_s, self._patient_until_s)

    def _judge(self, now_s: float) -> None:
        """Whoever is silent is dead, unless it was we who slept: then they may have spoken, and have one more period to be heard."""
        if now_s - self._beat_s > _LATE * self._heartbeat_s + self._peer_timeout_s / 2:
            self._patient_until_s = now_s + self._heartbeat_s
            return
        for name, peer in list(self._peers.items()):
            if now_s >= peer.heard_s + self._peer_timeout_s:
                reason = f"{name} has been silent for {self._peer_timeout_s:g} s"
                self._forget(name, PeerGone(name, peer.incarnation, False, reason))

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(progress=self._progress, step_budget_s=self._step_budget_s)

    def _forget(self, name: str, gone: PeerGone) -> None:
        peer = self._peers.pop(name, None)
        if peer is not None and peer.route is not None and not gone.proven:
            self._silent_routes[name] = peer.route
        if peer is not None and peer.dealer is not None:
            self._poller.unregister(peer.dealer)
            del self._dealers[peer.dealer]
            peer.dealer.close(linger=0)
        self._inbound.put(gone)

    def _bind(self, host: str) -> zmq.Socket[bytes]:
        router = self._socket(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            router.bind(f"tcp://{socket.gethostbyname(host)}:*")
        except (OSError, zmq.ZMQError) as error:
            self._context.destroy(linger=0)
            raise StartupError(f"cannot listen on {host}: {error}; give an address of this machine") from error
        return router

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, _LINGER_MS)
        made.setsockopt(zmq.SNDHWM, _SEND_HIGH_WATER)
        made.setsockopt(zmq.RCVHWM, _RECEIVE_HIGH_WATER)
        made.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        return made

    def _close_all(self) -> None:
        if self._driver is not None:
            self._driver.close()
        self._context.destroy(linger=_LINGER_MS)
        self._wake_read.close()
        self._wake_write.close()
