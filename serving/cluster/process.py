"""Ending with one's parent, adopting orphans, and leaving no process behind. Linux; elsewhere the kernel calls are left out.

Ray's workers are children of its raylet: when that dies first they would be nobody's. A reaper adopts them, so that one walk over its
descendants at the end finds everything that was ever started below it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import time

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def child_command(module: str, *, end: signal.Signals) -> list[str]:
    """`python -m module` that receives `end` when the thread that starts it ends, however it ends."""
    return [sys.executable, "-m", __name__, str(os.getpid()), str(end.value), module]


def end_with_parent(parent_pid: int, end: int) -> None:
    """The kernel sends `end` to this process when the thread that started it ends; if `parent_pid` is already gone, it exits now."""
    _prctl(_PR_SET_PDEATHSIG, end)
    if os.getppid() != parent_pid:
        sys.exit(1)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, not of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(*, grace_s: float) -> list[str]:
    """Waits up to `grace_s` for every descendant to end, then kills what remains; returns the names of those it had to kill."""
    deadline_s = time.monotonic() + grace_s
    while (alive := _living_descendants()) and time.monotonic() < deadline_s:
        psutil.wait_procs(alive, timeout=0.1)
    killed = []
    while alive := _living_descendants():
        for process in alive:
            with contextlib.suppress(psutil.Error):
                killed.append(process.name())
                process.kill()
        psutil.wait_procs(alive, timeout=2.0)
    return killed


def wait_for_end(pid: int, *, timeout_s: float) -> None:
    """Returns when process `pid` of this host has ended, however long that takes; kills it after `timeout_s`.

    One that is in the kernel ends only when it comes out of it. One that nobody reaps has ended all the same.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            try:
                process.wait(timeout_s)
                return
            except psutil.TimeoutExpired:
                process.kill()


def _living_descendants() -> list[psutil.Process]:
    """Reaps those that have ended and are ours; the others' parents do so."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
            elif process.ppid() == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return alive


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]), int(sys.argv[2]))
    del sys.argv[1:3]
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
