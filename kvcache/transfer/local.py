"""Pages between two pools of one process, by tensor copies: tests, and prefill and decode side by side in one process.

A `LocalFabric` is what joins them; sources and targets of the same fabric reach each other. A write is complete when
`write` returns and is reported by the next `poll`, as an asynchronous backend would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from kvcache.pool import KVPool
from kvcache.transfer.base import Completed, runs
from serving.core.errors import PeerError

_PAUSE_S = 1e-3


class LocalFabric:
    """Who can be written to, by name."""

    def __init__(self) -> None:
        self._targets: dict[str, LocalTarget] = {}

    def target(self, name: str, pool: KVPool) -> LocalTarget:
        assert name not in self._targets, f"there is a target {name} already"
        self._targets[name] = LocalTarget(name, pool, self)
        return self._targets[name]

    def source(self, pool: KVPool) -> LocalSource:
        return LocalSource(pool, self)

    def find(self, name: str) -> LocalTarget | None:
        return self._targets.get(name)

    def remove(self, name: str) -> None:
        self._targets.pop(name, None)


class LocalTarget:
    """A PageTarget."""

    def __init__(self, name: str, pool: KVPool, fabric: LocalFabric) -> None:
        self.pool = pool
        self._name = name
        self._fabric = fabric
        self._arrived: deque[bytes] = deque()

    @property
    def agent(self) -> bytes:
        return self._name.encode()

    @property
    def pause_s(self) -> float:
        return _PAUSE_S

    def arrive(self, notification: bytes) -> None:
        self._arrived.append(notification)

    def notifications(self) -> list[bytes]:
        return [self._arrived.popleft() for _ in range(len(self._arrived))]

    def close(self) -> None:
        self._fabric.remove(self._name)


class LocalSource:
    """A PageSource."""

    def __init__(self, pool: KVPool, fabric: LocalFabric) -> None:
        self._pool = pool
        self._fabric = fabric
        self._done: list[Completed] = []
        self._next_handle = 0

    @property
    def num_open(self) -> int:
        return len(self._done)

    @property
    def pause_s(self) -> float:
        return _PAUSE_S

    def connect(self, agent: bytes) -> str:
        name = agent.decode(errors="replace")
        target = self._fabric.find(name)
        if target is None:
            raise PeerError(f"no pool {name!r} in this process; a local fabric reaches no other process, use NIXL")
        if target.pool.layout != self._pool.layout or target.pool.tensor.dtype != self._pool.tensor.dtype:
            raise PeerError(
                f"pool {name!r} has other pages than ours; start both workers with the same model and dtype"
            )
        return name

    def disconnect(self, peer: str) -> None:
        """There is nothing to forget."""

    def write(
        self, peer: str, source_page_ids: Sequence[int], target_page_ids: Sequence[int], notification: bytes
    ) -> int:
        self._next_handle += 1
        target = self._fabric.find(peer)
        error = f"pool {peer!r} is closed" if target is None else None
        if target is not None:
            error = self._copy(target, source_page_ids, target_page_ids, notification)
        self._done.append(Completed(self._next_handle, error))
        return self._next_handle

    def poll(self) -> list[Completed]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self._done = []

    def _copy(
        self, target: LocalTarget, source_page_ids: Sequence[int], target_page_ids: Sequence[int], notification: bytes
    ) -> str | None:
        if not all(0 <= page_id < target.pool.num_pages for page_id in target_page_ids):
            return f"pages {list(target_page_ids)} are not all in a pool of {target.pool.num_pages}"
        for source, first, num in runs(source_page_ids, target_page_ids):
            target.pool.tensor[first : first + num].copy_(self._pool.tensor[source : source + num])
        if target.pool.tensor.is_cuda:
            torch.cuda.synchronize(target.pool.tensor.device)
        target.arrive(notification)
        return None
