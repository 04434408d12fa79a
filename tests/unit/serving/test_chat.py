"""`baton chat` against a server of a few lines that speaks the OpenAI API over HTTP."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from serving.chat import Timing, main
from serving.core.errors import BatonError


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers `You said: <last message>`; a message `fail` fails in the stream, `refuse` before it."""

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._reply(200, json.dumps({"data": [{"id": "echo"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        text = body["messages"][-1]["content"]
        if text == "refuse":
            self._reply(429, json.dumps({"error": {"message": "no room"}}))
            return
        chunks = [chunk({"role": "assistant", "content": ""}), chunk({"reasoning_content": "hm. "})]
        if text == "fail":
            chunks.append({"error": {"message": "a worker was lost"}})
        else:
            chunks += [chunk({"content": "You said: "}), chunk({"content": text}), chunk({}, "stop")]
            chunks.append({"choices": [], "usage": {"completion_tokens": 3}})
        self._reply(200, "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n")

    def _reply(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.bodies = []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def url(server: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def says(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What the user types; then Ctrl-D."""
    left = list(lines)

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", read)


def test_one_question_prints_answer_and_times(
    server: http.server.ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", url(server), "-q", "[bold]2 + 2?", "--max-tokens", "9", "--no-thinking"]) == 0
    out, err = capsys.readouterr()
    assert out == "hm. You said: [bold]2 + 2?\n", "the text is the model's, not markup"
    assert "TTFT" in err
    assert "TPOT" in err
    assert "3 tokens" in err
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("echo", 0.0, 9)
    assert body["chat_template_kwargs"] == {"thinking": False}


def test_a_conversation_remembers_and_forgets(
    server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, "one", "two", "", "/clear", "/system be brief", "/think on", "three", "/exit", "never")
    assert main(["--url", url(server) + "/v1"]) == 0
    roles = [[(m["role"], m["content"]) for m in body["messages"]] for body in server.bodies]
    assert roles == [
        [("user", "one")],
        [("user", "one"), ("assistant", "You said: one"), ("user", "two")],
        [("system", "be brief"), ("user", "three")],
    ]
    assert server.bodies[2]["chat_template_kwargs"] == {"thinking": True}


def test_a_failed_turn_is_told_and_not_remembered(
    server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, "fail", "refuse", "again")
    main(["--url", url(server)])
    err = capsys.readouterr().err
    assert "a worker was lost" in err
    assert "429: no room" in err
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["again"]


def test_a_failed_question_is_an_error(server: http.server.ThreadingHTTPServer) -> None:
    with pytest.raises(BatonError, match="a worker was lost"):
        main(["--url", url(server), "-q", "fail"])


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:1", "127.0.0.1:1", "ftp://x"])
def test_nobody_there_is_one_line_that_says_what_to_do(wrong: str) -> None:
    with pytest.raises(BatonError, match=r"baton serve|write it as"):
        main(["--url", wrong, "-q", "hello"])


def test_times_are_per_token_after_the_first() -> None:
    timing = Timing(started_s=1.0, num_tokens=5)
    for now_s in (1.2, 1.3, 1.6):
        timing.saw_text(now_s)
    assert str(timing) == "TTFT 200.0 ms   TPOT 100.00 ms   5 tokens"
    assert str(Timing(started_s=1.0)) == "no text"
