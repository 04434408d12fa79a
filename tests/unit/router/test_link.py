"""A socket on the event loop: nothing that was sent is lost, and nobody can send us without bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import zmq

from router.link import Link
from serving.wire import MAX_FRAME_BYTES


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def peer(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.RCVTIMEO, 5000)
    return socket


async def test_what_a_slow_peer_does_not_read_yet_waits(
    context: zmq.Context[zmq.Socket[bytes]], peer: zmq.Socket[bytes]
) -> None:
    port = peer.bind_to_random_port("tcp://127.0.0.1")
    peer.unbind(f"tcp://127.0.0.1:{port}")
    link = Link(context, f"tcp://127.0.0.1:{port}", lambda frame: None)
    for number in range(5000):
        link.send(b"%d" % number)
    peer.bind(f"tcp://127.0.0.1:{port}")
    heard = [(await asyncio.to_thread(peer.recv_multipart))[1] for _ in range(5000)]
    assert heard == [b"%d" % number for number in range(5000)]
    link.close()


async def test_a_frame_without_bounds_never_arrives(
    context: zmq.Context[zmq.Socket[bytes]], peer: zmq.Socket[bytes]
) -> None:
    port = peer.bind_to_random_port("tcp://127.0.0.1")
    heard: list[bytes] = []
    link = Link(context, f"tcp://127.0.0.1:{port}", heard.append)
    link.send(b"hello")
    route = (await asyncio.to_thread(peer.recv_multipart))[0]
    peer.send_multipart([route, b"short"])
    peer.send_multipart([route, bytes(MAX_FRAME_BYTES + 1)])
    await asyncio.sleep(0.3)
    assert heard == [b"short"]
    link.close()
