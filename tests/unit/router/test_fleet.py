"""How often a router looks at its clock: seldom without requests, and never too late for a worker that falls silent."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from router.fleet import Fleet
from router.view import View, Worker
from serving.core.messages import AnyMessage, Heartbeat
from serving.metrics import Metrics
from serving.wire import Codec
from tests.unit.router.scripted_worker import SECRET, ScriptedCluster, ScriptedWorker


class Watcher:
    """A Listener that counts."""

    def __init__(self) -> None:
        self.busy = False
        self.num_ticks = 0
        self.lost_s: dict[str, float] = {}

    def on_message(self, worker: Worker, message: AnyMessage) -> None: ...
    def on_stalled(self) -> None: ...

    def on_lost(self, worker: Worker) -> None:
        self.lost_s[worker.worker_id] = time.monotonic()

    def tick(self) -> None:
        self.num_ticks += 1

    async def ticks_in(self, seconds: float) -> int:
        before = self.num_ticks
        await asyncio.sleep(seconds)
        return self.num_ticks - before


@pytest.fixture
def cluster() -> Iterator[ScriptedCluster]:
    with ScriptedCluster(lambda prompt_ids: [], [ScriptedWorker("decode-0", "decode")]) as started:
        yield started


async def attached(cluster: ScriptedCluster, watcher: Watcher) -> tuple[Fleet, View]:
    """A fleet with the default heartbeat that has heard its worker."""
    view = View()
    fleet = Fleet(view, Codec(SECRET, "router-1", 1), Metrics("router"), directory=cluster.endpoint, heartbeat_s=0.75)
    fleet.start(watcher)
    deadline_s = time.monotonic() + 5.0
    while not any(worker.usable for worker in view):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)
    return fleet, view


async def test_an_idle_router_looks_once_a_heartbeat_and_four_times_a_second_from_the_first_job_on(
    cluster: ScriptedCluster,
) -> None:
    watcher = Watcher()
    fleet, view = await attached(cluster, watcher)
    await asyncio.sleep(1.0)
    assert await watcher.ticks_in(2.2) in (2, 3)
    watcher.busy = True
    fleet.post(next(iter(view)), Heartbeat(progress=0))
    assert await watcher.ticks_in(0.35) == 1
    assert await watcher.ticks_in(1.6) in (5, 6, 7)
    fleet.close()


async def test_an_idle_router_knows_of_a_silent_worker_as_soon_as_a_busy_one(cluster: ScriptedCluster) -> None:
    watcher = Watcher()
    fleet, _ = await attached(cluster, watcher)
    cluster.kill("decode-0", announce=False)
    killed_s = time.monotonic()
    await asyncio.sleep(2.4)
    assert 1.7 < watcher.lost_s["decode-0"] - killed_s < 2.4
    fleet.close()


@pytest.mark.parametrize("linger_ms", [-1, 30_000])
async def test_closing_is_bounded_whatever_a_socket_holds(
    cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch, linger_ms: int
) -> None:
    """Closed with words for nobody and a long linger, or, with a failed start, not closed at all."""
    contexts: list[zmq.Context[zmq.Socket[bytes]]] = []
    made = zmq.Context
    monkeypatch.setattr(zmq, "Context", lambda: contexts.append(made()) or contexts[0])
    fleet, _ = await attached(cluster, Watcher())
    held = contexts[0].socket(zmq.DEALER)
    held.connect("tcp://127.0.0.1:1")
    held.send(b"nobody hears this")
    if linger_ms > 0:
        held.close(linger=linger_ms)
    closing = threading.Thread(target=fleet.close, daemon=True)
    begin_s = time.monotonic()
    closing.start()
    await asyncio.to_thread(closing.join, 5.0)
    assert not closing.is_alive()
    assert time.monotonic() - begin_s < 2.0
