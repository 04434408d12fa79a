"""Fills a model from a Hugging Face folder: check everything by header, then stream, a few megabytes in flight.

FP8 block-scaled tensors are dequantised to the compute dtype on their way in, unless the model keeps them. The MTP layer's copies of embedding and
head are compared with the main ones and not kept. Knows nothing of pages, batches or processes.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from serving.core.errors import ModelFolderError
from serving.kernels.quant import dequantise_block_fp8, quantise_block_fp8
from serving.model.checkpoint import ShardReader, TensorEntry, read_entries
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.heap import blocks_returned
from serving.model.kernels import OURS, KernelChoices
from serving.model.names import SCALE_SUFFIX, Target, name_table, name_tables
from serving.model.parallel import SINGLE, Parallel

_LOG = logging.getLogger("baton.weights")
_FLOATS = ("BF16", "F16", "F32", "F64")
_FP8 = "F8_E4M3"
# A buffer some exporters store although config.json determines it.
_DERIVED = ".rotary_emb.inv_freq"


class Progress(Protocol):
    """Told how loading goes; `serving.model.progress` has one for a console."""

    def start(self, total_bytes: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...

    def finish(self) -> None: ...

    def tell(self, text: str) -> None:
        """What is done after the weights are loaded."""
        ...


def load_weights(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    kernels: KernelChoices = OURS,
    parallel: Parallel = SINGLE,
    entries: dict[str, TensorEntry] | None = None,
    progress: Progress | None = None,
) -> DeepseekV3:
    """Read the folder's weights into a new model of compute dtype `dtype` on `device`, which computes with `kernels`.

    Of a unit of many ranks only what this one keeps is read; the whole folder is checked all the same. `entries`: what it holds, where
    that has been read. Raises ModelFolderError, before reading any weight, with one line that counts the faults and then a line for
    each group of tensors that is missing, unexpected or of a wrong shape or dtype; ConfigError where the model does not divide as asked.
    """
    with blocks_returned():
        found = read_entries(Path(folder)) if entries is None else entries
        return _load(Path(folder), found, config, dtype, device, kernels, parallel, progress)


def _load(
    folder: Path,
    entries: dict[str, TensorEntry],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    kernels: KernelChoices,
    parallel: Parallel,
    progress: Progress | None,
) -> DeepseekV3:
    model = _new_model(folder, config, dtype, device, kernels, parallel)
    table = name_table(model)
    _check(folder, entries, config, table)
    total_bytes = sum(_kept_bytes(entries, name, target) for name, target in table.items())
    # Its views would keep alive what is packed.
    del table
    in_flight_bytes = min(max(total_bytes // 64, 1 << 20), 64 << 20)
    if progress is not None:
        progress.start(total_bytes)
    with ShardReader(entries, mapped_bytes=in_flight_bytes) as reader:
        files = _Files(entries=entries, reader=reader, config=config, piece_elements=in_flight_bytes // 8)
        for pack, targets in name_tables(model, kept=True):
            while targets:
                name = next(iter(targets))
                # The views die before the part takes its final layout: only one part exists twice.
                num_bytes = files.load(name, targets.pop(name))
                if progress is not None:
                    progress.advance(num_bytes)
            if pack is not None:
                pack()
    if progress is not None:
        progress.finish()
    return model


def check_weights(folder: str | Path, config: ModelConfig) -> None:
    """Compare the headers of the folder's shards with the model; reads no weights. Raises what `load_weights` raises."""
    model = DeepseekV3(config, torch.bfloat16, "meta")
    _check(Path(folder), read_entries(Path(folder)), config, name_table(model))


def _new_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    kernels: KernelChoices,
    parallel: Parallel,
) -> DeepseekV3:
    """Uninitialised: on CPU nothing is resident before it is filled."""
    try:
        return DeepseekV3(config, dtype, device, kernels=kernels, parallel=parallel)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ModelFolderError(
            f"{folder}: no memory for the weights as {dtype} on {device} ({reason}); choose a smaller dtype or model"
        ) from None


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The open folder, and how many elements of a tensor are converted at a time (at most 8 transient bytes each)."""

    entries: dict[str, TensorEntry]
    reader: ShardReader
    config: ModelConfig
    piece_elements: int

    def load(self, name: str, target: Target) -> int:
        """Fill one target; bytes of the files that this took."""
        if name not in self.entries:
            return 0
        if not target.into.numel():
            return 0
        if target.repeats is None:
            self._fill(name, target)
        else:
            self._compare(name, target, target.repeats)
        return _kept_bytes(self.entries, name, target)

    def _fill(self, name: str, target: Target) -> None:
        quantised = self.entries[name].dtype == _FP8
        block = self.config.weight_block_size or (1, 1)
        for start, end in self._pieces(target, multiple_of=block[0] if quantised or target.scales is not None else 1):
            if target.scales is None:
                part = (
                    self._dequantised(name, target, start, end, block)
                    if quantised
                    else self._rows(name, target, start, end)
                )
                target.into[start:end].copy_(part)
                continue
            # What stays FP8 begins where its blocks do.
            part = self._rows(name, target, start, end)
            if quantised:
                scales = self._scales(name, target, start, end, block)
            else:
                if start == 0:
                    _LOG.warning("%s is not FP8 in the checkpoint; it is quantised as its neighbours were", name)
                part, scales = quantise_block_fp8(part, block)
            target.into[start:end].copy_(part)
            target.scales[start // block[0] : -(-end // block[0])].copy_(scales)

    def _rows(self, name: str, target: Target, start: int, end: int) -> Tensor:
        """Rows [start, end) of the part, as they are in the file."""
        first, left = target.at
        columns = None if target.has_all_columns else slice(left, left + target.into.shape[1])
        return self.reader.rows(name, first + start, first + end, columns)

    def _dequantised(self, name: str, target: Target, start: int, end: int, block: tuple[int, int]) -> Tensor:
        """The same of FP8 blocks; what is read begins where they do."""
        row, left = target.at[0] + start, target.at[1]
        rows_before, columns_before = row % block[0], left % block[1]
        columns = None if target.has_all_columns else slice(left - columns_before, left + target.into.shape[1])
        whole = self.reader.rows(name, row - rows_before, target.at[0] + end, columns)
        scales = self._scales(name, target, start, end, block)
        return dequantise_block_fp8(whole, scales, block, target.into.dtype)[rows_before:, columns_before:]

    def _scales(self, name: str, target: Target, start: int, end: int, block: tuple[int, int]) -> Tensor:
        """Of the blocks that hold rows [start, end) of the part."""
        first, left = target.at
        right = left + target.into.shape[1]
        columns = None if target.has_all_columns else slice(left // block[1], -(-right // block[1]))
        return self.reader.rows(
            name + SCALE_SUFFIX, (first + start) // block[0], -(-(first + end) // block[0]), columns
        )

    def _compare(self, name: str, target: Target, original: str) -> None:
        """The copy in the file must be what it repeats."""
        first = target.at[0]
        for start, end in self._pieces(target, multiple_of=1):
            rows = first + start, first + end
            if not torch.equal(self.reader.rows(name, *rows), self.reader.rows(original, *rows)):
                raise ModelFolderError(
                    f"{self.entries[name].shard}: {name} differs from {original}; an MTP layer with its own embedding "
                    "or head is not supported (set num_nextn_predict_layers to 0 in config.json to leave it out)"
                )

    def _pieces(self, target: Target, *, multiple_of: int) -> list[tuple[int, int]]:
        """Row ranges of the part, of about `piece_elements` each."""
        num_rows, *width = target.into.shape
        step = max(self.piece_elements // max(math.prod(width), 1) // multiple_of, 1) * multiple_of
        return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _kept_bytes(entries: dict[str, TensorEntry], name: str, target: Target) -> int:
    """What the part takes of the files, its scales included."""
    if not target.into.numel():
        return 0
    found = [entries[each].num_bytes for each in (name, name + SCALE_SUFFIX) if each in entries]
    return sum(found) * target.into.numel() // max(math.prod(target.shape), 1)


def _check(folder: Path, entries: dict[str, TensorEntry], config: ModelConfig, table: dict[str, Target]) -> None:
    """Compare names, shapes and dtypes of the folder with the model's; one error names every fault."""
    faults: dict[str, list[str]] = defaultdict(list)
    expected = set(table)
    for name, target in table.items():
        if name not in entries:
            if target.repeats is None:
                faults["missing"].append(name)
            continue
        entry, shape = entries[name], target.shape
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
