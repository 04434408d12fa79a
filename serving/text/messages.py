"""What a conversation is made of. Frozen, typed, and free of any chat format; `template` turns it into ids.

The router builds these from a validated request; nothing here has been checked against a tokenizer.
"""

from __future__ import annotations

import json

import msgspec


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool the model may call. `parameters` is the JSON text of its schema, exactly as the model shall read it."""

    name: str
    description: str = ""
    parameters: str = "{}"

    @classmethod
    def from_schema(cls, name: str, description: str, schema: object) -> ToolSpec:
        """`schema` is decoded JSON; it is written the way the published formats do (", " and ": ", no escapes)."""
        return cls(name, description, json.dumps(schema, ensure_ascii=False))


class ToolCall(msgspec.Struct, frozen=True):
    """A call the model made. `arguments` is the text it wrote, which may be broken JSON."""

    name: str
    arguments: str
    id: str = ""


class SystemMessage(msgspec.Struct, frozen=True, tag_field="role", tag="system"):
    """Wherever it stands, it is rendered at the head of the prompt."""

    content: str


class UserMessage(msgspec.Struct, frozen=True, tag_field="role", tag="user"):
    """What the user wrote; never trusted, never a source of control tokens."""

    content: str


class AssistantMessage(msgspec.Struct, frozen=True, tag_field="role", tag="assistant"):
    """A past answer. `reasoning` is kept for the client's sake: every published format leaves it out of the prompt."""

    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""


class ToolMessage(msgspec.Struct, frozen=True, tag_field="role", tag="tool"):
    """A tool's output. The formats identify it by its order, not by `tool_call_id`."""

    content: str
    tool_call_id: str = ""


Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage
