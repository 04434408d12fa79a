"""A folder of safetensors shards: what it holds, and rows of one tensor at a time.

Everything that can be wrong with the files is found from their headers, before a weight is read. Files are mapped only
for a few tensors at a time, so that pages of the files do not add up to a second copy of the model in memory. Nothing
but `*.safetensors` is opened: no pickles, no code from the folder.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from serving.core.errors import ModelFolderError

_INDEX = "model.safetensors.index.json"
_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor in a shard; `dtype` as the file names it (BF16, F8_E4M3, ...)."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        size = _ELEMENT_BYTES.get(self.dtype, 1)
        for length in self.shape:
            size *= length
        return size


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder's shards, from their headers. Raises ModelFolderError on a missing or damaged shard."""
    entries: dict[str, TensorEntry] = {}
    for shard in _shards(folder):
        for name, (dtype, shape) in _header(shard).items():
            if name in entries:
                raise ModelFolderError(f"{name} stands in both {entries[name].shard.name} and {shard.name}; keep one")
            entries[name] = TensorEntry(shard=shard, dtype=dtype, shape=shape)
    return entries


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    found = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelFolderError(f"{index} is not a safetensors index; fetch it again") from None
        if any(Path(name).name != name for name in names):
            raise ModelFolderError(f"{index} names a shard outside the folder; fetch it again")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelFolderError(f"{folder}: shard {missing[0]}{more} is missing; fetch the folder again")
        return [folder / name for name in names]
    if not found:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        hint = f" ({others[0]} is not read: only safetensors is)" if others else ""
        raise ModelFolderError(f"{folder} holds no *.safetensors{hint}; give a folder with safetensors weights")
    return found


def _header(shard: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape). The file's length must be exactly what its header announces."""
    damaged = ModelFolderError(f"{shard} is truncated or damaged; fetch it again")
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise damaged
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
            tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        except (ValueError, KeyError, IndexError, AttributeError, TypeError):
            raise damaged from None
    if size != 8 + length + max(ends, default=0):
        raise ModelFolderError(
            f"{shard} is truncated or damaged: {size} bytes, its header announces {8 + length + max(ends, default=0)}; "
            "fetch it again"
        )
    return tensors


class ShardReader:
    """Reads rows of tensors, one shard mapped at a time, each mapping closed once `mapped_bytes` were read through it.

    A context manager; what it returned must be copied or dropped soon, or it keeps its mapping.
    """

    def __init__(self, entries: dict[str, TensorEntry], *, mapped_bytes: int) -> None:
        self._entries = entries
        self._mapped_bytes = mapped_bytes
        self._shard: Path | None = None
        self._file: Any = None
        self._bytes_read = 0

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close()

    def rows(self, name: str, start: int, end: int, columns: slice | None = None) -> Tensor:
        """Rows `[start, end)` of a tensor, or those columns of them, on CPU, in the file's dtype."""
        entry = self._entries[name]
        if entry.shard != self._shard or self._bytes_read >= self._mapped_bytes:
            self._close()
            try:
                mapped: Any = safe_open(entry.shard, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelFolderError(f"{entry.shard} cannot be opened ({error}); fetch it again") from None
            self._file = mapped.__enter__()
            self._shard = entry.shard
        self._bytes_read += entry.num_bytes * (end - start) // max(entry.shape[0], 1)
        whole = self._file.get_slice(name)
        part: Tensor = whole[start:end] if columns is None else whole[start:end, columns]
        return part

    def _close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._file, self._shard, self._bytes_read = None, None, 0
