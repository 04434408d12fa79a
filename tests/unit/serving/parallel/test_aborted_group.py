"""Nobody waits for a group that is being aborted. The backend is a stand-in that holds its lock as torch's NCCL does while it aborts: until
the last captured step that names the group is let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from serving.parallel.collectives import Handle
from serving.parallel.distributed import TorchCollectives

LONG_S = 10.0


class Come:
    """The work of a call that is done."""

    def wait(self) -> None:
        """Nothing is left to do."""


class HeldUp:
    """`let_go`: what the abort waits for. `answers`: what a call waits for, once it has been let in."""

    def __init__(self) -> None:
        self.let_go, self.answers = threading.Event(), threading.Event()
        self.aborts, self.enters = threading.Event(), threading.Event()
        self.events: list[str] = []
        self._lock = threading.Lock()

    def alltoall_base(self, output: Tensor, input: Tensor, recv: list[int], send: list[int]) -> Come:
        with self._lock:
            self.events.append("called")
        self.enters.set()
        self.answers.wait(LONG_S)
        self.events.append("answered")
        return Come()

    def abort(self) -> None:
        with self._lock:
            self.events.append("aborted")
            self.aborts.set()
            self.let_go.wait(LONG_S)


@pytest.fixture
def backend() -> Iterator[HeldUp]:
    backend = HeldUp()
    yield backend
    backend.let_go.set()
    backend.answers.set()


@pytest.fixture
def group(backend: HeldUp) -> TorchCollectives:
    store = torch.distributed.HashStore()
    group = TorchCollectives(backend="gloo", store=store, ranks=(0,), rank=0, name="tp", deadline_s=LONG_S)
    group._group, group._backend = backend, "nccl"  # type: ignore[assignment]
    return group


def in_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def issue(group: TorchCollectives) -> Handle:
    return group.all_gather(torch.zeros(1, 8), torch.ones(1, 8))


def test_a_call_into_a_group_that_is_being_aborted_ends_at_once(backend: HeldUp, group: TorchCollectives) -> None:
    backend.answers.set()
    issue(group).wait()
    issued = issue(group)
    in_background(group.abort)
    assert backend.aborts.wait(1.0)
    begin_s = time.monotonic()
    with pytest.raises(RuntimeError, match="tp was aborted"):
        issue(group)
    # What it would bring is worth nothing.
    with pytest.raises(RuntimeError, match="tp was aborted"):
        issued.wait()
    assert time.monotonic() - begin_s < 1.0
    # The group itself would have kept the caller.
    caller = in_background(lambda: backend.alltoall_base(torch.zeros(1), torch.zeros(1), [], []))
    caller.join(0.2)
    assert caller.is_alive()
    backend.let_go.set()
    caller.join(LONG_S)
    assert not caller.is_alive()


def test_a_call_that_has_begun_is_let_through_unless_it_waits_for_the_device(
    backend: HeldUp, group: TorchCollectives
) -> None:
    in_background(lambda: issue(group))
    assert backend.enters.wait(1.0)
    in_background(group.abort)
    time.sleep(0.02)
    backend.answers.set()
    assert backend.aborts.wait(1.0)
    assert backend.events == ["called", "answered", "aborted"]


def test_a_call_that_waits_for_the_device_keeps_no_abort(backend: HeldUp, group: TorchCollectives) -> None:
    in_background(lambda: issue(group))
    assert backend.enters.wait(1.0)
    in_background(group.abort)
    assert backend.aborts.wait(1.0)
    assert backend.events == ["called", "aborted"]
