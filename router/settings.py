"""What a router process is told: command line, configuration as JSON, secret in the environment. Checked here, read nowhere else."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from serving.core.config import Config, from_dict
from serving.core.errors import ConfigError

_SECRET = "BATON_SECRET"


@dataclass(frozen=True, kw_only=True)
class Settings:
    directory: str
    model_dir: str
    router_id: str
    host: str
    port: int
    secret: bytes = field(repr=False)
    config: Config


def read_settings(arguments: Sequence[str], environment: Mapping[str, str], stdin: TextIO) -> Settings:
    """Raises ConfigError. A wrong option ends the process with argparse's own line and exit code 2."""
    given = _parser().parse_args(arguments)
    config = _config(given.config, stdin)
    return Settings(
        directory=given.directory,
        model_dir=given.model_dir,
        router_id=given.router_id or f"router-{os.getpid()}",
        host=given.host or config.router.host,
        port=config.router.port if given.port is None else given.port,
        secret=_secret(environment),
        config=config,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m router", description="One router process of a Baton server.")
    parser.add_argument("--directory", required=True, help="ZeroMQ endpoint of the supervisor, tcp://HOST:PORT")
    parser.add_argument("--model-dir", required=True, help="model folder: tokenizer and config.json are read")
    parser.add_argument("--config", help="JSON file of the whole configuration; - reads standard input")
    parser.add_argument("--host", help="address to listen on; default router.host")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one; default router.port")
    parser.add_argument("--router-id", help="name towards workers; unique in a cluster")
    return parser


def _config(path: str | None, stdin: TextIO) -> Config:
    if path is None:
        return Config()
    try:
        if path == "-":
            return from_dict(json.load(stdin))
        with open(path, encoding="utf-8") as file:
            return from_dict(json.load(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--config {path}: not the JSON of a configuration ({error!r})") from error


def _secret(environment: Mapping[str, str]) -> bytes:
    try:
        secret = bytes.fromhex(environment.get(_SECRET, ""))
    except ValueError:
        secret = b""
    if not 16 <= len(secret) <= 64:
        raise ConfigError(f"{_SECRET} must be 32 to 128 hexadecimal digits, the same for every process of the server")
    return secret
