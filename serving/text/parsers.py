"""The tokens of a chat answer, split into reasoning, content and tool calls while they arrive.

    reasoning --</think>--> content --<tool▁calls▁begin>--> tool calls --<tool▁calls▁end>--> content

The boundaries are control tokens, recognised by id: an answer that spells `</think>` out in ordinary tokens stays where
it is. Reasoning and content begin without the line breaks that the models put around the markers. Stop strings are
looked for in the content alone, never across a marker.

Must not know: HTTP schemas, workers.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

import msgspec

from serving.text import markers as m
from serving.text.detokenizer import Detokenizer, StopMatcher
from serving.text.messages import AssistantMessage, ToolCall
from serving.text.template import Style
from serving.text.tokenizer import Tokenizer
from serving.text.tool_calls import ToolCallDelta, ToolCallParser

THINK_MARKERS: Final = (m.THINK, m.END_THINK)
TOOL_MARKERS: Final = (m.CALLS_BEGIN, m.CALLS_END, m.CALL_BEGIN, m.CALL_END, m.SEP)


class OutputDelta(msgspec.Struct, frozen=True):
    """What a few tokens added to an answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)


def new_call_id() -> str:
    """A tool call's id, unique without coordination."""
    return f"call_{secrets.token_hex(12)}"


class OutputParser:
    """Parser of one answer. After `stop_hit` is set everything further is dropped."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        style: Style,
        *,
        in_reasoning: bool = False,
        tools: bool = False,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        new_call_id: Callable[[], str] = new_call_id,
    ) -> None:
        """`in_reasoning`: the prompt ended inside `<think>` (`ChatTemplate.opens_reasoning`). Without `tools` the tool
        markers are text like any other, since nobody asked for calls."""
        names = (*THINK_MARKERS, *(TOOL_MARKERS if tools else ()))
        self._markers = {tokenizer.control_id(name): name for name in names if tokenizer.has_control(name)}
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stops, include=include_stop)
        self._calls = ToolCallParser(style, new_call_id)
        self._state: Literal["reasoning", "content", "calls"] = "reasoning" if in_reasoning else "content"
        self._trims = in_reasoning
        self._has_content = False
        self._reasoning: list[str] = []
        self._content: list[str] = []

    @property
    def stop_hit(self) -> str | None:
        """The stop string that ended the content, if one did."""
        return self._matcher.hit

    @property
    def num_tool_calls(self) -> int:
        """Calls begun so far; the finish reason is `tool_calls` when there is one."""
        return self._calls.num_calls

    def push(self, ids: Iterable[int]) -> OutputDelta:
        """Take the next tokens."""
        run: list[int] = []
        for token_id in ids:
            name = self._markers.get(token_id)
            if name is None:
                run.append(token_id)
                continue
            self._text(self._detokenizer.push(run) + self._detokenizer.flush())
            self._marker(name)
            run = []
        self._text(self._detokenizer.push(run))
        return self._take()

    def flush(self) -> OutputDelta:
        """The answer is over: what was held back."""
        self._text(self._detokenizer.flush())
        self._calls.end_call()
        self._content.append(self._matcher.flush())
        return self._take()

    def _text(self, text: str) -> None:
        if self._trims and self._state != "calls":
            text = text.lstrip("\n")
            self._trims = not text
        if self.stop_hit is not None or not text:
            return
        if self._state == "reasoning":
            self._reasoning.append(text)
        elif self._state == "content":
            self._has_content = self._has_content or not text.isspace()
            self._content.append(self._matcher.push(text))
        else:
            self._calls.text(text)

    def _marker(self, name: str) -> None:
        if self.stop_hit is not None:
            return
        if name in TOOL_MARKERS:
            self._tool_marker(name)
        elif self._state == "calls":
            self._calls.text(name)
        elif name == m.END_THINK and self._state == "reasoning":
            self._enter("content")
        elif self._has_content:
            self._text(name)
        elif name == m.THINK:
            self._enter("reasoning")

    def _tool_marker(self, name: str) -> None:
        if self._state != "calls" and name not in (m.CALLS_BEGIN, m.CALL_BEGIN):
            self._text(name)
            return
        if self._state != "calls":
            self._content.append(self._matcher.flush())
            self._enter("calls")
        self._calls.marker(name)
        if name == m.CALLS_END:
            self._enter("content")

    def _enter(self, state: Literal["reasoning", "content", "calls"]) -> None:
        self._state = state
        self._trims = state != "calls"

    def _take(self) -> OutputDelta:
        delta = OutputDelta("".join(self._reasoning), "".join(self._content), self._calls.take())
        self._reasoning.clear()
        self._content.clear()
        return delta


def merge(deltas: Iterable[OutputDelta]) -> AssistantMessage:
    """The whole answer, for a client that does not stream."""
    seen = list(deltas)
    calls: dict[int, ToolCall] = {}
    for news in (news for delta in seen for news in delta.tool_calls):
        call = calls.get(news.index) or ToolCall(news.name or "", "", news.id or "")
        calls[news.index] = ToolCall(call.name, call.arguments + news.arguments, call.id)
    return AssistantMessage(
        content="".join(delta.content for delta in seen),
        tool_calls=tuple(calls.values()),
        reasoning="".join(delta.reasoning for delta in seen),
    )
