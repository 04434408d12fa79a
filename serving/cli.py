"""`baton`: reads the command line and calls whoever does it. Imports as little as the command needs.

A BatonError is one line on standard error and its exit code; anything else is our bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.core.config import Config, help_text, is_secret, load_config, to_dict
from serving.core.errors import BatonError, ConfigError

_PASSED_ON = ("bench", "chat")
_BENCHMARKS = {
    "make-checkpoint": "a model of a named shape with random weights, to measure with",
    "kernels": "every kernel at DeepSeek-V3's shapes, beside the machine's ceilings and installed peers",
    "numerics": "logits of an FP8 model beside those of its weights in bf16, by cosine",
    "engine": "the engine alone, beside peers on the same weights",
    "handoff": "prefill and decode on devices of their own, beside one worker that does both",
    "ranks": "a unit of processes beside one process: rates, time in collectives, what two micro-batches hide",
    "collectives": "a call between processes of this host: shared memory, gloo",
    "dispatch": "expert dispatch and combine between GPUs of one host: NCCL, peer memory",
    "transfer": "pages of one prompt from one pool to another: NIXL, NCCL, the link",
    "served": "what HTTP, router and two workers cost over the engine alone",
    "balance": "how evenly each way of placing experts spreads a load, and its time",
    "drafts": "the embedded model with drafts of its MTP layer and without",
    "redundancy": "experts' replicas chosen anew in every step, beside a static placement and the optimum",
    "idle": "CPU of a server without requests",
    "memory": "peak memory of the workers, against what they must hold",
    "ask": "how often the embedded model answers right through the API",
}
"""Modules of serving.bench, with dashes."""
_HELP_COLUMN = 28


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments and arguments[0] in _PASSED_ON:
            return _pass_on(arguments[0], arguments[1:])
        options = _parser().parse_args(arguments)
        if options.command is None:
            _parser().print_help()
            return 2
        return _COMMANDS[options.command](options)
    except BatonError as error:
        print(f"baton: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _pass_on(command: str, arguments: list[str]) -> int:
    """Commands with a command line of their own."""
    if command == "chat":
        from serving.chat import main as chat

        return chat(arguments)
    what = arguments[0] if arguments else ""
    if what in ("-h", "--help"):
        lines = [f"{name:<17}{what_for}" for name, what_for in _BENCHMARKS.items()]
        print("\n".join([f"usage: baton bench {{{','.join(_BENCHMARKS)}}} [options]", "", *lines]))
        return 0
    if what not in _BENCHMARKS:
        raise ConfigError(f"baton bench {what!r}: there is no such benchmark; choose one of {', '.join(_BENCHMARKS)}")
    code: int = importlib.import_module(f"serving.bench.{what.replace('-', '_')}").main(arguments[1:])
    return code


def _serve(options: argparse.Namespace) -> int:
    from serving.cluster.display import Display
    from serving.cluster.launch import serve

    return serve(_config(options), Display())


def _demo(options: argparse.Namespace) -> int:
    from serving.cluster.demo import run_demo

    return run_demo(_server_arguments(options))


def _doctor(options: argparse.Namespace) -> int:
    from serving.cluster.doctor import examine

    return examine(_config(options))


def _check_config(options: argparse.Namespace) -> int:
    from serving.cluster.sizes import describe_units

    config = load_config(options.file)
    described = describe_units(config)
    for table, keys in to_dict(config).items():
        print(f"[{table}]")
        for key, value in keys.items():
            hidden = value and is_secret(table, key)
            setting = f"# {key}: {len(value)} in force, not shown" if hidden else f"{key} = {_toml(value)}"
            print(f"{setting:<{_HELP_COLUMN}}  # {help_text(table, key)}")
    print("\n".join(["", *(f"# {line}" for line in described)]))
    return 0


_COMMANDS = {"serve": _serve, "demo": _demo, "doctor": _doctor, "check-config": _check_config}


def _config(options: argparse.Namespace) -> Config:
    named = {"model.dir": options.model, "router.host": options.host, "router.port": options.port}
    overrides = [f"{key}={value}" for key, value in named.items() if value is not None]
    return load_config(options.config, environment=os.environ, overrides=[*options.set, *overrides])


def _server_arguments(options: argparse.Namespace) -> list[str]:
    """The options as they were given, for a `baton serve` in another process."""
    named = {"--config": options.config, "--model": options.model, "--host": options.host, "--port": options.port}
    pairs = [part for name, value in named.items() if value is not None for part in (name, str(value))]
    return pairs + [part for text in options.set for part in ("--set", text)]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton", description="Disaggregated inference server for DeepSeek-V3-architecture models."
    )
    parser.add_argument("--version", action="version", version=f"baton {_Version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser("serve", help="start workers and router, and serve until SIGTERM or Ctrl-C")
    demo = commands.add_parser("demo", help="start a server, stream one answer, check it, shut down")
    doctor = commands.add_parser("doctor", help="what this machine has, and what to do about what it lacks")
    for command in (serve, demo, doctor):
        _add_server_options(command)
    commands.add_parser("chat", help="talk to a server", add_help=False)
    commands.add_parser("bench", help="measure: " + ", ".join(_BENCHMARKS), add_help=False)
    check = commands.add_parser(
        "check-config", help="read a configuration file, print all settings in force and what its units come to"
    )
    check.add_argument("file", type=Path, metavar="FILE")
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file; without it, the defaults")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder; without it, the embedded model")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", help="port to listen on (8000); 0 takes a free one")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="table.key=value",
        help="overrides file and environment; repeatable",
    )


class _Version:
    """Looked up only when it is printed."""

    def __str__(self) -> str:
        from importlib.metadata import version

        return version("baton-serving")


if __name__ == "__main__":
    sys.exit(main())
