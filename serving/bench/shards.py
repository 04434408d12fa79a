"""Writes safetensors as a stream: names, dtypes and shapes fix every byte's place before the first weight is drawn.

A file is `u64 length | JSON header | tensors`. Tensors come in any order and leave through a ring of staging buffers (pinned
where there is a GPU), each written by a thread while the next is filled: memory is one tensor and the ring.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from serving.core.errors import ConfigError

INDEX = "model.safetensors.index.json"

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
_BUFFER_BYTES = 32 << 20
_NUM_BUFFERS = 8


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def plan_shards(groups: Sequence[Sequence[Entry]], max_bytes: int) -> dict[str, list[Entry]]:
    """Tensors by file name, in their order; a file is full before `max_bytes`. A group (a weight and its scales) is not parted."""
    shards: list[list[Entry]] = [[]]
    room = max_bytes
    for group in groups:
        num_bytes = sum(entry.num_bytes for entry in group)
        if num_bytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1] += group
        room -= num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


class ShardWriter:
    """The files of one folder, open. A context manager: left by an exception it removes what it began.

    Raises ConfigError where the folder cannot be written (full, read-only).
    """

    def __init__(self, folder: Path, shards: dict[str, list[Entry]], *, pinned: bool) -> None:
        self._folder = folder
        self._shards = shards
        self._pinned = pinned
        self._files: dict[Path, int] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="shard-writer")
        self._ring: deque[tuple[Future[None], Tensor]] = deque()

    def __enter__(self) -> ShardWriter:
        try:
            for name, entries in self._shards.items():
                self._open(self._folder / name, entries)
            if len(self._shards) > 1:
                self._write_index()
        except OSError as error:
            self._close(remove=True)
            raise _refused(self._folder, error) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        complete = False
        try:
            if kind is None:
                assert not self._places, f"planned but not written: {next(iter(self._places))}"
                while self._ring:
                    self._ring.popleft()[0].result()
                complete = True
        except OSError as full:
            raise _refused(self._folder, full) from None
        finally:
            self._close(remove=not complete)

    def write(self, name: str, tensor: Tensor) -> None:
        """`tensor` as planned, on any device; it may be changed once this returns."""
        file, offset = self._places.pop(name)
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        try:
            for start in range(0, flat.numel(), _BUFFER_BYTES):
                buffer = self._buffer()
                staged = buffer[: min(_BUFFER_BYTES, flat.numel() - start)]
                staged.copy_(flat[start : start + _BUFFER_BYTES])
                data = staged.numpy().data
                self._ring.append((self._threads.submit(_write_at, file, data, offset + start), buffer))
        except OSError as error:
            raise _refused(self._folder, error) from None

    def _open(self, path: Path, entries: Sequence[Entry]) -> None:
        file = self._files[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        # Wide elements first, so that each tensor begins at a multiple of its element's size.
        ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = [], 0
        for entry in ordered:
            starts.append(end)
            end += entry.num_bytes
            header[entry.name] = {
                "dtype": _DTYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [starts[-1], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        _write_at(file, memoryview(struct.pack("<Q", len(text)) + text), 0)
        for entry, start in zip(ordered, starts, strict=True):
            self._places[entry.name] = file, 8 + len(text) + start

    def _write_index(self) -> None:
        weight_map = {entry.name: name for name, entries in self._shards.items() for entry in entries}
        total = sum(entry.num_bytes for entries in self._shards.values() for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = self._folder / INDEX
        self._files[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        _write_at(self._files[path], memoryview(json.dumps(index, indent=1).encode()), 0)

    def _buffer(self) -> Tensor:
        """A staging buffer that nothing is written from any more; raises what writing its last content raised."""
        if len(self._ring) < _NUM_BUFFERS:
            return torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
        written, buffer = self._ring.popleft()
        written.result()
        return buffer

    def _close(self, *, remove: bool) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for path, file in self._files.items():
            os.close(file)
            if remove:
                path.unlink(missing_ok=True)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        num_written = os.pwrite(file, data, offset)
        data, offset = data[num_written:], offset + num_written


def _refused(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{folder}: {error.strerror or error}; give a folder that can be written, on a disk with room")
