"""Ranks of a unit as processes of this host: lockstep and bell are the real ones, a step is one collective of all ranks."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from serving.engine.plan import DecodeRow, Launched, SlotSpec, StepPlan, StepResult, StepShape
from serving.engine.unit import Follower, Leader, Lockstep
from serving.parallel.bell import TcpBell
from serving.parallel.collectives import Collectives
from serving.parallel.distributed import TorchCollectives
from serving.parallel.groups import Groups
from serving.parallel.shared_memory import SharedMemoryCollectives

GROUPS = Groups(tp=2, dp=2, ep=4, ranks_per_node=4)
DEADLINE_S = 20.0
_PLAN = StepPlan(rows=(DecodeRow(slot=0, position=1),))


@dataclass(frozen=True)
class _InFlight:
    plan: StepPlan


class _Runner:
    """Counts its steps."""

    def __init__(self, model: Collectives) -> None:
        self._model = model
        self.num_steps = 0

    def open_slot(self, slot: int, spec: SlotSpec) -> None:
        raise AssertionError("no plan here opens one")

    def close_slot(self, slot: int) -> None:
        raise AssertionError("no plan here closes one")

    def launch(self, plan: StepPlan, shape: StepShape | None = None) -> Launched:
        self._model.barrier()
        self.num_steps += 1
        return _InFlight(plan)

    def settle(self, launched: Launched) -> StepResult:
        return StepResult(tokens=())


class UnitProcesses:
    """`say` gives a leader steps to run, or "drain"; `hear` is what a rank says: "ready", then how it ended."""

    def __init__(self, name: str, gloo: Path | None = None) -> None:
        """`gloo`: the ranks exchange over it, and this is the file of their store; None: through shared memory."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "serving.engine.unit", "serving.parallel.shared_memory"])
        self.processes = []
        self._pipes: list[Connection] = []
        for rank in range(GROUPS.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_live, args=(theirs, rank, name, gloo), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def say(self, rank: int, what: int | str) -> None:
        self._pipes[rank].send(what)

    def hear(self, rank: int) -> Any:
        assert self._pipes[rank].poll(DEADLINE_S), f"rank {rank} says nothing"
        return self._pipes[rank].recv()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _world(rank: int, name: str, gloo: Path | None, bells: list[TcpBell]) -> Collectives:
    if gloo is None:
        return SharedMemoryCollectives(name=name, ranks=range(4), rank=rank, deadline_s=DEADLINE_S)
    return TorchCollectives(
        backend="gloo",
        store=FileStore(str(gloo), 4),
        ranks=range(4),
        rank=rank,
        name=name,
        deadline_s=DEADLINE_S,
        presence=lambda: bells[0] if bells else None,
    )


def _live(pipe: Connection, rank: int, name: str, gloo: Path | None) -> None:
    torch.set_num_threads(1)
    bells: list[TcpBell] = []
    world = _world(rank, name, gloo, bells)
    tp = world.subgroup(GROUPS.tp_group(rank), "tp")
    model = world.subgroup(range(4), "model")
    bells.append(TcpBell(world, host="127.0.0.1", deadline_s=DEADLINE_S))
    lockstep = Lockstep(world, tp, bells[0])
    runner = _Runner(model)
    pipe.send("ready")
    try:
        if GROUPS.coordinates(rank).tp_rank:
            Follower(runner, lockstep).run()
        else:
            _lead(Leader(runner, lockstep), pipe)
        pipe.send((lockstep.number, runner.num_steps))
    except Exception as error:
        pipe.send(error)
    lockstep.bell.close()


def _lead(leader: Leader, pipe: Connection) -> None:
    """A step loop whose mailbox is a queue, filled from the pipe by a thread."""
    mailbox: queue.SimpleQueue[int | str | None] = queue.SimpleQueue()

    def read() -> None:
        while True:
            try:
                mailbox.put(pipe.recv())
            except (EOFError, OSError):
                return

    threading.Thread(target=read, daemon=True).start()
    leader.tell(lambda: mailbox.put(None))
    num_left, drained = 0, False
    while not leader.turned(stopping=False, drained=drained and not num_left):
        try:
            said = mailbox.get(block=not num_left and not leader.awake)
        except queue.Empty:
            said = None
        if said == "drain":
            drained = True
        elif isinstance(said, int):
            num_left += said
        if num_left:
            leader.settle(leader.launch(_PLAN))
            num_left -= 1
