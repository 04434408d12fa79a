"""What a person sees while a cluster starts: one moving line on a terminal, a line a change elsewhere. Then the ready line, always the same."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.status import Status

from serving.core.messages import WorkerInfo


class Display:
    """Progress goes to `stream`, the ready line to standard output."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._status: Status | None = None
        self._shown: dict[str, str] = {}
        if self._stream.isatty():
            self._status = Console(file=self._stream).status("baton: starting")

    def step(self, text: str) -> None:
        """Something else happens now."""
        if self._status is None:
            self._line(text)
        else:
            self._status.update(f"baton: {text}")
            self._status.start()

    def workers(self, workers: Iterable[WorkerInfo]) -> None:
        """Shows those whose state has changed."""
        for worker in workers:
            name = worker.address.worker_id
            text = f"{name}: {worker.state}" + (f", {worker.detail}" if worker.detail else "")
            if self._shown.get(name) != text:
                self._shown[name] = text
                self.step(text)

    def note(self, text: str) -> None:
        """Stays on the screen."""
        self.stop()
        self._line(text)

    def ready(self, url: str, num_prefill: int, num_decode: int) -> None:
        """From here every change is a line that stays."""
        self.stop()
        self._status = None
        print(f"baton: ready on {url} ({num_prefill} prefill, {num_decode} decode ranks)", flush=True)

    def stop(self) -> None:
        if self._status is not None:
            self._status.stop()

    def _line(self, text: str) -> None:
        print(f"baton: {text}", file=self._stream, flush=True)
