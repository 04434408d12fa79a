"""`baton doctor`: what this machine has of what a server needs, one line each, with the fix where something is missing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serving.cluster.placement import plan_units
from serving.cluster.preflight import check_model_folder, check_ports, check_units, resolve_model_dir
from serving.core.config import Config
from serving.core.errors import BatonError

_DISTRIBUTIONS = (
    "torch",
    "ray",
    "nixl-cu13",
    "pyzmq",
    "msgspec",
    "fastapi",
    "uvicorn",
    "tokenizers",
    "safetensors",
    "openai",
)
_LEAST_MEMORY_BYTES = 2 << 30
_LEAST_SHM_BYTES = 128 << 20
_LEAST_DISK_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """`fix` is empty where all is well."""

    subject: str
    found: str
    fix: str = ""


def examine(config: Config) -> int:
    """Prints the table; 0 if nothing is missing, else 2."""
    findings = [
        _python(),
        *_versions(),
        _nixl(),
        _devices(config),
        _memory(),
        _shared_memory(),
        _disk(),
        _model(config),
        _units(config),
        _ports(config),
    ]
    table = Table("", "found", "what to do", show_edge=False)
    for finding in findings:
        mark = "[red]fix[/red] " if finding.fix else "ok  "
        table.add_row(mark + escape(finding.subject), escape(finding.found), escape(finding.fix))
    Console().print(table)
    return 2 if any(finding.fix for finding in findings) else 0


def _python() -> Finding:
    fix = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer"
    return Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", fix)


def _versions() -> list[Finding]:
    findings = []
    for name in _DISTRIBUTIONS:
        try:
            findings.append(Finding(name, version(name)))
        except PackageNotFoundError:
            findings.append(Finding(name, "not installed", "make install"))
    return findings


def _nixl() -> Finding:
    try:
        importlib.import_module("nixl_cu13._api")
    except ImportError as error:
        return Finding(
            "NIXL", f"does not load: {error}", "make install; without it, --set engine.mode=both serves in one worker"
        )
    return Finding("NIXL", "loads")


def _devices(config: Config) -> Finding:
    num_gpus, num_cores = _num_gpus(), len(os.sched_getaffinity(0))
    ranks = [rank for unit in plan_units(config, num_cores=num_cores, num_gpus=num_gpus) for rank in unit.ranks]
    threads = " or ".join(str(number) for number in sorted({rank.num_threads for rank in ranks}))
    found = f"{num_gpus} GPUs, {num_cores} cores for {len(ranks)} workers of {threads} threads"
    missing_gpu = config.model.device == "cuda" and not num_gpus
    return Finding(
        "devices",
        found,
        "set model.device to auto or cpu, or install a driver and a CUDA build of torch" if missing_gpu else "",
    )


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    return Finding(
        "memory",
        f"{free / 2**30:.1f} GiB available",
        "" if free >= _LEAST_MEMORY_BYTES else "2 GiB are needed; end something",
    )


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("/dev/shm", "absent", "Ray keeps its object store there; mount a tmpfs of 128 MiB or more")
    free = shutil.disk_usage("/dev/shm").free
    return Finding(
        "/dev/shm",
        f"{free / 2**20:.0f} MiB free",
        "" if free >= _LEAST_SHM_BYTES else "128 MiB are needed; give the container more (--shm-size)",
    )


def _disk() -> Finding:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    return Finding(
        folder,
        f"{free / 2**30:.1f} GiB free",
        "" if free >= _LEAST_DISK_BYTES else "1 GiB is needed for Ray's session; set TMPDIR",
    )


def _model(config: Config) -> Finding:
    return _tried(
        "model", lambda: check_model_folder(resolve_model_dir(config), config), config.model.dir or "the embedded model"
    )


def _units(config: Config) -> Finding:
    num_gpus = 0 if config.model.device == "cpu" else _num_gpus()

    def check() -> None:
        units = plan_units(config, num_cores=1, num_gpus=num_gpus)
        check_units(config, resolve_model_dir(config), units, num_gpus=num_gpus)

    return _tried("units", check, "fit the model and this machine")


def _ports(config: Config) -> Finding:
    return _tried("port", lambda: check_ports(config), f"{config.router.host}:{config.router.port} is free")


def _tried(subject: str, check: Callable[[], None], found: str) -> Finding:
    try:
        check()
    except BatonError as error:
        return Finding(subject, "wrong", " ".join(str(error).split()))
    return Finding(subject, found)
