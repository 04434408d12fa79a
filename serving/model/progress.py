"""Shows how loading goes: a bar with bytes and rate on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY_S = 5.0


class ConsoleProgress:
    """Progress of one load to `stream`. Not reusable."""

    def __init__(self, stream: TextIO, what: str = "loading weights") -> None:
        self._stream = stream
        self._what = what
        self._bar: RichProgress | None = None
        self._total = 0
        self._done = 0
        self._started_s = 0.0
        self._next_line_s = 0.0

    def start(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._started_s = time.monotonic()
        self._next_line_s = self._started_s + _LINE_EVERY_S
        if self._stream.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
            self._bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(file=self._stream))
            self._bar.add_task(self._what, total=total_bytes)
            self._bar.start()

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], num_bytes)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s += _LINE_EVERY_S
            self._line(f"{100 * self._done // max(self._total, 1)} %, ")

    def tell(self, text: str) -> None:
        self._stream.write(f"{text}\n")

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._line("")

    def _line(self, share: str) -> None:
        rate = self._done / max(time.monotonic() - self._started_s, 1e-6)
        print(f"{self._what}: {share}{self._done / 1e6:.1f} MB at {rate / 1e6:.0f} MB/s", file=self._stream, flush=True)
