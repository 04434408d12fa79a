"""A prefill worker in a process of its own, for tests that kill it. Built from its WorkerSpec, as an actor would."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from prefill.worker import PrefillWorker
from serving.core.config import Config
from serving.core.messages import PeerAddress
from tests.wire_client import create_spec


def start_prefill(model_dir: Path, config: Config, *, incarnation: int = 1) -> tuple[SpawnProcess, PeerAddress]:
    """Returns when it listens. The caller kills and joins it."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_serve, args=(other, model_dir, config, incarnation), daemon=True)
    process.start()
    assert pipe.poll(60), "the prefill process does not come up"
    address = pipe.recv()
    assert isinstance(address, PeerAddress)
    return process, address


def _serve(pipe: Connection, model_dir: Path, config: Config, incarnation: int) -> None:
    spec = create_spec("prefill-0", "prefill", config, incarnation=incarnation, model_dir=model_dir)
    worker = PrefillWorker(spec)
    pipe.send(worker.address)
    worker.run()
