"""Units of several ranks that share heads and experts, as processes: prompts through one shape, decoded by another, text as of one rank."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.cluster.conftest import StartServer
from tests.cluster.watched_server import WatchedServer, still_running

PROMPTS = [f"{'the quick brown fox jumps over ' * (number % 5)}{number}" for number in range(64)]
PAGES = ("--set", "kv.prefill_pages=64", "--set", "kv.decode_pages=64")
BALANCING = ("--set", "balance.threshold=1", "--set", "balance.min_gain=0.001")
VERSION = re.compile(r"^baton_placement_version\{.*\} ([0-9.]+)$", re.MULTILINE)


def _sizes(role: str, tp: int, dp: int, *more: str) -> list[str]:
    return [word for one in (f"tp={tp}", f"dp={dp}", *more) for word in ("--set", f"{role}.{one}")]


TO_ONE_HEAD = [
    *_sizes("prefill", 2, 2, "redundant_experts=4", "ranks_per_node=2"),
    *_sizes("decode", 1, 4, "microbatches=2"),
]
FROM_ONE_HEAD = [*_sizes("prefill", 1, 4, "microbatches=2"), *_sizes("decode", 2, 2, "redundant_experts=8")]

# Hosts are seldom placed anew, since replicas chosen in every step are even already; that they change is tested where a look is two steps
# away and not 32 (test_unit_model).
HOSTED = [
    *_sizes("prefill", 2, 2, "redundant_experts=4", "hosted_slots=5", "ranks_per_node=2"),
    *_sizes("decode", 1, 4, "redundant_experts=4", "hosted_slots=4", "microbatches=2"),
]


@pytest.mark.parametrize(
    ("sizes", "balances"),
    [(TO_ONE_HEAD, False), (FROM_ONE_HEAD, True), (HOSTED, False)],
    ids=["tp2-to-tp1", "tp1-to-tp2", "hosted"],
)
@pytest.mark.timeout(120)
def test_the_text_is_that_of_one_rank(
    server: WatchedServer, start_server: StartServer, sizes: list[str], balances: bool
) -> None:
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(server.complete, PROMPTS))
    units = start_server(*sizes, *PAGES, *(BALANCING if balances else ()))
    versions = [1.0]
    while versions == [1.0] or (balances and max(versions) == 1):
        with ThreadPoolExecutor(64) as pool:
            assert list(pool.map(units.complete, PROMPTS)) == texts
        versions = [float(version) for version in VERSION.findall(httpx.get(f"{units.url}/metrics").text)]
    assert len(versions) == 2, "one figure of each EP group"
    assert (max(versions) > 1) == balances
    assert units.listens_at() <= {"127.0.0.1", "::1"}
    family = units.family()
    assert units.stop(signal.SIGTERM) == 0
    assert still_running(family, after_s=0) == []
