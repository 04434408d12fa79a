"""`baton chat`: talk to a server from a terminal, one question with `-q` or a conversation.

A client like any other: it knows the OpenAI API over HTTP and nothing of the server's insides. The answer is printed as it comes,
reasoning dimmed; below it stand the time to the first token (TTFT) and per token after it (TPOT), as this client saw them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console

from serving.core.errors import BatonError

_URL = "http://127.0.0.1:8000"
_CONNECT_S = 5.0
_HELP = "/clear forgets the conversation, /system TEXT gives it a frame, /think on|off|auto, /exit or Ctrl-D leaves; Ctrl-C stops an answer"


@dataclass
class Timing:
    """Seconds on this client's clock; `num_tokens` is what the server counted."""

    started_s: float
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0

    def saw_text(self, now_s: float) -> None:
        self.first_s = now_s if self.first_s is None else self.first_s
        self.last_s = now_s

    def __str__(self) -> str:
        if self.first_s is None or self.last_s is None:
            return "no text"
        parts = [f"TTFT {1000 * (self.first_s - self.started_s):.1f} ms"]
        if self.num_tokens > 1:
            tpot_s = (self.last_s - self.first_s) / (self.num_tokens - 1)
            parts.append(f"TPOT {1000 * tpot_s:.2f} ms")
        if self.num_tokens:
            parts.append(f"{self.num_tokens} tokens")
        return "   ".join(parts)


@dataclass
class Piece:
    """News of an answer."""

    text: str = ""
    reasoning: str = ""
    call: str = ""
    num_tokens: int | None = None
    finish_reason: str | None = None


@dataclass
class Conversation:
    """What has been said, and how the next answer is to be made."""

    model: str
    temperature: float
    max_tokens: int | None
    thinking: bool | None
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        frame = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*frame, *self.turns],
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"thinking": self.thinking}
        return body


class Server:
    """The API as this program uses it. Every fault is a BatonError of one line."""

    def __init__(self, url: str, api_key: str) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        self._url = url.rstrip("/").removesuffix("/v1")
        try:
            self._client = httpx.Client(base_url=self._url, headers=headers, timeout=timeout, trust_env=False)
        except (httpx.InvalidURL, TypeError, ValueError) as error:
            raise BatonError(f"--url {url}: {error}; write it as {_URL}") from None

    def close(self) -> None:
        self._client.close()

    def first_model(self) -> str:
        with self._faults():
            response = self._client.get("/v1/models")
            _check(response)
            models = [str(model["id"]) for model in response.json()["data"]]
        if not models:
            raise BatonError(f"{self._url} serves no model")
        return models[0]

    def answer(self, body: dict[str, Any]) -> Iterator[Piece]:
        with self._faults(), self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
            _check(response)
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield _piece(json.loads(line.removeprefix("data: ")))

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol):
            raise BatonError(f"nobody answers at {self._url}; start a server with: baton serve") from None
        except httpx.HTTPError as error:
            raise BatonError(f"{self._url} broke off ({type(error).__name__}); is it still running?") from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BatonError(f"{self._url} does not speak the OpenAI API ({error!r}); check --url") from None


def _check(response: httpx.Response) -> None:
    if response.is_error:
        raise BatonError(f"{response.status_code}: {response.json()['error']['message']}")


def _piece(chunk: dict[str, Any]) -> Piece:
    if "error" in chunk:
        raise BatonError(str(chunk["error"]["message"]))
    piece = Piece(num_tokens=(chunk.get("usage") or {}).get("completion_tokens"))
    for choice in chunk["choices"]:
        delta = choice["delta"]
        piece.text += delta.get("content") or ""
        piece.reasoning += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or ():
            function = call["function"]
            piece.call += f"\n{function['name']} " if function.get("name") else ""
            piece.call += function.get("arguments") or ""
        piece.finish_reason = choice["finish_reason"] or piece.finish_reason
    return piece


class Chat:
    """One terminal, one server, one conversation."""

    def __init__(self, server: Server, conversation: Conversation, console: Console, notes: Console) -> None:
        """Answers go to `console`, everything about them to `notes`."""
        self._server = server
        self._conversation = conversation
        self._console = console
        self._notes = notes

    def ask(self, text: str) -> None:
        """Print the answer as it comes and remember it. Ctrl-C keeps what has come. Raises BatonError; then nothing is remembered."""
        turns = self._conversation.turns
        turns.append({"role": "user", "content": text})
        timing, said, reason = Timing(time.perf_counter()), list[str](), None
        try:
            for piece in self._server.answer(self._conversation.body()):
                self._show(piece, timing)
                said.append(piece.text)
                reason = piece.finish_reason or reason
        except KeyboardInterrupt:
            reason = "stopped"
        except BatonError:
            turns.pop()
            raise
        finally:
            self._console.print()
        turns.append({"role": "assistant", "content": "".join(said)})
        cut = {"length": "   cut off at the length limit", "stopped": "   stopped"}.get(reason or "", "")
        self._notes.print(f"{timing}{cut}", style="dim", highlight=False)

    def _show(self, piece: Piece, timing: Timing) -> None:
        if piece.num_tokens is not None:
            timing.num_tokens = piece.num_tokens
        for text, style in ((piece.reasoning, "dim italic"), (piece.text, ""), (piece.call, "cyan")):
            if text:
                timing.saw_text(time.perf_counter())
                self._console.print(text, style=style, end="", markup=False, highlight=False, soft_wrap=True)
                self._console.file.flush()

    def talk(self) -> None:
        """Until /exit, Ctrl-D or Ctrl-C at the prompt."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` editing and history
        self._notes.print(f"{self._conversation.model}. {_HELP}", style="dim", highlight=False)
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                try:
                    self.ask(line)
                except BatonError as error:
                    self._notes.print(f"baton: {error}", style="red", markup=False, highlight=False)

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        conversation = self._conversation
        if name == "/clear":
            conversation.turns.clear()
        elif name == "/system":
            conversation.system = argument.strip()
        elif name == "/think" and argument.strip() in ("on", "off", "auto"):
            conversation.thinking = {"on": True, "off": False, "auto": None}[argument.strip()]
        else:
            self._notes.print(_HELP, style="dim", highlight=False)


def main(arguments: Sequence[str]) -> int:
    """`baton chat`. Raises BatonError."""
    options = _parser().parse_args(arguments)
    server = Server(options.url, options.api_key)
    try:
        conversation = Conversation(
            model=options.model or server.first_model(),
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            thinking=options.thinking,
            system=options.system,
        )
        chat = Chat(server, conversation, Console(file=sys.stdout), Console(file=sys.stderr))
        if options.question is None:
            chat.talk()
        else:
            chat.ask(options.question)
    finally:
        server.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton chat", description="Talk to a server.")
    parser.add_argument("--url", default=_URL, help=f"the server; default {_URL}")
    parser.add_argument("-q", "--question", metavar="TEXT", help="ask this, print the answer, and leave")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0: the likeliest text")
    parser.add_argument("--max-tokens", type=int, help="longest answer; default: what the context leaves")
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="ask the model to think first, or not to; default: its habit",
    )
    parser.add_argument("--api-key", default="", help="if the server wants one")
    return parser
