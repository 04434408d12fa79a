"""From a checked body to what is to be generated: prompts as ids, sampling, stops, limits.

Must not know workers, streams or the event loop. Everything here may run in a thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from router.openai.schemas import MAX_LOGPROBS, ChatBody, ChatMessage, CompletionBody, ContentPart, Sampling, Tool
from serving.core.errors import ModelNotFound, RequestError
from serving.core.request import SamplingParams
from serving.text.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer

_MAX_STOPS = 16
_MAX_TOKEN_IDS = 1024
"""Of logit_bias, and of stop_token_ids: each goes to two workers with every choice, and is looked at in every step."""
_MAX_TEXTS = 1024
_DEFAULT_COMPLETION_TOKENS = 16
_LONGEST_TOKEN_BYTES = 256
_SEED_MASK = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model as clients may use it. `eos_ids` end a text; `vocab_size` bounds every token id that a client names."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_positions: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One prompt. `max_new_tokens` is clamped to what the context leaves; `stops` are strings, looked for in the router."""

    prompt_ids: list[int]
    sampling: SamplingParams
    max_new_tokens: int
    stops: tuple[str, ...]
    tools: bool = False
    in_reasoning: bool = False
    echo: str = ""

    def sampling_of(self, choice: int) -> SamplingParams:
        """Every choice draws with a seed of its own; the first with the one that was asked for."""
        return msgspec.structs.replace(self.sampling, seed=(self.sampling.seed + choice) & _SEED_MASK)


def chat(body: ChatBody, served: Served, max_model_len: int) -> Prepared:
    """Raises RequestError or ModelNotFound."""
    _check_common(body, served)
    tools = _tools(body)
    messages = [_message(message, f"messages[{n}]") for n, message in enumerate(body.messages)]
    _check_length(sum(len(message.content or "") for message in messages), max_model_len, "messages")
    thinking = None if body.chat_template_kwargs is None else body.chat_template_kwargs.thinking
    prompt_ids = served.template.render(messages, tools=tools, thinking=thinking)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    param = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    return Prepared(
        prompt_ids=prompt_ids,
        sampling=_sampling(body, served, (body.top_logprobs or 0) if body.logprobs else None),
        max_new_tokens=_max_new_tokens(len(prompt_ids), wanted, None, max_model_len, "messages", param),
        stops=_stops(body),
        tools=bool(tools),
        in_reasoning=served.template.opens_reasoning(messages, thinking),
    )


def completions(body: CompletionBody, served: Served, max_model_len: int) -> list[Prepared]:
    """One a prompt. Raises RequestError or ModelNotFound."""
    _check_common(body, served)
    if body.suffix:
        raise RequestError("suffix is not supported; leave it out", param="suffix", code="unsupported_value")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of must equal n; leave it out", param="best_of", code="unsupported_value")
    if body.echo and body.logprobs is not None:
        raise RequestError("echo with logprobs is not supported; choose one", param="echo", code="unsupported_value")
    sampling, stops = _sampling(body, served, body.logprobs), _stops(body)
    prepared = []
    for prompt_ids in _prompts(body, served, max_model_len):
        prepared.append(
            Prepared(
                prompt_ids=prompt_ids,
                sampling=sampling,
                max_new_tokens=_max_new_tokens(
                    len(prompt_ids), body.max_tokens, _DEFAULT_COMPLETION_TOKENS, max_model_len, "prompt", "max_tokens"
                ),
                stops=stops,
                echo=served.tokenizer.decode(prompt_ids) if body.echo else "",
            )
        )
    return prepared


def _check_common(body: Sampling, served: Served) -> None:
    if body.model != served.name:
        raise ModelNotFound(
            f"the model {body.model!r} does not exist here; this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise RequestError('only {"type": "text"} is supported', param="response_format", code="unsupported_value")
    for param, ids in (("logit_bias", body.logit_bias), ("stop_token_ids", body.stop_token_ids)):
        if len(ids or ()) > _MAX_TOKEN_IDS:
            raise RequestError(f"{param}: at most {_MAX_TOKEN_IDS} token ids", param=param, code="invalid_value")
        _check_ids(ids or (), served, param)


def _check_ids(ids: Sequence[int] | dict[int, float] | tuple[()], served: Served, param: str) -> None:
    foreign = next((token_id for token_id in ids if not 0 <= token_id < served.vocab_size), None)
    if foreign is not None:
        raise RequestError(
            f"{param}: {foreign} is no token id; ids are 0 to {served.vocab_size - 1}",
            param=param,
            code="invalid_value",
        )


# -- prompts ------------------------------------------------------------------------------------------------------------


def _message(message: ChatMessage, where: str) -> Message:
    text = _text(message.content, f"{where}.content")
    match message.role:
        case "user":
            return UserMessage(_needed(text, where))
        case "system" | "developer":
            return SystemMessage(_needed(text, where))
        case "tool":
            return ToolMessage(_needed(text, where), message.tool_call_id or "")
        case "assistant":
            calls = tuple(ToolCall(c.function.name, c.function.arguments, c.id) for c in message.tool_calls or ())
            if text is None and not calls:
                raise RequestError(
                    f"{where}: an assistant message needs content or tool_calls", param=f"{where}.content"
                )
            return AssistantMessage(text or "", calls, message.reasoning_content or "")
        case role:
            raise RequestError(
                f"{where}.role: {role!r} is unknown; use system, developer, user, assistant or tool",
                param=f"{where}.role",
                code="invalid_value",
            )


def _needed(text: str | None, where: str) -> str:
    if text is None:
        raise RequestError(f"{where}.content is required", param=f"{where}.content", code="missing_required_parameter")
    return text


def _text(content: str | list[ContentPart] | None, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = []
    for n, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise RequestError(
                f"{where}[{n}]: only parts of type text, with a text, are supported",
                param=f"{where}[{n}]",
                code="unsupported_value",
            )
        texts.append(part.text)
    return "".join(texts)


def _tools(body: ChatBody) -> list[ToolSpec] | None:
    choice = body.tool_choice
    if choice is not None and choice not in ("auto", "none"):
        raise RequestError("tool_choice must be auto or none", param="tool_choice", code="unsupported_value")
    if not body.tools or choice == "none":
        return None
    return [_tool(tool, f"tools[{n}]") for n, tool in enumerate(body.tools)]


def _tool(tool: Tool, where: str) -> ToolSpec:
    if tool.type != "function":
        raise RequestError(f"{where}.type must be function", param=f"{where}.type", code="unsupported_value")
    function = tool.function
    return ToolSpec.from_schema(function.name, function.description or "", function.parameters or {})


def _prompts(body: CompletionBody, served: Served, max_model_len: int) -> list[list[int]]:
    given: Sequence[str | int | list[int]] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not given or "" in given or [] in given:
        raise RequestError("prompt is empty", param="prompt", code="invalid_value")
    if all(isinstance(item, int) for item in given):
        given = [[item for item in given if isinstance(item, int)]]
    if len(given) * (body.n or 1) > _MAX_TEXTS:
        raise RequestError(f"prompts times n: at most {_MAX_TEXTS}", param="prompt", code="invalid_value")
    if len({type(item) for item in given}) > 1:
        raise RequestError("prompt mixes strings, ids and lists of ids", param="prompt", code="invalid_value")
    return [_prompt(item, served, max_model_len) for item in given if not isinstance(item, int)]


def _prompt(given: str | list[int], served: Served, max_model_len: int) -> list[int]:
    if isinstance(given, list):
        _check_ids(given, served, "prompt")
        return given
    _check_length(len(given), max_model_len, "prompt")
    return served.tokenizer.encode_completion(given)


def _check_length(num_chars: int, max_model_len: int, param: str) -> None:
    """Texts that are too long whatever their tokens are: not worth tokenising."""
    if num_chars > max_model_len * _LONGEST_TOKEN_BYTES:
        raise _too_long(f"{num_chars} characters are", max_model_len, param)


def _too_long(what: str, max_model_len: int, param: str) -> RequestError:
    return RequestError(
        f"{what} too long; this model's context is {max_model_len} tokens, prompt and answer together",
        param=param,
        code="context_length_exceeded",
    )


def _max_new_tokens(
    num_prompt_tokens: int, wanted: int | None, default: int | None, max_model_len: int, prompt_param: str, param: str
) -> int:
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise _too_long(f"a prompt of {num_prompt_tokens} tokens is", max_model_len, prompt_param)
    if wanted is not None and wanted > room:
        raise _too_long(f"{num_prompt_tokens} prompt tokens and {param} {wanted} are", max_model_len, param)
    return wanted if wanted is not None else min(room, default or room)


# -- sampling -----------------------------------------------------------------------------------------------------------


def _sampling(body: Sampling, served: Served, logprobs: int | None) -> SamplingParams:
    assert logprobs is None or logprobs <= MAX_LOGPROBS
    stop_ids = dict.fromkeys((*(() if body.ignore_eos else served.eos_ids), *(body.stop_token_ids or ())))
    return SamplingParams(
        temperature=_or(body.temperature, 1.0),
        top_k=max(0, body.top_k or 0),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias or {},
        seed=(secrets.randbits(63) if body.seed is None else body.seed) & _SEED_MASK,
        logprobs=logprobs,
        stop_token_ids=list(stop_ids),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _stops(body: Sampling) -> tuple[str, ...]:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if "" in stops:
        raise RequestError("a stop string must not be empty", param="stop", code="invalid_value")
    if len(stops) > _MAX_STOPS:
        raise RequestError(f"at most {_MAX_STOPS} stop strings", param="stop", code="invalid_value")
    return stops
