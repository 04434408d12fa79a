"""`baton bench engine`: prefill rate, TTFT, TPOT and decode rate of the engine alone, beside peers on the same weights.

Every system generates greedily from the same prompts; t(n) is the wall time for n new tokens of all prompts. Then

    TTFT = t(1)      prefill tok/s = prompt tokens / t(1)      TPOT = (t(N) - t(1)) / (N - 1)      decode tok/s = batch / TPOT

Systems take turns within each repeat, so that a busy machine is busy for all of them; figures are medians over repeats.
A turn begins with a pause and a prefill that is not counted: threads of the system before may spin for 0.2 s after its
last step, and t(1) alone would pay for that and for caches that hold another's weights.

--virtual runs units of many ranks instead, for what they send and not for time: `serving.bench.virtual`. --shape rank-* runs one
rank of such a unit, for time: `serving.bench.rank`.

On a GPU, or where --prefill or --decode is given, points are measured instead: `serving.bench.points`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from serving.bench.foreign import FOREIGN, Foreign, foreign
from serving.bench.options import count, counts
from serving.bench.points import (
    GPU_DECODE,
    GPU_PREFILL,
    STEP_TOKENS,
    Point,
    batches_of_prompts,
    idle_share,
    measure_points,
    point_line,
    point_ratios,
    points_of,
    ratio_table,
)
from serving.bench.rank import RANKS, run_rank
from serving.bench.report import provenance, write_report
from serving.bench.shapes import SHAPES, random_prompts, write_checkpoint
from serving.bench.systems import Baton, System, Transformers
from serving.bench.virtual import report_of, run_units, table
from serving.core.collector import passing_over_what_is_loaded
from serving.core.config import load_config
from serving.core.errors import ConfigError
from serving.model.config import ModelConfig

_PAUSE_S = 0.3
_PEERS = sorted([Transformers.name, *FOREIGN])
# Peers that say when their steps ended.
_TIMED_PEERS = {"vllm"}
_IDLE_POINT = Point(kind="decode", batch=64, prompt_tokens=512)
_NUM_IDLE_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One system at one batch size; seconds and tokens per second, medians over the repeats. `raw_s`: t(1) and t(N) of each."""

    system: str
    batch: int
    ttft_s: float
    tpot_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    raw_s: list[tuple[float, float]]


def main(argv: Sequence[str]) -> int:
    """`argv` without the program's name. JSON on standard output (or in --out), a table on standard error."""
    options = _parse(argv)
    if options.virtual is not None:
        return _run_virtual(options, argv)
    if options.shape in RANKS:
        return run_rank(options, argv)
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-"))
        model_dir, model = _model(options, Path(scratch))
        report = provenance(["baton", "bench", "engine", *argv]) | {"model": model, "settings": _settings(options)}
        baton, peers = _systems(options, model_dir, stack)
        systems: list[System] = [baton, *peers]
        stack.enter_context(passing_over_what_is_loaded())
        report["kernel_choices"] = {
            system.name: system.kernels for system in [baton, *peers] if isinstance(system, Baton)
        }
        report["versions"] |= {system.name: system.version for system in peers if not isinstance(system, Baton)}
        vocab_size = ModelConfig.from_folder(model_dir).vocab_size
        if options.points:
            timed = [peer for peer in peers if not isinstance(peer, Transformers)]
            _measure_points(options, baton, timed, vocab_size, report)
            return 0
        figures, agreement = measure(
            systems, options.batch, vocab_size, options.prompt_tokens, options.new_tokens, options.repeats, options.seed
        )
    report["results"] = [asdict(figure) for figure in figures]
    report["same_text_as_baton"] = agreement
    report["ratios"] = ratios(figures)
    print(_table(figures), file=sys.stderr)
    write_report(report, options.out)
    return 0


def _run_virtual(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """1: a text is not that of one rank."""
    settings = {"num_requests": options.requests, "new_tokens": options.new_tokens, "seed": options.seed}
    report = provenance(["baton", "bench", "engine", *argv]) | {"settings": settings}
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        report |= report_of(run_units(options.virtual, Path(scratch), overrides=options.set, **settings))
    print(table(report), file=sys.stderr)
    write_report(report, options.out)
    return 0 if report["same_text_as_one_rank"] == options.requests else 1


def measure(
    systems: Sequence[System],
    batches: Sequence[int],
    vocab_size: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Figure], dict[str, float]]:
    """Figures in the order of batches and systems, and for each peer the share of texts that equal the first system's."""

    def timed(system: System, num_new_tokens: int) -> float:
        begin = clock()
        system.generate(prompts, num_new_tokens)
        return clock() - begin

    figures: list[Figure] = []
    same: dict[str, list[bool]] = {system.name: [] for system in systems[1:]}
    for batch in batches:
        prompts = random_prompts(batch, prompt_tokens, vocab_size, seed)
        texts = [system.generate(prompts, new_tokens) for system in systems]
        for system, text in zip(systems[1:], texts[1:], strict=True):
            same[system.name] += [mine == theirs for mine, theirs in zip(texts[0], text, strict=True)]
        raw: list[list[tuple[float, float]]] = [[] for _ in systems]
        for _ in range(repeats):
            for times, system in zip(raw, systems, strict=True):
                time.sleep(_PAUSE_S)
                system.generate(prompts, 1)
                times.append((timed(system, 1), timed(system, new_tokens)))
        figures += [
            _figure(system.name, batch, prompt_tokens, new_tokens, times)
            for system, times in zip(systems, raw, strict=True)
        ]
    return figures, {name: sum(equal) / len(equal) for name, equal in same.items()}


def ratios(figures: Sequence[Figure]) -> dict[str, dict[str, float]]:
    """By "peer at batch B": decode rate over the peer's, and the peer's TTFT over ours. Above 1 is better than the peer."""
    ours = {figure.batch: figure for figure in figures if figure.system == Baton.name}
    return {
        f"{figure.system} at batch {figure.batch}": {
            "decode": ours[figure.batch].decode_tokens_per_s / figure.decode_tokens_per_s,
            "ttft": figure.ttft_s / ours[figure.batch].ttft_s,
        }
        for figure in figures
        if figure.system != Baton.name
    }


def _measure_points(
    options: argparse.Namespace,
    baton: Baton,
    peers: Sequence[Baton | Foreign],
    vocab_size: int,
    report: dict[str, Any],
) -> None:
    """Fills the report and writes it; tables on standard error."""
    report["device"] = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    figures = measure_points(
        [baton, *peers],
        options.points,
        vocab_size=vocab_size,
        num_steps=options.new_tokens - 1,
        step_tokens=options.max_batched_tokens,
        repeats=options.repeats,
        seed=options.seed,
        told=lambda figure: print(point_line(figure), file=sys.stderr, flush=True),
    )
    report["results"] = [asdict(figure) for figure in figures]
    report["ratios"] = point_ratios(figures, baton.name)
    print(ratio_table(report["ratios"]), file=sys.stderr)
    write_report(report, options.out)
    if options.idle:
        share = idle_share(baton, _IDLE_POINT, vocab_size=vocab_size, num_steps=_NUM_IDLE_STEPS, seed=options.seed)
        report["idle"] = {"point": _IDLE_POINT.name, "steps": _NUM_IDLE_STEPS, "share": share}
        print(f"the device idles {share:.2%} of {_IDLE_POINT.name}", file=sys.stderr)
        write_report(report, options.out)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="baton bench engine", description=__doc__.split("\n")[0] if __doc__ else None)
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--shape",
        choices=sorted([*SHAPES, *RANKS]),
        default="cpu-34m",
        help="a built-in model with random weights; rank-*: one rank of a published unit, on a GPU",
    )
    model.add_argument("--model", type=Path, help="a Hugging Face folder instead")
    model.add_argument(
        "--virtual",
        metavar="CONFIG",
        help="every rank of both units of a configuration (a file, or the name of a shipped one), in one process on a small model",
    )
    parser.add_argument("--requests", type=count, default=160, help="of --virtual")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="of --virtual: overrides the configuration",
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="the GPU if any")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every system")
    parser.add_argument("--batch", type=counts, default=[1, 8], help="sequences at once, comma-separated")
    parser.add_argument("--prompt-tokens", type=count, default=128)
    parser.add_argument(
        "--new-tokens",
        type=count,
        default=0,
        help="at least 2; of a point: steps + 1; if not given 65, of --virtual 16",
    )
    parser.add_argument(
        "--max-batched-tokens", type=count, default=0, help="prefill tokens of one step; if not given, as served"
    )
    parser.add_argument(
        "--prefill", type=batches_of_prompts, metavar="BxL,...", help="points: batches of prompts of L tokens"
    )
    parser.add_argument(
        "--decode", type=batches_of_prompts, metavar="BxL,...", help="points: batches behind such prompts"
    )
    parser.add_argument("--idle", action="store_true", help="profile how long the GPU idles at 64 sequences")
    parser.add_argument("--layers", type=count, default=0, help="of rank-*: fewer than the model has")
    parser.add_argument("--profile", action="store_true", help="of rank-*: the kernels of a step")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--peer", action="append", choices=_PEERS, default=[], help="measure this one too")
    parser.add_argument(
        "--against",
        action="append",
        type=_of_kernels,
        default=[],
        metavar="kernels.KEY=VALUE",
        help="points: measure Baton with this setting too, its weights in memory a second time",
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        type=_interpreter,
        default=[],
        metavar="NAME=PATH",
        help=f"the interpreter of a peer that is not installed beside Baton ({', '.join(sorted(FOREIGN))})",
    )
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    options = parser.parse_args(argv)
    options.new_tokens = options.new_tokens or (65 if options.virtual is None else 16)
    if options.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the first token is the prefill's")
    if options.idle and options.device != "cuda":
        parser.error("--idle needs --device cuda")
    if options.prefill is None and options.decode is None and options.device == "cuda":
        options.prefill, options.decode = GPU_PREFILL, GPU_DECODE
    options.points = points_of(options.prefill or (), options.decode or ())
    if options.against and not options.points:
        parser.error("--against: settings of [kernels] are compared at points; give --prefill or --decode, or a GPU")
    if options.points:
        options.max_batched_tokens = options.max_batched_tokens or STEP_TOKENS
        if set(options.peer) - _TIMED_PEERS:
            parser.error(f"--peer: beside points of a GPU only {', '.join(sorted(_TIMED_PEERS))} can be measured")
    return options


def _of_kernels(text: str) -> str:
    if not text.startswith("kernels."):
        raise argparse.ArgumentTypeError(f"{text!r}; give a key of [kernels]: kernels.linear_fp8=baton")
    try:
        load_config(overrides=[text])
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _interpreter(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or name not in FOREIGN:
        raise argparse.ArgumentTypeError(f"{text!r}; give NAME=PATH, NAME one of {', '.join(sorted(FOREIGN))}")
    return name, Path(path)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ["device", "dtype", "threads", "new_tokens", "max_batched_tokens", "repeats", "seed"]
    return {name: getattr(options, name) for name in names + ([] if options.points else ["prompt_tokens"])}


def _model(options: argparse.Namespace, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """The folder to load, and what the report says of it: name and fields of config.json."""
    if options.model is not None:
        config = asdict(ModelConfig.from_folder(options.model))
        return options.model, {"name": options.model.name, "config": config}
    num_parameters = write_checkpoint(scratch, options.shape, options.seed, device=options.device)
    return scratch, {"name": options.shape, "num_parameters": num_parameters, "config": SHAPES[options.shape]}


def _systems(
    options: argparse.Namespace, model_dir: Path, stack: ExitStack
) -> tuple[Baton, list[Baton | Transformers | Foreign]]:
    """Baton and its peers, itself with other settings first. `stack` ends the processes of peers."""
    batches = [(batch, options.prompt_tokens, options.new_tokens) for batch in options.batch]
    if options.points:
        batches = [
            (p.batch, p.prompt_tokens, p.num_new_tokens(options.new_tokens - 1, options.max_batched_tokens))
            for p in [*options.points, *([_IDLE_POINT] if options.idle else [])]
        ]
    longest = max(prompt_tokens + new_tokens for _, prompt_tokens, new_tokens in batches)
    most = max(batch for batch, _, _ in batches)
    limit = ModelConfig.from_folder(model_dir).max_position_embeddings
    if longest > limit:
        raise ConfigError(f"--prompt-tokens and --new-tokens come to {longest}; the model's limit is {limit}")

    def baton(kernels: str = "") -> Baton:
        return Baton(
            model_dir,
            dtype=options.dtype,
            device=options.device,
            max_num_seqs=most,
            max_tokens=longest,
            max_batched_tokens=options.max_batched_tokens,
            kernels=kernels,
        )

    def peers() -> list[Transformers | Foreign]:
        return [_peer(name, options, model_dir, most, longest, stack) for name in options.peer]

    if options.device == "cpu":
        return baton(), [*map(baton, dict.fromkeys(options.against)), *peers()]
    # Each takes a minute or two, most of it compiling; memory is for both.
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(peers)
        return baton(), [*map(baton, dict.fromkeys(options.against)), *loading.result()]


def _peer(
    name: str, options: argparse.Namespace, model_dir: Path, most: int, longest: int, stack: ExitStack
) -> Transformers | Foreign:
    if name == Transformers.name:
        return Transformers(model_dir, dtype=options.dtype, device=options.device)
    peer, own_settings = FOREIGN[name]
    settings = {
        "model_dir": str(model_dir),
        "dtype": options.dtype,
        "max_num_seqs": most,
        "max_tokens": longest,
        "threads": options.threads if options.device == "cpu" else None,
    }
    python = dict(options.peer_python).get(name, Path(sys.executable))
    return stack.enter_context(foreign(name, peer=peer, python=python, settings=settings | own_settings))


def _figure(name: str, batch: int, prompt_tokens: int, new_tokens: int, times: list[tuple[float, float]]) -> Figure:
    ttft_s = statistics.median(first for first, _ in times)
    tpot_s = statistics.median((last - first) / (new_tokens - 1) for first, last in times)
    return Figure(
        system=name,
        batch=batch,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        prefill_tokens_per_s=batch * prompt_tokens / ttft_s,
        decode_tokens_per_s=batch / tpot_s,
        raw_s=times,
    )


def _table(figures: Sequence[Figure]) -> str:
    lines = [f"{'system':<24}{'batch':>6}{'TTFT ms':>10}{'TPOT ms':>10}{'prefill tok/s':>15}{'decode tok/s':>14}"]
    lines += [
        f"{f.system:<24}{f.batch:>6}{f.ttft_s * 1e3:>10.1f}{f.tpot_s * 1e3:>10.2f}"
        f"{f.prefill_tokens_per_s:>15.0f}{f.decode_tokens_per_s:>14.1f}"
        for f in figures
    ]
    lines += [
        f"{name}: decode {ratio['decode']:.2f} times, first token {ratio['ttft']:.2f} times as fast"
        for name, ratio in ratios(figures).items()
    ]
    return "\n".join(lines)
