"""A peer of an installation of its own: a child process with its own interpreter, spoken to in lines of JSON.

The child is `peers/child.py` with one file of `peers/`; what goes over the pipes is told there. Its clock is ours: a line
costs microseconds, a step milliseconds. Must not import the peer: its packages and ours need not agree.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from serving.bench.systems import Run
from serving.core.errors import ConfigError

_FOLDER = Path(__file__).with_name("peers")

FOREIGN: dict[str, tuple[Path, dict[str, object]]] = {
    "llama-cpp-python": (_FOLDER / "llama_cpp.py", {}),
    "llama-cpp-python-exact": (_FOLDER / "llama_cpp.py", {"exact": True}),
    "vllm": (_FOLDER / "vllm.py", {}),
}
"""By name in reports: the file whose `load` the child calls, and settings beyond those of every peer."""

_NUM_SHOWN_LINES = 5
_EXIT_S = 5.0


class _Loaded(msgspec.Struct):
    version: str | None = None
    missing: str | None = None


class _Texts(msgspec.Struct):
    token_ids: list[list[int]]


class _TimedTexts(msgspec.Struct):
    token_ids: list[list[int]]
    steps_s: list[float]
    last_steps: list[int]


_Answer = TypeVar("_Answer", _Loaded, _Texts, _TimedTexts)


@contextmanager
def foreign(name: str, *, peer: Path, python: Path, settings: Mapping[str, object]) -> Iterator[Foreign]:
    """The peer, loaded; its process ends with the block. `settings` are the keywords of `load` in the file `peer`.

    Raises ConfigError where `python` cannot be started or lacks the peer, and where the child dies or answers nonsense.
    """
    command = [python, _FOLDER / "child.py", peer]
    with tempfile.TemporaryFile() as stderr:
        try:
            # A session of its own: what the child starts ends with it, and an interrupt reaches this process alone.
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(f"--peer {name}: {error}; {_fix(name)}") from None
        with child:
            try:
                yield Foreign(name, child, stderr, settings)
            finally:
                _end(child)


class Foreign:
    """One child's side of the pipes, as a `System`."""

    def __init__(
        self, name: str, child: subprocess.Popen[bytes], stderr: IO[bytes], settings: Mapping[str, object]
    ) -> None:
        self.name = name
        self._child = child
        self._stderr = stderr
        loaded = self._ask(settings, _Loaded)
        if loaded.version is None:
            raise ConfigError(f"--peer {name}: the interpreter has no package {loaded.missing!r}; {_fix(name)}")
        self.version = loaded.version

    def generate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[list[int]]:
        asked = {"prompts": prompts, "num_new_tokens": num_new_tokens}
        return self._checked(self._ask(asked, _Texts).token_ids, len(prompts), num_new_tokens)

    def timed(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> Run:
        asked = {"prompts": prompts, "num_new_tokens": num_new_tokens, "timed": True}
        texts = self._ask(asked, _TimedTexts)
        token_ids = self._checked(texts.token_ids, len(prompts), num_new_tokens)
        return Run(token_ids=token_ids, steps_s=texts.steps_s, last_steps=texts.last_steps)

    def _checked(self, texts: list[list[int]], num_prompts: int, num_new_tokens: int) -> list[list[int]]:
        lengths = [len(text) for text in texts]
        if lengths != [num_new_tokens] * num_prompts:
            raise ConfigError(
                f"--peer {self.name}: asked for {num_new_tokens} tokens after each of {num_prompts} prompts it wrote "
                f"{lengths}; a figure would mean nothing: leave the peer out, or use another version of it"
            )
        return texts

    def _ask(self, message: Mapping[str, object], kind: type[_Answer]) -> _Answer:
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin
        assert stdout
        # A child that is gone shows in the answer that it does not give.
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        line = stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        try:
            return msgspec.json.decode(line, type=kind)
        except msgspec.DecodeError as error:
            raise ConfigError(f"--peer {self.name}: cannot read its answer {line[:80]!r}: {error}") from None

    def _died(self) -> ConfigError:
        status = self._child.wait()
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").splitlines()[-_NUM_SHOWN_LINES:]
        return ConfigError("\n".join([f"--peer {self.name}: its process ended with status {status}:", *last]))


def _fix(name: str) -> str:
    return f"give an interpreter that has the peer: --peer-python {name}=PATH"


def _end(child: subprocess.Popen[bytes]) -> None:
    """End of file, a while to leave in, then the signal, to whatever the child started too."""
    assert child.stdin
    try:
        with suppress(BrokenPipeError):
            child.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(_EXIT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
