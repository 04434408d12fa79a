"""What was there when a process became ready is looked at by no later collection; what comes afterwards is."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from router import __main__ as router
from serving.cluster import rank
from serving.core.collector import passing_over_what_is_loaded
from serving.core.config import load_config
from serving.core.spec import WorkerSpec

SPEC = WorkerSpec(
    worker_id="decode-0",
    role="decode",
    incarnation=1,
    host="127.0.0.1",
    secret=bytes(32),
    model_dir="",
    num_threads=1,
    config=load_config(),
)


@pytest.fixture
def unfrozen() -> Iterator[None]:
    assert gc.get_freeze_count() == 0
    yield
    gc.unfreeze()


class Node:
    """Holds itself: only a collection finds that nobody wants it any more."""

    def __init__(self) -> None:
        self.me = self


def dropped() -> weakref.ref[Node]:
    return weakref.ref(Node())


def test_what_was_loaded_is_passed_over_and_what_came_afterwards_is_not() -> None:
    loaded = [Node()]
    old = weakref.ref(loaded[0])
    with passing_over_what_is_loaded():
        loaded.clear()
        new = dropped()
        gc.collect()
        assert old() is not None
        assert new() is None
    gc.collect()
    assert old() is None


def test_what_nobody_wanted_before_is_not_kept() -> None:
    garbage = dropped()
    with passing_over_what_is_loaded():
        assert garbage() is None


@pytest.mark.usefixtures("unfrozen")
def test_a_worker_of_a_process_is_loaded_when_it_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    class Loaded:
        address = None

        def __init__(self, spec: WorkerSpec, progress: object = None) -> None:
            self.me = self
            made.append(weakref.ref(self))

        def run(self) -> None: ...

    monkeypatch.setattr(rank, "worker_class", lambda role, leads: Loaded)
    monkeypatch.setattr(rank, "unmap_library_pages", lambda: 0)
    rank.build_worker(SPEC)
    gc.collect()
    assert made[0]() is not None


@pytest.mark.usefixtures("unfrozen")
def test_a_router_that_listens_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(router._announce(cast("router._Server", SimpleNamespace(started=True)), "http://here"))
    assert gc.get_freeze_count() > 0
    assert "listening on http://here" in capsys.readouterr().out
