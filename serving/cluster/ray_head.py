"""Ray on this machine, for one cluster: a private folder, a token, loopback, nothing that we do not use, and its end.

    with RayHead(num_cpus=3, num_gpus=0): ...

Ray's own start-up brings a log monitor, an autoscaler and a dashboard process, and no way to leave them out. We read no logs through Ray,
scale nothing by it and have a router for HTTP, so the three are ended right after the start: together 1.1 % of a core and 250 MB, idle.

Units of several nodes run on this one machine all the same: each further node is one more raylet, which Ray takes for a machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from serving.cluster import guard
from serving.core.errors import StartupError

NAMESPACE = "baton"
_LOOPBACK = "127.0.0.1"
_UNUSED = ("log_monitor.py", "autoscaler/_private/monitor.py", "dashboard/dashboard.py")
_NEEDED = ("gcs_server", "raylet")
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
# Ray puts its sockets below its folder, and a socket's path must stay below 108 bytes.
_LONGEST_FOLDER = 34
_PREFIX = "baton-"
_GUARD_TIMEOUT_S = 15.0

# Ray's defaults poll ten times a second for work that comes in milliseconds; we start a handful of actors and then want silence. Measured
# on 2 cores with three idle actors: 5.9 % of a core with the defaults, 1.8 % with these and without the three processes above.
_SYSTEM_CONFIG: dict[str, int | bool] = {
    # Ray runs its workers at nice 15: beside anything else on the machine they would get a thirtieth of a core.
    "worker_niceness": 0,
    "raylet_report_resources_period_milliseconds": 1000,
    "gcs_pull_resource_loads_period_milliseconds": 10_000,
    "ray_syncer_message_refresh_interval_ms": 10_000,
    "report_worker_backlog_interval_ms": 10_000,
    "health_check_period_ms": 5_000,
    "raylet_death_check_interval_milliseconds": 1_000,
    "raylet_liveness_self_check_interval_ms": 10_000,
    "raylet_check_gc_period_milliseconds": 10_000,
    "raylet_check_for_unexpected_worker_disconnect_interval_ms": 1_000,
    "core_worker_internal_heartbeat_ms": 10_000,
    "get_check_signal_interval_milliseconds": 10_000,
    "kill_idle_workers_interval_ms": 10_000,
    "object_manager_timer_freq_ms": 10_000,
    "free_objects_period_milliseconds": 10_000,
    "local_fs_monitor_interval_ms": 0,
    "memory_monitor_refresh_ms": 0,
    "metrics_report_interval_ms": 600_000,
    "task_events_report_interval_ms": 0,
    "io_context_event_loop_lag_collection_interval_ms": 60_000,
    "io_context_monitor_probe_interval_ms": 60_000,
    "event_stats": False,
    "event_stats_print_interval_ms": 3_600_000,
    "debug_dump_period_milliseconds": 0,
    "enable_metrics_collection": False,
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
}

_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Its name notwithstanding: 0 keeps every socket of Ray on the loopback interface, on any system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Transfers between workers of one host need no other interface either.
    "UCX_NET_DEVICES": "lo",
}


class RayHead:
    """Ray's head node as children of this process. One a process at a time; owns the environment variables that Ray reads.

    `num_nodes` above 1: as if there were so many machines, each with `num_cpus` and `num_gpus`.
    """

    def __init__(self, *, num_cpus: int, num_gpus: int, num_nodes: int = 1) -> None:
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus
        self._num_nodes = num_nodes
        self._further: list[Any] = []
        self.folder = Path()
        self._processes: list[psutil.Process] = []

    def __enter__(self) -> RayHead:
        """Raises StartupError if Ray does not come up."""
        self.folder = _private_folder()
        self.rendezvous_dir.mkdir()
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-E", guard.__file__, str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def rendezvous_dir(self) -> Path:
        """Where the ranks of a unit find each other."""
        return self.folder / "rendezvous"

    @property
    def alive(self) -> bool:
        """False: one of Ray's own processes has ended, and with it what Ray can do for us."""
        return all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self._processes)

    def _start(self) -> None:
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ.update(_ENVIRONMENT, RAY_AUTH_TOKEN_PATH=str(token))
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):  # would lead to somebody else's cluster
            os.environ.pop(name, None)
        import ray
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

        AuthenticationTokenLoader.instance().reset_cache()  # the token of a head that this process had before
        try:
            ray.init(
                address="local",
                num_cpus=self._num_cpus,
                num_gpus=self._num_gpus,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                logging_level="ERROR",
                namespace=NAMESPACE,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(self.folder / "r"),
                _node_ip_address=_LOOPBACK,
                _system_config=_SYSTEM_CONFIG,
            )
            for _ in range(1, self._num_nodes):
                self._further.append(self._further_node())
        except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())
            raise StartupError(f"Ray does not start: {reason}; `baton doctor` shows what is missing") from error
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if any(unused in part for part in process.cmdline() for unused in _UNUSED):
                    process.kill()
                    process.wait()
                elif process.name() in _NEEDED:
                    self._processes.append(process)

    def _further_node(self) -> Any:
        """As ray.cluster_utils adds one to its clusters, bound to the life of this process."""
        import ray
        from ray._private.node import Node
        from ray._private.parameter import RayParams

        parameters = RayParams(
            gcs_address=ray._private.worker._global_node.gcs_address,
            node_ip_address=_LOOPBACK,
            node_manager_port=0,
            min_worker_port=0,
            max_worker_port=0,
            num_cpus=self._num_cpus,
            num_gpus=self._num_gpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            temp_dir=str(self.folder / "r"),
            include_log_monitor=False,
        )
        return Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=True)

    def _stop(self) -> None:
        import ray

        for node in self._further:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        ray.shutdown()
        self._guard.communicate(timeout=_GUARD_TIMEOUT_S)


def _private_folder() -> Path:
    """Readable by us alone."""
    parent = tempfile.gettempdir()
    if len(parent) + len(_PREFIX) + 9 > _LONGEST_FOLDER:
        parent = "/tmp"
    try:
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise StartupError(
            f"no folder can be made in {parent} ({error.strerror}); set TMPDIR to a short path that is writable"
        ) from None
