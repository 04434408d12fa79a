"""Where the ranks of a unit first meet: a store at an address that each of them is told, new in every life of the unit.

    tcp://host:port/name    rank 0 holds it, and all reach it there; nothing is shared between hosts but the network
    a path                  of a file that is not there yet; for ranks of one host

The name, or the file's, is new too, and good for whatever else they share on a host. Whoever reaches the port may read and write what is in
the store, which are the addresses of the ranks, as whoever reaches gloo's and NCCL's own ports may speak to them: the network has to be the unit's own.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from torch._C._distributed_c10d import FileStore, Store, TCPStore

from serving.parallel.collectives import RanksMissing

_TCP = "tcp"


def open_store(rendezvous: str, *, world_size: int, listener: int, deadline_s: float) -> Store:
    """`listener`: the file descriptor of the socket that listens there, which is this rank's from then on; -1: it is another's. Raises
    RanksMissing if nobody answers there within the deadline."""
    parts = urlsplit(rendezvous)
    if parts.scheme != _TCP:
        return FileStore(rendezvous, world_size)
    assert parts.hostname is not None, f"{rendezvous} is no address"
    assert parts.port is not None, f"{rendezvous} is no address"
    holds = listener >= 0
    try:
        return TCPStore(
            parts.hostname,
            parts.port,
            is_master=holds,
            wait_for_workers=False,
            timeout=timedelta(seconds=deadline_s),
            master_listen_fd=listener if holds else None,
        )
    except RuntimeError as error:
        raise RanksMissing([0], group="rendezvous", reason=f"{rendezvous}: {str(error).splitlines()[0]}") from error


def name_of(rendezvous: str) -> str:
    """Its own among all units and lives."""
    return Path(rendezvous).name
