"""One choice of an answer: a generation's tokens, read at the client's pace, become text, calls and a finish reason.

Two readers, one per endpoint, behind `Choice`. Reading finds stop strings, so a choice must be read as its tokens come, whether or not the
client streams. Must not know JSON or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from router.generation import Generation, Outcome
from router.openai.prepare import Prepared, Served
from serving.core.request import FinishReason, TokenLogprobs
from serving.text.detokenizer import Detokenizer, StopMatcher
from serving.text.parsers import OutputDelta, OutputParser

Stop = Callable[[Generation], None]
"""Ends a generation whose text is complete; the dispatcher's."""


class Reader(Protocol):
    """Tokens in, pieces of the answer out."""

    @property
    def stop_hit(self) -> str | None: ...
    @property
    def num_tool_calls(self) -> int: ...
    def push(self, ids: list[int]) -> OutputDelta: ...
    def flush(self) -> OutputDelta: ...


class TextReader:
    """Plain completions: nothing but text and stop strings."""

    num_tool_calls = 0

    def __init__(self, served: Served, prepared: Prepared) -> None:
        self._detokenizer = Detokenizer(served.tokenizer)
        self._matcher = StopMatcher(prepared.stops)

    @property
    def stop_hit(self) -> str | None:
        return self._matcher.hit

    def push(self, ids: list[int]) -> OutputDelta:
        return OutputDelta(content=self._matcher.push(self._detokenizer.push(ids)))

    def flush(self) -> OutputDelta:
        rest = self._matcher.push(self._detokenizer.flush())
        return OutputDelta(content=rest + self._matcher.flush())


def chat_reader(served: Served, prepared: Prepared) -> OutputParser:
    return OutputParser(
        served.tokenizer,
        served.template.style,
        in_reasoning=prepared.in_reasoning,
        tools=prepared.tools,
        stops=prepared.stops,
    )


class Choice:
    """`finish_reason` is set once nothing more will come; `generation.error` instead, if it failed."""

    def __init__(self, index: int, prepared: Prepared, generation: Generation, reader: Reader, stop: Stop) -> None:
        self.index = index
        self.prepared = prepared
        self.generation = generation
        self.finish_reason: str | None = None
        self._reader = reader
        self._stop = stop
        self._num_read = 0

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    def read(self) -> tuple[OutputDelta, list[int], list[TokenLogprobs]]:
        """What is new: the pieces, and the shown tokens with their logprobs. The end-of-sequence token is not shown."""
        generation = self.generation
        start = self._num_read
        delta = self._push(generation.token_ids[start : self._num_shown()])
        end = self._num_read
        if self._reader.stop_hit is not None:
            self._stop(generation)
        if generation.outcome is Outcome.FINISHED and not self.ended:
            if self._reader.stop_hit is None:
                delta = _joined(delta, self._reader.flush())
            self.finish_reason = self._reason()
        return delta, generation.token_ids[start:end], generation.logprobs[start:end]

    @property
    def num_tokens(self) -> int:
        """Of the answer, its end-of-sequence token among them; not those drawn after a stop string."""
        return self._num_read if self._reader.stop_hit is not None else len(self.generation.token_ids)

    def _push(self, ids: list[int]) -> OutputDelta:
        """One by one where a stop string may end the text among them: a step may bring several."""
        delta = OutputDelta()
        pieces = [[token_id] for token_id in ids] if self.prepared.stops else [ids] if ids else []
        for piece in pieces:
            if self._reader.stop_hit is None:
                delta = _joined(delta, self._reader.push(piece))
                self._num_read += len(piece)
        return delta

    def _num_shown(self) -> int:
        """A stop token ends the text and is no part of it."""
        generation = self.generation
        ids = generation.token_ids
        stopped = generation.finish is FinishReason.STOP and self._reader.stop_hit is None
        return len(ids) - (1 if stopped and ids and ids[-1] in generation.order.sampling.stop_token_ids else 0)

    def _reason(self) -> str:
        if self.generation.finish is FinishReason.LENGTH and self._reader.stop_hit is None:
            return "length"
        return "tool_calls" if self._reader.num_tool_calls else "stop"


def _joined(first: OutputDelta, second: OutputDelta) -> OutputDelta:
    return OutputDelta(
        first.reasoning + second.reasoning, first.content + second.content, first.tool_calls + second.tool_calls
    )
