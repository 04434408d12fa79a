"""Bodies of the OpenAI API as they come in: types and ranges. What a field means is decided in `prepare`.

Unknown fields are ignored, null means absent. A body that does not fit raises RequestError that names the field.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from serving.core.errors import RequestError

MAX_CHOICES = 128
MAX_LOGPROBS = 20

Count = Annotated[int, Meta(ge=1)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
TokenId = Annotated[int, Meta(ge=0)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints share. Not OpenAI's: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos."""

    model: str
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    max_tokens: Count | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    seed: int | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: str = "{}"


class AssistantCall(msgspec.Struct, frozen=True):
    function: CalledFunction
    id: str = ""


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[AssistantCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True):
    function: Function
    type: str = "function"


class TemplateArguments(msgspec.Struct, frozen=True):
    thinking: bool | None = None


class ChatBody(Sampling, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: TemplateArguments | None = None


class CompletionBody(Sampling, frozen=True, kw_only=True):
    """POST /v1/completions. A list is all strings (several prompts), all ids (one prompt), or all lists of ids."""

    prompt: str | list[str | int | list[int]]
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: Choices | None = None
    suffix: str | None = None


Body = TypeVar("Body", ChatBody, CompletionBody)

_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")


class BodyDecoder:
    """Decodes the bodies of one endpoint."""

    def __init__(self, body_type: type[Any]) -> None:
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(body_type)

    def __call__(self, data: bytes) -> Any:
        """Raises RequestError with `param` set to the field at fault."""
        try:
            return self._decoder.decode(data)
        except msgspec.ValidationError as error:
            raise _invalid(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None


def _invalid(text: str) -> RequestError:
    found = _PATH.match(text)
    assert found is not None
    what, path = found["what"], found["path"] or ""
    missing = _MISSING.search(what)
    if missing is not None:
        param = f"{path}.{missing['name']}" if path else missing["name"]
        return RequestError(f"{param} is required", param=param, code="missing_required_parameter")
    what = what[:1].lower() + what[1:].replace("`", "")
    where = f"a key of {path}" if found["key"] else path or "the body"
    return RequestError(f"{where}: {what}", param=path.removesuffix("[...]") or None, code="invalid_value")
