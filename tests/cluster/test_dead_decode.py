"""A decode process that dies while pages are written into it: the prefill worker gets everything back and serves its next life."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefill.worker import PrefillWorker
from serving.core.config import Config, KVTable
from tests.cluster.worker_process import start_worker
from tests.engine_factory import create_engine, create_loop, random_prompts
from tests.wire_client import GREEDY, Running, WireClient, create_config, create_spec
from tests.worker_stage import num_used

# Four slots: a job that kept its own would be missed at once.
CONFIG: Config = dataclasses.replace(
    create_config(max_batched_tokens=64, max_num_seqs=4), kv=KVTable(prefill_pages=600, decode_pages=600)
)


@pytest.fixture
def prefill(folder: Path) -> Iterator[PrefillWorker]:
    worker = PrefillWorker(create_spec("prefill-0", "prefill", CONFIG, model_dir=folder))
    running = Running(worker)
    yield worker
    running.close()


@pytest.mark.cluster
def test_a_prefill_worker_outlives_the_decode_process_that_it_writes_into(folder: Path, prefill: PrefillWorker) -> None:
    with ExitStack() as stack:
        process, address = start_worker("decode", folder, CONFIG)
        stack.callback(process.kill)
        client = WireClient(prefill.address, address)
        stack.callback(client.close)
        requests = [client.submit(prompt, 500) for prompt in random_prompts([3000] * 8, 3)]
        client.wait(lambda: prefill.metric("baton_kv_handoff_bytes_total", kind="latent") > 0)
        assert num_used(prefill) > 0, "everything was over before the process died"
        process.kill()
        process.join(10)
        client.wait(lambda: all(request.done for request in requests) and num_used(prefill) == 0)
        assert all(request.failures for request in requests)

        process, second = start_worker("decode", folder, CONFIG, incarnation=2)
        stack.callback(process.kill)
        again = WireClient(prefill.address, second, name="router-1")
        stack.callback(again.close)
        prompts = random_prompts([200, 90, 64, 30, 130, 5], 4)
        wanted = create_loop(create_engine(folder), prefix_cache=False).generate(prompts, GREEDY, 6)
        assert again.finish([again.submit(prompt, 6) for prompt in prompts]) == wanted
        again.wait(lambda: num_used(prefill) == 0)
