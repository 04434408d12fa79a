"""A prefill process that dies in the middle of hand-offs: what it may write is free only when its death is proven."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from decode.worker import DecodeWorker
from serving.core.config import Config, KVTable
from serving.core.messages import PeerAddress, Roster, WorkerInfo
from tests.cluster.worker_process import start_worker
from tests.engine_factory import create_engine, create_loop, random_prompts
from tests.wire_client import GREEDY, Running, WireClient, create_config, create_spec
from tests.worker_stage import num_used

CONFIG: Config = dataclasses.replace(
    create_config(max_batched_tokens=64), kv=KVTable(prefill_pages=600, decode_pages=600)
)


@pytest.fixture
def decode(folder: Path) -> Iterator[DecodeWorker]:
    worker = DecodeWorker(create_spec("decode-0", "decode", CONFIG, model_dir=folder))
    running = Running(worker)
    yield worker
    running.close()


@pytest.mark.cluster
@pytest.mark.parametrize("proof", ["roster", "restart"])
def test_pages_exposed_to_a_killed_process_are_free_when_its_death_is_proven_and_not_before(
    folder: Path, decode: DecodeWorker, proof: str
) -> None:
    with ExitStack() as stack:
        process, address = start_worker("prefill", folder, CONFIG)
        stack.callback(process.kill)
        client = WireClient(address, decode.address)
        stack.callback(client.close)
        requests = [client.submit(prompt, 4) for prompt in random_prompts([3000] * 8, 3)]
        client.wait(lambda: decode.pages()["exposed"] >= 40)
        process.kill()
        killed_s = time.monotonic()
        process.join(10)
        client.wait(lambda: all(request.done for request in requests), 5.0)
        assert time.monotonic() - killed_s < 4.0
        assert all("silent" in reason for request in requests for reason in request.failures)
        client.wait(lambda: decode.pages()["quarantined"] > 0 and num_used(decode) == decode.pages()["quarantined"])
        time.sleep(1.0)
        assert decode.pages()["quarantined"] >= 40, "time is no proof"
        _prove(proof, stack, folder, client, address, decode)
        client.wait(lambda: num_used(decode) == 0, 2.0)


def _prove(
    proof: str, stack: ExitStack, folder: Path, client: WireClient, address: PeerAddress, decode: DecodeWorker
) -> None:
    """Either the supervisor's word, or the next life of the worker, which also serves."""
    if proof == "roster":
        dead = WorkerInfo(address=address, role="prefill", state="dead", detail="killed by signal 9")
        client.mailbox.post("decode-0", Roster(workers=[dead]))
        return
    process, second = start_worker("prefill", folder, CONFIG, incarnation=2)
    stack.callback(process.kill)
    again = WireClient(second, decode.address, name="router-1")
    stack.callback(again.close)
    prompt = random_prompts([200], 4)[0]
    wanted = create_loop(create_engine(folder), prefix_cache=False).generate([prompt], GREEDY, 6)
    assert again.finish([again.submit(prompt, 6)]) == wanted
