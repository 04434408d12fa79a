"""A prefill or decode worker in a process of its own, for tests that kill it. Built from its WorkerSpec, as an actor would."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from decode.worker import DecodeWorker
from prefill.worker import PrefillWorker
from serving.core.config import Config
from serving.core.messages import PeerAddress
from tests.wire_client import create_spec


def start_worker(
    role: str, model_dir: Path, config: Config, *, incarnation: int = 1
) -> tuple[SpawnProcess, PeerAddress]:
    """`{role}-0`. Returns when it listens. The caller kills and joins it."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_serve, args=(other, role, model_dir, config, incarnation), daemon=True)
    process.start()
    assert pipe.poll(60), f"the {role} process does not come up"
    address = pipe.recv()
    assert isinstance(address, PeerAddress)
    return process, address


def _serve(pipe: Connection, role: str, model_dir: Path, config: Config, incarnation: int) -> None:
    spec = create_spec(f"{role}-0", role, config, incarnation=incarnation, model_dir=model_dir)
    worker = PrefillWorker(spec) if role == "prefill" else DecodeWorker(spec)
    pipe.send(worker.address)
    worker.run()
