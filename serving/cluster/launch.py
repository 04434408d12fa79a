"""What `baton serve` does: checks, Ray, supervisor, routers, ready; and on SIGTERM all of it backwards.

    checked -> Ray up -> supervisor up -> workers ready, routers listening -> READY -> draining -> nothing left

This process is the parent of everything and holds no request: it sees worker states (a Roster) and router exits, and restarts routers. If it
is killed, the kernel ends Ray's head and the routers with it, and Ray's workers follow their raylet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from serving.cluster.directory import directory_mailbox
from serving.cluster.display import Display
from serving.cluster.placement import UnitPlan, count_ranks, plan_units
from serving.cluster.preflight import (
    check_model_folder,
    check_ports,
    check_units,
    num_hosts,
    resolve_model_dir,
    router_ports,
)
from serving.cluster.process import adopt_orphans, end_descendants
from serving.cluster.ray_head import NAMESPACE, RayHead
from serving.cluster.router_process import RouterProcess
from serving.core.config import Config
from serving.core.errors import BatonError, StartupError
from serving.core.messages import Attach, Drain, PeerAddress, Roster, WorkerInfo
from serving.mailbox import PeerGone, Received

_LOOPBACK = "127.0.0.1"
_EMBEDDED_NAME = "baton-demo"
_SUPERVISOR_TIMEOUT_S = 60.0
_READY_TIMEOUT_S = 30.0
_LAST_WORDS_S = 3.0
_WORKER_DRAIN_S = 25.0
_LEFTOVER_GRACE_S = 3.0
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 10.0


class Stopped(BaseException):
    """A signal asked us to stop while we were still starting."""


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP. At first one raises `Stopped`; once Ray is up they are counted and `wake` is called.

    Only the first raises: a second would break off the cleaning up that follows the first. And an exception out of a signal handler must
    not pass through Ray's compiled calls: it comes out as something else, or not at all.
    """

    def __init__(self) -> None:
        self.num_received = 0
        self.wake: Callable[[], None] | None = None
        self._raising = True

    def install(self) -> None:
        """Again after `ray.init`, which takes SIGTERM for itself."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    def only_count(self) -> None:
        """From here nothing is interrupted; whoever waits looks at `num_received`."""
        self._raising = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.num_received += 1
        if self._raising and self.num_received == 1:
            raise Stopped
        if self.wake is not None:
            self.wake()


def serve(config: Config, display: Display) -> int:
    """Until a signal; returns the exit code. Raises BatonError. No process is left in either case."""
    stop = StopSignals()
    stop.install()
    try:
        if not config.model.dir and not config.model.name:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=_EMBEDDED_NAME))
        model_dir = resolve_model_dir(config)
        check_ports(config)
        display.step(f"checking {model_dir}")
        check_model_folder(model_dir, config)
        num_gpus = _num_gpus(config)
        units = plan_units(config, num_cores=len(os.sched_getaffinity(0)), num_gpus=num_gpus)
        check_units(config, model_dir, units, num_gpus=num_gpus)
        adopt_orphans()
        _serve(config, model_dir, units, display, stop)
    except BaseException as error:
        if not (
            stop.num_received or isinstance(error, SystemExit)
        ):  # SystemExit: Ray's own handler, in force within ray.init
            raise
        display.note("stopped before it was ready")
    finally:
        stop.only_count()
        display.stop()
        end_descendants(grace_s=_LEFTOVER_GRACE_S)
    return 0


def _serve(config: Config, model_dir: Path, units: tuple[UnitPlan, ...], display: Display, stop: StopSignals) -> None:
    display.step("starting Ray")
    num_ranks = sum(len(unit.ranks) for unit in units)
    with RayHead(num_cpus=num_ranks, num_gpus=_num_gpus(config), num_nodes=num_hosts(units)) as head:
        stop.only_count()
        stop.install()
        cluster = Cluster(config, model_dir, units, head, display, stop)
        try:
            cluster.start()
            cluster.serve()
            display.note("draining; a second signal ends the streams in flight")
            cluster.drain()
            display.note("stopped")
        finally:
            cluster.close()


class Cluster:
    """Supervisor and routers of one server, on a Ray that is up. Belongs to the main thread."""

    def __init__(
        self,
        config: Config,
        model_dir: Path,
        units: tuple[UnitPlan, ...],
        head: RayHead,
        display: Display,
        stop: StopSignals,
    ) -> None:
        self._config = config
        self._model_dir = model_dir
        self._units = units
        self._head = head
        self._display = display
        self._stop = stop
        self._secret = secrets.token_bytes(32)
        self._workers: list[WorkerInfo] = []
        self._routers: list[_Router] = []
        self._supervisor: PeerAddress | None = None
        self._run: Any = None
        self._mailbox = directory_mailbox("launch", host=_LOOPBACK, secret=self._secret)
        stop.wake = self._mailbox.wake

    def start(self) -> None:
        """Returns when a request would be answered. Raises StartupError with what the first failing process said."""
        self._mailbox.start()
        self._start_supervisor()
        assert self._supervisor is not None
        self._display.step("starting workers and routers")
        for index, port in enumerate(router_ports(self._config)):
            self._routers.append(_Router(f"router-{index}", port))
            self._start_router(self._routers[-1])
        while not self._is_up():
            self._turn(None)
            self._raise_if_stopped()
            self._raise_first_failure()
        for router in self._routers:
            self._await_readyz(router.listening_url)
        num_prefill, num_decode = count_ranks(self._units)
        self._display.ready(self._routers[0].listening_url, num_prefill, num_decode)

    def serve(self) -> None:
        """Restarts routers and shows what the workers do until a signal comes. Raises BatonError if the supervisor dies."""
        while not self._stop.num_received:
            self._turn(self._patience_s())
            now_s = time.monotonic()
            for router in self._routers:
                self._mind(router, now_s)

    def drain(self) -> None:
        """Streams run to their end; at the limit, or a second signal, each is told that the server stops. Then workers settle.

        One more signal cuts it short.
        """
        for router in self._routers:
            router.process.drain()
        if not self._await_routers(self._config.router.drain_timeout_s):
            for router in self._routers:
                router.process.drain()
            self._await_routers(_LAST_WORDS_S)
        import ray

        asked = self._stop.num_received
        self._mailbox.post(_peer(self._supervisor).worker_id, Drain())
        deadline_s = time.monotonic() + _WORKER_DRAIN_S
        while time.monotonic() < deadline_s and self._stop.num_received == asked and self._head.alive:
            if ray.wait([self._run], timeout=0.2)[0]:
                return

    def _await_routers(self, timeout_s: float) -> bool:
        """True: all have ended. False: time is up, or another signal has come."""
        asked, deadline_s = self._stop.num_received, time.monotonic() + timeout_s
        while any(not router.process.wait(0.05) for router in self._routers):
            if time.monotonic() > deadline_s or self._stop.num_received > asked:
                return False
        return True

    def close(self) -> None:
        """Whatever still runs is ended without ceremony."""
        self._stop.wake = None
        for router in self._routers:
            router.process.kill()
        self._mailbox.close()

    def _start_supervisor(self) -> None:
        import ray

        from serving.cluster.supervisor import SUPERVISOR_ID, ClusterSpec, Supervisor

        spec = ClusterSpec(
            host=_LOOPBACK,
            secret=self._secret,
            model_dir=str(self._model_dir),
            rendezvous_dir=str(self._head.rendezvous_dir),
            config=self._config,
            units=self._units,
        )
        options = {
            "name": SUPERVISOR_ID,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,
            "num_cpus": 0,
        }
        try:
            actor = ray.remote(Supervisor).options(**options).remote(spec)
            address = actor.address.remote()
            deadline_s = time.monotonic() + _SUPERVISOR_TIMEOUT_S
            while not ray.wait([address], timeout=0.2)[0] and time.monotonic() < deadline_s:
                self._raise_if_stopped()
            self._supervisor = ray.get(address, timeout=0)
        except ray.exceptions.RayError as error:
            raise StartupError(
                f"the supervisor does not start: {_one_line(error)}; `baton doctor` shows what is missing"
            ) from error
        self._run = actor.run.remote()
        self._attach()

    def _attach(self) -> None:
        address = _peer(self._supervisor)
        self._mailbox.connect(address)
        self._mailbox.post(address.worker_id, Attach())

    def _start_router(self, router: _Router) -> None:
        router.process_or_none = RouterProcess(
            router_id=router.router_id,
            config=self._config,
            port=router.port,
            directory=_peer(self._supervisor).endpoint,
            model_dir=self._model_dir,
            secret=self._secret,
            folder=self._head.folder,
            changed=self._mailbox.wake,
        )
        router.started_s, router.restart_at_s = time.monotonic(), None

    def _turn(self, timeout_s: float | None) -> None:
        for event in self._mailbox.get(timeout_s):
            if isinstance(event, Received) and isinstance(event.message, Roster):
                self._workers = event.message.workers
                self._display.workers(self._workers)
            elif isinstance(event, PeerGone):
                self._raise_if_supervisor_ended()
                self._attach()

    def _raise_if_supervisor_ended(self) -> None:
        import ray

        if not self._head.alive:
            raise BatonError("Ray has died; start the server again")
        if ray.wait([self._run], timeout=0.5)[0]:
            try:
                ray.get(self._run)
                reason = "it ended"
            except ray.exceptions.RayError as error:
                reason = _one_line(error)
            raise BatonError(f"the supervisor has died ({reason}); start the server again")

    def _is_up(self) -> bool:
        workers_ready = bool(self._workers) and all(worker.state == "ready" for worker in self._workers)
        return workers_ready and all(router.process.url is not None for router in self._routers)

    def _raise_if_stopped(self) -> None:
        if self._stop.num_received:
            raise Stopped

    def _raise_first_failure(self) -> None:
        for worker in self._workers:
            if worker.state == "dead":
                raise StartupError(f"{worker.address.worker_id} does not start: {worker.detail}")
        for router in self._routers:
            if router.process.exit_code is not None:
                reason = router.process.last_words() or f"exit code {router.process.exit_code}"
                raise StartupError(f"{router.router_id} does not start: {reason}")

    def _await_readyz(self, url: str) -> None:
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        while not _answers(url, "/readyz"):
            if time.monotonic() > deadline_s:
                raise StartupError(
                    f"{url}/readyz is not 200 after {_READY_TIMEOUT_S:g} s although all workers are ready"
                )
            self._turn(0.02)
            self._raise_if_stopped()
            self._raise_first_failure()

    def _patience_s(self) -> float | None:
        due = [router.restart_at_s for router in self._routers if router.restart_at_s is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _mind(self, router: _Router, now_s: float) -> None:
        """Restarts a router that has died, alone; sooner if it had lived for a while."""
        if router.process.exit_code is None:
            return
        if router.restart_at_s is None:
            if now_s - router.started_s > _LONGEST_BACKOFF_S:
                router.backoff_s = _FIRST_BACKOFF_S
            router.restart_at_s = now_s + router.backoff_s
            router.backoff_s = min(2 * router.backoff_s, _LONGEST_BACKOFF_S)
            router.port = router.port or router.process.port
            self._display.note(f"{router.router_id} has died (exit code {router.process.exit_code}); restarting it")
        elif now_s >= router.restart_at_s:
            self._start_router(router)


@dataclasses.dataclass(slots=True)
class _Router:
    router_id: str
    port: int
    process_or_none: RouterProcess | None = None
    started_s: float = 0.0
    backoff_s: float = _FIRST_BACKOFF_S
    restart_at_s: float | None = None

    @property
    def process(self) -> RouterProcess:
        assert self.process_or_none is not None
        return self.process_or_none

    @property
    def listening_url(self) -> str:
        assert self.process.url is not None
        return self.process.url


def _peer(address: PeerAddress | None) -> PeerAddress:
    assert address is not None, "the supervisor is started first"
    return address


def _num_gpus(config: Config) -> int:
    """GPUs that ranks may take."""
    import torch

    return 0 if config.model.device == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()


def _one_line(error: Exception) -> str:
    lines: Iterator[str] = (line.strip() for line in reversed(str(error).splitlines()))
    return next((line for line in lines if line), type(error).__name__)


def _answers(url: str, path: str) -> bool:
    """True: a GET is answered with 200."""
    parts = urlsplit(url)
    host = {"0.0.0.0": _LOOPBACK, "::": "::1"}.get(parts.hostname or "", parts.hostname or "")
    connection = http.client.HTTPConnection(host, parts.port, timeout=2.0)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status == 200
    return False
