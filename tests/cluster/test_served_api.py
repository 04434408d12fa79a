"""The embedded model through the whole path: HTTP, router, prefill worker, hand-off, decode worker. A wrong hand-off is a wrong answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest

from serving.cluster.served import ServedProcess
from serving.demo import questions, tools
from serving.demo.questions import Question
from serving.text.messages import ToolCall

SEED = 20_260_000
CHAT = "/v1/chat/completions"
BIASED_ID = 300


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ServedProcess() as server:
        yield server.url


@pytest.fixture
async def client(url: str) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60.0) as made:
        yield made


async def model_of(client: openai.AsyncOpenAI) -> str:
    return (await client.models.list()).data[0].id


def num_words(text: str) -> int:
    """Stands for the tokenizer: a word of these texts is about 1.5 tokens."""
    return len(text.split())


async def at_once(calls: Sequence[Callable[[], Awaitable[Any]]], limit: int) -> list[Any]:
    gate = asyncio.Semaphore(limit)

    async def guarded(call: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await call()

    return list(await asyncio.gather(*(guarded(call) for call in calls)))


async def answer(
    client: openai.AsyncOpenAI, question: Question, *, stream: bool, **more: Any
) -> tuple[str, list[ToolCall]]:
    """Text and calls of a greedy reply."""
    body: dict[str, Any] = {"model": await model_of(client), "messages": question.openai_messages(), "temperature": 0}
    body |= {"max_tokens": 64, **({"tools": question.openai_tools()} if question.tools else {}), **more}
    if not stream:
        message = (await client.chat.completions.create(**body)).choices[0].message
        calls = [ToolCall(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        return message.content or "", calls
    text, parts = "", dict[int, list[str]]()
    async for chunk in await client.chat.completions.create(**body, stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for call in delta.tool_calls or ():
            name, arguments = parts.setdefault(call.index, ["", ""])
            parts[call.index] = [name + (call.function.name or ""), arguments + (call.function.arguments or "")]
    return text, [ToolCall(*part) for part in parts.values()]


def drawn(kind: str, count: int) -> list[Question]:
    rng = random.Random(f"{SEED}/{kind}")
    if kind == "addition":
        return [questions.addition(rng) for _ in range(count)]
    if kind == "tool_call":
        return [tools.tool_call(rng) for _ in range(count)]
    return [questions.needle(rng, int(kind), n / max(1, count - 1), num_words) for n in range(count)]


@pytest.mark.parametrize(
    ("kind", "count", "allowed_wrong"),
    [("addition", 16, 1), ("150", 16, 1), ("600", 4, 1), ("2400", 1, 0), ("tool_call", 8, 1)],
)
async def test_the_embedded_model_answers_right(
    client: openai.AsyncOpenAI, kind: str, count: int, allowed_wrong: int
) -> None:
    """Streamed and whole in turns. The number of a needle is the length of its text in words."""
    asked = drawn(kind, count)
    calls = [lambda q=q, n=n: answer(client, q, stream=n % 2 == 0) for n, q in enumerate(asked)]
    replies = await at_once(calls, 8)
    wrong = [(q.needed, reply) for q, reply in zip(asked, replies, strict=True) if not q.accepts(*reply)]
    assert len(wrong) <= allowed_wrong, wrong


async def test_a_stream_says_what_a_whole_answer_says(client: openai.AsyncOpenAI) -> None:
    asked = drawn("150", 6)
    streamed = await at_once([lambda q=q: answer(client, q, stream=True) for q in asked], 6)
    whole = [await answer(client, q, stream=False) for q in asked]
    assert streamed == whole
    assert len({text for text, _ in whole}) == len(asked)


async def test_a_seed_gives_the_same_text_alone_and_in_company(client: openai.AsyncOpenAI) -> None:
    model = await model_of(client)

    async def ask(seed: int) -> str:
        body: dict[str, Any] = {"model": model, "prompt": "The", "temperature": 2, "max_tokens": 24, "seed": seed}
        return (await client.completions.create(**body, extra_body={"ignore_eos": True})).choices[0].text

    alone = await ask(7)
    company = await at_once([lambda n=n: ask(7 if n == 3 else 100 + n) for n in range(8)], 8)
    assert company[3] == alone
    assert len(set(company)) == len(company), "every other seed says something else"


async def test_what_can_be_asked_for_is_given(client: openai.AsyncOpenAI) -> None:
    model, (question,) = await model_of(client), drawn("150", 1)
    body: dict[str, Any] = {"model": model, "messages": question.openai_messages(), "temperature": 0}
    plain = await client.chat.completions.create(**body)
    text = plain.choices[0].message.content
    assert plain.choices[0].finish_reason == "stop"

    noted = await client.chat.completions.create(**body, logprobs=True, top_logprobs=3, n=2)
    for choice in noted.choices:
        assert choice.message.content == text
        entries = choice.logprobs.content
        assert "".join(entry.token for entry in entries) == text
        for entry in entries:
            best = [top.logprob for top in entry.top_logprobs]
            assert entry.token == entry.top_logprobs[0].token, "greedy takes the likeliest"
            assert best == sorted(best, reverse=True)
            assert best[0] <= 1e-6

    word = text.split()[1]
    stopped = await client.chat.completions.create(**body, stop=[word])
    assert stopped.choices[0].message.content == text[: text.index(word)]
    short = await client.chat.completions.create(**body, max_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    spelled = await client.completions.create(model=model, prompt=[BIASED_ID], max_tokens=1, echo=True)
    biased = await client.chat.completions.create(**body, max_tokens=2, logit_bias={str(BIASED_ID): 100})
    twice = biased.choices[0].message.content
    assert twice == 2 * twice[: len(twice) // 2]
    assert spelled.choices[0].text.startswith(twice[: len(twice) // 2])
    assert not text.startswith(twice)


FAULTS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"messages": [{"role": "user", "content": "word " * 20_000}]}, 400, "messages"),
    ({"model": "gpt-9"}, 404, "model"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"n": 0}, 400, "n"),
    ({"messages": []}, 400, "messages"),
    ({"max_tokens": 10_000_000}, 400, "max_tokens"),
]


async def test_what_is_wrong_is_named_and_the_server_goes_on(client: openai.AsyncOpenAI, url: str) -> None:
    model, (question,) = await model_of(client), drawn("addition", 1)
    good = {"model": model, "messages": question.openai_messages(), "temperature": 0}
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
        for fields, status, param in FAULTS:
            response = await http.post(CHAT, json=good | fields)
            assert (response.status_code, response.json()["error"]["param"]) == (status, param), fields
        broken = await http.post(CHAT, content=b'{"model": ')
        assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
        empty = await http.post("/v1/completions", json={"model": model, "prompt": ""})
        assert (empty.status_code, empty.json()["error"]["param"]) == (400, "prompt")
    assert question.accepts((await answer(client, question, stream=False))[0])


def pages(text: str) -> dict[str, dict[str, float]]:
    """worker -> state -> pages, from /metrics."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if line.startswith("baton_kv_pages{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            found.setdefault(labels["worker"], {})[labels["state"]] = float(line.rsplit(" ", 1)[1])
    return found


def held(text: str) -> dict[str, float]:
    """Pages that are neither free nor cached, by worker."""
    return {
        worker: sum(count for state, count in states.items() if state not in ("free", "cached"))
        for worker, states in pages(text).items()
    }


async def test_two_hundred_clients_that_hang_up_leave_nothing_behind(client: openai.AsyncOpenAI, url: str) -> None:
    model, rng = await model_of(client), random.Random(SEED)
    asked = drawn("150", 10)

    async def hang_up(n: int, http: httpx.AsyncClient) -> None:
        """Gone after a random time: in the queue, in prefill, in hand-off or in decode."""
        messages = asked[n % len(asked)].openai_messages()
        body = {"model": model, "messages": messages, "max_tokens": 400, "ignore_eos": True, "stream": n % 2 == 0}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.choice((0.02, 0.1, 0.4)) * rng.random() * 2):
                await http.post(CHAT, json=body)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30.0) as http:
        await at_once([lambda n=n: hang_up(n, http) for n in range(200)], 8)
        ended_s = time.monotonic()
        while any(held(text := (await http.get("/metrics")).text).values()):
            assert time.monotonic() - ended_s < 2.0, pages(text)
            await asyncio.sleep(0.05)
    assert set(held(text)) == {"prefill-0", "decode-0"}
    cancelled = float(re.search(r'baton_requests_total\{outcome="cancelled"\} (\S+)', text)[1])
    assert cancelled > 100
    replies = await at_once([lambda q=q: answer(client, q, stream=False) for q in asked], 4)
    assert sum(q.accepts(*reply) for q, reply in zip(asked, replies, strict=True)) >= len(asked) - 1
