"""Lives and ends of requests, with workers that are pre-empted, die, fail, fall silent, overtake each other."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from router.generation import Outcome
from serving.core.messages import Abort, DecodeJob, JobTokens, PrefillJob, TokenBatch
from serving.wire import Codec
from tests.unit.router.conftest import Front, byte_ids, chat_body, saying
from tests.unit.router.scripted_worker import SECRET, Job, ScriptedWorker

CHAT = "/v1/chat/completions"
TEXT = "The quick brown fox jumps over the lazy dog."
Faults = Callable[[Job], str | None]


def once(fault: str, at: int, before: Callable[[Job], object] = lambda job: None) -> Faults:
    """A fault in front of token `at` of the answer, the first time it comes to that."""
    left = [fault]

    def ask(job: Job) -> str | None:
        if job.next == at and left:
            before(job)
            return left.pop()
        return None

    return ask


def pair(prefill: Faults = lambda job: None, decode: Faults = lambda job: None) -> list[ScriptedWorker]:
    return [
        ScriptedWorker("prefill-0", "prefill", before_token=prefill),
        ScriptedWorker("decode-0", "decode", before_token=decode),
    ]


async def content(front: Front, **body: Any) -> str:
    response = await front.client.post(CHAT, json=chat_body(**body))
    assert response.status_code == 200, response.text
    text = response.json()["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("at", [1, 7, len(TEXT)])
async def test_preemption_loses_and_repeats_nothing(front: Callable[..., Any], at: int) -> None:
    async with front(saying(TEXT), pair(decode=once("preempt", at))) as f:
        assert await content(f, max_tokens=100) == TEXT
        lives = f.cluster.workers["prefill-0"].heard_of(PrefillJob)
        assert len(lives) == 2
        assert lives[1].token_ids == lives[0].token_ids + byte_ids(TEXT[:at])
        assert lives[1].num_prompt_tokens == len(lives[0].token_ids)
        assert lives[1].max_new_tokens == 100 - at
        assert lives[1].sampling == lives[0].sampling
        assert lives[1].job_id != lives[0].job_id
        assert f.ended("finished") == 1


async def test_preemption_may_happen_more_often_than_failure(front: Callable[..., Any]) -> None:
    async with front(saying("abcdefghijkl"), pair(decode=lambda job: "preempt" if _grew_by_one(job) else None)) as f:
        assert await content(f) == "abcdefghijkl"
        assert len(f.cluster.workers["prefill-0"].heard_of(PrefillJob)) > 5


def _grew_by_one(job: Job) -> bool:
    """Each life gets one token out of prefill and one out of decode."""
    return job.next >= len(job.message.token_ids) - job.message.num_prompt_tokens + 2


@pytest.mark.parametrize(
    ("prefill", "decode"), [(once("fail", 0), lambda job: None), (lambda job: None, once("fail", 9))]
)
async def test_a_retryable_failure_starts_another_life(
    front: Callable[..., Any], prefill: Faults, decode: Faults
) -> None:
    async with front(saying(TEXT), pair(prefill, decode)) as f:
        assert await content(f) == TEXT
        assert f.ended("failed") == 0


@pytest.mark.parametrize("seed", range(3))
async def test_random_faults_lose_and_repeat_nothing(front: Callable[..., Any], seed: int) -> None:
    rng = random.Random(seed)
    decode: Faults = lambda job: rng.choices((None, "preempt", "fail", "hold"), (0.95, 0.03, 0.01, 0.01))[0]  # noqa: E731
    prefill: Faults = lambda job: rng.choices((None, "fail"), (0.95, 0.05))[0]  # noqa: E731
    workers = [
        *(ScriptedWorker(f"prefill-{n}", "prefill", before_token=prefill) for n in range(2)),
        *(ScriptedWorker(f"decode-{n}", "decode", before_token=decode) for n in range(2)),
    ]
    async with front(saying(TEXT), workers) as f:
        replies = await asyncio.gather(*(f.client.post(CHAT, json=chat_body(stream=True)) for _ in range(24)))
        texts = [streamed(reply) for reply in replies]
        finished = texts.count(TEXT)
        assert finished > 12
        assert all(text == TEXT or "gave up after 4 attempts" in text for text in texts)
        assert (f.ended("finished"), f.ended("failed")) == (finished, 24 - finished)
        await f.until(lambda: f.cluster.num_jobs == 0)
        assert all(worker.pages.total == worker.work.total == 0 for worker in f.view)


def streamed(reply: httpx.Response) -> str:
    """The content of a stream, an error's text behind it."""
    if reply.status_code != 200:
        return str(reply.json()["error"]["message"])
    chunks = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n")[:-2]]
    parts = [c["error"]["message"] if "error" in c else c["choices"][0]["delta"].get("content", "") for c in chunks]
    return "".join(parts)


async def test_endless_failure_ends_in_an_error(front: Callable[..., Any]) -> None:
    async with front(saying(TEXT), pair(prefill=lambda job: "fail")) as f:
        response = await f.client.post(CHAT, json=chat_body())
        assert response.status_code == 503
        assert "4 attempts" in response.json()["error"]["message"]
        assert (f.ended("failed"), f.ended("finished")) == (1, 0)


async def test_a_failure_that_cannot_be_retried_is_told_at_once(front: Callable[..., Any]) -> None:
    async with front(saying(TEXT), pair(prefill=once("refuse", 0))) as f:
        response = await f.client.post(CHAT, json=chat_body())
        assert response.status_code == 500
        assert "scripted fault" in response.json()["error"]["message"]
        assert await content(f) == TEXT


@pytest.mark.parametrize("streams", [True, False])
async def test_a_worker_that_is_too_busy_is_no_bug_and_says_when_to_come_back(
    front: Callable[..., Any], streams: bool
) -> None:
    async with front(saying(TEXT), pair(prefill=once("overload", 0))) as f:
        response = await f.client.post(CHAT, json=chat_body(stream=streams))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
        assert await content(f) == TEXT


async def test_a_failure_in_a_stream_is_an_event_in_it(front: Callable[..., Any]) -> None:
    async with front(saying(TEXT), pair(decode=once("refuse", 5))) as f:
        response = await f.client.post(CHAT, json=chat_body(stream=True))
        blocks = response.text.split("\n\n")
    assert response.status_code == 200
    assert json.loads(blocks[-3].removeprefix("data: "))["error"]["type"] == "server_error"
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert f.metrics.value("baton_requests_total", outcome="failed") == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_the_death_of_a_worker_moves_its_requests(front: Callable[..., Any], role: str) -> None:
    at = 0 if role == "prefill" else 10
    fault = once("die", at)
    workers = [
        *(ScriptedWorker(f"prefill-{n}", "prefill", before_token=fault) for n in range(2)),
        *(ScriptedWorker(f"decode-{n}", "decode", before_token=fault) for n in range(2)),
    ]
    async with front(saying(TEXT), workers) as f:
        texts = await asyncio.gather(*(content(f) for _ in range(6)))
        assert texts == [TEXT] * 6
        assert sum(worker.role == role for worker in f.view) == 1
        assert (f.ended("finished"), f.ended("failed")) == (6, 0)


async def test_prefill_may_die_when_decode_has_taken_over(front: Callable[..., Any]) -> None:
    gate = [True]
    hold: Faults = lambda job: "hold" if job.next == 10 and gate else None  # noqa: E731
    async with front(saying(TEXT), pair(decode=hold)) as f:
        asked = asyncio.create_task(content(f))
        await f.until(lambda: f.cluster.workers["decode-0"].progress >= 9)
        f.cluster.kill("prefill-0")
        await f.until(lambda: f.view.get("prefill-0") is None)
        gate.clear()
        assert await asked == TEXT
        assert len(f.cluster.workers["decode-0"].heard_of(DecodeJob)) == 1, "no second life was needed"


async def test_a_restart_in_a_new_incarnation_is_another_worker(front: Callable[..., Any]) -> None:
    stuck: Faults = lambda job: "hold" if job.message.num_prompt_tokens == len(job.message.token_ids) else None  # noqa: E731
    async with front(saying(TEXT), pair(decode=stuck)) as f:
        asked = asyncio.create_task(content(f))
        await f.until(lambda: bool(f.cluster.workers["decode-0"].heard_of(DecodeJob)))
        await f.until(lambda: f.cluster.workers["prefill-0"].progress > 0)
        new = f.cluster.restart("decode-0")
        assert await asked == TEXT
        assert len(new.heard_of(DecodeJob)) == 1


async def test_silence_of_two_seconds_is_death(front: Callable[..., Any]) -> None:
    workers = [*pair(), ScriptedWorker("decode-1", "decode")]
    mute: Faults = once("hold", 10, lambda job: setattr(f.cluster.workers[_holder(f, job)], "mute", True))
    for worker in workers[1:]:
        worker.before_token = mute
    async with front(saying(TEXT), workers) as f:
        started_s = asyncio.get_running_loop().time()
        assert await content(f) == TEXT
        assert 1.9 < asyncio.get_running_loop().time() - started_s < 4.0
        assert sum(worker.silent for worker in f.view) == 1


def _holder(front: Front, job: Job) -> str:
    return next(w.worker_id for w in front.cluster.workers.values() if job in w.jobs.values() and w.role == "decode")


async def test_with_nobody_left_the_client_hears_within_five_seconds(front: Callable[..., Any]) -> None:
    async with front(saying(TEXT), pair(decode=once("die", 10))) as f:
        started_s = asyncio.get_running_loop().time()
        response = await f.client.post(CHAT, json=chat_body(stream=True))
        assert asyncio.get_running_loop().time() - started_s < 5.0
        assert "no decode worker is ready" in response.text.split("\n\n")[-3]
        refused = await f.client.post(CHAT, json=chat_body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert (await f.client.get("/readyz")).status_code == 503


async def test_tokens_of_decode_wait_for_the_first_one(front: Callable[..., Any]) -> None:
    """Prefill is held back; decode speaks first, as it might over another connection."""
    gate = [True]
    async with front(saying("abc"), pair(prefill=lambda job: "hold" if gate else None)) as f:
        asked = asyncio.create_task(content(f, max_tokens=3))
        decode = f.cluster.workers["decode-0"]
        await f.until(lambda: bool(decode.jobs))
        job_id = next(iter(decode.jobs))
        f.cluster.post("decode-0", TokenBatch(jobs=[JobTokens(job_id=job_id, token_ids=byte_ids("Z"))]))
        await asyncio.sleep(0.05)
        gate.clear()
        assert await asked == "aZb", "the early token stands behind the first, and the script goes on"


async def test_messages_of_an_earlier_life_are_dropped(front: Callable[..., Any]) -> None:
    async with front(saying(TEXT), pair(decode=once("preempt", 9))) as f:
        seen: list[str] = []
        hold: Faults = lambda job: "hold" if job.next == 20 and not seen else None  # noqa: E731
        asked = asyncio.create_task(content(f))
        await f.until(lambda: len(f.cluster.workers["prefill-0"].heard_of(PrefillJob)) == 2)
        f.cluster.workers["decode-0"].before_token = hold
        old = f.cluster.workers["prefill-0"].heard_of(PrefillJob)[0].job_id
        late = TokenBatch(jobs=[JobTokens(job_id=old, token_ids=byte_ids("XXX"))])
        f.cluster.post("decode-0", late)
        f.cluster.post("prefill-0", late)
        await asyncio.sleep(0.05)
        seen.append("go on")
        assert await asked == TEXT


async def test_forged_and_stale_frames_change_nothing(front: Callable[..., Any]) -> None:
    gate = [True]
    async with front(saying("abc"), pair(prefill=lambda job: "hold" if gate else None)) as f:
        asked = asyncio.create_task(content(f))
        await f.until(lambda: bool(f.cluster.workers["prefill-0"].heard_of(PrefillJob)))
        job_id = f.cluster.workers["prefill-0"].heard_of(PrefillJob)[0].job_id
        lie = TokenBatch(jobs=[JobTokens(job_id=job_id, token_ids=byte_ids("X"))])
        f.cluster.raw("prefill-0", Codec(b"x" * 32, "prefill-0", 1).encode(lie))
        f.cluster.raw("prefill-0", Codec(SECRET, "prefill-0", 0).encode(lie))
        f.cluster.raw("prefill-0", Codec(SECRET, "prefill-7", 1).encode(lie))
        f.cluster.raw("prefill-0", b"short")
        await asyncio.sleep(0.05)
        gate.clear()
        assert await asked == "abc"


async def test_the_directory_may_vanish(front: Callable[..., Any]) -> None:
    async with front(saying(TEXT)) as f:
        f.cluster.lose_directory()
        assert await content(f) == TEXT


class Connection:
    """A client at ASGI level, which can hang up."""

    def __init__(self, front: Front, body: dict[str, Any]) -> None:
        self.received: list[dict[str, Any]] = []
        self._gone = asyncio.Event()
        self._sent = False
        self._body = json.dumps(body).encode()
        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
        more = {"headers": [], "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("router", 80)}
        self.task = asyncio.create_task(front.app(scope | more, self._receive, self._send))

    async def hang_up(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, 2.0)

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.received.append(message)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("at", ["prefill", "decode"])
async def test_a_client_that_leaves_aborts_both_sides(front: Callable[..., Any], streams: bool, at: str) -> None:
    hold: Faults = lambda job: "hold"  # noqa: E731
    workers = pair(prefill=hold) if at == "prefill" else pair(decode=hold)
    async with front(saying(TEXT), workers) as f:
        connection = Connection(f, chat_body(stream=streams))
        await f.until(lambda: len(f.cluster.workers["decode-0"].jobs) == 1)
        if at == "decode":
            await f.until(lambda: f.cluster.workers["prefill-0"].progress == 1)
        await connection.hang_up()
        await f.until(lambda: f.cluster.num_jobs == 0)
        job_id = f.cluster.workers["decode-0"].heard_of(DecodeJob)[0].job_id
        for worker_id in ("prefill-0", "decode-0"):
            assert [abort.job_id for abort in f.cluster.workers[worker_id].heard_of(Abort)] == [job_id]
        assert (f.ended("cancelled"), f.ended("finished"), f.ended("failed")) == (1, 0, 0)
        assert f.dispatcher.num_running == 0


@pytest.mark.parametrize(
    "body",
    [
        {"stream": False},
        {"stream": False, "n": 2},
        {"stream": True, "n": 2},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("leaves", [True, False])
async def test_a_request_leaves_no_task_behind(front: Callable[..., Any], body: dict[str, Any], leaves: bool) -> None:
    gate = [True]
    async with front(saying(TEXT), pair(prefill=lambda job: "hold" if gate else None)) as f:
        before = asyncio.all_tasks()
        connection = Connection(f, chat_body(**body))
        await f.until(lambda: len(f.cluster.workers["prefill-0"].jobs) == body.get("n", 1))
        assert len(asyncio.all_tasks() - before) == 2, "one serves, one watches, however many choices"
        if leaves:
            await connection.hang_up()
            assert connection.received == []
        else:
            gate.clear()
            await asyncio.wait_for(connection.task, 5.0)
            assert connection.received[-1]["more_body"] is False
        await f.until(lambda: f.cluster.num_jobs == 0)
        assert asyncio.all_tasks() == before
        assert f.ended("cancelled") == (body.get("n", 1) if leaves else 0)


async def test_a_client_that_leaves_the_queue_is_never_admitted(front: Callable[..., Any]) -> None:
    workers = pair()
    workers[1].num_pages = 5
    gate = [True]
    workers[1].before_token = lambda job: "hold" if gate else None
    async with front(saying(TEXT), workers) as f:
        first = asyncio.create_task(content(f, max_tokens=200))
        await f.until(lambda: f.dispatcher.num_running == 1)
        connection = Connection(f, chat_body(max_tokens=200))
        await f.until(lambda: f.dispatcher.num_waiting == 1)
        await connection.hang_up()
        assert f.dispatcher.num_waiting == 0
        gate.clear()
        assert await first == TEXT
        assert len(f.cluster.workers["prefill-0"].heard_of(PrefillJob)) == 1
        assert connection.received == []


async def test_credits_bound_what_runs_and_everybody_is_served(front: Callable[..., Any]) -> None:
    workers = pair()
    workers[1].num_pages = 8
    most = [0]

    def count(job: Job) -> None:
        most[0] = max(most[0], len(workers[1].jobs))

    workers[1].before_token = count
    async with front(saying(TEXT), workers) as f:
        texts = await asyncio.gather(*(content(f, max_tokens=60) for _ in range(12)))
        assert texts == [TEXT] * 12
    assert 2 <= most[0] <= 4, "eight pages, two a request"


async def test_a_full_queue_says_429_with_a_time(front: Callable[..., Any]) -> None:
    gate = [True]
    workers = pair(decode=lambda job: "hold" if gate else None)
    workers[1].num_pages = 2
    async with front(saying(TEXT), workers, max_waiting=1) as f:
        running = asyncio.create_task(content(f, max_tokens=60))
        await f.until(lambda: f.dispatcher.num_running == 1)
        waiting = asyncio.create_task(content(f, max_tokens=60))
        await f.until(lambda: f.dispatcher.num_waiting == 1)
        refused = await f.client.post(CHAT, json=chat_body(max_tokens=60))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert f.metrics.value("baton_requests_rejected_total", reason="queue_full") == 1
        scraped = (await f.client.get("/metrics")).text.splitlines()
        assert {f'baton_requests_{what}{{role="router"}} 1.0' for what in ("running", "waiting")} <= set(scraped)
        gate.clear()
        assert [await running, await waiting] == [TEXT, TEXT]


async def test_waiting_has_an_end(front: Callable[..., Any]) -> None:
    gate = [True]
    workers = pair(decode=lambda job: "hold" if gate else None)
    workers[1].num_pages = 2
    async with front(saying(TEXT), workers, queue_timeout_s=0.2) as f:
        running = asyncio.create_task(content(f, max_tokens=60))
        await f.until(lambda: f.dispatcher.num_running == 1)
        late = await f.client.post(CHAT, json=chat_body(max_tokens=60))
        assert late.status_code == 429
        assert f.metrics.value("baton_requests_rejected_total", reason="queue_timeout") == 1
        gate.clear()
        assert await running == TEXT


async def test_a_request_that_no_pool_could_hold_is_the_clients_fault(front: Callable[..., Any]) -> None:
    workers = pair()
    workers[1].num_pages = 2
    async with front(saying(TEXT), workers) as f:
        response = await f.client.post(CHAT, json=chat_body(max_tokens=128))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
        assert "context is 128 tokens" in response.json()["error"]["message"]


async def test_a_router_that_stood_still_starts_new_lives(front: Callable[..., Any]) -> None:
    gate = [True]
    async with front(saying(TEXT), pair(decode=lambda job: "hold" if gate and job.next == 12 else None)) as f:
        asked = asyncio.create_task(content(f))
        await f.until(lambda: f.cluster.workers["decode-0"].progress >= 11)
        f.dispatcher.on_stalled()
        gate.clear()
        assert await asked == TEXT
        assert len(f.cluster.workers["decode-0"].heard_of(DecodeJob)) == 2


async def test_a_fault_in_one_tick_is_not_the_end_of_all(
    front: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context["exception"]))
    raised: list[Exception] = []
    ticks: list[str] = []

    def tick() -> None:
        ticks.append("tick")
        if len(ticks) == 1:
            raise ArithmeticError("a bug")

    async with front(saying(TEXT)) as f:
        monkeypatch.setattr(f.dispatcher, "tick", tick)
        await f.until(lambda: len(ticks) > 2)
    assert [str(error) for error in raised] == ["a bug"]


async def test_an_end_is_counted_once(front: Callable[..., Any]) -> None:
    async with front(saying(TEXT)) as f:
        connection = Connection(f, chat_body())
        await asyncio.wait_for(connection.task, 5.0)
        assert [message["type"] for message in connection.received] == ["http.response.start", "http.response.body"]
        assert sum(f.ended(outcome.value) for outcome in Outcome) == 1
