"""How often a router looks at its clock: seldom without requests, and never too late for a worker that falls silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

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
