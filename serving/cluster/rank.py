"""One rank as a Ray actor: builds its worker, runs it in a thread of its own, and tells the supervisor what happens to it.

    loading -> ready(address) -> ended            loading | ready -> failed(reason): the actor exits

`run` is a generator that occupies the actor's main thread for the worker's whole life: Ray polls an actor that waits for a call a hundred
times a second (0.7 % of a core), one inside a call not at all. Nothing of a request passes here.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from serving.cluster.library_pages import unmap_library_pages
from serving.core.collector import pass_over_what_is_loaded
from serving.core.errors import BatonError
from serving.core.messages import PeerAddress
from serving.core.spec import WorkerSpec

_PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class RankEvent:
    """`state` as above; `detail` for people; `pid` of the actor's process; `address` once it is ready."""

    state: str
    pid: int
    detail: str = ""
    address: PeerAddress | None = None


class Worker(Protocol):
    """What a rank runs. Constructing it loads the model and binds its socket, if it has one; `run` returns when it was drained."""

    @property
    def address(self) -> PeerAddress | None: ...

    def run(self) -> None: ...


class LoadProgress:
    """Receives the progress of loading (serving.model.weights.Progress) and passes on a line now and then."""

    def __init__(self, events: queue.SimpleQueue[RankEvent | None]) -> None:
        self._events = events
        self._total = self._done = 0
        self._started_s = self._next_s = 0.0

    def start(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._started_s = time.monotonic()
        self._next_s = self._started_s + _PROGRESS_EVERY_S

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if time.monotonic() >= self._next_s:
            self._next_s += _PROGRESS_EVERY_S
            self._tell()

    def finish(self) -> None:
        self._tell()

    def _tell(self) -> None:
        rate = self._done / max(time.monotonic() - self._started_s, 1e-6)
        self.tell(f"loading weights: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB at {rate / 1e6:.0f} MB/s")

    def tell(self, text: str) -> None:
        self._events.put(RankEvent(state="loading", pid=os.getpid(), detail=text))


class Rank:
    """One life of one worker."""

    def __init__(self) -> None:
        self._listener = -1

    def host(self) -> str:
        """The address of its node; asked before `run`."""
        import ray

        return str(ray.util.get_node_ip_address())

    def listen(self, host: str) -> int:
        """The port on which this rank's unit will meet, if this is who holds its rendezvous; asked before `run`."""
        listener = socket.create_server((host, 0))
        port: int = listener.getsockname()[1]
        self._listener = listener.detach()
        return port

    def gpu(self) -> str:
        """Which of its node's GPUs Ray shows it; asked before `run`."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def run(self, spec: WorkerSpec) -> Iterator[RankEvent]:
        """Ends when the worker was drained; after a failure the process exits."""
        logging.basicConfig(
            stream=sys.stderr,
            level=spec.config.telemetry.log_level.upper(),
            format="%(asctime)s %(name)s %(levelname)s %(message)s",
        )
        spec = replace(spec, listener=self._listener)
        events: queue.SimpleQueue[RankEvent | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._live, args=(spec, events), name=f"worker-{spec.worker_id}", daemon=True)
        thread.start()
        yield RankEvent(state="loading", pid=os.getpid(), detail="importing")
        while (event := events.get()) is not None:
            yield event
        thread.join()

    def _live(self, spec: WorkerSpec, events: queue.SimpleQueue[RankEvent | None]) -> None:
        pid = os.getpid()
        try:
            worker = build_worker(spec, LoadProgress(events))
            events.put(RankEvent(state="ready", pid=pid, detail=f"pid {pid}", address=worker.address))
            worker.run()
            events.put(RankEvent(state="ended", pid=pid, detail="drained"))
        except BatonError as error:
            events.put(RankEvent(state="failed", pid=pid, detail=str(error)))
        except BaseException as error:
            logging.getLogger("baton.rank").exception("%s has failed", spec.worker_id)
            events.put(RankEvent(state="failed", pid=pid, detail=f"{type(error).__name__}: {error}"))
        finally:
            events.put(None)


def build_worker(spec: WorkerSpec, progress: LoadProgress | None = None) -> Worker:
    """The worker of a process that does nothing else. Raises BatonError."""
    from serving.engine.joining import leads

    of_role = worker_class(spec.role, leads=leads(spec))
    unmap_library_pages()
    worker = of_role(spec, progress=progress)
    pass_over_what_is_loaded()
    return worker


def worker_class(role: str, *, leads: bool = True) -> Callable[..., Worker]:
    """Imports only what the role needs."""
    if not leads:
        from serving.follower import FollowerWorker

        return FollowerWorker
    if role == "prefill":
        from prefill.worker import PrefillWorker

        return PrefillWorker
    if role == "decode":
        from decode.worker import DecodeWorker

        return DecodeWorker
    from serving.aggregated_worker import AggregatedWorker

    return AggregatedWorker
