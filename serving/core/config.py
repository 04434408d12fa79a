"""Configuration: frozen dataclasses, one a table of the TOML file.

Order, strongest first: `--set table.key=value`, environment (BATON_TABLE_KEY), file, default. An unknown table or key is an error that names
the file, the key and the nearest known one. The environment is passed in; nothing here reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.core.errors import ConfigError

MOST_DRAFTS = 3
"""The attention of a decode step takes four tokens of a sequence."""


def _key(
    default: Any,
    help_text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    or_zero: bool = False,
    secret: bool = False,
) -> Any:
    """`or_zero`: 0 is allowed below `low`, and leaves the choice to us."""
    metadata = {"help": help_text, "choices": choices, "low": low, "high": high, "or_zero": or_zero, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelTable:
    dir: str = _key("", "Hugging Face folder of the model; empty: the embedded model")
    name: str = _key("", "name in the API; empty: the folder's name")
    dtype: str = _key("auto", "compute type; auto: float32 on a CPU", choices=("auto", "float32", "bfloat16"))
    device: str = _key("auto", "auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    mtp: bool = _key(True, "load the multi-token-prediction layer if the model has one, and keep its latents")
    max_model_len: int = _key(
        0, "longest prompt + answer in tokens; 0: the model's own limit, or what the pool holds", low=0
    )
    chat_format: str = _key("auto", "auto: from the tokenizer's template", choices=("auto", "v3", "r1", "v3.1"))


@dataclass(frozen=True, kw_only=True)
class UnitTable:
    """The ranks of a unit and what they share; the same keys for both roles. What fits together: serving.model.units."""

    units: int = _key(1, "units of the role", low=1)
    tp: int = _key(1, "ranks that share a batch and part the attention heads among them; they lie on one node", low=1)
    dp: int = _key(1, "groups of tp ranks, each with a batch of its own; a unit has tp * dp ranks", low=1)
    ep: int = _key(0, "ranks that hold all experts together; 0: all of the unit", low=0)
    ranks_per_node: int = _key(8, "ranks of a unit on one node, a GPU each; a smaller unit fills a part of one", low=1)
    redundant_experts: int = _key(
        0, "experts that ep ranks hold in a layer beyond each routed one once: copies of those in demand", low=0
    )
    hosted_slots: int = _key(
        0,
        "experts of a layer in a rank's memory, of which each step uses (routed + redundant) / ep, chosen anew; 0: no more than those",
        low=0,
    )
    shared_expert_routed: bool = _key(
        False, "the shared expert as one more routed one that every token takes, its copies among the redundant"
    )
    microbatches: int = _key(
        1,
        "parts of a large step, one computed while the other communicates: on a CPU from 64 tokens of prompts or 8 rows of a dp group on, on "
        "GPUs from 16384 tokens of prompts on",
        low=1,
        high=2,
    )
    kv_sharding: bool = _key(False, "each page on one of its tp ranks; false: on every one")


@dataclass(frozen=True, kw_only=True)
class PrefillTable(UnitTable):
    max_num_seqs: int = _key(16, "sequences being prefilled or handed off at once", low=1)
    max_batched_tokens: int = _key(
        0,
        "tokens of one step; a longer prompt is computed in chunks; 0: 256 on a CPU, 8192 on a GPU",
        low=64,
        or_zero=True,
    )
    dispatch: str = _key(
        "auto",
        "how tokens reach experts on other GPUs; auto: nccl; deepep: that library, if it is installed",
        choices=("auto", "nccl", "deepep"),
    )
    threads: int = _key(0, "CPU threads of a worker; 0: the cores shared evenly among the workers", low=0)


@dataclass(frozen=True, kw_only=True)
class DecodeTable(UnitTable):
    max_num_seqs: int = _key(64, "sequences decoded together", low=1)
    draft_tokens: str = _key(
        "auto",
        "most tokens drafted a step with the MTP layer, fewer where they do not pay; auto: 0 as yet",
        choices=("auto", *(str(number) for number in range(MOST_DRAFTS + 1))),
    )
    dispatch: str = _key(
        "auto",
        "how tokens reach experts on other GPUs; symmetric: written into those GPUs' memory, and so are a tp group's sums of up to 1 MiB; "
        "auto: symmetric where ranks are on one node and can, else nccl",
        choices=("auto", "nccl", "symmetric"),
    )
    threads: int = _key(0, "CPU threads of a worker; 0: the cores shared evenly among the workers", low=0)


@dataclass(frozen=True, kw_only=True)
class KVTable:
    prefill_pages: int = _key(0, "pages of 64 tokens in a prefill worker; 0: sized from free memory", low=0)
    decode_pages: int = _key(0, "pages of 64 tokens in a decode worker; 0: sized from free memory", low=0)
    memory_fraction: float = _key(
        0.0,
        "share that one pool may take of the memory that is free when all else is loaded; 0: 0.1 on a CPU, 0.9 on a GPU",
        low=0.0,
    )
    prefix_cache: bool = _key(True, "keep full pages for later requests with the same beginning")
    expected_new_tokens: int = _key(256, "growth that a decode credit reserves, at most max_tokens", low=1)


@dataclass(frozen=True, kw_only=True)
class KernelsTable:
    """A library in place of our kernel, on a GPU."""

    mla_decode: str = _key(
        "auto",
        "attention of decode steps; auto: baton, with which steps of every shape measured are shortest",
        choices=("auto", "baton", "flashmla"),
    )
    linear_fp8: str = _key(
        "auto",
        "dense FP8 products; auto: deepgemm from 64 rows on where it is installed, else baton",
        choices=("auto", "baton", "deepgemm"),
    )
    grouped_fp8: str = _key(
        "auto",
        "FP8 products of the experts; auto: baton, with which steps are shortest",
        choices=("auto", "baton", "deepgemm"),
    )


@dataclass(frozen=True, kw_only=True)
class EngineTable:
    mode: str = _key(
        "disaggregated",
        "both: prefill and decode in one worker, as large as [decode] says, with prefill.max_batched_tokens",
        choices=("disaggregated", "both"),
    )
    run_ahead: bool = _key(True, "launch a step before the tokens of the one before are read back")


@dataclass(frozen=True, kw_only=True)
class TransferTable:
    checksum: str = _key("sampled", "which pages are checked on arrival", choices=("sampled", "all", "off"))
    progress_timeout_s: float = _key(10.0, "a hand-off that moves no byte for so long has failed", low=0.1)


@dataclass(frozen=True, kw_only=True)
class RouterTable:
    host: str = _key("127.0.0.1", "address to listen on")
    port: int = _key(8000, "port to listen on", low=0)
    processes: int = _key(1, "router processes, on consecutive ports", low=1)
    api_keys: tuple[str, ...] = _key((), "accepted bearer tokens; empty: no authentication", secret=True)
    max_body_bytes: int = _key(8 * 1024 * 1024, "largest request body", low=1024)
    max_waiting: int = _key(1024, "requests waiting for credits before 429", low=0)
    queue_timeout_s: float = _key(60.0, "longest wait for credits", low=0.0)
    drain_timeout_s: float = _key(
        30.0, "time that streams in flight have to end after SIGTERM; then each is told that the server stops", low=0.0
    )


@dataclass(frozen=True, kw_only=True)
class SloTable:
    ttft_ms: float = _key(2000.0, "time to first token promised by default; a bucket bound of its histogram", low=1.0)
    tpot_ms: float = _key(100.0, "time per output token promised by default; a bucket bound of its histogram", low=1.0)


@dataclass(frozen=True, kw_only=True)
class BalanceTable:
    """When the experts of units with ep above 1 are placed anew, and how fast."""

    period_s: float = _key(
        600.0, "longest time between two placements; 0: experts stay where they are", low=1.0, or_zero=True
    )
    threshold: float = _key(
        0.8,
        "balance (mean over largest load of a GPU) below which the period is not waited for; 0: it always is",
        low=0.0,
        high=1.0,
    )
    min_gain: float = _key(0.02, "balance that a layer must gain to be placed anew", low=0.001, high=0.5)
    half_life_s: float = _key(300.0, "after so long a token counts half", low=1.0)
    step_bytes: int = _key(64 << 20, "weights that a rank sends, and receives, during one step", low=1 << 20)


@dataclass(frozen=True, kw_only=True)
class TelemetryTable:
    log_level: str = _key("info", "what is logged", choices=("debug", "info", "warning", "error"))
    heartbeat_s: float = _key(0.75, "time between heartbeats; a peer silent for 2 s is dead", low=0.05)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration. Every table has defaults that serve the embedded model on a laptop."""

    model: ModelTable = ModelTable()
    prefill: PrefillTable = PrefillTable()
    decode: DecodeTable = DecodeTable()
    kv: KVTable = KVTable()
    kernels: KernelsTable = KernelsTable()
    engine: EngineTable = EngineTable()
    transfer: TransferTable = TransferTable()
    router: RouterTable = RouterTable()
    slo: SloTable = SloTable()
    balance: BalanceTable = BalanceTable()
    telemetry: TelemetryTable = TelemetryTable()


def unit_table(config: Config, role: str) -> UnitTable:
    """The table that says how large a unit of `role` is (prefill, decode or both)."""
    return config.prefill if role == "prefill" else config.decode


def load_config(
    path: Path | None = None, *, environment: Mapping[str, str] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Reads `path` (TOML), then `environment` (BATON_TABLE_KEY), then `overrides` ("table.key=value"). Raises ConfigError."""
    values: dict[str, dict[str, Any]] = {table.name: {} for table in dataclasses.fields(Config)}
    if path is not None:
        for table, keys in _read_toml(path).items():
            for key, value in keys.items():
                values[_table(table, str(path))][key] = _checked(table, key, value, str(path))
    for name, text in (environment or {}).items():
        known = _from_environment(name)
        if known is not None:
            values[known[0]][known[1]] = _checked(*known, text, f"environment variable {name}", parse=True)
    for text in overrides:
        table, key, value = _split_override(text)
        values[_table(table, "--set")][key] = _checked(table, key, value, f"--set {text}", parse=True)
    return Config(**{table.name: table.type(**values[table.name]) for table in _tables()})


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data, for another process; `from_dict` reads it back."""
    return dataclasses.asdict(config)


def is_secret(table: str, key: str) -> bool:
    """Its value must not be shown."""
    return bool(_metadata(table, key)["secret"])


def help_text(table: str, key: str) -> str:
    """What it is, and what may stand there, in one line."""
    metadata = _metadata(table, key)
    choices = f"; one of {', '.join(metadata['choices'])}" if metadata["choices"] else ""
    return f"{metadata['help']}{choices}"


def _metadata(table: str, key: str) -> Mapping[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(getattr(Config(), table))}
    return fields[key].metadata


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    tables = {table.name: table.type(**_tuples(values[table.name])) for table in _tables()}
    return Config(**tables)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@dataclass(frozen=True)
class _Table:
    name: str
    type: Any


def _tables() -> list[_Table]:
    hints = typing.get_type_hints(Config)
    return [_Table(table.name, hints[table.name]) for table in dataclasses.fields(Config)]


def _read_toml(path: Path) -> dict[str, dict[str, Any]]:
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; pass --config with an existing TOML file, or none for the defaults"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error
    for name, table in data.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{path}: {name!r} stands outside of a table; write it under one of {_names(_known_tables())}"
            )
    return data


def _known_tables() -> list[str]:
    return [table.name for table in _tables()]


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"[{name}]" for name in names)


def _table(name: str, source: str) -> str:
    known = _known_tables()
    if name not in known:
        raise ConfigError(f"{source}: unknown table [{name}]{_nearest(name, known)}; the tables are {_names(known)}")
    return name


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; the nearest is {close[0]!r}" if close else ""


def _from_environment(name: str) -> tuple[str, str] | None:
    """BATON_ROUTER_PORT -> ("router", "port"). Other BATON_ variables belong to somebody else."""
    for table in _tables():
        prefix = f"BATON_{table.name.upper()}_"
        if name.startswith(prefix):
            return table.name, name.removeprefix(prefix).lower()
    return None


def _split_override(text: str) -> tuple[str, str, str]:
    name, equals, value = text.partition("=")
    table, dot, key = name.partition(".")
    if not (equals and dot):
        raise ConfigError(f"--set {text}: write it as --set table.key=value")
    return table.strip(), key.strip(), value.strip()


def _checked(table: str, key: str, value: Any, source: str, *, parse: bool = False) -> Any:
    table_type = next(t.type for t in _tables() if t.name == _table(table, source))
    fields = {f.name: f for f in dataclasses.fields(table_type)}
    if key not in fields:
        raise ConfigError(f"{source}: unknown key {key!r} in [{table}]{_nearest(key, list(fields))}")
    wanted = typing.get_type_hints(table_type)[key]
    where = f"{source}: {table}.{key}"
    value = _parsed(value, wanted, where) if parse else _typed(value, wanted, where)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value!r}; it must be a finite number")
    choices, low, high, or_zero = (fields[key].metadata[name] for name in ("choices", "low", "high", "or_zero"))
    if choices and value not in choices:
        raise ConfigError(f"{where} = {value!r}; choose one of {', '.join(choices)}")
    if low is not None and value < low and not (or_zero and value == 0):
        raise ConfigError(f"{where} = {value!r}; it must be {'0 or ' if or_zero else ''}at least {low:g}")
    if high is not None and value > high:
        raise ConfigError(f"{where} = {value!r}; it must be at most {high:g}")
    return value


def _typed(value: Any, wanted: Any, where: str) -> Any:
    if isinstance(wanted, types.GenericAlias):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigError(f"{where} must be a list of strings")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{where} = {value!r}; it must be of type {wanted.__name__}")
    return value


def _parsed(text: str, wanted: Any, where: str) -> Any:
    if wanted is str:
        return text
    if isinstance(wanted, types.GenericAlias):
        return tuple(part for part in text.split(",") if part)
    if wanted is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise ConfigError(f"{where} = {text!r}; write true or false")
    try:
        return wanted(text)
    except ValueError:
        raise ConfigError(f"{where} = {text!r}; it must be of type {wanted.__name__}") from None
