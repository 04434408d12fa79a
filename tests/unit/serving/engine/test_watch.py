"""A rank whose device waits for others is not left waiting: who is behind is named, the rest go on, and a process that cannot ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.engine.watch import DeviceWatch
from serving.parallel.collectives import Collectives, Presence, RanksMissing
from tests.unit.serving.parallel.rank_processes import RankProcesses

WORLD = 4
DEADLINE_S = 0.6


class QuietBell:
    """Nobody's connection ends."""

    def ring(self, number: int) -> None:
        raise AssertionError("nobody rings")

    def wait(self, number: int, timeout_s: float | None) -> bool:
        return True

    def tell(self, rung: Any) -> None:
        raise AssertionError("nobody listens")

    def close(self) -> None:
        """It has nothing."""


def device_step(group: Collectives, absent: int, calls: dict[int, int], how: str, name: str) -> dict[str, Any]:
    """Each rank gives its device `calls[rank]` things to do and waits for it; where one has given fewer than the rest the devices of all
    wait for ever, unless they are aborted. `absent` never waits: it sleeps or dies, or comes to the next round."""
    part = group.subgroup(group.ranks, name, DEADLINE_S if how != "fine" else 20.0)
    assert isinstance(part, Presence)
    part.barrier()
    watch = DeviceWatch(part, QuietBell(), deadline_s=DEADLINE_S)
    aborted = threading.Event()
    watch.also_aborts(aborted.set)
    for _ in range(calls[group.rank]):
        watch.advance()
    begin_s = time.monotonic()
    named: list[int] = []
    try:
        if group.rank == absent:
            _go(how, part)
        else:
            with watch.on_device():
                if how != "fine":
                    aborted.wait(10.0)
        if how != "fine":
            part.barrier()
    except RanksMissing as error:
        named = list(error.ranks)
    took_s = time.monotonic() - begin_s
    watch.close()
    return {"named": named, "took_s": took_s, "aborted": aborted.is_set(), "alive": watch._thread.is_alive()}


def _go(how: str, part: Collectives) -> None:
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "sleeps":
        time.sleep(2.5 * DEADLINE_S)
    elif how == "comes to the next round":
        part.barrier()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    ranks = RankProcesses(WORLD, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def test_who_has_given_its_device_less_to_do_is_named_by_all(processes: RankProcesses) -> None:
    results = processes.run("shared_memory", device_step, 2, {0: 5, 1: 5, 2: 4, 3: 6}, "sleeps", "sleeps")
    assert [result["named"] for result in results] == [[2]] * WORLD
    assert all(result["aborted"] for rank, result in enumerate(results) if rank != 2)
    assert max(result["took_s"] for rank, result in enumerate(results) if rank != 2) < 2 * DEADLINE_S


def test_a_rank_that_waits_for_a_round_is_not_who_is_missing(processes: RankProcesses) -> None:
    """Rank 0 has done its part of the step and waits in the round; 1 is behind, the others wait for it on their devices."""
    calls = {0: 7, 1: 6, 2: 7, 3: 7}
    results = processes.run("shared_memory", device_step, 0, calls, "comes to the next round", "round")
    assert [result["named"] for result in results] == [[1]] * WORLD


def test_a_step_that_ends_is_nobodys_fault(processes: RankProcesses) -> None:
    results = processes.run("shared_memory", device_step, -1, dict.fromkeys(range(4), 3), "fine", "fine")
    assert [result["named"] for result in results] == [[]] * WORLD
    assert not any(result["alive"] for result in results)


def test_a_rank_that_dies_is_named_at_once(tmp_path: Path) -> None:
    ranks = RankProcesses(3, tmp_path)
    try:
        results = ranks.run("shared_memory", device_step, 1, {0: 2, 1: 2, 2: 3}, "dies", "dies")
    finally:
        ranks.close()
    assert results[1] is None
    assert [results[0]["named"], results[2]["named"]] == [[1], [1]]
    assert max(results[0]["took_s"], results[2]["took_s"]) < 0.5 * DEADLINE_S


class Present:
    """One rank's end of a unit whose rank 3 is found missing when `is_missing`."""

    is_missing = False
    far = 0

    def advance(self) -> None:
        self.far += 1

    def reach(self, far: int) -> None:
        self.far = far

    def check(self) -> None:
        if self.is_missing:
            raise RanksMissing([3], group="control", reason="its process ended")

    def give_up(self) -> Any:
        raise RanksMissing([2], group="control", reason="deadline")


def test_what_went_wrong_for_want_of_a_rank_is_told_as_that() -> None:
    presence = Present()
    watch = DeviceWatch(presence, QuietBell(), deadline_s=20.0)
    aborted = threading.Event()
    watch.also_aborts(aborted.set)
    with pytest.raises(ValueError, match="garbage"), watch.on_device():
        raise ValueError("garbage")

    def compute() -> None:
        with watch.on_device():
            presence.is_missing = True
            assert aborted.wait(5.0)
            raise ValueError("garbage")

    with pytest.raises(RanksMissing) as raised:
        compute()
    assert raised.value.ranks == (3,)
    assert isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(RanksMissing), watch.on_device():
        raise AssertionError("nothing is begun any more")
    watch.close()


def test_results_of_a_step_in_which_a_kernel_gave_up_are_nobodys() -> None:
    late: list[int] = []

    def check() -> None:
        if late:
            raise RanksMissing(late, group="tp", reason="deadline, peer memory")

    watch = DeviceWatch(Present(), QuietBell(), deadline_s=20.0)
    watch.also_checks(check)
    with watch.on_device():
        """Everybody has come."""
    with pytest.raises(RanksMissing) as raised, watch.on_device():
        late.append(3)
    assert raised.value.ranks == (3,)
    watch.close()


def test_a_rank_is_as_far_as_its_step_however_much_its_device_has_to_do_in_it() -> None:
    """Of four ranks, the first is in step 5 still; the second has replayed that step, the third has launched it piece by piece and made three calls
    between the steps, the fourth has begun the next one."""
    presences = [Present() for _ in range(4)]
    watches = [DeviceWatch(presence, QuietBell(), deadline_s=20.0) for presence in presences]
    num_calls = 40, 0, 90, 90
    for watch, number in zip(watches, num_calls, strict=True):
        watch.launching(5)
        for _ in range(number):
            watch.advance()
    for watch in watches[1:]:
        watch.launched(5)
    for watch in watches[2:]:
        for _ in range(3):
            watch.advance()
    watches[3].launching(6)
    far = [presence.far for presence in presences]
    assert far == sorted(set(far))
    for watch in watches:
        watch.close()


def test_at_the_end_captured_steps_go_before_the_groups_that_they_name() -> None:
    ends: list[str] = []
    watch = DeviceWatch(Present(), QuietBell(), deadline_s=20.0)
    watch.also_aborts(lambda: ends.append("group"))
    watch.also_releases(lambda: ends.append("memory"))
    watch.also_releases(lambda: ends.append("steps"))
    watch.close()
    assert ends == ["steps", "memory", "group"]
