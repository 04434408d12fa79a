"""Whole servers on a small random model. `server` is one for all tests that leave it as they found it; the others start their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.cluster.watched_server import WatchedServer
from tests.model_factory import make_checkpoint
from tests.served_model import make_served_model

StartServer = Callable[..., WatchedServer]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with random weights and no tokenizer, for workers without a router."""
    torch.set_num_threads(1)
    make_checkpoint(tmp_path / "tiny", 0)
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights and a tokenizer; in the API its name is `tiny`."""
    return make_served_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedServer]:
    with WatchedServer(["--model", str(served_model)], tmp_path_factory.mktemp("server") / "log") as started:
        yield started


@pytest.fixture
def start_server(served_model: Path, tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers with further arguments and ends what is left of them after the test."""
    started: list[WatchedServer] = []

    def start(*arguments: str) -> WatchedServer:
        log = tmp_path / f"server-{len(started)}.log"
        started.append(WatchedServer(["--model", str(served_model), *arguments], log))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop()
