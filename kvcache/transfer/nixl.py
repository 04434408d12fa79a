"""Pages over NIXL with UCX: one-sided writes into registered memory, shared memory or TCP or RDMA as UCX finds them.

    source                                            target
    write: descriptors, post  ---------------------->  its memory
    poll: state, release      ----notification------>  notifications

One agent a worker, its pool registered once. NIXL's own progress thread stays off (it burns a core): `poll` and
`notifications` drive the agent, from the worker's I/O thread and only while something is open. Adjacent pages go as one
descriptor, because descriptor size decides the bandwidth: a page holds all layers, so a single one is large enough. On GPUs of
one host UCX copies from pool to pool (CUDA IPC over NVLink), on streams of its own: the source's pages must be complete when
`write` is called, and whoever reads the target's pages does so in a step launched after the notification. A handle is released in every case; one that NIXL cannot
release yet is tried again and not reported before; why is logged.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from kvcache.pool import KVPool
from kvcache.transfer.base import Completed, runs
from serving.core.errors import PeerError, StartupError

_PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")
_MAX_ERRORS = 1000  # a second or more of polls
# 128 MB take 0.4 ms over NVLink, and 30 from DRAM to DRAM.
_PAUSE_S = {"DRAM": 1e-3, "VRAM": 5e-5}

log = logging.getLogger("baton.nixl")


class AgentInfo(msgspec.Struct, frozen=True):
    """`KVTicket.agent`: NIXL's metadata of the target, and where its pool lies. memory: DRAM or VRAM."""

    metadata: bytes
    base_address: int
    page_bytes: int
    num_pages: int
    memory: str
    device_id: int


def load_nixl() -> Any:
    """NIXL's Python module. Raises StartupError that says what to install."""
    for package in _PACKAGES:
        try:
            module = importlib.import_module(f"{package}._api")
        except ImportError:
            continue
        logging.getLogger("nixl").setLevel(logging.WARNING)
        return module
    raise StartupError(
        'NIXL is not installed: run "pip install nixl_cu13" (nixl_cu12 for CUDA 12), it runs without a GPU too'
    )


class _Agent:
    """A NIXL agent with one registered pool."""

    def __init__(self, name: str, pool: KVPool) -> None:
        """Raises StartupError."""
        nixl = load_nixl()
        self.pool = pool
        self.memory = "VRAM" if pool.tensor.is_cuda else "DRAM"
        self.device_id = pool.tensor.get_device() if pool.tensor.is_cuda else 0
        self._thread = 0
        try:
            config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            self.nixl = nixl.nixl_agent(name, config)
            region = (pool.base_address, pool.num_bytes, self.device_id, "")
            self._registered = self.nixl.register_memory([region], self.memory)
        except Exception as error:
            raise StartupError(
                f"NIXL cannot register a pool of {pool.num_bytes} bytes with UCX: {error}; lower kv.*_pages"
            ) from error

    def enter(self) -> None:
        """Before anything that moves bytes: UCX looks for the GPU in the calling thread's CUDA context, and a new thread has none."""
        if self.memory == "VRAM" and self._thread != threading.get_ident():
            torch.cuda.set_device(self.device_id)
            torch.cuda.current_stream(self.device_id).query()
            self._thread = threading.get_ident()

    def descriptors(self, base_address: int, stretches: Sequence[tuple[int, int]], memory: str, device_id: int) -> Any:
        """NIXL's list for (first page, number of pages) stretches of a pool at `base_address`."""
        size = self.pool.layout.page_bytes
        return self.nixl.get_xfer_descs(
            [(base_address + page * size, num * size, device_id) for page, num in stretches], memory
        )

    def close(self) -> None:
        self.nixl.deregister_memory(self._registered)


class NixlTarget:
    """A PageTarget. `name` must be unique in the cluster."""

    def __init__(self, name: str, pool: KVPool) -> None:
        self._agent = _Agent(name, pool)
        info = AgentInfo(
            metadata=self._agent.nixl.get_agent_metadata(),
            base_address=pool.base_address,
            page_bytes=pool.layout.page_bytes,
            num_pages=pool.num_pages,
            memory=self._agent.memory,
            device_id=self._agent.device_id,
        )
        self._info = msgspec.msgpack.encode(info)
        self._num_errors = 0

    @property
    def agent(self) -> bytes:
        return self._info

    @property
    def pause_s(self) -> float:
        return _PAUSE_S[self._agent.memory]

    def notifications(self) -> list[bytes]:
        """Raises what NIXL raises once it has raised _MAX_ERRORS times in a row: then the agent is broken, not a peer."""
        self._agent.enter()
        try:
            arrived = self._agent.nixl.get_new_notifs()
        except Exception as error:
            # A peer's connection broke: what it announced is lost, and its hand-off will not move.
            self._num_errors += 1
            if self._num_errors >= _MAX_ERRORS:
                raise
            if _worth_a_line(self._num_errors):
                log.warning("%d errors in a row; the last: %s", self._num_errors, error)
            return []
        self._num_errors = 0
        return [message for messages in arrived.values() for message in messages]

    def close(self) -> None:
        self._agent.close()


@dataclass(slots=True)
class _Peer:
    info: AgentInfo
    agent: bytes
    num_open: int = 0
    leaving: bool = False


@dataclass(slots=True)
class _Write:
    """`xfer` None: it never started, or is released. `error` is set once it has failed and waits to be released.

    `num_refusals`: how often NIXL would not release it.
    """

    peer: str
    xfer: Any = None
    error: str | None = None
    done: bool = False
    num_refusals: int = 0


class NixlSource:
    """A PageSource. `name` must be unique in the cluster."""

    def __init__(self, name: str, pool: KVPool) -> None:
        self._agent = _Agent(name, pool)
        self._peers: dict[str, _Peer] = {}
        self._names: dict[bytes, str] = {}
        self._open: dict[int, _Write] = {}
        self._next_handle = 0

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def pause_s(self) -> float:
        return _PAUSE_S[self._agent.memory]

    def connect(self, agent: bytes) -> str:
        if agent in self._names:
            return self._names[agent]
        self._agent.enter()
        try:
            info = msgspec.msgpack.decode(agent, type=AgentInfo)
        except msgspec.MsgspecError as error:
            raise PeerError(
                f"the ticket does not describe a NIXL agent: {error}; every worker of a server must run the same release"
            ) from error
        if info.page_bytes != self._agent.pool.layout.page_bytes:
            raise PeerError(f"the peer's pages have {info.page_bytes} bytes, ours {self._agent.pool.layout.page_bytes}")
        if info.memory != self._agent.memory:
            raise PeerError(
                f"the peer's pool is in {info.memory}, ours in {self._agent.memory}; start both workers with the same model.device"
            )
        try:
            name = _text(self._agent.nixl.add_remote_agent(info.metadata))
        except Exception as error:
            raise PeerError(f"NIXL cannot reach the peer: {error}") from error
        self._names[agent] = name
        self._peers[name] = _Peer(info, agent)
        return name

    def disconnect(self, peer: str) -> None:
        if peer in self._peers:
            self._peers[peer].leaving = True
            self._part(peer)

    def write(
        self, peer: str, source_page_ids: Sequence[int], target_page_ids: Sequence[int], notification: bytes
    ) -> int:
        self._next_handle += 1
        write = _Write(peer)
        self._open[self._next_handle] = write
        known = self._peers.get(peer)
        if known is None:
            write.error = f"{peer} is not connected"
            return self._next_handle
        known.num_open += 1
        self._agent.enter()
        try:
            self._post(write, known.info, list(runs(source_page_ids, target_page_ids)), notification)
        except Exception as error:
            write.error = f"{type(error).__name__}: {error}"
        return self._next_handle

    def poll(self) -> list[Completed]:
        over: list[Completed] = []
        if self._open:
            self._agent.enter()
        for handle, write in list(self._open.items()):
            self._check(write)
            if (write.done or write.error is not None) and self._released(write):
                del self._open[handle]
                self._gone(write.peer)
                over.append(Completed(handle, write.error))
        return over

    def close(self) -> None:
        for write in self._open.values():
            self._released(write)
        self._open.clear()
        for name in list(self._peers):
            self._peers[name].num_open = 0
            self.disconnect(name)
        self._agent.close()

    def _post(self, write: _Write, info: AgentInfo, stretches: list[tuple[int, int, int]], notification: bytes) -> None:
        if not all(target >= 0 and target + num <= info.num_pages for _, target, num in stretches):
            raise PeerError(f"pages {stretches} are not all in a pool of {info.num_pages}")
        agent = self._agent
        ours = [(source, num) for source, _, num in stretches]
        theirs = [(target, num) for _, target, num in stretches]
        local = agent.descriptors(agent.pool.base_address, ours, agent.memory, agent.device_id)
        remote = agent.descriptors(info.base_address, theirs, info.memory, info.device_id)
        write.xfer = agent.nixl.initialize_xfer("WRITE", local, remote, write.peer, notification)
        self._note(write, agent.nixl.transfer(write.xfer))

    def _check(self, write: _Write) -> None:
        if write.done or write.error is not None:
            return
        try:
            self._note(write, self._agent.nixl.check_xfer_state(write.xfer))
        except Exception as error:
            write.error = f"{type(error).__name__}: {error}"

    @staticmethod
    def _note(write: _Write, state: str) -> None:
        if state == "ERR":
            write.error = "NIXL reports a failed transfer"
        write.done = state == "DONE"

    def _released(self, write: _Write) -> bool:
        """False: not yet."""
        if write.xfer is None:
            return True
        try:
            self._agent.nixl.release_xfer_handle(write.xfer)
        except Exception as error:
            write.num_refusals += 1
            if _worth_a_line(write.num_refusals):
                log.warning(
                    "a write to %s is not released after %d attempts: %s; its pages are held until then",
                    write.peer,
                    write.num_refusals,
                    error,
                )
            return False
        write.xfer = None
        if write.num_refusals:
            log.warning("a write to %s was released after %d attempts", write.peer, write.num_refusals + 1)
        return True

    def _gone(self, peer: str) -> None:
        known = self._peers.get(peer)
        if known is not None:
            known.num_open -= 1
            self._part(peer)

    def _part(self, peer: str) -> None:
        known = self._peers[peer]
        if known.leaving and known.num_open == 0:
            del self._peers[peer], self._names[known.agent]
            with contextlib.suppress(Exception):  # its process may have ended; there is nothing left to part from
                self._agent.nixl.remove_remote_agent(peer)


def _worth_a_line(count: int) -> bool:
    """1, 2, 4, 8: polls come a thousand times a second and must not fill the log."""
    return count & (count - 1) == 0


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
