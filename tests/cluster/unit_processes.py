"""All ranks of a prefill and of a decode unit as processes, built from their specs as the actors would, with routers for tests."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from kvcache.pool import KVPool
from kvcache.transfer.base import PageSource
from kvcache.transfer.nixl import NixlSource
from serving.cluster.rank import build_worker
from serving.core.config import Config, unit_table
from serving.core.messages import Drain, MetricsQuery, MetricsReply, PeerAddress
from serving.core.spec import WorkerSpec
from serving.engine.build import build_engine_for
from serving.model.units import groups_of
from tests.scripted_peer import ScriptedPeer
from tests.wire_client import WireClient, WrappedSource, create_spec

_READY_S = 60.0
_END_S = 20.0
_SPOILT_ROW = 3


class SpoilingSource(WrappedSource):
    """One latent of the first page that it writes is a hundred times what it was."""

    def __init__(self, source: PageSource, pool: KVPool) -> None:
        super().__init__(source)
        self._pool = pool
        self._is_first = True

    def write(
        self, peer: str, source_page_ids: Sequence[int], target_page_ids: Sequence[int], notification: bytes
    ) -> int:
        if self._is_first:
            self._is_first = False
            self._pool.page(source_page_ids[0])[2, _SPOILT_ROW].mul_(100)
        return super().write(peer, source_page_ids, target_page_ids, notification)


class UnitPair:
    """A prefill and a decode unit of `config`'s sizes. `spoils`: the rank of the prefill unit that changes a latent on its way."""

    def __init__(self, config: Config, model_dir: Path, folder: Path, *, spoils: int | None = None) -> None:
        """`folder`: an empty one of its own."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, "prefill.worker", "decode.worker", "serving.follower"])
        self._stack = ExitStack()
        self.processes: dict[str, list[ForkServerProcess]] = {"prefill": [], "decode": []}
        """By role and rank."""
        self._stack.callback(self._kill)
        try:
            pipes = {
                role: self._start(role, config, model_dir, folder, spoils if role == "prefill" else None)
                for role in self.processes
            }
            self._leaders = {role: _leaders(role, of_role) for role, of_role in pipes.items()}
            self._observer = ScriptedPeer("observer")
            self._stack.callback(self._observer.close)
            for leader in self._leaders["prefill"] + self._leaders["decode"]:
                self._observer.mailbox.connect(leader)
            num_clients = max(map(len, self._leaders.values()))
            self.clients = [self._client(index) for index in range(num_clients)]
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> UnitPair:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def generate(self, prompts: Sequence[list[int]], num_new: int, timeout_s: float = 60.0) -> list[list[int]]:
        """Their greedy texts, all of them at once; the DP groups take turns."""
        clients = self.clients
        requests = [clients[index % len(clients)].submit(prompt, num_new) for index, prompt in enumerate(prompts)]
        for index, client in enumerate(clients):
            client.finish(requests[index :: len(clients)], timeout_s)
        assert not any(request.failures or request.num_preempted for request in requests), requests
        return [request.token_ids for request in requests]

    def metric(self, name: str, *roles: str, **labels: str) -> float:
        """Over the leaders of `roles`, or of both units."""
        total = 0.0
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for role in roles or self._leaders:
            for leader in self._leaders[role]:
                self._observer.say(MetricsQuery(query_id=1), to=leader.worker_id)
                for line in self._observer.hear(MetricsReply).exposition.splitlines():
                    if line.startswith(name + "{") and all(label in line for label in wanted):
                        total += float(line.rsplit(" ", 1)[1])
        return total

    def wait_until_quiet(self, *roles: str, timeout_s: float = 10.0) -> None:
        """Until every page of every group is free or cached."""
        used = ("reserved", "exposed", "filled", "owned", "draining", "quarantined")
        end_s = time.monotonic() + timeout_s
        while any(self.metric("baton_kv_pages", *roles, state=state) for state in used):
            assert time.monotonic() < end_s, [
                (state, self.metric("baton_kv_pages", *roles, state=state)) for state in used
            ]

    def drain(self, *roles: str) -> None:
        """The units end by themselves, and well."""
        for role in roles or self._leaders:
            for leader in self._leaders[role]:
                self._observer.say(Drain(), to=leader.worker_id)
        for role in roles or self._leaders:
            for process in self.processes[role]:
                process.join(_END_S)
            codes = [process.exitcode for process in self.processes[role]]
            assert codes == [0] * len(codes), f"ranks of {role} ended with {codes}"

    def _start(self, role: str, config: Config, model_dir: Path, folder: Path, spoils: int | None) -> list[Connection]:
        pipes = []
        groups = groups_of(unit_table(config, role))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            rendezvous = str(folder / f"{role}-{os.getpid()}")
            if groups.num_nodes > 1:
                rendezvous = f"tcp://127.0.0.1:{listener.getsockname()[1]}/{Path(rendezvous).name}"
            for rank in range(groups.world_size):
                spec = dataclasses.replace(
                    create_spec(f"{role}-0.{rank}", role, config, model_dir=model_dir),
                    unit=f"{role}-0",
                    rank=rank,
                    rendezvous=rendezvous,
                )
                pipe, other = self._context.Pipe()
                held = listener if groups.num_nodes > 1 and rank == 0 else None
                process = self._context.Process(target=_live, args=(other, spec, held, rank == spoils), daemon=True)
                process.start()
                self.processes[role].append(process)
                pipes.append(pipe)
        return pipes

    def _client(self, index: int) -> WireClient:
        prefill, decode = (of_role[index % len(of_role)] for of_role in self._leaders.values())
        client = WireClient(prefill, decode, name=f"router-{index}")
        self._stack.callback(client.close)
        return client

    def _kill(self) -> None:
        for process in self.processes["prefill"] + self.processes["decode"]:
            process.kill()
            process.join()


def _leaders(role: str, pipes: list[Connection]) -> list[PeerAddress]:
    addresses: list[PeerAddress | None] = []
    for rank, pipe in enumerate(pipes):
        assert pipe.poll(_READY_S), f"rank {rank} of the {role} unit does not come up"
        addresses.append(pipe.recv())
    return [address for address in addresses if address is not None]


def _live(pipe: Connection, spec: WorkerSpec, listener: socket.socket | None, spoils: bool) -> None:
    if listener is not None:
        spec = dataclasses.replace(spec, listener=listener.detach())
    worker: Any = _spoiling_worker(spec) if spoils else build_worker(spec)
    pipe.send(worker.address)
    worker.run()


def _spoiling_worker(spec: WorkerSpec) -> Any:
    from prefill.worker import PrefillWorker
    from serving.engine.joining import leads
    from serving.follower import FollowerWorker

    engine = build_engine_for(spec)
    source = SpoilingSource(NixlSource(f"{spec.worker_id}.spoilt", engine.pool), engine.pool)
    return (PrefillWorker if leads(spec) else FollowerWorker)(spec, engine=engine, source=source)
