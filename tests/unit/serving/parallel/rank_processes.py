"""Processes that are ranks of a unit over gloo and over shared memory at once, and run cases by name."""

from __future__ import annotations

import multiprocessing
import secrets
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from serving.parallel.collectives import Collectives
from serving.parallel.distributed import TorchCollectives
from serving.parallel.shared_memory import SharedMemoryCollectives
from tests.unit.serving.parallel import rank_cases

DEADLINE_S = 30.0
PART_BYTES = 64


class RankProcesses:
    """Parts of the shared memory are so small that most calls take several rounds."""

    def __init__(self, world_size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "serving.parallel.distributed"])
        # Other tests of this machine have ranks at the same time.
        self.name = f"test-{secrets.token_hex(4)}"
        self.processes = []
        self._pipes: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size, folder, self.name), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def run(self, implementation: str, case: str, *arguments: Any) -> list[Any]:
        """The case's result on each rank; None of a rank that died in it."""
        for pipe in self._pipes:
            pipe.send((implementation, case, arguments))
        return [_result(pipe) for pipe in self._pipes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _result(pipe: Connection) -> Any:
    try:
        assert pipe.poll(60.0), "a rank does not answer"
        result = pipe.recv()
    except EOFError:
        return None
    if isinstance(result, BaseException):
        raise result
    return result


def _serve(pipe: Connection, rank: int, world_size: int, folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    ranks = range(world_size)
    store = dist.FileStore(str(folder / "store"), world_size)
    groups: dict[str, Collectives] = {
        "gloo": TorchCollectives(
            backend="gloo", store=store, ranks=ranks, rank=rank, name="unit", deadline_s=DEADLINE_S
        ),
        "shared_memory": SharedMemoryCollectives(
            name=name, ranks=ranks, rank=rank, deadline_s=DEADLINE_S, part_bytes=PART_BYTES
        ),
    }
    while True:
        implementation, case, arguments = pipe.recv()
        try:
            pipe.send(getattr(rank_cases, case)(groups[implementation], *arguments))
        except Exception as error:
            pipe.send(error)
