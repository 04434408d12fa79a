"""Processes that end with their parents, and the ones that see to it."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from serving.cluster import guard
from serving.cluster.process import wait_for_end

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def eventually(check: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ignores_sigterm(pid: int) -> bool:
    mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:"))
    return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent_however_that_ends(tmp_path: Path, number: signal.Signals):
    (tmp_path / "sleeper.py").write_text("print('up', flush=True)\nimport time\ntime.sleep(60)\n")
    parent = python(f"""
        import signal, subprocess, sys, time
        sys.path.insert(0, {str(tmp_path)!r})
        from serving.cluster.process import child_command
        command = child_command("sleeper", end=signal.SIGKILL)
        child = subprocess.Popen(command, cwd={str(tmp_path)!r}, stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "up\\n"
        print(child.pid, flush=True)
        time.sleep(60)
    """)
    child = int(first_line(parent))
    assert not ended(child)
    parent.send_signal(number)
    parent.communicate()
    assert eventually(lambda: ended(child))


def test_whoever_is_left_below_is_killed_even_orphans():
    process = python("""
        import subprocess, sys
        from serving.cluster.process import adopt_orphans, end_descendants
        adopt_orphans()
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        inner = f"import subprocess; print(subprocess.Popen({sleep!r}, stdout=subprocess.DEVNULL).pid, flush=True)"
        orphan = int(subprocess.run([sys.executable, "-c", inner], stdout=subprocess.PIPE, text=True).stdout)
        child = subprocess.Popen(sleep)
        print(orphan, child.pid, len(end_descendants(grace_s=0.0)), flush=True)
    """)
    orphan, child, num_killed = map(int, first_line(process).split())
    process.communicate()
    assert num_killed == 2
    assert ended(orphan)
    assert ended(child)


def test_those_that_end_in_time_are_not_killed():
    process = python("""
        import subprocess, sys
        from serving.cluster.process import end_descendants
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
        print(end_descendants(grace_s=20.0), flush=True)
    """)
    assert first_line(process) == "[]"
    process.communicate()


def test_nothing_below_is_nothing_to_do():
    # In an interpreter of its own: this one may have children of other tests.
    process = python("""
        from serving.cluster.process import end_descendants
        print(end_descendants(grace_s=0.0))
    """)
    assert first_line(process) == "[]"
    process.communicate()


def test_waiting_for_a_process_that_does_not_end_ends_it():
    process = subprocess.Popen(SLEEP)
    wait_for_end(process.pid, timeout_s=0.1)
    assert ended(process.pid)
    process.wait()
    wait_for_end(process.pid, timeout_s=0.1)


def test_waiting_goes_on_as_long_as_the_killed_process_has_not_ended(monkeypatch: pytest.MonkeyPatch):
    process = subprocess.Popen(SLEEP)
    kill, asked = psutil.Process.kill, list[float]()

    def late(self: psutil.Process) -> None:
        """As of one that is in the kernel: the third signal is the first to show."""
        asked.append(time.monotonic())
        if len(asked) == 3:
            kill(self)

    monkeypatch.setattr(psutil.Process, "kill", late)
    wait_for_end(process.pid, timeout_s=0.05)
    assert len(asked) == 3
    assert ended(process.pid)
    process.wait()


def test_a_dead_process_that_nobody_reaps_has_ended():
    process = python("""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "pass"])
        print(child.pid, flush=True)
        time.sleep(60)
    """)
    orphan = int(first_line(process))
    assert eventually(lambda: ended(orphan))
    started_s = time.monotonic()
    wait_for_end(orphan, timeout_s=30.0)
    assert time.monotonic() - started_s < 5.0
    process.kill()
    process.communicate()


def test_the_guard_ends_writers_spares_readers_and_removes_the_folder(tmp_path: Path):
    folder = tmp_path / "private"
    folder.mkdir()
    log = folder / "log"
    with log.open("w") as file:
        writer = subprocess.Popen(SLEEP, stdout=file)
    with log.open() as file:
        reader = subprocess.Popen(SLEEP, stdin=file)
    watching = subprocess.Popen([sys.executable, "-S", "-E", guard.__file__, str(folder)], stdin=subprocess.PIPE)
    assert eventually(lambda: ignores_sigterm(watching.pid))
    watching.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert watching.poll() is None
    assert folder.is_dir()
    watching.communicate(timeout=10)
    assert writer.wait(timeout=5) == -signal.SIGKILL
    assert reader.poll() is None
    assert not folder.exists()
    reader.kill()
    reader.wait()
