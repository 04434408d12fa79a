"""The life of a worker's step loop: how it runs, drains, stops, bears with a wrong peer, and breaks.

    running --Drain, nothing left to do--> gone
       |  stop: after the turn under way
       |  an exception of our own: every job is failed loudly, then it is raised

One for the three workers, which say what a turn does. Knows no scheduler, no pages and no engine.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from serving.core.errors import PeerError, StaleError
from serving.core.spec import WorkerSpec
from serving.mailbox import Driver, Mailbox
from serving.metrics import Metrics

T = TypeVar("T")


def open_mailbox(spec: WorkerSpec, metrics: Metrics, driver: Driver[T] | None = None) -> Mailbox[T]:
    """Bound, not started. Raises StartupError."""
    return Mailbox(
        worker_id=spec.worker_id,
        incarnation=spec.incarnation,
        host=spec.host,
        secret=spec.secret,
        heartbeat_s=spec.config.telemetry.heartbeat_s,
        metrics=metrics,
        driver=driver,
    )


class Loop:
    """`draining`: takes no new job and ends when nothing is left."""

    def __init__(self, worker_id: str, mailbox: Mailbox[Any], metrics: Metrics) -> None:
        self.log = logging.getLogger(f"baton.{worker_id}")
        self.draining = False
        self._stopping = False
        self._mailbox = mailbox
        self._metrics = metrics

    def run(self, turn: Callable[[], None], is_empty: Callable[[], bool], fail_all: Callable[[str], None]) -> None:
        """Blocks until drained or stopped. An exception is our bug: every job is failed before it is raised."""
        self._mailbox.start()
        try:
            while not self._stopping and not (self.draining and is_empty()):
                turn()
        except BaseException:
            self.log.exception("the worker stops")
            fail_all("the worker has failed")
            raise
        finally:
            self._mailbox.close()

    def stop(self) -> None:
        """From any thread: `run` returns after the turn under way, whatever is unfinished."""
        self._stopping = True
        self._mailbox.wake()

    @contextlib.contextmanager
    def bearing_with(self, peer: str) -> Iterator[None]:
        """What a peer says wrongly, or too late, is counted and dropped."""
        try:
            yield
        except PeerError as error:
            stale = isinstance(error, StaleError)
            self._metrics.add("baton_kv_stale_total" if stale else "baton_frames_refused_total")
            self.log.warning("%s: %s", peer, error)
