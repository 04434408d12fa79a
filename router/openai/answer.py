"""The HTTP response to a request that generates: streamed or whole, watched for the client's leaving.

    submitted --first news--> headers --news--> ... --> last chunk, or the whole body
        |                        |
        |                        +--error--> an error event in the stream
        +--error--> an error response      (client gone, at any point --> every generation is cancelled at once)

One task watches the connection, one writes; both belong to the request, none to a token. Must not know workers.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.generation import Generation, Order
from router.openai.choice import Choice
from router.openai.chunks import DONE, ChunkWriter, Usage, event
from router.openai.errors import envelope, error_response
from serving.core.errors import BatonError
from serving.core.request import TokenLogprobs
from serving.text.parsers import OutputDelta, merge


class Generator(Protocol):
    """Who makes tokens; the dispatcher."""

    def submit(self, order: Order, notify: Callable[[], None]) -> Generation: ...
    def stop(self, generation: Generation) -> None: ...
    def cancel(self, generation: Generation) -> None: ...


class Answer(Response, ABC):
    """Owns the generations of one request from submission to their end, whatever happens in between."""

    def __init__(
        self, generator: Generator, start: Callable[[Callable[[], None]], list[Choice]], writer: ChunkWriter
    ) -> None:
        """`start(notify)` submits; it may raise BatonError, then nothing has been submitted."""
        self.background = None
        self._generator = generator
        self._start = start
        self._writer = writer
        self._news = asyncio.Event()
        self._gone = False
        self._begun = False
        self._choices: list[Choice] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            self._choices = self._start(self._news.set)
            await self._write(send)
        except BatonError as error:
            await self._report(error, scope, receive, send)
        finally:
            watcher.cancel()
            self._cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._cancel()
        self._news.set()

    def _cancel(self) -> None:
        for choice in self._choices:
            self._generator.cancel(choice.generation)

    async def _wait(self) -> None:
        """Until there is news. Raises the error of a generation that failed."""
        await self._news.wait()
        self._news.clear()

    def _check(self) -> None:
        for choice in self._choices:
            if choice.generation.error is not None:
                raise choice.generation.error

    async def _report(self, error: BatonError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._gone:
            return
        if self._begun:
            await send({"type": "http.response.body", "body": event(envelope(error)) + DONE, "more_body": False})
        else:
            await error_response(error)(scope, receive, send)

    async def _begin(self, send: Send, content_type: bytes, length: int | None = None) -> None:
        self._begun = True
        headers = [(b"content-type", content_type)]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        if self._choices:
            generation = self._choices[0].generation
            headers.append((b"x-baton-prefill", generation.prefill_id.encode()))
            headers.append((b"x-baton-decode", generation.decode_id.encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    @abstractmethod
    async def _write(self, send: Send) -> None:
        """Everything there is to answer, from headers to end. Raises BatonError."""

    def _usage(self) -> Usage:
        """Choices of one prompt share it, and the first of them says what was cached: the others may have hit what it computed."""
        first = {id(choice.prepared): choice for choice in reversed(self._choices)}.values()
        return Usage(
            num_prompt_tokens=sum(len(choice.prepared.prompt_ids) for choice in first),
            num_completion_tokens=sum(choice.num_tokens for choice in self._choices),
            num_cached_tokens=sum(choice.generation.num_cached_tokens for choice in first),
        )


class StreamedAnswer(Answer):
    """Server-sent events; one write for all that is new at a wake-up."""

    async def _write(self, send: Send) -> None:
        ended = False
        while not ended:
            await self._wait()
            if self._gone:
                return
            body = b"".join([self._new_of(choice) for choice in self._choices if not choice.ended])
            ended = all(choice.ended for choice in self._choices)
            if ended:
                body += self._writer.usage(self._usage()) + DONE
            elif not self._begun:
                self._check()
            if body and not self._begun:
                await self._begin(send, b"text/event-stream; charset=utf-8")
                body = b"".join(self._writer.begin(c.index, c.prepared.echo) for c in self._choices) + body
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": not ended})
            self._check()

    def _new_of(self, choice: Choice) -> bytes:
        delta, ids, logprobs = choice.read()
        chunk = self._writer.delta(choice.index, delta, ids, logprobs) if delta or logprobs else b""
        if choice.finish_reason is None:
            return chunk
        return chunk + self._writer.end(choice.index, choice.finish_reason)


class WholeAnswer(Answer):
    """One JSON object when everything is there."""

    async def _write(self, send: Send) -> None:
        parts: list[_Part] = []
        while not parts or not all(choice.ended for choice in self._choices):
            await self._wait()
            if self._gone:
                return
            parts = parts or [_Part() for _ in self._choices]
            for choice, part in zip(self._choices, parts, strict=True):
                part.add(*choice.read())
            self._check()
        choices = [self._choice(choice, part) for choice, part in zip(self._choices, parts, strict=True)]
        body = self._writer.answer(choices, self._usage())
        await self._begin(send, b"application/json", len(body))
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _choice(self, choice: Choice, part: _Part) -> dict[str, Any]:
        assert choice.finish_reason is not None
        message, echo = merge(part.deltas), choice.prepared.echo
        return self._writer.whole(choice.index, message, part.ids, part.logprobs, echo, choice.finish_reason)


class _Part:
    """What has been read of one choice."""

    def __init__(self) -> None:
        self.deltas: list[OutputDelta] = []
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []

    def add(self, delta: OutputDelta, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        self.deltas.append(delta)
        self.ids += ids
        self.logprobs += logprobs
