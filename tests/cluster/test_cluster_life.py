"""What a server does when its processes die and when it is told to stop, seen from outside."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cluster.conftest import StartServer
from tests.cluster.watched_server import WatchedServer, eventually, still_running

PROMPT = "the quick brown fox"
WITHOUT_TOKEN = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=5)
"""


@pytest.mark.parametrize(("victim", "other"), [("decode-0", "prefill-0"), ("prefill-0", "decode-0")])
def test_a_killed_worker_comes_back_alone_and_answers_the_same(server: WatchedServer, victim: str, other: str):
    text, before = server.complete(PROMPT), server.worker_pids()
    psutil.Process(before[victim]).kill()
    assert eventually(lambda: server.worker_pids()[victim] != before[victim], timeout_s=60)
    assert eventually(server.is_ready, timeout_s=5)
    assert server.worker_pids()[other] == before[other]
    assert server.complete(PROMPT) == text
    assert server.complete(PROMPT + "!") != text


def test_a_killed_router_is_restarted_alone_on_its_port(server: WatchedServer):
    text, before, old = server.complete(PROMPT), server.worker_pids(), server.router().pid
    psutil.Process(old).kill()
    assert eventually(lambda: not server.is_ready(), timeout_s=5)
    assert eventually(server.is_ready, timeout_s=30)
    assert server.router().pid != old
    assert server.worker_pids() == before
    assert all(psutil.pid_exists(pid) for pid in before.values())
    assert server.complete(PROMPT) == text


def test_nothing_listens_beyond_this_machine(server: WatchedServer):
    addresses = server.listens_at()
    assert addresses
    assert addresses <= {"127.0.0.1", "::1"}


def test_ray_refuses_whoever_has_no_token(server: WatchedServer):
    gcs = next(process for process in server.family() if process.name() == "gcs_server")
    ports = [c.laddr.port for c in gcs.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert ports
    for port in ports:
        refused = subprocess.run(
            [sys.executable, "-c", WITHOUT_TOKEN, f"127.0.0.1:{port}"],
            env={"RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert refused.returncode != 0
        assert "nauthenticated" in refused.stderr, refused.stderr


def test_sigterm_lets_streams_finish_ends_with_0_and_leaves_nothing(start_server: StartServer):
    server = start_server()
    alone = server.complete(PROMPT, 400)
    family, texts = server.family(), []
    thread = threading.Thread(target=lambda: texts.append(server.complete(PROMPT, 400)))
    thread.start()
    running = 'baton_requests_running{role="decode",worker="decode-0"} 1'
    assert eventually(lambda: running in httpx.get(f"{server.url}/metrics").text, timeout_s=10)
    exit_code = server.stop(signal.SIGTERM)
    thread.join()
    assert exit_code == 0
    assert texts == [alone]
    assert still_running(family, after_s=0) == []


def test_a_stream_that_outlasts_the_drain_is_told_so(start_server: StartServer):
    server = start_server("--set", "router.drain_timeout_s=0.5")
    family = server.family()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        *_, last, done = (line for line in lines if line)
    assert done == "data: [DONE]"
    assert "the server stops" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert server.process.wait(timeout=30) == 0
    assert still_running(family, after_s=0) == []


def test_a_server_whose_supervisor_dies_says_so_and_leaves_nothing(start_server: StartServer):
    server = start_server()
    family = server.family()
    next(process for process in family if process.name().startswith("ray::Supervisor")).kill()
    assert server.process.wait(timeout=60) == 1
    assert "supervisor has died" in server.log.read_text().splitlines()[-1]
    assert still_running(family, after_s=0) == []


def test_mode_both_answers_the_same_from_one_worker(server: WatchedServer, start_server: StartServer):
    prompts = [PROMPT, PROMPT + "!", "once upon a time " * 40]
    both = start_server("--set", "engine.mode=both")
    assert list(both.worker_pids()) == ["both-0"]
    assert [both.complete(prompt) for prompt in prompts] == [server.complete(prompt) for prompt in prompts]


def test_a_killed_server_takes_everything_with_it(start_server: StartServer):
    server = start_server()
    family = server.family()
    folders = {
        Path(c.split("=")[1]).parents[3] for p in family for c in p.cmdline() if c.startswith("--raylet_socket_name=")
    }
    assert [folder.is_dir() for folder in folders] == [True]
    server.stop(signal.SIGKILL)
    assert still_running(family, after_s=10) == []
    assert eventually(lambda: not any(folder.exists() for folder in folders), timeout_s=5)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))


def test_what_a_worker_cannot_start_with_is_one_line_and_leaves_nothing(served_model: Path):
    command = [sys.executable, "-m", "serving", "serve", "--model", str(served_model), "--port", "0"]
    process = subprocess.Popen([*command, "--set", "kv.memory_fraction=1e-9"], stderr=subprocess.PIPE, text=True)
    family: set[psutil.Process] = set()
    while process.poll() is None:
        family |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.1)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "does not start: kv.memory_fraction" in errors.splitlines()[-1]
    assert len(family) > 5
    assert still_running(family, after_s=0) == []
