"""JSON of answers: whole ones, and the chunks of streams, exactly as the OpenAI API writes them.

    chat         role chunk, deltas, a chunk with finish_reason, [usage chunk,] [DONE]
    completions  texts, the last with finish_reason, [usage chunk,] [DONE]

What a chunk of plain text has in common with all others is encoded once a stream. Must not know generations or HTTP.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from serving.core.request import TokenLogprobs
from serving.text.messages import AssistantMessage
from serving.text.parsers import OutputDelta
from serving.text.tokenizer import Tokenizer
from serving.text.tool_calls import ToolCallDelta

DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, over all its choices. A prompt counts once; `num_cached_tokens` of it were not computed again."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(frozen=True)
class Head:
    """What every object of one answer repeats. `created` is Unix time, the API's only wall clock."""

    id: str
    object: str
    model: str
    created: int

    def json(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.object, "created": self.created, "model": self.model}


def head(request_id: str, prefix: str, object_name: str, model: str) -> Head:
    return Head(f"{prefix}-{request_id}", object_name, model, int(time.time()))


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class ChunkWriter(ABC):
    """Bytes of server-sent events; `whole` is an entry of `choices` in an `answer` that is sent at once.

    `field` is the name under which a kind of chunk says what is new, `nothing` what stands there in the last.
    """

    field: bytes
    nothing: bytes

    def __init__(self, head: Head, tokenizer: Tokenizer, *, include_usage: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._encode = msgspec.json.Encoder().encode
        self._before = b"data: " + self._encode(head.json())[:-1] + b',"choices":[{"index":'
        self._after = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    @abstractmethod
    def begin(self, index: int, echo: str) -> bytes: ...

    @abstractmethod
    def delta(self, index: int, delta: OutputDelta, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> bytes:
        """b"" when the tokens have added nothing to see yet."""

    @abstractmethod
    def _content(self, message: AssistantMessage, echo: str) -> dict[str, Any]:
        """The field of a whole choice that holds its text."""

    @abstractmethod
    def _noted(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """`offset`: characters of the answer in front of the first token."""

    def end(self, index: int, finish_reason: str) -> bytes:
        return self._chunk(index, self.nothing, finish=self._encode(finish_reason))

    def whole(
        self,
        index: int,
        message: AssistantMessage,
        ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        echo: str,
        finish_reason: str,
    ) -> dict[str, Any]:
        noted = self._noted(ids, logprobs, len(echo)) if logprobs else None
        return {"index": index, **self._content(message, echo), "logprobs": noted, "finish_reason": finish_reason}

    def usage(self, usage: Usage) -> bytes:
        """b"" where nobody asked for it."""
        return event(self.answer([], usage)) if self._include_usage else b""

    def answer(self, choices: list[dict[str, Any]], usage: Usage) -> bytes:
        return self._encode({**self._head.json(), "choices": choices, "usage": usage.json()})

    def _chunk(self, index: int, new: bytes, *, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        """`new`, `logprobs` and `finish` are JSON."""
        return b'%b%d,"%b":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._before,
            index,
            self.field,
            new,
            logprobs,
            finish,
            self._after,
        )


class ChatChunks(ChunkWriter):
    """Chunks of a chat stream."""

    field, nothing = b"delta", b"{}"

    def begin(self, index: int, echo: str) -> bytes:
        return self._chunk(index, b'{"role":"assistant","content":""}')

    def delta(self, index: int, delta: OutputDelta, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> bytes:
        if not logprobs and not delta.reasoning and not delta.tool_calls:
            return self._chunk(index, b'{"content":' + self._encode(delta.content) + b"}") if delta.content else b""
        fields: dict[str, Any] = {}
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.content or not delta:
            fields["content"] = delta.content
        if delta.tool_calls:
            fields["tool_calls"] = [_call_delta(call) for call in delta.tool_calls]
        noted = self._encode(self._noted(ids, logprobs, 0)) if logprobs else b"null"
        return self._chunk(index, self._encode(fields), logprobs=noted)

    def _content(self, message: AssistantMessage, echo: str) -> dict[str, Any]:
        """Content is null where there are calls and no text."""
        fields: dict[str, Any] = {
            "role": "assistant",
            "content": message.content or (None if message.tool_calls else ""),
        }
        if message.reasoning:
            fields["reasoning_content"] = message.reasoning
        if message.tool_calls:
            fields["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        return {"message": fields}

    def _noted(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, ids, logprobs)


class CompletionChunks(ChunkWriter):
    """Chunks of a plain completion's stream."""

    field, nothing = b"text", b'""'

    def __init__(self, head: Head, tokenizer: Tokenizer, *, include_usage: bool) -> None:
        super().__init__(head, tokenizer, include_usage=include_usage)
        self._offsets: dict[int, int] = {}

    def begin(self, index: int, echo: str) -> bytes:
        return self._chunk(index, self._encode(echo)) if echo else b""

    def delta(self, index: int, delta: OutputDelta, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> bytes:
        if not logprobs:
            return self._chunk(index, self._encode(delta.content)) if delta.content else b""
        offset = self._offsets.get(index, 0)
        noted = self._noted(ids, logprobs, offset)
        self._offsets[index] = offset + sum(len(token) for token in noted["tokens"])
        return self._chunk(index, self._encode(delta.content), logprobs=self._encode(noted))

    def _content(self, message: AssistantMessage, echo: str) -> dict[str, Any]:
        return {"text": echo + message.content}

    def _noted(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        return completion_logprobs(self._tokenizer, ids, logprobs, offset)


# -- parts --------------------------------------------------------------------------------------------------------------


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, str] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> dict[str, list[dict[str, Any]]]:
    content = []
    for token_id, noted in zip(ids, logprobs, strict=True):
        best = [_logprob(tokenizer, i, value) for i, value in zip(noted.top_ids, noted.top_logprobs, strict=True)]
        content.append({**_logprob(tokenizer, token_id, noted.logprob), "top_logprobs": best})
    return {"content": content}


def _logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def completion_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int
) -> dict[str, list[Any]]:
    """`offset`: characters of the answer in front of the first token."""
    tokens = [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [noted.logprob for noted in logprobs],
        "top_logprobs": [_named(tokenizer, noted) for noted in logprobs],
        "text_offset": offsets,
    }


def _named(tokenizer: Tokenizer, noted: TokenLogprobs) -> dict[str, float]:
    texts = [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in noted.top_ids]
    return dict(zip(texts, noted.top_logprobs, strict=True))
