"""Units of several ranks that share heads and experts, as processes: prompts through one shape, decoded by another, text as of one rank."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster.conftest import StartServer
from tests.cluster.watched_server import WatchedServer, still_running

PROMPTS = [f"{'the quick brown fox jumps over ' * (number % 5)}{number}" for number in range(64)]


def _sizes(role: str, tp: int, dp: int, *more: str) -> list[str]:
    given = [f"tp={tp}", f"dp={dp}", *more]
    return [word for one in given for word in ("--set", f"{role}.{one}")]


@pytest.mark.parametrize(
    "sizes",
    [
        [
            *_sizes("prefill", 2, 2, "redundant_experts=4", "ranks_per_node=2"),
            *_sizes("decode", 1, 4, "microbatches=2"),
        ],
        [*_sizes("prefill", 1, 4, "microbatches=2"), *_sizes("decode", 2, 2)],
    ],
    ids=["tp2dp2-to-tp1dp4", "tp1dp4-to-tp2dp2"],
)
@pytest.mark.timeout(240)
def test_the_text_is_that_of_one_rank(server: WatchedServer, start_server: StartServer, sizes: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(server.complete, PROMPTS))
    units = start_server(*sizes, "--set", "kv.prefill_pages=64", "--set", "kv.decode_pages=64")
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(units.complete, PROMPTS)) == texts
    family = units.family()
    assert units.stop(signal.SIGTERM) == 0
    assert still_running(family, after_s=0) == []
