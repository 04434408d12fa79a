"""Fills a model from a Hugging Face folder: check everything by header, then stream, a few megabytes in flight.

FP8 block-scaled tensors are dequantised to the compute dtype on their way in. The MTP layer's copies of embedding and
head are compared with the main ones and not kept. Knows nothing of pages, batches or processes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from serving.core.errors import ModelFolderError
from serving.kernels.quant import dequantise_block_fp8
from serving.model.checkpoint import ShardReader, TensorEntry, read_entries
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.names import SCALE_SUFFIX, Target, name_table, name_tables

# Elements of one tensor converted at a time; the transient is at most 8 bytes each.
_PIECE_ELEMENTS = 1 << 20
_FLOATS = ("BF16", "F16", "F32", "F64")
_FP8 = "F8_E4M3"
# A buffer some exporters store although config.json determines it.
_DERIVED = ".rotary_emb.inv_freq"


class Progress(Protocol):
    """Told how loading goes; `serving.model.progress` has one for a console."""

    def start(self, total_bytes: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...

    def finish(self) -> None: ...


def load_weights(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
) -> DeepseekV3:
    """Read the folder's weights into a new model of compute dtype `dtype` on `device`.

    Raises ModelFolderError, before reading any weight, with one line that counts the faults and then a line for each
    group of tensors that is missing, unexpected or of a wrong shape or dtype.
    """
    entries = read_entries(Path(folder))
    _check(Path(folder), entries, config)
    model = DeepseekV3(config, dtype, device)
    if progress is not None:
        progress.start(sum(entry.num_bytes for entry in entries.values()))
    with ShardReader(entries) as reader:
        for part, targets in name_tables(model):
            for name, target in targets.items():
                num_bytes = _load(name, target, entries, reader, config)
                if progress is not None:
                    progress.advance(num_bytes)
            # The views die before the part takes its final layout, so that only one part exists twice.
            targets.clear()
            del target
            if part is not None:
                part.pack()
    if progress is not None:
        progress.finish()
    return model


def check_weights(folder: str | Path, config: ModelConfig) -> None:
    """Compare the headers of the folder's shards with the model; reads no weights. Raises what `load_weights` raises."""
    _check(Path(folder), read_entries(Path(folder)), config)


def _load(name: str, target: Target, entries: dict[str, TensorEntry], reader: ShardReader, config: ModelConfig) -> int:
    """Fill one target; bytes of the files that this took."""
    if name not in entries:
        return 0
    if target.repeats is None:
        _fill(name, target.into, entries, reader, config)
    else:
        _compare(name, target.repeats, entries, reader)
    scales = entries.get(name + SCALE_SUFFIX)
    return entries[name].num_bytes + (scales.num_bytes if scales else 0)


def _fill(name: str, into: Tensor, entries: dict[str, TensorEntry], reader: ShardReader, config: ModelConfig) -> None:
    quantised = entries[name].dtype == _FP8
    block = config.weight_block_size or (1, 1)
    for start, end in _pieces(into.shape, multiple_of=block[0] if quantised else 1):
        part = reader.rows(name, start, end)
        if quantised:
            scales = reader.rows(name + SCALE_SUFFIX, start // block[0], -(-end // block[0]))
            part = dequantise_block_fp8(part, scales, block, into.dtype)
        into[start:end].copy_(part)


def _compare(name: str, original: str, entries: dict[str, TensorEntry], reader: ShardReader) -> None:
    """The copy in the file must be what it repeats."""
    for start, end in _pieces(entries[name].shape, multiple_of=1):
        if not torch.equal(reader.rows(name, start, end).float(), reader.rows(original, start, end).float()):
            raise ModelFolderError(
                f"{entries[name].shard}: {name} differs from {original}; an MTP layer with its own embedding or "
                "head is not supported (set num_nextn_predict_layers to 0 in config.json to leave it out)"
            )


def _pieces(shape: Sequence[int], *, multiple_of: int) -> list[tuple[int, int]]:
    """Row ranges of about `_PIECE_ELEMENTS` each."""
    step = max(_PIECE_ELEMENTS // max(math.prod(shape[1:]), 1) // multiple_of, 1) * multiple_of
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _check(folder: Path, entries: dict[str, TensorEntry], config: ModelConfig) -> None:
    """Compare names, shapes and dtypes of the folder with the model's; one error names every fault."""
    table = name_table(DeepseekV3(config, torch.bfloat16, "meta"))
    faults: dict[str, list[str]] = defaultdict(list)
    expected = set(table)
    for name, target in table.items():
        if name not in entries:
            if target.repeats is None:
                faults["missing"].append(name)
            continue
        entry, shape = entries[name], tuple(target.into.shape)
        if entry.shape != shape:
            faults[f"of shape {list(entry.shape)} where config.json asks for {list(shape)}"].append(name)
        if target.quantised and entry.dtype == _FP8 and config.weight_block_size:
            expected.add(name + SCALE_SUFFIX)
            _check_scales(name, shape, entries, config.weight_block_size, faults)
        elif entry.dtype not in _FLOATS:
            faults[f"of dtype {entry.dtype}, {_supported_dtypes(target, entry, config)}"].append(name)
    mtp_prefix = f"model.layers.{config.num_layers}."
    surplus = [name for name in entries if name not in expected and not name.endswith(_DERIVED)]
    if not config.num_mtp_layers:
        surplus = [name for name in surplus if not name.startswith(mtp_prefix)]
    if surplus:
        faults["unexpected"] = surplus
    _report(folder, faults, mtp_prefix)


def _check_scales(
    name: str,
    shape: tuple[int, ...],
    entries: dict[str, TensorEntry],
    block: tuple[int, int],
    faults: dict[str, list[str]],
) -> None:
    scales = entries.get(name + SCALE_SUFFIX)
    blocks = tuple(-(-length // size) for length, size in zip(shape, block, strict=True))
    if scales is None:
        faults["missing"].append(name + SCALE_SUFFIX)
    elif scales.shape != blocks:
        asked = f"where blocks of {list(block)} ask for {list(blocks)}"
        faults[f"of shape {list(scales.shape)} {asked}"].append(name + SCALE_SUFFIX)
    elif scales.dtype not in _FLOATS:
        faults[f"of dtype {scales.dtype}, supported are {', '.join(_FLOATS)}"].append(name + SCALE_SUFFIX)


def _supported_dtypes(target: Target, entry: TensorEntry, config: ModelConfig) -> str:
    if entry.dtype == _FP8 and target.quantised:
        return "but config.json has no quantization_config with a weight_block_size"
    also_fp8 = ", F8_E4M3" if target.quantised and config.weight_block_size else ""
    return f"supported are {', '.join(_FLOATS)}{also_fp8}"


def _report(folder: Path, faults: dict[str, list[str]], mtp_prefix: str) -> None:
    if not faults:
        return
    counts = ", ".join(f"{len(names)} {fault.split(',')[0]}" for fault, names in list(faults.items())[:3])
    first = next(iter(faults.values()))[0]
    lines = [f"{folder}: weights do not match config.json: {counts} (first: {first}); fetch the folder again"]
    missing = faults.get("missing", [])
    if missing and all(name.startswith(mtp_prefix) for name in missing):
        lines[0] = (
            f"{folder}: the MTP layer ({mtp_prefix}*) is missing; fetch the folder again, or set "
            "num_nextn_predict_layers to 0 in config.json to serve without it"
        )
    for fault, names in faults.items():
        lines += [f"  {fault}: {line}" for line in _grouped(names)]
    raise ModelFolderError("\n".join(lines))


def _grouped(names: list[str]) -> list[str]:
    """Every name; experts of one layer that lack the same tensor share a line."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        head, found, tail = name.partition(".experts.")
        number, _, rest = tail.partition(".")
        groups[(head + found, rest) if found else (name, "")].append(number)
    return [
        f"{head}{{{','.join(numbers)}}}.{rest}"
        if len(numbers) > 1
        else f"{head}{numbers[0]}{'.' if rest else ''}{rest}"
        for (head, rest), numbers in groups.items()
    ]
