"""All ranks of a prefill and of a decode unit as processes, built from their specs as the actors would, with routers for tests."""

from __future__ import annotations

import dataclasses
import multiprocessing
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
from serving.core.messages import Drain, PeerAddress
from serving.core.spec import WorkerSpec
from serving.engine.build import build_engine_for
from serving.model.units import groups_of
from tests.wire_client import Request, WireClient, WrappedSource, create_spec

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
    """A prefill and a decode unit of `config`'s sizes. `close` drains both and raises if a process does not end well.

    `spoils`: the rank of the prefill unit that changes a latent on its way.
    """

    def __init__(self, config: Config, model_dir: Path, folder: Path, *, spoils: int | None = None) -> None:
        """`folder`: an empty one of its own."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, "prefill.worker", "decode.worker", "serving.follower"])
        self._stack = ExitStack()
        self._processes: list[ForkServerProcess] = []
        self._pipes: dict[str, list[Connection]] = {"prefill": [], "decode": []}
        try:
            for role in self._pipes:
                self._start(role, config, model_dir, str(folder / role), spoils if role == "prefill" else None)
            self.prefill, self.decode = (self._leaders(role) for role in ("prefill", "decode"))
        except BaseException:
            self._kill()
            raise
        num_clients = max(len(self.prefill), len(self.decode))
        self.clients = [self._client(index) for index in range(num_clients)]

    def generate(self, prompts: Sequence[list[int]], num_new: int, timeout_s: float = 60.0) -> list[list[int]]:
        """Their greedy texts, all of them at once; the DP groups take turns."""
        clients = self.clients
        requests = [clients[index % len(clients)].submit(prompt, num_new) for index, prompt in enumerate(prompts)]
        for index, client in enumerate(clients):
            client.finish(requests[index :: len(clients)], timeout_s)
        assert not any(request.failures or request.num_preempted for request in requests), requests
        return [request.token_ids for request in requests]

    def submit(self, prompt: list[int], num_new: int) -> tuple[WireClient, Request]:
        return self.clients[0], self.clients[0].submit(prompt, num_new)

    def metric(self, name: str, **labels: str) -> float:
        """Over the leaders of both units."""
        total = 0.0
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for worker, text in self._scrape().items():
            for line in text.splitlines():
                if line.startswith(name + "{") and all(label in line for label in wanted):
                    assert f'worker="{worker}"' in line
                    total += float(line.rsplit(" ", 1)[1])
        return total

    def is_quiet(self) -> bool:
        """Every page of every group is free or cached."""
        return all(
            self.metric("baton_kv_pages", state=state) == 0
            for state in ("reserved", "exposed", "filled", "owned", "draining", "quarantined")
        )

    def wait_until_quiet(self, timeout_s: float = 5.0) -> None:
        end_s = time.monotonic() + timeout_s
        while not self.is_quiet():
            assert time.monotonic() < end_s, self._scrape()

    def close(self) -> None:
        try:
            for role in (self.prefill, self.decode):
                for address in role:
                    client = next(c for c in self.clients if address in (c.prefill, c.decode))
                    client.mailbox.post(address.worker_id, Drain())
            for process in self._processes:
                process.join(_END_S)
            codes = [process.exitcode for process in self._processes]
            assert codes == [0] * len(codes), f"ranks ended with {codes}"
        finally:
            self._kill()

    def _start(self, role: str, config: Config, model_dir: Path, rendezvous: str, spoils: int | None) -> None:
        for rank in range(groups_of(unit_table(config, role)).world_size):
            spec = dataclasses.replace(
                create_spec(f"{role}-0.{rank}", role, config, model_dir=model_dir),
                unit=f"{role}-0",
                rank=rank,
                rendezvous=rendezvous,
            )
            pipe, other = self._context.Pipe()
            process = self._context.Process(target=_live, args=(other, spec, rank == spoils), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes[role].append(pipe)

    def _leaders(self, role: str) -> list[PeerAddress]:
        addresses = []
        for rank, pipe in enumerate(self._pipes[role]):
            assert pipe.poll(_READY_S), f"rank {rank} of the {role} unit does not come up"
            addresses.append(pipe.recv())
        return [address for address in addresses if address is not None]

    def _client(self, index: int) -> WireClient:
        prefill, decode = self.prefill[index % len(self.prefill)], self.decode[index % len(self.decode)]
        client = WireClient(prefill, decode, name=f"router-{index}")
        self._stack.callback(client.close)
        return client

    def _scrape(self) -> dict[str, str]:
        texts: dict[str, str] = {}
        for client in self.clients:
            texts |= client.scrape()
        return texts

    def _kill(self) -> None:
        self._stack.close()
        for process in self._processes:
            process.kill()
            process.join()


def _live(pipe: Connection, spec: WorkerSpec, spoils: bool) -> None:
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
