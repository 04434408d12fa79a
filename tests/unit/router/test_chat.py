"""Answers as clients read them: streams and whole ones, chat and plain, with everything that can be asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serving.core.messages import DecodeJob, PrefillJob
from serving.text import markers as m
from tests.unit.router.conftest import CONTROL_ID, byte_ids, chat_body, saying
from tests.unit.router.scripted_worker import EOS, Job, ScriptedWorker

CHAT = "/v1/chat/completions"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream; it must end in [DONE]."""
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith("data: ") for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


async def stream(client: httpx.AsyncClient, path: str = CHAT, **body: Any) -> list[dict[str, Any]]:
    response = await client.post(path, json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response)


async def test_a_stream_has_a_role_then_text_then_a_reason(front: Callable[..., Any]) -> None:
    async with front(saying("Hello, wörld ☃")) as f:
        chunks = await stream(f.client, **chat_body())
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello, wörld ☃"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert len({c["id"] for c in chunks}) == 1
    assert all(c["object"] == "chat.completion.chunk" and "usage" not in c for c in chunks)


async def test_usage_comes_last_when_asked_for(front: Callable[..., Any]) -> None:
    async with front(saying("four")) as f:
        chunks = await stream(f.client, **chat_body(stream_options={"include_usage": True}))
        whole = (await f.client.post(CHAT, json=chat_body())).json()
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == len("four") + 1, "the end-of-sequence token was computed as well"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_usage_says_what_of_each_prompt_was_cached_when_its_first_choice_began(front: Callable[..., Any]) -> None:
    prefill, decode = ScriptedWorker("prefill-0", "prefill"), ScriptedWorker("decode-0", "decode", num_cached=50)

    def cached(job: Job) -> None:
        prefill.num_cached = job.message.sampling.seed

    prefill.before_token = cached
    async with front(saying("four"), [prefill, decode]) as f:
        body = {"model": "bytes", "prompt": ["one", "two"], "n": 2, "seed": 3}
        usage = (await f.client.post("/v1/completions", json=body)).json()["usage"]
        chunks = await stream(f.client, **chat_body(n=2, seed=2, stream_options={"include_usage": True}))
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3 + 3}
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_a_whole_answer_equals_the_stream(front: Callable[..., Any]) -> None:
    async with front(saying("Hello")) as f:
        response = await f.client.post(CHAT, json=chat_body(), headers={"x-request-id": "r1"})
    body = response.json()
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert (body["object"], body["model"], body["id"]) == ("chat.completion", "bytes", "chatcmpl-r1")
    assert response.headers["x-baton-prefill"] == "prefill-0"
    assert response.headers["x-baton-decode"] == "decode-0"


async def test_length_is_a_reason_and_one_token_never_reaches_decode(front: Callable[..., Any]) -> None:
    async with front(saying("abcdef")) as f:
        three = (await f.client.post(CHAT, json=chat_body(max_tokens=3))).json()
        one = (await f.client.post(CHAT, json=chat_body(max_completion_tokens=1))).json()
        decode = f.cluster.workers["decode-0"]
        prefill = f.cluster.workers["prefill-0"]
    assert (three["choices"][0]["message"]["content"], three["choices"][0]["finish_reason"]) == ("abc", "length")
    assert (one["choices"][0]["message"]["content"], one["choices"][0]["finish_reason"]) == ("a", "length")
    assert len(decode.heard_of(DecodeJob)) == 1
    assert [job.decode is None for job in prefill.heard_of(PrefillJob)] == [False, True]


async def test_several_choices_draw_with_several_seeds(front: Callable[..., Any]) -> None:
    async with front(saying("abc")) as f:
        chunks = await stream(f.client, **chat_body(n=3, seed=5, stream_options={"include_usage": True}))
        jobs = f.cluster.workers["prefill-0"].heard_of(PrefillJob)
        whole = (await f.client.post(CHAT, json=chat_body(n=2))).json()
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == {0: "abc", 1: "abc", 2: "abc"}
    assert sorted(job.sampling.seed for job in jobs[:3]) == [5, 6, 7]
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] == len(jobs[0].token_ids), "one prompt, however many choices"
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]


@pytest.mark.parametrize("streams", [True, False])
async def test_a_stop_string_ends_the_text_and_the_job(front: Callable[..., Any], streams: bool) -> None:
    async with front(saying("one two three " * 100)) as f:
        if streams:
            chunks = await stream(f.client, **chat_body(stop=[" three"]))
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            choice = (await f.client.post(CHAT, json=chat_body(stop=" three"))).json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text, reason) == ("one two", "stop")
        await f.until(lambda: f.cluster.num_jobs == 0)
        assert f.ended("finished") == 1
        assert f.ended("cancelled") == 0


@pytest.mark.parametrize("num_each", [2, 3, 4])
async def test_a_step_with_several_tokens_changes_no_text_no_logprobs_and_no_usage(
    front: Callable[..., Any], num_each: int
) -> None:
    bodies = [
        chat_body(stop=[" three"], logprobs=True, top_logprobs=1),
        chat_body(stop=["wo", "x"]),
        chat_body(max_tokens=6, logprobs=True, top_logprobs=1),
        chat_body(stop_token_ids=byte_ids("h")),
    ]
    answers = []
    for several in (1, num_each):
        workers = [ScriptedWorker("prefill-0", "prefill"), ScriptedWorker("decode-0", "decode", num_each=several)]
        async with front(saying("one two three " * 100), workers) as f:
            whole = [(await f.client.post(CHAT, json=body)).json() for body in bodies]
            chunks = await stream(f.client, **bodies[0], stream_options={"include_usage": True})
        listed = [entry for c in chunks[:-1] for entry in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        answers.append(([(answer["choices"], answer["usage"]) for answer in whole], listed, chunks[-1]["usage"]))
    assert answers[0] == answers[1]


async def test_end_of_sequence_is_not_shown_even_when_it_is_an_ordinary_token(front: Callable[..., Any]) -> None:
    async with front(saying("abc|def")) as f:
        body = chat_body(stop_token_ids=byte_ids("|"))
        assert (await f.client.post(CHAT, json=body)).json()["choices"][0]["message"]["content"] == "abc"


async def test_logprobs_stand_beside_each_token(front: Callable[..., Any]) -> None:
    async with front(saying("hé")) as f:
        whole = (await f.client.post(CHAT, json=chat_body(logprobs=True, top_logprobs=2))).json()
        chunks = await stream(f.client, **chat_body(logprobs=True, top_logprobs=2))
        plain_body = {"model": "bytes", "prompt": "x", "logprobs": 1}
        plain = (await f.client.post("/v1/completions", json=plain_body)).json()
    content = whole["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[byte] for byte in "hé".encode()]
    assert (content[0]["token"], content[0]["logprob"], len(content[0]["top_logprobs"])) == ("h", -0.5, 2)
    streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content
    assert plain["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]
    assert plain["choices"][0]["logprobs"]["token_logprobs"] == [-0.5] * 3


async def test_reasoning_and_calls_have_fields_of_their_own(front: Callable[..., Any]) -> None:
    call = [CONTROL_ID[m.CALLS_BEGIN], CONTROL_ID[m.CALL_BEGIN], *byte_ids("function"), CONTROL_ID[m.SEP]]
    call += [*byte_ids('add\n```json\n{"a": 1}\n```'), CONTROL_ID[m.CALL_END], CONTROL_ID[m.CALLS_END], EOS]
    script = [*byte_ids("thought"), CONTROL_ID[m.END_THINK], *call]
    body = chat_body(tools=[{"type": "function", "function": {"name": "add"}}], chat_template_kwargs={"thinking": True})
    async with front(lambda prompt_ids: script) as f:
        choice = (await f.client.post(CHAT, json=body)).json()["choices"][0]
        chunks = await stream(f.client, **body)
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("thought", None)
    assert choice["finish_reason"] == "tool_calls"
    called = message["tool_calls"][0]
    assert (called["type"], called["function"]) == ("function", {"name": "add", "arguments": '{"a": 1}'})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "thought"
    calls = [c for delta in deltas for c in delta.get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "add"
    assert "".join(c["function"]["arguments"] for c in calls) == '{"a": 1}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_plain_completions_of_several_prompts(front: Callable[..., Any]) -> None:
    async with front(saying("yes")) as f:
        body = {"model": "bytes", "prompt": ["one", "two"], "n": 2, "echo": True}
        whole = (await f.client.post("/v1/completions", json=body)).json()
        chunks = await stream(f.client, "/v1/completions", **body)
        ids = (await f.client.post("/v1/completions", json={"model": "bytes", "prompt": byte_ids("ab")})).json()
    assert [(c["index"], c["text"]) for c in whole["choices"]] == [
        (0, "oneyes"),
        (1, "oneyes"),
        (2, "twoyes"),
        (3, "twoyes"),
    ]
    assert whole["usage"]["prompt_tokens"] == 8, "BOS and three bytes, twice"
    texts = ["", "", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [c["text"] for c in whole["choices"]]
    assert (ids["choices"][0]["text"], ids["usage"]["prompt_tokens"]) == ("yes", 2)


async def test_a_worker_of_both_roles_serves_alone(front: Callable[..., Any]) -> None:
    async with front(saying("alone"), [ScriptedWorker("both-0", "both")]) as f:
        response = await f.client.post(CHAT, json=chat_body())
        job = f.cluster.workers["both-0"].heard_of(PrefillJob)[0]
    assert response.json()["choices"][0]["message"]["content"] == "alone"
    assert response.headers["x-baton-decode"] == "both-0"
    assert job.decode is None


async def test_metrics_hold_the_routers_and_the_workers_families(front: Callable[..., Any]) -> None:
    async with front(saying("abc")) as f:
        await f.client.post(CHAT, json=chat_body())
        text = (await f.client.get("/metrics")).text
    lines = text.splitlines()
    assert 'baton_requests_total{outcome="finished"} 1.0' in lines
    assert "baton_ttft_seconds_count 1.0" in lines
    assert "baton_tpot_seconds_count 1.0" in lines
    for stage in ("admission", "prefill_queue", "prefill", "first_token"):
        assert f'baton_ttft_stage_seconds_count{{stage="{stage}"}} 1.0' in lines
    assert 'baton_handoff_gap_seconds_count{stage="first_step"} 1.0' in lines
    assert 'baton_slo_total{blame="",met="true",slo="ttft"} 1.0' in lines
    assert {'baton_tokens_total{worker="prefill-0"} 1.0', 'baton_tokens_total{worker="decode-0"} 1.0'} <= set(lines)
    assert 'baton_worker_up{role="decode",worker="decode-0"} 1.0' in lines


async def test_a_missed_promise_is_counted_with_its_stage(front: Callable[..., Any]) -> None:
    async with front(saying("abc"), [ScriptedWorker("b", "both", step_s=0.05)]) as f:
        headers = {"x-slo-ttft-ms": "1", "x-slo-tpot-ms": "1"}
        await f.client.post(CHAT, json=chat_body(), headers=headers)
        assert f.metrics.value("baton_slo_total", slo="ttft", met="false", blame="first_token") == 1
        assert f.metrics.value("baton_slo_total", slo="tpot", met="false", blame="decode") == 1
        wrong = await f.client.post(CHAT, json=chat_body(), headers={"x-slo-ttft-ms": "soon"})
        assert wrong.json()["error"]["param"] == "x-slo-ttft-ms"
