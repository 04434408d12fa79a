"""What wakes a parked unit: any rank rings, every rank that waits goes on.

Rings are numbered, because several may ring for the same waking: one that is late must not wake a unit that has parked again since.
The number is that of the round which the waking begins (`serving.engine.unit`), so all ranks know it alike. Waiting takes no CPU.
Implementations: `TcpBell` between processes, `serving.parallel.virtual.VirtualBell` between virtual ranks.

    rank 0 listens; every other rank keeps one connection to it        a ring -> rank 0 -> everybody else
    a connection that ends before `close` is a rank that is missing: rank 0 tells the others
    a rank gives up -> rank 0 asks everybody how far they are: who does not answer, or is behind, is missing -> everybody

By the last two a bell knows of its ranks what groups in shared memory know (`serving.parallel.collectives.Presence`), also where they are
on several hosts. Between calls nothing travels: how far a rank is stays with it until it is asked.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import NoReturn, Protocol

import torch

from serving.core.errors import StartupError
from serving.parallel.collectives import Collectives, RanksMissing

_HEAD = struct.Struct("<qq")
_NUMBER_BYTES = 8
_HELLO = struct.Struct("<16sq")
_INVITATION_BYTES = 128
_ANSWER_S = 1.0
"""For an answer between two threads that have nothing else to do."""
_HELLO_S = 2.0
"""For what a rank says first: it has nothing else to do, and a stranger that says nothing holds up all who come after it."""


class _Kind(IntEnum):
    """What a rank says; each begins with the kind and how many numbers follow."""

    RING = 0
    """The number that is rung."""
    ENDED = 1
    """Indices of ranks whose connections have."""
    BEHIND = 2
    """Indices of ranks that the others wait for in vain."""
    ASKED = 3
    """To rank 0, with the indices of those who do not come, and by it to all: how far are you?"""
    FAR = 4
    """The answer: how far this rank is."""


_REASONS = {_Kind.ENDED: "its connection has ended", _Kind.BEHIND: "the others wait for it in vain"}


class Bell(Protocol):
    """One rank's end."""

    def ring(self, number: int) -> None:
        """Every rank's wait for `number`, or for one before it, returns, now or when it is made. From any thread."""

    def wait(self, number: int, timeout_s: float | None) -> bool:
        """Whether `number`, or a later one, has been rung; waits up to `timeout_s` for it (None: for ever). Raises RanksMissing."""

    def tell(self, rung: Callable[[], None]) -> None:
        """`rung` is called, from any thread, whenever a wait may have become shorter: for who waits for something else too."""

    def close(self) -> None:
        """The others' waits raise RanksMissing from now on, unless they have closed theirs."""


class TcpBell:
    """Joins the ranks of `world`, each in a process of its own, of one host or of several; returns or raises within `deadline_s`.

    `host`: the address under which the others reach this rank; rank 0's is what counts. A rank is admitted by a token that
    travels over `world`.
    """

    def __init__(self, world: Collectives, *, host: str, deadline_s: float) -> None:
        """Raises StartupError, RanksMissing."""
        self._ranks = world.ranks
        self._rank = world.rank
        self._rung = -1
        self._missing: RanksMissing | None = None
        self._progress = 0
        self._far: dict[int, int] | None = None
        """On rank 0 while it asks: how far those are who have answered."""
        self._closing = False
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._deciding = threading.Lock()
        """Held from when rank 0 tells who is missing until its own wait knows: of what two threads hear at once, all ranks go by the same."""
        self._told: Callable[[], None] = _nobody
        self._peers = self._join(world, host, deadline_s)
        self._thread = threading.Thread(target=self._read, name=f"bell-{self._rank}", daemon=True)
        self._thread.start()

    def ring(self, number: int) -> None:
        self._hear(_Kind.RING, [number], sender=self._rank)

    def wait(self, number: int, timeout_s: float | None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._rung >= number or self._missing is not None, timeout_s)
            if self._missing is not None:
                raise self._missing
            return self._rung >= number

    def tell(self, rung: Callable[[], None]) -> None:
        self._told = rung

    def advance(self) -> None:
        self._progress += 1

    def reach(self, far: int) -> None:
        self._progress = far

    def check(self) -> None:
        self.wait(-1, 0.0)

    def give_up(self, ranks: Sequence[int] = ()) -> NoReturn:
        among = [self._ranks.index(rank) for rank in ranks] or list(range(len(self._ranks)))
        if self._rank:
            self._say(_Kind.ASKED, among, to=[0])
        else:
            self._ask_all(self._rank, among)
        with self._changed:
            # Rank 0 asks the others first.
            if not self._changed.wait_for(lambda: self._missing is not None, 2 * _ANSWER_S):
                self._missing = self._named(_Kind.BEHIND, [0])
            assert self._missing is not None
            raise self._missing

    def close(self) -> None:
        self._closing = True
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for connection in self._peers.values():
            connection.close()

    def _join(self, world: Collectives, host: str, deadline_s: float) -> dict[int, socket.socket]:
        """Connections by index in the world: rank 0's to everybody, everybody's to rank 0."""
        invitation = torch.zeros(_INVITATION_BYTES, dtype=torch.uint8)
        if self._rank:
            world.broadcast(invitation, 0).wait()
            return {0: _connected(bytes(invitation.tolist()), self._rank, self._ranks, deadline_s)}
        with _listening(host) as listener:
            token, address = os.urandom(16), listener.getsockname()
            text = f"{address[1]} {address[0]}".encode()
            invitation[: 16 + len(text)] = torch.frombuffer(bytearray(token + text), dtype=torch.uint8)
            world.broadcast(invitation, 0).wait()
            return _admitted(listener, token, self._ranks, deadline_s)

    def _read(self) -> None:
        """Until every connection has ended."""
        with selectors.DefaultSelector() as selector:
            for index, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    index = key.data
                    kind, numbers = _said(self._peers[index])
                    if kind is None:
                        selector.unregister(self._peers[index])
                        kind, numbers = _Kind.ENDED, [index]
                    if not self._closing:
                        self._hear(kind, numbers, sender=index)

    def _hear(self, kind: _Kind, numbers: list[int], *, sender: int) -> None:
        """What concerns all rank 0 passes on."""
        if kind is _Kind.ASKED:
            if self._rank:
                self._say(_Kind.FAR, [self._progress], to=[0])
            else:
                self._ask_all(sender, numbers)
            return
        with self._deciding if kind in _REASONS else contextlib.nullcontext():
            if kind is not _Kind.FAR and (not self._rank or sender == self._rank):
                # First: where it ends a wait, this rank may end too, and the others would hear of that alone.
                self._pass_on(kind, numbers, sender)
            with self._changed:
                if kind is _Kind.RING:
                    self._rung = max(self._rung, numbers[0])
                elif kind is _Kind.FAR:
                    if self._far is not None:
                        self._far[sender] = numbers[0]
                elif self._missing is None:
                    self._missing = self._named(kind, numbers)
                self._changed.notify_all()
        self._told()

    def _pass_on(self, kind: _Kind, numbers: list[int], sender: int) -> None:
        """To all but the sender; of who is missing what is heard first alone."""
        if kind is _Kind.RING or self._missing is None:
            self._say(kind, numbers, to=[index for index in self._peers if index != sender])

    def _ask_all(self, asker: int, among: list[int]) -> None:
        """On rank 0: everybody is told who is missing, within a moment, if it has not been found out before."""
        with self._changed:
            if self._far is not None or self._missing is not None:
                return
            self._far = {self._rank: self._progress}
        threading.Thread(target=self._compare, args=(asker, among), name="bell-compares", daemon=True).start()

    def _compare(self, asker: int, among: list[int]) -> None:
        self._say(_Kind.ASKED, [], to=self._peers)
        everybody = range(len(self._ranks))
        with self._changed:
            far = self._far
            assert far is not None
            self._changed.wait_for(lambda: len(far) == len(everybody) or self._missing is not None, _ANSWER_S)
            self._far = None
        missing = [index for index in everybody if index not in far]
        if not missing:
            least, most = min(far[index] for index in among), max(far[index] for index in among)
            missing = [index for index in among if (far[index] == least if least < most else index != asker)]
        self._hear(_Kind.BEHIND, missing, sender=self._rank)

    def _say(self, kind: _Kind, numbers: list[int], *, to: Iterable[int]) -> None:
        word = _HEAD.pack(kind, len(numbers)) + struct.pack(f"<{len(numbers)}q", *numbers)
        with self._sending:
            for index in to:
                with contextlib.suppress(OSError):  # its end is heard by `_read`
                    self._peers[index].sendall(word)

    def _named(self, kind: _Kind, indices: list[int]) -> RanksMissing:
        return RanksMissing([self._ranks[index] for index in indices], group="bell", reason=_REASONS[kind])


def _nobody() -> None:
    """Until there is somebody to tell."""


def _listening(host: str) -> socket.socket:
    try:
        return socket.create_server((socket.gethostbyname(host), 0))
    except OSError as error:
        raise StartupError(f"cannot listen on {host}: {error}; give an address of this machine") from error


def _connected(invitation: bytes, index: int, ranks: tuple[int, ...], deadline_s: float) -> socket.socket:
    token, (port, host) = invitation[:16], invitation[16:].rstrip(b"\0").decode().split(" ", 1)
    try:
        connection = socket.create_connection((host, int(port)), deadline_s)
        connection.sendall(_HELLO.pack(token, index))
    except OSError as error:
        raise RanksMissing([ranks[0]], group="bell", reason=f"{host}:{port}: {error}") from error
    return _kept_alive(connection)


def _admitted(
    listener: socket.socket, token: bytes, ranks: tuple[int, ...], deadline_s: float
) -> dict[int, socket.socket]:
    """Connections of all other ranks. A stranger is sent away."""
    admitted: dict[int, socket.socket] = {}
    due_s = time.monotonic() + deadline_s
    while len(admitted) < len(ranks) - 1:
        listener.settimeout(max(1e-3, due_s - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except OSError as error:
            for joined in admitted.values():
                joined.close()
            absent = [rank for index, rank in enumerate(ranks) if index and index not in admitted]
            raise RanksMissing(absent, group="bell", reason=f"deadline {deadline_s:g} s") from error
        connection.settimeout(_HELLO_S)
        hello = _received(connection, _HELLO.size)
        said, index = _HELLO.unpack(hello) if hello else (b"", 0)
        if said == token and 0 < index < len(ranks):
            admitted[index] = _kept_alive(connection)
        else:
            connection.close()
    return admitted


def _kept_alive(connection: socket.socket) -> socket.socket:
    """The kernel finds out within some ten seconds that a host is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _said(connection: socket.socket) -> tuple[_Kind | None, list[int]]:
    """None: the connection has ended."""
    head = _received(connection, _HEAD.size)
    if not head:
        return None, []
    kind, count = _HEAD.unpack(head)
    numbers = _received(connection, count * _NUMBER_BYTES) if count else b""
    return (
        (_Kind(kind), list(struct.unpack(f"<{count}q", numbers)))
        if len(numbers) == count * _NUMBER_BYTES
        else (None, [])
    )


def _received(connection: socket.socket, num_bytes: int) -> bytes:
    """b"": the connection has ended."""
    with contextlib.suppress(OSError):
        data = connection.recv(num_bytes, socket.MSG_WAITALL)
        if len(data) == num_bytes:
            return data
    return b""
