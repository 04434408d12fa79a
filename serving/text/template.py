"""The chat formats of DeepSeek-V3, R1 and V3.1: a conversation becomes the ids of a prompt.

    v3     BOS system <User>q<Assistant>a EOS <User>q<Assistant>                     V3, V3-0324, R1-0528
    r1     the same; the prompt ends in <Assistant><think>\\n                         R1
    v3.1   BOS system <User>q<Assistant></think>a EOS <User>q<Assistant></think>     V3.1; or <Assistant><think>

Text between two control tokens is joined first and tokenised in one piece by `Tokenizer.encode_text`; control tokens go
in by id. So the ids equal those of the published Jinja template, as long as no message contains a control token's text;
where one does, ours stays text and the published one is taken over by whoever wrote the message.

Kept from the published templates: all system messages stand at the head; a past answer loses everything up to
`</think>`; after tool outputs the model goes on without a new `<Assistant>`. Mended: the published V3 template opens
the tool-calls and tool-outputs blocks only once per conversation, and forgets `<｜tool▁outputs▁end｜>` before a second
round of calls; here every round has its markers, as in V3-0324.

Must not know: HTTP schemas, the model, or Jinja: a client's or folder's template text is never run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from serving.core.errors import ModelFolderError
from serving.text import markers as m
from serving.text.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from serving.text.tokenizer import Tokenizer

Style = Literal["v3", "r1", "v3.1"]

TOOLS_HEAD = "\n\n## Tools\nYou have access to the following tools:\n"
TOOLS_FORMAT = "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
TOOLS_RULES = (
    "\n\nWhere:\n\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces"
)


class PromptIds:
    """A prompt under construction: text is collected until a control token ends it, then tokenised in one piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._text: list[str] = []

    def text(self, text: str) -> None:
        """Append text that can never become a control token."""
        self._text.append(text)

    def control(self, *names: str) -> None:
        """Append control tokens by name. Raises ModelFolderError when the tokenizer lacks one."""
        self._settle()
        self._ids += [self._tokenizer.control_id(name) for name in names]

    def ids(self) -> list[int]:
        """Everything appended so far."""
        self._settle()
        return list(self._ids)

    def _settle(self) -> None:
        text = "".join(self._text)
        if text:
            self._ids += self._tokenizer.encode_text(text)
        self._text.clear()


class ChatTemplate:
    """Renders conversations in one style with one tokenizer. Stateless between calls."""

    def __init__(self, tokenizer: Tokenizer, style: Style) -> None:
        """Raises ModelFolderError when the tokenizer lacks a control token that the style cannot do without."""
        self.style: Style = style
        self._tokenizer = tokenizer
        for name in (m.USER, m.ASSISTANT, *(() if style == "v3" else (m.THINK, m.END_THINK))):
            tokenizer.control_id(name)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSpec] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of the prompt, BOS first. `thinking` None is the style's own habit: v3 leaves it to the model, r1 thinks,
        v3.1 does not. Raises RequestError for text that is not valid Unicode."""
        prompt = PromptIds(self._tokenizer)
        prompt.control(m.BOS)
        prompt.text("\n\n".join(message.content for message in messages if isinstance(message, SystemMessage)))
        if tools:
            self._tools(prompt, tools)
        turns = [message for message in messages if not isinstance(message, SystemMessage)]
        before: Message | None = None
        for message in turns:
            match message:
                case UserMessage():
                    prompt.control(m.USER)
                    prompt.text(message.content)
                case AssistantMessage():
                    self._assistant(prompt, message, before)
                case ToolMessage():
                    self._tool_output(prompt, message, before)
            before = message
        self._tail(prompt, before, thinking, add_generation_prompt)
        return prompt.ids()

    def opens_reasoning(self, messages: Sequence[Message], thinking: bool | None = None) -> bool:
        """Whether the prompt that `render` makes of this ends inside `<think>`, so that the answer starts there."""
        turns = [message for message in messages if not isinstance(message, SystemMessage)]
        opening = self._opening(turns[-1] if turns else None, thinking)
        return opening is not None and m.THINK in opening and m.END_THINK not in opening

    # -- one turn ---------------------------------------------------------------------------------------------------

    def _assistant(self, prompt: PromptIds, message: AssistantMessage, before: Message | None) -> None:
        after_output = isinstance(before, ToolMessage)
        if self.style == "v3.1":
            if isinstance(before, UserMessage):
                prompt.control(m.ASSISTANT, m.END_THINK)
        else:
            prompt.control(m.OUTPUTS_END if after_output else m.ASSISTANT)
        prompt.text(self._without_reasoning(message.content))
        if message.tool_calls:
            self._tool_calls(prompt, message.tool_calls)
        prompt.control(m.EOS)

    def _without_reasoning(self, content: str) -> str:
        """V3.1 cuts at the first `</think>`, V3 and R1 at the last, as published."""
        if self.style == "v3.1":
            return content.split(m.END_THINK, 1)[-1]
        return content.rsplit(m.END_THINK, 1)[-1]

    def _tool_calls(self, prompt: PromptIds, calls: Sequence[ToolCall]) -> None:
        prompt.control(m.CALLS_BEGIN)
        for n, call in enumerate(calls):
            if n and self.style != "v3.1":
                prompt.text("\n")
            self._tool_call(prompt, call.name, call.arguments)
        prompt.control(m.CALLS_END)

    def _tool_call(self, prompt: PromptIds, name: str, arguments: str) -> None:
        prompt.control(m.CALL_BEGIN)
        if self.style == "v3.1":
            prompt.text(name)
            prompt.control(m.SEP)
            prompt.text(arguments)
        else:
            prompt.text("function")
            prompt.control(m.SEP)
            prompt.text(f"{name}\n```json\n{arguments}\n```")
        prompt.control(m.CALL_END)

    def _tool_output(self, prompt: PromptIds, message: ToolMessage, before: Message | None) -> None:
        if self.style != "v3.1" and not isinstance(before, ToolMessage):
            prompt.control(m.OUTPUTS_BEGIN)
        prompt.control(m.OUTPUT_BEGIN)
        prompt.text(message.content)
        prompt.control(m.OUTPUT_END)

    # -- head and tail ----------------------------------------------------------------------------------------------

    def _tools(self, prompt: PromptIds, tools: Sequence[ToolSpec]) -> None:
        """The tools section DeepSeek published with V3.1, behind the system text. The V3 template has none: there the
        same section shows V3's own call format and leaves out the closing rules, so that it stays short."""
        prompt.text(TOOLS_HEAD)
        for tool in tools:
            prompt.text(f"\n### {tool.name}\nDescription: {tool.description}\n\nParameters: {tool.parameters}\n")
        prompt.text(TOOLS_FORMAT)
        prompt.control(m.CALLS_BEGIN)
        self._tool_call(prompt, "tool_call_name", "tool_call_arguments")
        prompt.text("{additional_tool_calls}")
        prompt.control(m.CALLS_END)
        if self.style == "v3.1":
            prompt.text(TOOLS_RULES)

    def _tail(self, prompt: PromptIds, last: Message | None, thinking: bool | None, generate: bool) -> None:
        if isinstance(last, ToolMessage) and self.style != "v3.1":
            prompt.control(m.OUTPUTS_END)
        opening = self._opening(last, thinking) if generate else None
        for piece in opening or ():
            if piece.isspace():
                prompt.text(piece)
            else:
                prompt.control(piece)

    def _opening(self, last: Message | None, thinking: bool | None) -> tuple[str, ...] | None:
        """What makes the model answer: control token names and white space. None where the format has the model go on
        by itself: after tool outputs, and in v3.1 after anything but a user's message."""
        if isinstance(last, ToolMessage):
            return None
        if self.style == "v3.1":
            if not isinstance(last, UserMessage):
                return None
            return (m.ASSISTANT, m.THINK if thinking else m.END_THINK)
        if thinking or (thinking is None and self.style == "r1"):
            return (m.ASSISTANT, m.THINK, "\n")
        if self.style == "r1":  # R1 has no published way not to think: an empty thought
            return (m.ASSISTANT, m.THINK, "\n\n", m.END_THINK, "\n\n")
        return (m.ASSISTANT,)


def detect_style(folder: str | Path) -> Style:
    """Style of a model folder, recognised by its published template's text, which is never run. Raises ModelFolderError
    when there is no template or it is of no style known here."""
    text = _template_text(Path(folder))
    if m.USER not in text or m.ASSISTANT not in text:
        raise ModelFolderError(
            f"{folder}: the chat template is not of the DeepSeek-V3, R1 or V3.1 format; "
            "serve a model of this family, or set model.chat_format to v3, r1 or v3.1"
        )
    if "thinking" in text and m.END_THINK in text:
        return "v3.1"
    return "r1" if m.ASSISTANT + m.THINK in text else "v3"


def _template_text(folder: Path) -> str:
    """`chat_template.jinja` where the folder has it, else `chat_template` of the tokenizer config (a text, or a list of
    named ones of which "default" counts)."""
    try:
        separate = folder / "chat_template.jinja"
        if separate.exists():
            return separate.read_text(encoding="utf-8")
        template = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
    except (OSError, ValueError, AttributeError) as fault:
        raise ModelFolderError(f"{folder}: its chat template cannot be read ({fault}); download it again") from fault
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ModelFolderError(
            f"{folder}: no chat template in chat_template.jinja or tokenizer_config.json; "
            "copy it from the published model, or set model.chat_format to v3, r1 or v3.1"
        )
    return template
