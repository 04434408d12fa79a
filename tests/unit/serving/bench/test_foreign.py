"""Peers in a process of their own: what they write, how their failures read, and that nothing of them is left running."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

import serving.bench.engine
import serving.bench.foreign
from serving.bench.engine import main
from serving.bench.foreign import FOREIGN, Foreign, foreign
from serving.core.errors import ConfigError

COUNTING = """
def load(*, stride):
    def generate(prompts, num_new_tokens):
        return [[ids[-1] + stride * (1 + n) for n in range(num_new_tokens)] for ids in prompts]
    return "1.2", generate
"""
NOISY = """
import os
print("on import")
def load():
    print("on loading")
    def generate(prompts, num_new_tokens):
        os.write(1, b"below Python\\n")
        return [[7] * num_new_tokens for _ in prompts]
    return "1", generate
"""
# Its version tells the ids of its process and of one that it has started; a thread keeps it from ending by itself.
CLINGING = """
import os, subprocess, sys, threading, time
def load():
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    threading.Thread(target=time.sleep, args=(60,)).start()
    return f"{os.getpid()} {started.pid}", None
"""


def _peer(folder: Path, source: str, **settings: object) -> AbstractContextManager[Foreign]:
    path = folder / "peer.py"
    path.write_text(source)
    return foreign("vllm", peer=path, python=Path(sys.executable), settings=settings)


def _answering(answer: str) -> str:
    return f"def load(): return '1', lambda prompts, num_new_tokens: {answer}"


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _all_gone(peer: Foreign) -> bool:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        if all(_gone(int(pid)) for pid in peer.version.split()):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("stride", [1, 5])
def test_a_peer_writes_what_its_settings_say(tmp_path: Path, stride: int) -> None:
    with _peer(tmp_path, COUNTING, stride=stride) as peer:
        assert (peer.name, peer.version) == ("vllm", "1.2")
        assert peer.generate([[1, 2], [30]], 2) == [[2 + stride, 2 + 2 * stride], [30 + stride, 30 + 2 * stride]]
        assert peer.generate([[8]], 1) == [[8 + stride]]


def test_what_a_peer_prints_is_no_answer(tmp_path: Path) -> None:
    with _peer(tmp_path, NOISY) as peer:
        assert peer.generate([[1]], 3) == [[7, 7, 7]]


def test_a_missing_package_is_named_with_the_option_that_helps(tmp_path: Path) -> None:
    peer = _peer(tmp_path, "def load(): import package_that_nobody_has")
    with pytest.raises(ConfigError, match=r"no package 'package_that_nobody_has'.*--peer-python vllm=PATH"), peer:
        pass


def test_a_missing_interpreter_is_named_with_the_option_that_helps(tmp_path: Path) -> None:
    peer = foreign("vllm", peer=tmp_path, python=tmp_path / "python", settings={})
    with pytest.raises(ConfigError, match=rf"{tmp_path / 'python'}.*--peer-python vllm=PATH"), peer:
        pass


def test_a_peer_that_cannot_load_shows_its_last_lines(tmp_path: Path) -> None:
    peer = _peer(tmp_path, "def load(): raise MemoryError('weights of 700 GB')")
    with pytest.raises(ConfigError, match=r"(?s)status 1:.*MemoryError: weights of 700 GB"), peer:
        pass


def test_a_peer_that_dies_at_work_shows_its_last_lines(tmp_path: Path) -> None:
    source = "import os\n" + _answering("print('the last words', flush=True) or os._exit(9)")
    with _peer(tmp_path, source) as peer, pytest.raises(ConfigError, match=r"(?s)status 9:.*the last words"):
        peer.generate([[1]], 1)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("[[1, 2]]", r"3 tokens after each of 1 prompts it wrote \[2\]"),
        ("[[1, 2, 3]] * 2", r"3 tokens after each of 1 prompts it wrote \[3, 3\]"),
        ("[['one', 'two', 'three']]", "cannot read its answer"),
    ],
)
def test_an_answer_that_is_none_is_refused(tmp_path: Path, answer: str, complaint: str) -> None:
    with _peer(tmp_path, _answering(answer)) as peer, pytest.raises(ConfigError, match=complaint):
        peer.generate([[1]], 3)


def test_nothing_of_a_peer_outlives_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.bench.foreign, "_EXIT_S", 0.1)
    with _peer(tmp_path, CLINGING) as peer:
        assert not any(_gone(int(pid)) for pid in peer.version.split())
    assert _all_gone(peer)


def test_nothing_of_a_peer_outlives_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.bench.foreign, "_EXIT_S", 0.1)
    with pytest.raises(KeyboardInterrupt), _peer(tmp_path, CLINGING) as peer:
        raise KeyboardInterrupt
    assert _all_gone(peer)


def test_a_report_has_the_version_and_the_texts_of_a_foreign_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
def load(*, model_dir, dtype, max_num_seqs, max_tokens, threads, threads_bound):
    version = f"{open(model_dir + '/config.json').read().count('DeepseekV3')} {dtype} {max_num_seqs} {max_tokens} {threads} {threads_bound}"
    return version, lambda prompts, num_new_tokens: [[0] * num_new_tokens for _ in prompts]
"""
    (tmp_path / "peer.py").write_text(source)
    monkeypatch.setattr(serving.bench.engine, "_PAUSE_S", 0.0)
    monkeypatch.setitem(FOREIGN, "vllm", (tmp_path / "peer.py", {"threads_bound": True}))
    out = tmp_path / "engine.json"
    command = ["--shape", "tiny", "--threads", "1", "--repeats", "1", "--prompt-tokens", "9", "--new-tokens", "4"]
    assert (
        main(
            [*command, "--batch", "2,3", "--peer", "vllm", "--peer-python", f"vllm={sys.executable}", "--out", str(out)]
        )
        == 0
    )
    report = json.loads(out.read_text())
    assert report["versions"]["vllm"] == "1 float32 3 13 1 True"
    assert report["same_text_as_baton"] == {"vllm": 0.0}
    assert [(row["system"], row["batch"]) for row in report["results"]] == [
        ("baton", 2), ("vllm", 2), ("baton", 3), ("vllm", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["vllm", "transformers=/usr/bin/python3"])
def test_an_interpreter_is_only_for_a_peer_of_another_installation(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--peer-python", value])
    assert "NAME one of llama-cpp-python" in capsys.readouterr().err
