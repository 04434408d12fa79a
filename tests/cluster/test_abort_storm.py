"""Two hundred clients that hang up at random moments, against a whole server: every page comes back, and the next answer is the one before.

What has been in whose hands when the client left is read from the server: jobs that waited or were prefilled, latents on
their way, sequences that decoded. A storm that missed one of them proves nothing and fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from tests.cluster.watched_server import WatchedServer

SEED = 3
NUM_REQUESTS = 200
NUM_AT_ONCE = 24
AFTER_S = 2.0
STATES = {"free", "cached", "reserved", "exposed", "filled", "owned", "draining", "quarantined"}
Pages = Mapping[str, Mapping[str, float]]


def samples(text: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """(labels, value) of each sample of `name` in an exposition."""
    for labels, value in re.findall(rf"^{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE):
        yield dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)


def num_ended(text: str) -> dict[str, float]:
    """Requests by outcome."""
    return {labels["outcome"]: value for labels, value in samples(text, "baton_requests_total")}


async def pages(client: httpx.AsyncClient) -> Pages:
    """worker -> state -> number of pages."""
    found: dict[str, dict[str, float]] = {}
    for labels, value in samples((await client.get("/metrics")).text, "baton_kv_pages"):
        found.setdefault(labels["worker"], {})[labels["state"]] = value
    return found


def in_use(counts: Pages) -> dict[str, float]:
    """Pages in somebody's hands, by worker."""
    return {
        worker: sum(count for state, count in states.items() if state not in ("free", "cached"))
        for worker, states in counts.items()
    }


async def settled(client: httpx.AsyncClient, within_s: float) -> Pages:
    """Pages once nobody holds any, or as they are after `within_s`."""
    deadline_s = time.monotonic() + within_s
    while True:
        counts = await pages(client)
        if time.monotonic() >= deadline_s or not any(in_use(counts).values()):
            return counts
        await asyncio.sleep(0.05)


def body(rng: random.Random, num_prompt_tokens: int, *, stream: bool, max_tokens: int) -> dict[str, Any]:
    prompt = [rng.randrange(3, 900) for _ in range(num_prompt_tokens)]
    return {
        "model": "tiny",
        "prompt": prompt,
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": max_tokens,
        "stream": stream,
    }


async def text_of(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
    answer = await client.post("/v1/completions", json=request)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["text"]
    assert isinstance(text, str)
    return text


async def hang_up(client: httpx.AsyncClient, request: dict[str, Any], patience_s: float, num_events: int) -> str:
    """Leaves after `patience_s`, or after `num_events` pieces of the stream; says which it was, or that the answer was whole."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience_s), client.stream("POST", "/v1/completions", json=request) as answer:
            left = num_events
            async for line in answer.aiter_lines():
                left -= line.startswith("data: ")
                if left == 0:
                    return "in the stream"
            return "whole"
    return "before the end"


async def storm(client: httpx.AsyncClient) -> Counter[str]:
    """Half of the clients stream, and half of those leave on a token; all others by the clock."""
    rng, gate = random.Random(SEED), asyncio.Semaphore(NUM_AT_ONCE)

    async def one(index: int) -> str:
        stream, by_clock = index % 2 == 0, index % 4 != 0
        request = body(rng, rng.choice((5, 130, 600, 1200)), stream=stream, max_tokens=rng.choice((200, 400)))
        patience_s = rng.choice((0.01, 0.05, 0.2, 0.8)) * 2 * rng.random() if by_clock else 30.0
        async with gate:
            return await hang_up(client, request, patience_s, 0 if by_clock else rng.randrange(1, 30))

    return Counter(await asyncio.gather(*(one(index) for index in range(NUM_REQUESTS))))


async def watch(client: httpx.AsyncClient, seen: dict[str, set[str]]) -> None:
    """Notes in which states pages have been, by worker."""
    while True:
        for worker, states in (await pages(client)).items():
            seen.setdefault(worker, set()).update(state for state, count in states.items() if count)
        await asyncio.sleep(0.02)


@pytest.mark.timeout(90)
async def test_two_hundred_disconnects_cost_no_page_and_change_no_answer(server: WatchedServer) -> None:
    rng = random.Random("asked")
    asked = [body(rng, length, stream=False, max_tokens=24) for length in (7, 200, 700)]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60.0) as client:
        before = [await text_of(client, request) for request in asked]
        assert len(set(before)) == len(asked)
        ended_before = num_ended((await client.get("/metrics")).text)
        totals = {worker: sum(states.values()) for worker, states in (await pages(client)).items()}
        seen: dict[str, set[str]] = {}
        watcher = asyncio.create_task(watch(client, seen))
        left = await storm(client)
        watcher.cancel()
        counts = await settled(client, AFTER_S)
        assert set(counts) == {"prefill-0", "decode-0"}, "both workers are seen"
        assert not any(in_use(counts).values()), counts
        assert {worker: sum(states.values()) for worker, states in counts.items()} == totals
        assert [await text_of(client, request) for request in asked] == before

        assert left["in the stream"] >= 30, left
        assert left["before the end"] >= 100, left
        assert "owned" in seen["prefill-0"], "nobody left during prefill"
        assert {"reserved", "owned"} <= seen["decode-0"], "nobody left before the hand-off, or in decode"
        assert seen["decode-0"] & {"exposed", "filled", "draining"}, "nobody left during a hand-off"
        ended = num_ended((await client.get("/metrics")).text)
        assert ended["cancelled"] - ended_before.get("cancelled", 0) >= 150, ended
        assert ended.get("failed") == ended_before.get("failed"), ended


async def test_the_page_check_sees_a_request_that_nobody_has_left(server: WatchedServer) -> None:
    """The control: pages that are held are counted as held, on both workers, and free once they are given back."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
        request = body(random.Random("held"), 700, stream=True, max_tokens=2000)
        async with client.stream("POST", "/v1/completions", json=request) as answer:
            lines = answer.aiter_lines()
            async for line in lines:
                if line.startswith("data: "):
                    break
            counts = await settled(client, 0.5)
            assert all(set(states) == STATES for states in counts.values())
            assert in_use(counts)["decode-0"] >= 700 // 64
        assert not any(in_use(await settled(client, AFTER_S)).values())
