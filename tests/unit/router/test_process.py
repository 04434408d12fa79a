"""`python -m router` as its launcher and its clients meet it: the official openai client, signals, exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import openai
import pytest

from router.__main__ import main
from router.settings import read_settings
from serving.core.config import Config, to_dict
from tests.unit.router.conftest import chat_body, saying
from tests.unit.router.scripted_worker import SECRET, ScriptedCluster, ScriptedWorker

SECRETS = {"BATON_SECRET": SECRET.hex()}
TEXT = "Hello, world! " * 8


def arguments(endpoint: str, folder: Path, *options: str) -> list[str]:
    return ["--directory", endpoint, "--model-dir", str(folder), *options]


@contextlib.contextmanager
def running(folder: Path, cluster: ScriptedCluster) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "router", *arguments(cluster.endpoint, folder, "--port", "0", "--config", "-")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env={**os.environ, **SECRETS}, stdin=pipe, stdout=pipe, text=True)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(to_dict(Config())))
        process.stdin.close()
        line = process.stdout.readline()
        assert line.startswith("router: listening on http://127.0.0.1:"), line
        url = line.split()[-1]
        deadline_s = time.monotonic() + 10.0
        while httpx.get(f"{url}/readyz").status_code != 200:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        yield url, process
    finally:
        process.kill()
        process.wait(10.0)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[ScriptedCluster]:
    workers = [ScriptedWorker("prefill-0", "prefill"), ScriptedWorker("decode-0", "decode", step_s=0.01)]
    with ScriptedCluster(saying(TEXT), workers) as made:
        yield made


@pytest.fixture(scope="module")
def url(model_folder: Path, cluster: ScriptedCluster) -> Iterator[str]:
    with running(model_folder, cluster) as (where, _):
        yield where


def test_the_official_client_streams_and_does_not(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["bytes"]
        messages = [{"role": "user", "content": "hi"}]
        whole = client.chat.completions.create(model="bytes", messages=messages, temperature=0)
        assert whole.choices[0].message.content == TEXT
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(model="bytes", messages=messages, stream=True, stream_options=options)
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
        assert chunks[-1].usage == whole.usage
        plain = client.completions.create(model="bytes", prompt="x", max_tokens=5, logprobs=1)
        assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("Hello", "length")
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="other", messages=messages)
        assert missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="bytes", messages=messages, n=0)
        assert (wrong.value.param, wrong.value.type) == ("n", "invalid_request_error")


def test_every_answer_is_dated_once(url: str) -> None:
    for path in ("/livez", "/nowhere"):
        dates = httpx.get(f"{url}{path}").headers.get_list("date")
        assert [abs(parsedate_to_datetime(date).timestamp() - time.time()) < 2.0 for date in dates] == [True]


def test_sigterm_lets_streams_end_and_exits_with_zero(model_folder: Path, cluster: ScriptedCluster) -> None:
    with running(model_folder, cluster) as (url, process):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=chat_body(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(10.0) == 0


@pytest.mark.parametrize("streams", [True, False])
def test_a_second_sigterm_tells_every_client_and_exits_with_zero(
    model_folder: Path, cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    monkeypatch.setattr(cluster.workers["decode-0"], "before_token", lambda job: "hold" if job.next > 5 else None)
    with running(model_folder, cluster) as (url, process), ThreadPoolExecutor() as pool:
        sent = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=chat_body(stream=streams), timeout=20.0)
        wait_until(lambda: any(job.next > 5 for job in list(cluster.workers["decode-0"].jobs.values())))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert not sent.done()
        process.send_signal(signal.SIGTERM)
        answer = sent.result(5.0)
        assert process.wait(5.0) == 0
    wait_until(lambda: cluster.num_jobs == 0)
    if streams:
        assert answer.status_code == 200
        assert answer.text.count('"content"') > 5
        *_, last, done = (line for line in answer.text.splitlines() if line)
        assert done == "data: [DONE]"
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 503
        error = answer.json()["error"]
    assert (error["code"], error["message"].startswith("the server stops")) == ("unavailable", True)


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


def test_a_client_that_hangs_up_aborts_over_tcp(
    url: str, cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.workers["decode-0"], "before_token", lambda job: "hold")
    for streams in (True, False):
        with contextlib.suppress(httpx.ReadTimeout), httpx.Client(timeout=0.3) as client:
            client.post(f"{url}/v1/chat/completions", json=chat_body(stream=streams))
        deadline_s = time.monotonic() + 2.0
        while cluster.num_jobs:
            assert time.monotonic() < deadline_s, "jobs are left"
            time.sleep(0.01)
    assert 'baton_requests_total{outcome="cancelled"} 2.0' in httpx.get(f"{url}/metrics").text


def test_many_streams_at_once_stay_apart(url: str) -> None:
    texts: list[str] = []

    def ask() -> None:
        answer = httpx.post(f"{url}/v1/chat/completions", json=chat_body(), timeout=20.0).json()
        texts.append(answer["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [TEXT] * 8


@pytest.mark.parametrize(
    ("options", "folder", "says"),
    [
        (["--port", "{taken}"], "", "is in use"),
        (["--port", "0"], "nowhere", "is not a folder"),
        (["--port", "0", "--config", "nothing.json"], "", "--config"),
        (["--port", "70000"], "", "port 70000"),
    ],
)
def test_a_wrong_start_is_one_line_and_exit_code_2(
    model_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], folder: str, says: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        filled = [option.format(taken=holder.getsockname()[1]) for option in options]
        status = main(arguments("tcp://127.0.0.1:1", model_folder / folder, *filled), SECRETS, io.StringIO())
    assert status == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert errors.count("\n") == 1


def test_settings_do_not_show_the_secret(model_folder: Path) -> None:
    settings = read_settings(arguments("tcp://127.0.0.1:1", model_folder), SECRETS, io.StringIO())
    assert settings.secret == SECRET
    assert repr(SECRET) not in repr(settings)
    assert "tcp://127.0.0.1:1" in repr(settings)


def test_without_a_secret_it_says_which_variable(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"BATON_SECRET": "open sesame"}
    assert main(arguments("tcp://127.0.0.1:1", model_folder), environment, io.StringIO()) == 2
    errors = capsys.readouterr().err
    assert "BATON_SECRET" in errors
    assert "sesame" not in errors
