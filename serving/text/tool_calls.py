"""Tool calls as the model writes them, piece by piece, into calls as the API reports them.

    v3, r1   <call▁begin>function<sep>NAME\\n```json\\n{arguments}\\n```<call▁end>
    v3.1     <call▁begin>NAME<sep>{arguments}<call▁end>

A call goes head -> (fence ->) arguments -> over. The name is reported once it is complete, arguments as they come.
Nothing is repaired: arguments that are not JSON are passed on as the text that the model wrote; only V3's code fence is
taken off. A call that its closing marker does not end, is ended by the next marker or by the end of the text.

Must not know: what a tool does, schemas, HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import msgspec

from serving.text import markers as m
from serving.text.template import Style

FENCE: Final = "```"
END_FENCE: Final = "\n```"


class ToolCallDelta(msgspec.Struct, frozen=True):
    """News of call number `index`. `id` and `name` are set in a call's first delta and None later."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolCallParser:
    """Reads what stands between the tool-calls markers. Feed it with `text` and `marker`, collect with `take`."""

    def __init__(self, style: Style, new_call_id: Callable[[], str]) -> None:
        self._fenced = style != "v3.1"
        self._new_call_id = new_call_id
        self._state: Literal["between", "head", "fence", "arguments"] = "between"
        self._held = ""
        self._type_seen = False
        self._news: list[ToolCallDelta] = []
        self.num_calls = 0

    def text(self, text: str) -> None:
        """Ordinary text. Between two calls it means nothing and is dropped."""
        if self._state == "between":
            return
        self._held += text
        self._advance()

    def marker(self, name: str) -> None:
        """A control token. Inside arguments a `<｜tool▁sep｜>` is part of them."""
        if name == m.SEP and self._state == "head":
            self._separate()
        elif name == m.SEP:
            self.text(name)
        else:
            self.end_call()
            if name == m.CALL_BEGIN:
                self._state, self._type_seen = "head", False

    def end_call(self) -> None:
        """The call in progress, if any, is over, complete or not."""
        if self._state == "head":
            self._type_seen = True
            self._advance()
            if self._state == "head" and self._held.strip():
                self._begin(self._held)
        if self._state == "fence" and not self._held.lstrip("`").isalpha():
            self._report(self._held.strip("`"))
        elif self._state == "arguments":
            body, fence, after = self._held.rpartition(END_FENCE)
            self._report(body if fence and not after.strip() else self._held)
        self._state, self._held = "between", ""

    def take(self) -> tuple[ToolCallDelta, ...]:
        """What is new since the last call."""
        news, self._news = tuple(self._news), []
        return news

    # -- inside one call ----------------------------------------------------------------------------------------------

    def _separate(self) -> None:
        """V3 has the type in front of the separator and it is always "function"; V3.1 has the name there."""
        if self._fenced and not self._type_seen:
            self._held, self._type_seen = "", True
        else:
            self._begin(self._held)

    def _advance(self) -> None:
        if self._state == "head" and self._fenced and self._type_seen and "\n" in self._held:
            name, _, rest = self._held.partition("\n")
            self._begin(name)
            self._state, self._held = "fence", rest
        if self._state == "fence":
            self._skip_fence()
        if self._state == "arguments":
            keep = _fence_start(self._held) if self._fenced else len(self._held)
            self._report(self._held[:keep])
            self._held = self._held[keep:]

    def _begin(self, name: str) -> None:
        self._news.append(ToolCallDelta(self.num_calls, self._new_call_id(), name.strip()))
        self.num_calls += 1
        self._state, self._held = "arguments", ""

    def _skip_fence(self) -> None:
        """Drop a first line that begins with a code fence; wait while it could still be one."""
        if not self._held.startswith(FENCE[: len(self._held)]):
            self._state = "arguments"
        elif "\n" in self._held:
            self._state, self._held = "arguments", self._held.partition("\n")[2]

    def _report(self, arguments: str) -> None:
        if arguments:
            self._news.append(ToolCallDelta(self.num_calls - 1, arguments=arguments))


def _fence_start(text: str) -> int:
    """Where a closing fence, or the beginning of one, ends the text (white space may follow); else the text's end."""
    at = text.rfind(END_FENCE)
    if at >= 0 and not text[at + len(END_FENCE) :].strip():
        return at
    cut = next((n for n in range(len(END_FENCE) - 1, 0, -1) if text.endswith(END_FENCE[:n])), 0)
    return len(text) - cut
