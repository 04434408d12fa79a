"""A worker under test among scripted peers, and what a test may ask of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

from serving.core.messages import PeerAddress
from serving.worker import Worker
from tests.engine_factory import GREEDY
from tests.scripted_peer import ScriptedPeer
from tests.wire_client import Running

W = TypeVar("W", bound=Worker[Any, Any])


def num_used(worker: Worker[Any, Any]) -> int:
    """Pages that are neither free nor cached."""
    pages = worker.pages()
    return sum(pages.values()) - pages["free"] - pages["cached"]


def job_fields(prompt: list[int], **fields: Any) -> dict[str, Any]:
    """Of a PrefillJob or a DecodeJob: four tokens after `prompt`, if `fields` do not say otherwise."""
    defaults: dict[str, Any] = {
        "token_ids": prompt,
        "num_prompt_tokens": len(prompt),
        "sampling": GREEDY,
        "max_new_tokens": 4,
        "budget_s": 60.0,
    }
    return defaults | fields


class Stage(Generic[W]):
    """Runs `worker`, with a scripted router; `stack` ends both, and every further peer."""

    def __init__(self, worker: W, stack: ExitStack) -> None:
        self.worker, self._stack = worker, stack
        self.running = Running(worker)
        stack.callback(self.running.close)
        self.router = self.peer("router-0", worker.address)

    def peer(self, name: str, worker: PeerAddress | None = None, *, incarnation: int = 1) -> ScriptedPeer:
        """As ScriptedPeer; closed with the stage."""
        peer = ScriptedPeer(name, worker, incarnation=incarnation)
        self._stack.callback(peer.close)
        return peer

    def used(self) -> int:
        return num_used(self.worker)

    def wait(self, until: Callable[[], bool], timeout_s: float = 2.0) -> None:
        end_s = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end_s, f"not within {timeout_s} s; {self.worker.pages()}"
            time.sleep(0.01)
