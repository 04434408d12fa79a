"""A rank's process that has imported everything and loaded nothing: what `baton bench memory` counts from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from serving.cluster.rank import worker_class
from serving.cluster.ray_head import RayHead


class _Bare:
    def import_everything(self, role: str) -> int:
        """What a worker of `role` has imported after its last request, NIXL's module among it. Returns the pid."""
        from kvcache.transfer.nixl import load_nixl

        worker_class(role)
        load_nixl()
        return os.getpid()

    def open_agent(self) -> None:
        """What NIXL and UCX set up for a worker, over a pool of four bytes a row."""
        import torch

        from kvcache.layout import PageLayout
        from kvcache.pool import KVPool
        from kvcache.transfer.nixl import NixlTarget

        layout = PageLayout(num_layers=1, num_mtp_layers=0, row_width=1, element_bytes=4)
        self._target = NixlTarget("bare", KVPool(layout, 1, torch.float32, torch.device("cpu")))


class BareRank:
    """`pid` is the actor's."""

    def __init__(self, actor: Any, pid: int) -> None:
        self._actor = actor
        self.pid = pid

    def open_agent(self) -> None:
        import ray

        ray.get(self._actor.open_agent.remote())


@contextmanager
def bare_ranks(roles: Sequence[str]) -> Iterator[list[BareRank]]:
    """One a role, on a Ray of their own. Raises StartupError."""
    with RayHead(num_cpus=len(roles), num_gpus=0):
        import ray

        actors = [ray.remote(_Bare).options(num_cpus=1).remote() for _ in roles]
        pids = ray.get([actor.import_everything.remote(role) for actor, role in zip(actors, roles, strict=True)])
        yield [BareRank(actor, pid) for actor, pid in zip(actors, pids, strict=True)]
