"""What looks after a host that waits for its device, while the device waits for other ranks': a thread of the rank.

    outside    --on_device-->  inside: the thread looks now and then  --left, or out of it-->  outside
    inside     a process has ended, a rank was given up, or the deadline has come  -->  aborted: the kernels end, and what is waited for
               comes, whatever it holds  -->  RanksMissing where `on_device` is left, or, if it is not, the end of the process

The host may wait anywhere in between: for numbers that it reads, for an event, in a captured step. Who is behind is known from what
every rank notes of its progress (`Presence`). Must not know steps.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

from serving.parallel.bell import Bell
from serving.parallel.collectives import Presence, RanksMissing

_LOOK_S = 0.05
_STEP = 1 << 20
"""Of the count that ranks compare. Half is for what a step gives the device that takes all ranks, half for what follows until the next."""
_LAST_RESORT_S = 10.0
"""From the abort on; kernels end within microseconds."""
_ENDED = 70

WARM_UP_DEADLINE_S = 1800.0
"""Of steps that are compiled and captured: a library's compiler may take minutes on the first start of a machine; a rank whose process has ended
is noticed at once."""
LAST_DEADLINE_S = 2 * WARM_UP_DEADLINE_S
"""Of what waits on the device itself and names nobody: nothing is watched for so long."""

_log = logging.getLogger("baton.unit")


class DeviceWatch:
    """`presence`: who knows of the unit's ranks that end, its group of CPU tensors or, across nodes, the bell. `deadline_s`: longer than the device takes for anything that is waited for at once."""

    def __init__(self, presence: Presence, bell: Bell, *, deadline_s: float) -> None:
        self._presence = presence
        self._bell = bell
        self._deadline_s = deadline_s
        self._releases: list[Callable[[], None]] = []
        self._aborts: list[Callable[[], None]] = []
        self._checks: list[Callable[[], None]] = []
        self._missing: RanksMissing | None = None
        self._due_s: float | None = None
        self._is_inside = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="device-watch", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """The device has been given one thing more that takes all ranks, in the order in which all of them do it."""
        self._presence.advance()

    def launching(self, number: int) -> None:
        """Step `number` of the unit, which all ranks count alike. How much each gives its device in it differs: a DP group may replay what another
        one launches piece by piece. So who is behind is who is in an earlier step, then who has not launched it whole."""
        self._presence.reach(number * _STEP)

    def launched(self, number: int) -> None:
        """The whole of step `number`."""
        self._presence.reach(number * _STEP + _STEP // 2)

    def also_aborts(self, abort: Callable[[], None]) -> None:
        """`abort` ends kernels that wait for other ranks; called from any thread."""
        self._aborts.append(abort)

    def also_checks(self, check: Callable[[], None]) -> None:
        """`check` raises RanksMissing if a kernel has given up waiting for another rank; called whenever the device is not waited for any more,
        before what it computed is used."""
        self._checks.append(check)

    def also_releases(self, release: Callable[[], None]) -> None:
        """`release` waits for the device and gives back what still names a group; called at the end."""
        self._releases.append(release)

    @contextlib.contextmanager
    def on_device(self, deadline_s: float | None = None) -> Iterator[None]:
        """Around what may wait for the device. Raises RanksMissing, whatever else went wrong for it."""
        if self._missing is not None:
            raise self._missing
        self._due_s = time.monotonic() + (deadline_s or self._deadline_s)
        self._is_inside.set()
        try:
            yield
        except Exception as error:
            if self._missing is not None:
                raise self._missing from error
            raise
        finally:
            self._due_s = None
        if self._missing is not None:
            raise self._missing
        for check in self._checks:
            check()

    def close(self) -> None:
        """No step will be launched any more."""
        with contextlib.suppress(RanksMissing), self.on_device():
            # Captured steps, which are made last, name what was there before.
            for end in (*reversed(self._releases), *self._aborts):
                end()
        self._closing = True
        self._is_inside.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closing and self._missing is None:
            # Of a unit that is parked nobody is inside for long, and the thread sleeps.
            self._is_inside.wait()
            self._is_inside.clear()
            while not self._closing and (due_s := self._due_s) is not None and self._missing is None:
                self._look(due_s)
                time.sleep(_LOOK_S)

    def _look(self, due_s: float) -> None:
        try:
            self._presence.check()
            self._bell.wait(-1, 0.0)
            if time.monotonic() > due_s:
                self._presence.give_up()
        except RanksMissing as missing:
            self._missing = missing
            _log.error("%s", missing)
            # All at once: one may return only when what another holds up has ended.
            for abort in self._aborts:
                threading.Thread(target=abort, daemon=True).start()
            self._end_process_if_stuck()

    def _end_process_if_stuck(self) -> None:
        begin_s = time.monotonic()
        while self._due_s is not None:
            if time.monotonic() - begin_s > _LAST_RESORT_S:
                _log.critical("the device does not come back; the process ends")
                faulthandler.dump_traceback(all_threads=True)
                os._exit(_ENDED)
            time.sleep(_LOOK_S)
