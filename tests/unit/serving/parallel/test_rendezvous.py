"""Ranks that meet at an address, as those of several hosts do: whoever ends, hangs or never comes is named, rank 0 and its store too."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from serving.engine.joining import watch_over
from serving.parallel.bell import TcpBell
from serving.parallel.collectives import Collectives, RanksMissing
from serving.parallel.distributed import TorchCollectives
from serving.parallel.rendezvous import name_of, open_store
from tests.unit.serving.parallel.rank_processes import DEADLINE_S, HOST, RankProcesses

WORLD = 3
PATIENCE_S = 0.5
STOPPED_S = 3.5
"""Longer than it takes to find out that rank 0 says nothing."""


class Unit:
    """What `join` gives the ranks of several nodes: a group in host memory and a bell that knows more than it."""

    def __init__(self, group: Collectives, name: str) -> None:
        assert isinstance(group, TorchCollectives)
        bells: list[TcpBell] = []
        self.control = TorchCollectives(
            backend="gloo",
            store=group._store,
            ranks=group.ranks,
            rank=group.rank,
            name=name,
            deadline_s=PATIENCE_S,
            host=HOST,
            presence=lambda: bells[0] if bells else None,
        )
        self.bell = TcpBell(group, host=HOST, deadline_s=DEADLINE_S)
        bells.append(self.bell)


def meet(group: Collectives, name: str) -> dict[str, Any]:
    """The sum of all ranks, and where this process listens."""
    unit = Unit(group, name)
    out = torch.zeros(1, dtype=torch.int64)
    ones = torch.full((WORLD,), 1 + group.rank)
    unit.control.reduce_scatter(out, ones).wait()
    listens = {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    unit.control.barrier()
    unit.bell.close()
    return {"sum": int(out), "listens": listens}


def fails(group: Collectives, name: str, victim: int, how: str, where: str) -> dict[str, Any]:
    """Of all ranks in a round, or with a device that waits for the others', one ends or stops for a while: who the others say it is, and when."""
    unit = Unit(group, name)
    watch = watch_over(unit.control, unit.bell)
    watch._deadline_s = PATIENCE_S
    unit.control.barrier()
    begin_s = time.monotonic()
    try:
        if group.rank == victim:
            _go(how)
        elif where == "round":
            unit.control.barrier()
        else:
            aborted: list[float] = []
            watch.also_aborts(lambda: aborted.append(time.monotonic()))
            watch.advance()
            with watch.on_device():
                while not aborted:
                    time.sleep(0.01)
    except RanksMissing as error:
        took_s = time.monotonic() - begin_s
        watch.close()
        return {"named": list(error.ranks), "took_s": took_s}
    return {"named": [], "took_s": 0.0}


def _go(how: str) -> None:
    if how == "ends":
        os.kill(os.getpid(), signal.SIGKILL)
    pid = os.getpid()
    subprocess.Popen(["sh", "-c", f"sleep {STOPPED_S}; kill -CONT {pid}"])
    os.kill(pid, signal.SIGSTOP)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[RankProcesses]:
    ranks = RankProcesses(WORLD, tmp_path, across_hosts=True)
    yield ranks
    ranks.close()
    assert list(tmp_path.iterdir()) == []


def test_ranks_meet_without_a_folder_and_listen_at_their_own_address_alone(processes: RankProcesses) -> None:
    results = processes.run("gloo", meet, "meet")
    assert [result["sum"] for result in results] == [6] * WORLD
    assert set().union(*(result["listens"] for result in results)) == {HOST}


@pytest.mark.parametrize("where", ["round", "device"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_ends_is_named_at_once(processes: RankProcesses, victim: int, where: str) -> None:
    results = processes.run("gloo", fails, "ends", victim, "ends", where)
    assert results[victim] is None
    others = [result for rank, result in enumerate(results) if rank != victim]
    assert [other["named"] for other in others] == [[victim]] * len(others)
    assert max(other["took_s"] for other in others) < PATIENCE_S


@pytest.mark.parametrize("where", ["round", "device"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_is_named_at_the_deadline(processes: RankProcesses, victim: int, where: str) -> None:
    results = processes.run("gloo", fails, "hangs", victim, "hangs", where)
    others = [result for rank, result in enumerate(results) if rank != victim]
    assert [other["named"] for other in others] == [[victim]] * len(others)
    assert PATIENCE_S < max(other["took_s"] for other in others) < STOPPED_S - 0.2


def test_a_rank_0_that_is_not_there_is_named() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RanksMissing, match=rf"rendezvous: rank 0 .*tcp://{HOST}:{port}/unit") as missing:
        open_store(f"tcp://{HOST}:{port}/unit", world_size=2, listener=-1, deadline_s=0.3)
    assert missing.value.ranks == (0,)


def test_the_name_of_a_meeting_is_its_last_part() -> None:
    assert name_of("tcp://127.0.0.1:4000/decode-0-1-ab") == name_of("/tmp/server/decode-0-1-ab") == "decode-0-1-ab"
