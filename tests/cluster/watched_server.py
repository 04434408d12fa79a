"""A server whose processes and log a test can look at."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import httpx
import psutil

from serving.cluster.served import ServedProcess

_READY = re.compile(r"baton: (\S+): ready, pid (\d+)")


class WatchedServer(ServedProcess):
    """Its progress and errors go to the file `log`."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        super().__init__(arguments, stderr=log)
        self.log = log

    def worker_pids(self) -> dict[str, int]:
        """worker id -> pid, as the server last said it."""
        return {name: int(pid) for name, pid in _READY.findall(self.log.read_text())}

    def family(self) -> list[psutil.Process]:
        """Every process below the server's own."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def listens_at(self) -> set[str]:
        """The addresses of all sockets that listen, of whichever process."""
        addresses = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in [psutil.Process(self.process.pid), *self.family()]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert addresses, "the router listens at least"
        return addresses

    def router(self) -> psutil.Process:
        return next(process for process in self.family() if "router" in process.cmdline())

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def complete(self, prompt: str, max_tokens: int = 12) -> str:
        """Greedy text of exactly `max_tokens` tokens."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])


def eventually(check: Callable[[], bool], *, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def still_running(processes: Iterable[psutil.Process], *, after_s: float) -> list[psutil.Process]:
    """Those that have not ended within `after_s`."""
    processes = list(processes)
    eventually(lambda: not any(process.is_running() for process in processes), timeout_s=after_s)
    return [process for process in processes if process.is_running()]
