"""A unit of processes parks without using the processor, wakes for anyone's work, and ends as one."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serving.parallel.collectives import RanksMissing
from tests.unit.serving.engine.unit_processes import UnitProcesses

PARKED_S = 0.6


@pytest.fixture
def unit() -> Iterator[UnitProcesses]:
    made = UnitProcesses(f"test-{uuid.uuid4().hex}")
    assert [made.hear(rank) for rank in range(4)] == ["ready"] * 4
    yield made
    made.close()


def _cpu_s(unit: UnitProcesses) -> list[float]:
    return [sum(psutil.Process(process.pid).cpu_times()[:2]) for process in unit.processes]


def _wait_until_parked(unit: UnitProcesses) -> None:
    """Until nobody has used the processor for a while."""
    time.sleep(0.1)
    before, due_s = [-1.0], time.monotonic() + 10
    while (now := _cpu_s(unit)) != before:
        assert time.monotonic() < due_s, "the unit does not park"
        before = now
        time.sleep(0.2)


def test_a_parked_unit_takes_no_time_and_wakes_for_the_work_of_any_leader(unit: UnitProcesses) -> None:
    for leader, num_steps in ((0, 3), (2, 5), (0, 1)):
        unit.say(leader, num_steps)
        _wait_until_parked(unit)
    # Two that ring for one waking: the later ring must not wake the unit when it has parked again.
    for _ in range(20):
        unit.say(0, 1)
        unit.say(2, 1)
        time.sleep(0.01)
    _wait_until_parked(unit)
    before = _cpu_s(unit)
    time.sleep(PARKED_S)
    assert [after - then for after, then in zip(_cpu_s(unit), before, strict=True)] == [0.0] * 4
    unit.say(0, "drain")
    _wait_until_parked(unit)
    unit.say(2, 2)
    unit.say(2, "drain")
    ends = [unit.hear(rank) for rank in range(4)]
    assert len(set(ends)) == 1, "all have been in the same rounds and steps"
    assert 9 + 20 + 2 <= ends[0][1] <= 9 + 40 + 2


@pytest.mark.parametrize(("killed", "working"), [(3, False), (0, False), (1, True)])
def test_a_rank_that_dies_is_named_by_all_others(unit: UnitProcesses, killed: int, working: bool) -> None:
    _wait_until_parked(unit)
    if working:
        unit.say(2, 10**6)
        time.sleep(0.2)
    unit.processes[killed].kill()
    begin_s = time.monotonic()
    for rank in set(range(4)) - {killed}:
        error = unit.hear(rank)
        assert isinstance(error, RanksMissing)
        assert error.ranks == (killed,)
    assert time.monotonic() - begin_s < 2.0


@pytest.mark.parametrize("killed", [0, 3])
def test_over_gloo_too_a_rank_that_dies_in_a_step_is_named_at_once(tmp_path: Path, killed: int) -> None:
    """Its sockets say that some rank is gone, the bell's connections which: nobody waits for the deadline."""
    unit = UnitProcesses(f"test-{uuid.uuid4().hex}", gloo=tmp_path / "store")
    try:
        assert [unit.hear(rank) for rank in range(4)] == ["ready"] * 4
        unit.say(2, 10**6)
        time.sleep(0.3)
        unit.processes[killed].kill()
        begin_s = time.monotonic()
        errors = [unit.hear(rank) for rank in range(4) if rank != killed]
        assert time.monotonic() - begin_s < 5.0
    finally:
        unit.close()
    assert [type(error) for error in errors] == [RanksMissing] * 3
    assert [error.ranks for error in errors] == [(killed,)] * 3
