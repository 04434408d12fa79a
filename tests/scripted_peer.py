"""A peer of a worker under test that says what the test wants it to say, over a real socket."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from serving.core.messages import AnyMessage, PeerAddress
from serving.mailbox import Mailbox, PeerGone, Received
from serving.metrics import Metrics
from tests.wire_client import SECRET

M = TypeVar("M")


class ScriptedPeer:
    """Connects to `worker` if it is given; else it waits to be connected to."""

    def __init__(self, name: str, worker: PeerAddress | None = None, *, incarnation: int = 1) -> None:
        self.name = name
        self._worker_id = None if worker is None else worker.worker_id
        self._inbox: list[AnyMessage] = []
        self.gone: list[PeerGone] = []
        self.mailbox: Mailbox[object] = Mailbox(
            worker_id=name,
            incarnation=incarnation,
            host="127.0.0.1",
            secret=SECRET,
            heartbeat_s=0.2,
            metrics=Metrics("worker", worker=name),
        )
        self.mailbox.start()
        if worker is not None:
            self.mailbox.connect(worker)

    @property
    def address(self) -> PeerAddress:
        return self.mailbox.address

    def say(self, message: AnyMessage, to: str | None = None) -> None:
        receiver = to or self._worker_id
        assert receiver is not None
        self.mailbox.post(receiver, message)

    def hear(self, kind: type[M], timeout_s: float = 5.0, **fields: Any) -> M:
        """The next message of this kind with these fields; others are kept for later calls."""
        end_s = time.monotonic() + timeout_s
        while True:
            for message in self._inbox:
                if isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items()):
                    self._inbox.remove(message)
                    return message
            assert time.monotonic() < end_s, f"{self.name} hears no {kind.__name__} {fields}, only {self._inbox}"
            self._listen(0.05)

    def hears_no(self, kind: type[Any], for_s: float) -> bool:
        end_s = time.monotonic() + for_s
        while time.monotonic() < end_s:
            self._listen(0.02)
        return not any(isinstance(message, kind) for message in self._inbox)

    def close(self) -> None:
        self.mailbox.close()

    def _listen(self, timeout_s: float) -> None:
        for event in self.mailbox.get(timeout_s):
            if isinstance(event, Received):
                self._inbox.append(event.message)
            elif isinstance(event, PeerGone):
                self.gone.append(event)
