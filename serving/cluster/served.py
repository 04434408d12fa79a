"""A whole server, `baton serve`, as a child process: started, waited for, asked, stopped. For the demo, benchmarks and tests.

with ServedProcess(["--model", "DIR"]) as server: ... server.url ...
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from serving.cluster.process import child_command
from serving.core.errors import StartupError

_READY = re.compile(r"baton: ready on (http://\S+) \(\d+ prefill, \d+ decode ranks\)")


class ServedProcess:
    """`arguments` follow `baton serve`; without a port among them a free one is taken. It ends with the process that made it."""

    def __init__(self, arguments: Sequence[str] = (), *, stderr: Path | None = None, timeout_s: float = 120.0) -> None:
        """`stderr` is a file for progress and errors; None: they go where ours go."""
        self._arguments = [*arguments] if "--port" in arguments else [*arguments, "--port", "0"]
        self._stderr = stderr
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "start it first"
        return self._process

    def start(self) -> None:
        """Returns when it is ready. Raises StartupError if it ends or is not ready in time."""
        command = [*child_command("serving", end=signal.SIGTERM), "serve", *self._arguments]
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(self._stderr.open("wb")) if self._stderr is not None else None
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        watchdog = threading.Timer(self._timeout_s, self._process.kill)
        watchdog.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        watchdog.cancel()
        ready = _READY.match(line)
        if ready is None:
            self.stop()
            raise StartupError(
                f"the server did not get ready (exit code {self._process.returncode}); its own message says why"
            )
        self.url = ready[1]

    def stop(self, number: int = signal.SIGTERM, *, timeout_s: float = 60.0) -> int:
        """Exit code. A server that does not end in time is killed."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.returncode

    def __enter__(self) -> ServedProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
