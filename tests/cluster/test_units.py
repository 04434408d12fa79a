"""A server whose units have several ranks, decode's on two nodes. Its ranks compute alone; what is looked at is that they live as one."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from tests.cluster.conftest import StartServer
from tests.cluster.watched_server import WatchedServer, eventually, still_running

PROMPT = "the quick brown fox"
ALONE = ("--set", "prefill.dp=2", "--set", "prefill.ep=1", "--set", "decode.dp=2", "--set", "decode.ep=1")
TWO_NODES = ("--set", "decode.ranks_per_node=1")
RANKS = {"prefill-0.0", "prefill-0.1", "decode-0.0", "decode-0.1"}


def test_the_ranks_of_a_unit_die_and_start_again_together(server: WatchedServer, start_server: StartServer):
    units = start_server(*ALONE, *TWO_NODES)
    prompts = [PROMPT + "!" * number for number in range(8)]
    texts = [server.complete(prompt) for prompt in prompts]
    assert len(set(texts)) > 1
    assert sum(process.name() == "raylet" for process in units.family()) == 2
    assert set(units.worker_pids()) == RANKS
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(units.complete, prompts)) == texts
    workers = httpx.get(f"{units.url}/metrics").text
    assert all(f'worker="{name}"' in workers for name in RANKS)

    before = units.worker_pids()
    psutil.Process(before["decode-0.1"]).kill()
    decode = ("decode-0.0", "decode-0.1")
    assert eventually(lambda: all(units.worker_pids()[name] != before[name] for name in decode), timeout_s=60)
    assert re.search("decode-0.0: (draining|dead), ends with decode-0.1: ", units.log.read_text())
    assert not any(psutil.pid_exists(before[name]) for name in decode)
    assert all(units.worker_pids()[name] == before[name] for name in RANKS - set(decode))
    assert eventually(units.is_ready, timeout_s=5)
    assert [units.complete(prompt) for prompt in prompts] == texts

    family = units.family()
    assert units.stop(signal.SIGTERM) == 0
    assert still_running(family, after_s=0) == []
