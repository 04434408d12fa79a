"""One ZeroMQ DEALER socket on the event loop: frames in by callback, frames out at once.

The socket's descriptor is edge-triggered: after it fires, and after every send, everything that has arrived must be read. That, and no
task or future a message, is all there is to it. Must not know who is at the other end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

from serving.wire import MAX_FRAME_BYTES

_READS_A_TURN = 64


class Link:
    """Belongs to one event loop; not thread-safe."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, on_frame: Callable[[bytes], None]
    ) -> None:
        """Connects lazily: a peer that is not there yet, or comes back, is met by ZeroMQ's own reconnecting."""
        self._loop = asyncio.get_running_loop()
        self._on_frame = on_frame
        self._closed = False
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(
            zmq.SNDHWM, 0
        )  # a job that could not be sent would be lost without a word; silence ends such a peer
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.connect(endpoint)
        fd = self._socket.getsockopt(zmq.FD)
        assert isinstance(fd, int)
        self._fd = fd
        self._loop.add_reader(self._fd, self._drain)

    def send(self, frame: bytes) -> None:
        """Never refused and never blocks: what a slow peer does not read yet, waits."""
        self._socket.send(frame, zmq.NOBLOCK)
        self._loop.call_soon(self._drain)

    def close(self, *, linger_ms: int = 0) -> None:
        """`linger_ms`: how long what has been sent may still take to leave."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=linger_ms)

    def _drain(self) -> None:
        """Reads what is there, in turns so that HTTP is served in between. `on_frame` may close the link."""
        for _ in range(_READS_A_TURN):
            if self._closed:
                return
            if not self._has_frame():
                return
            frame = self._socket.recv(zmq.NOBLOCK)
            self._on_frame(frame)
        self._loop.call_soon(self._drain)

    def _has_frame(self) -> bool:
        """Asking costs a tenth of the exception that a failed read would raise."""
        events = self._socket.getsockopt(zmq.EVENTS)
        assert isinstance(events, int)
        return bool(events & zmq.POLLIN)
