"""Stands beside a server and outlives it: ends who still writes into the server's private folder, then removes the folder.

Everything that Ray starts logs into that folder, so this finds what would linger after the server was killed (Ray's agents try for a minute
to tell somebody). Runs as a script, with the standard library only: it has to be small, and to hold nothing that could fail.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

_PATIENCE_S = 10.0


def writers(folder: str) -> list[int]:
    """Processes that have a file below `folder` open for writing."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and _writes(f"/proc/{name}", folder + os.sep):
                found.append(int(name))
    return found


def _writes(process: str, prefix: str) -> bool:
    for descriptor in os.listdir(f"{process}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"{process}/fd/{descriptor}").startswith(prefix) and _is_writable(process, descriptor):
                return True
    return False


def _is_writable(process: str, descriptor: str) -> bool:
    with open(f"{process}/fdinfo/{descriptor}") as file:
        flags = next(line for line in file if line.startswith("flags:"))
    return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


def main() -> None:
    folder, server = sys.argv[1], os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # until the server's end of the pipe is closed
    deadline_s = time.monotonic() + _PATIENCE_S
    while os.path.isdir("/proc") and (pids := set(writers(folder)) - {server}) and time.monotonic() < deadline_s:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
