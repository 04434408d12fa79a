"""Processes that are ranks of a unit over gloo and over shared memory at once, or over NCCL with a GPU each, and run cases by name."""

from __future__ import annotations

import multiprocessing
import secrets
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from serving.parallel.collectives import Collectives
from serving.parallel.distributed import TorchCollectives
from serving.parallel.rendezvous import open_store
from serving.parallel.shared_memory import SharedMemoryCollectives
from tests.unit.serving.parallel import rank_cases

HOST = "127.0.0.1"
DEADLINE_S = 30.0
PART_BYTES = 64


class RankProcesses:
    """Parts of the shared memory are so small that most calls take several rounds. `across_hosts`: they meet as ranks of several hosts do, at an
    address, where rank 0 holds the store."""

    def __init__(self, world_size: int, folder: Path, *, on_gpus: bool = False, across_hosts: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "serving.parallel.distributed"])
        # Other tests of this machine have ranks at the same time.
        self.name = f"test-{secrets.token_hex(4)}"
        self.processes = []
        self._pipes: list[Connection] = []
        with socket.create_server((HOST, 0)) as listener:
            port = listener.getsockname()[1]
            rendezvous = f"tcp://{HOST}:{port}/{self.name}" if across_hosts else str(folder / "store")
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                held = listener if across_hosts and rank == 0 else None
                arguments = theirs, rank, world_size, rendezvous, held, self.name, on_gpus
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self._pipes.append(ours)

    def run(self, implementation: str, case: str | Callable[..., Any], *arguments: Any) -> list[Any]:
        """The case's result on each rank, a function's or one's of `rank_cases`; None of a rank that died in it."""
        for pipe in self._pipes:
            pipe.send((implementation, case, arguments))
        return [_result(pipe) for pipe in self._pipes]

    def run_on(self, implementation: str, rank: int, case: Callable[..., Any], *arguments: Any) -> Any:
        """The same on one rank alone."""
        self._pipes[rank].send((implementation, case, arguments))
        return _result(self._pipes[rank])

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


def _serve(
    pipe: Connection,
    rank: int,
    world_size: int,
    rendezvous: str,
    held: socket.socket | None,
    name: str,
    on_gpus: bool,
) -> None:
    torch.set_num_threads(1)
    listener = held.detach() if held is not None else -1
    store = open_store(rendezvous, world_size=world_size, listener=listener, deadline_s=DEADLINE_S)
    groups: dict[str, Collectives] = {}
    if on_gpus:
        torch.cuda.set_device(rank)
        groups["nccl"] = _over_torch("nccl", rank, world_size, store)
        # The cases name no device.
        torch.set_default_device("cuda")
    else:
        groups["gloo"] = _over_torch("gloo", rank, world_size, store)
        groups["shared_memory"] = SharedMemoryCollectives(
            name=name, ranks=range(world_size), rank=rank, deadline_s=DEADLINE_S, part_bytes=PART_BYTES
        )
    while True:
        implementation, case, arguments = pipe.recv()
        function = getattr(rank_cases, case) if isinstance(case, str) else case
        try:
            pipe.send(function(groups[implementation], *arguments))
        except Exception as error:
            pipe.send(error)


def _over_torch(backend: str, rank: int, world_size: int, store: Store) -> TorchCollectives:
    return TorchCollectives(
        backend=backend, store=store, ranks=range(world_size), rank=rank, name="unit", deadline_s=DEADLINE_S, host=HOST
    )
