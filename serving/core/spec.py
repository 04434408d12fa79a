"""What a worker process is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.core.config import Config


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """One rank in one life. `host` is the address that peers reach it under; the worker binds a free port there and says which.

    role: prefill, decode or both. `incarnation` rises with every restart of the same `worker_id`. `secret` authenticates every frame.
    `num_threads` are torch's; `model_dir` is resolved (the embedded model's folder if the configuration names none). `gpu_share`: of the
    memory of its GPU, if it has one; below 1 where ranks share it.

    `unit` and `rank` say which rank of which unit this is; the unit's sizes are those of its table in `config` (`serving.model.units.groups_of`
    makes the groups of them). `rendezvous`: where the ranks of a unit of several find each other, new in every life of it
    (`serving.parallel.rendezvous`): the path of a file that is not there yet, in a folder of the server's own, or, of a server of several nodes, an
    address. `listener`: of the rank that holds it, the file descriptor of the socket that listens there; -1: another does.
    """

    worker_id: str
    role: str
    incarnation: int
    host: str
    secret: bytes = field(repr=False)
    model_dir: str
    num_threads: int
    config: Config
    gpu_share: float = 1.0
    unit: str = ""
    rank: int = 0
    rendezvous: str = ""
    listener: int = -1
