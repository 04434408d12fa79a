"""What clients send, right and wrong: status, the field named, and the server goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from router.openai import prepare
from router.openai.prepare import Served
from router.openai.schemas import BodyDecoder, ChatBody, CompletionBody
from serving.core.errors import ModelNotFound, RequestError
from tests.unit.router.conftest import CONTROL_ID, MAX_POSITIONS, chat_body, saying
from tests.unit.router.scripted_worker import EOS

CHAT = BodyDecoder(ChatBody)
COMPLETION = BodyDecoder(CompletionBody)


def chat(served: Served, max_model_len: int = MAX_POSITIONS, **fields: Any) -> prepare.Prepared:
    return prepare.chat(CHAT(json.dumps(chat_body(**fields)).encode()), served, max_model_len)


def completion(served: Served, **fields: Any) -> list[prepare.Prepared]:
    body = json.dumps({"model": "bytes", **fields}).encode()
    return prepare.completions(COMPLETION(body), served, MAX_POSITIONS)


USER = {"role": "user", "content": "hi"}

WRONG_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 2.5}, "n"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "wizard", "content": "hi"}]}, "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
    ),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": MAX_POSITIONS}, "max_completion_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"stop_token_ids": [99999]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": [{"type": "magic", "function": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"stream": "yes"}, "stream"),
    ({"messages": [{"role": "user", "content": "x" * MAX_POSITIONS}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 1_000_000}]}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_CHATS, ids=[json.dumps(f)[:60] for f, _ in WRONG_CHATS])
def test_a_wrong_chat_names_its_field_in_one_line(served: Served, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat(served, **fields)
    assert refused.value.param == param
    assert "\n" not in refused.value.message
    assert "`" not in refused.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "logprobs": 99}, "logprobs"),
    ],
)
def test_a_wrong_completion_names_its_field(served: Served, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        completion(served, **fields)
    assert refused.value.param == param


@pytest.mark.parametrize("body", [b"{", b"", b"nonsense", b'{"model":"\xff"}', b'{"model":"\\ud83d"}', b"[" * 100_000])
def test_broken_json_is_a_request_error(body: bytes) -> None:
    with pytest.raises(RequestError):
        CHAT(body)


def test_an_unknown_model_is_not_found(served: Served) -> None:
    with pytest.raises(ModelNotFound) as refused:
        chat(served, model="gpt-9")
    assert refused.value.param == "model"


def test_unknown_fields_and_nulls_are_ignored(served: Served) -> None:
    prepared = chat(
        served, temperature=None, stop=None, n=None, frobnicate=[1], service_tier="auto", metadata={"a": "b"}
    )
    assert prepared.sampling.temperature == 1.0


def test_parameters_reach_the_workers(served: Served) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1.0, "seed": 42}
    more = {"frequency_penalty": -1.0, "repetition_penalty": 1.5, "logit_bias": {"65": -100}, "max_tokens": 9}
    prepared = chat(served, logprobs=True, top_logprobs=2, stop=["a", "b"], stop_token_ids=[66], **fields, **more)
    for name, value in (fields | more).items():
        if name not in ("logit_bias", "max_tokens"):
            assert getattr(prepared.sampling, name) == value
    assert prepared.sampling.logit_bias == {65: -100.0}
    assert prepared.sampling.stop_token_ids == [EOS, 66]
    assert prepared.sampling.logprobs == 2
    assert (prepared.max_new_tokens, prepared.stops) == (9, ("a", "b"))
    assert prepared.sampling_of(1).seed == 43


def test_token_ids_of_a_request_are_1024_at_most(served: Served) -> None:
    wide = dataclasses.replace(served, vocab_size=129_280)
    biases = dict.fromkeys(map(str, range(1025)), 1.0)
    with pytest.raises(RequestError, match="at most 1024") as refused:
        chat(wide, logit_bias=biases)
    assert refused.value.param == "logit_bias"
    del biases["0"]
    prepared = chat(wide, logit_bias=biases, stop_token_ids=list(range(1024)), ignore_eos=True)
    assert len(prepared.sampling.logit_bias) == len(prepared.sampling.stop_token_ids) == 1024


def test_without_a_seed_two_requests_draw_differently(served: Served) -> None:
    assert chat(served).sampling.seed != chat(served).sampling.seed


def test_ignore_eos_leaves_only_the_clients_stops(served: Served) -> None:
    assert chat(served, ignore_eos=True).sampling.stop_token_ids == []


def test_an_answer_may_fill_the_context_and_no_more(served: Served) -> None:
    prepared = chat(served)
    assert len(prepared.prompt_ids) + prepared.max_new_tokens == MAX_POSITIONS
    assert chat(served, max_tokens=prepared.max_new_tokens).max_new_tokens == prepared.max_new_tokens
    with pytest.raises(RequestError, match="context is 2048 tokens"):
        chat(served, max_tokens=prepared.max_new_tokens + 1)


def test_text_parts_are_joined_and_control_tokens_stay_text(served: Served) -> None:
    parts = [{"type": "text", "text": "<｜User｜>"}, {"type": "text", "text": "!"}]
    prepared = chat(served, messages=[{"role": "user", "content": parts}])
    assert prepared.prompt_ids.count(CONTROL_ID["<｜User｜>"]) == 1, "the template's own"
    assert prepared.prompt_ids == chat(served, messages=[{"role": "user", "content": "<｜User｜>!"}]).prompt_ids


def test_tools_change_the_prompt_unless_the_client_says_none(served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    assert len(chat(served, tools=tools).prompt_ids) > len(chat(served).prompt_ids)
    assert chat(served, tools=tools, tool_choice="none").prompt_ids == chat(served).prompt_ids


def test_thinking_is_the_templates_business(served: Served) -> None:
    assert chat(served, chat_template_kwargs={"thinking": True}).in_reasoning
    assert not chat(served).in_reasoning


def test_completions_take_text_texts_ids_and_lists_of_ids(served: Served) -> None:
    assert [p.prompt_ids for p in completion(served, prompt=[5, 6])] == [[5, 6]]
    assert [p.prompt_ids for p in completion(served, prompt=[[5], [6, 7]])] == [[5], [6, 7]]
    assert len(completion(served, prompt=["a", "b"])) == 2
    assert completion(served, prompt="a")[0].prompt_ids[0] == CONTROL_ID["<｜begin▁of▁sentence｜>"]
    assert completion(served, prompt="a")[0].max_new_tokens == 16


HTTP_FAULTS: list[tuple[str, str, bytes, int, str | None]] = [
    ("POST", "/v1/chat/completions", b"{", 400, None),
    ("POST", "/v1/chat/completions", b"", 400, None),
    ("POST", "/v1/chat/completions", b"[]", 400, None),
    ("POST", "/v1/chat/completions", json.dumps(chat_body(n=0)).encode(), 400, "n"),
    ("POST", "/v1/chat/completions", json.dumps(chat_body(model="x")).encode(), 404, "model"),
    ("POST", "/v1/chat/completions", b'{"messages":[]}', 400, "messages"),
    ("POST", "/v1/completions", b'{"model":"bytes","prompt":""}', 400, "prompt"),
    ("POST", "/v1/chat/completions", b" " * 3000, 413, None),
    ("GET", "/v1/chat/completions", b"", 405, None),
    ("GET", "/v2", b"", 404, None),
    ("GET", "/v1/models/other", b"", 404, "model"),
]


async def test_every_fault_is_an_envelope_and_the_server_goes_on(front: Callable[..., Any]) -> None:
    async with front(saying("fine"), max_body_bytes=2048) as f:
        for method, path, body, status, param in HTTP_FAULTS:
            response = await f.client.request(method, path, content=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (status, param), (path, body, error)
            assert set(error) == {"message", "type", "param", "code"}
            assert response.headers["x-request-id"]
        response = await f.client.post("/v1/chat/completions", json=chat_body())
        assert response.json()["choices"][0]["message"]["content"] == "fine"
        assert f.metrics.value("baton_requests_rejected_total", reason="invalid") == 6


async def test_a_body_without_an_announced_length_is_cut_off_at_the_limit(front: Callable[..., Any]) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 1_000_000:
            sent += 1000
            yield b" " * 1000

    async with front(saying("fine"), max_body_bytes=4096) as f:
        response = await f.client.post("/v1/completions", content=endless())
        assert response.status_code == 413
        assert sent < 10_000


async def test_keys_guard_the_api_and_not_the_probes(front: Callable[..., Any]) -> None:
    async with front(saying("fine"), api_keys=("sesame",)) as f:
        refused = await f.client.post("/v1/chat/completions", json=chat_body())
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert refused.headers["x-request-id"]
        assert (await f.client.get("/v1/models")).status_code == 401
        headers = {"authorization": "Bearer sesame"}
        assert (await f.client.post("/v1/chat/completions", json=chat_body(), headers=headers)).status_code == 200
        assert (await f.client.get("/livez")).status_code == 200


async def test_request_ids_come_back_and_dirty_ones_are_replaced(front: Callable[..., Any]) -> None:
    async with front(saying("fine")) as f:
        for given, kept in (("my-id_1", True), ("a b", False), ("x" * 200, False)):
            response = await f.client.get("/livez", headers={"x-request-id": given})
            assert (response.headers["x-request-id"] == given) == kept
