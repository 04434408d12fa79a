"""`baton bench ranks`: a unit of several processes beside one process with as many threads as there are cores, over the same weights.

Each unit and the single process generate the same greedy texts in turns; texts have to be equal. Decode tok/s is taken while all sequences
are being decoded, prefill tok/s from generating one token, and the time in collectives is that of issuing and of waiting, on each rank.

--timeline generates once more with one micro-batch and with two, notes what was in flight while something was computed, and writes
the trace of the latter for Perfetto or chrome://tracing.

With --device cuda ranks have a GPU each and stand beside one GPU that holds all experts: `serving.bench.gpu_unit`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from serving.bench.gpu_ranks import Setup
from serving.bench.gpu_unit import decodes_of, ways_of
from serving.bench.gpu_unit import measure as measure_gpus
from serving.bench.gpu_unit import table as gpu_table
from serving.bench.options import count, counts
from serving.bench.processes import TRANSPORTS, Generation, Load, Sizes, Trace, Unit
from serving.bench.report import provenance, write_report
from serving.bench.shapes import SHAPES, random_prompts, write_checkpoint
from serving.core.errors import ConfigError

_PAUSE_S = 0.3
_TRACED_TOKENS = 6
_NUM_GPUS = 2
_THROUGH = "nccl", "peer-memory"
_CPU_DEFAULTS = {"shape": "cpu-34m", "requests": 64, "prompt_tokens": 64, "microbatches": [1]}
_GPU_DEFAULTS = {"shape": "slice", "requests": 32, "prompt_tokens": 2048, "microbatches": [1, 2]}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Medians over the repeats; ratios are to the single process. `raw`: (prefill, decode, whole generation) of each, tok/s.

    `in_collectives`: of a whole generation's wall time, the mean over the ranks. `same_texts`: of the single process's.
    """

    name: str
    sizes: Sizes
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    tokens_per_s: float
    prefill_ratio: float
    decode_ratio: float
    ratio: float
    in_collectives: float
    same_texts: int
    raw: list[tuple[float, float, float]]


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Of the communication of all ranks: `in_flight_s` until it was waited for, of which `exposed_s` nothing was computed."""

    micro_batches: int
    in_flight_s: float
    exposed_s: float

    @property
    def share(self) -> float:
        return 1.0 - self.exposed_s / self.in_flight_s if self.in_flight_s else 0.0


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: a text is not the single's."""
    options = _parse(argv)
    if options.device == "cuda":
        return _run_on_gpus(options, argv)
    settings = {name: getattr(options, name) for name in ("requests", "prompt_tokens", "new_tokens", "repeats", "seed")}
    report = provenance(["baton", "bench", "ranks", *argv]) | {"settings": settings}
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        num_parameters = write_checkpoint(folder, options.shape, options.seed)
        report["model"] = {"name": options.shape, "num_parameters": num_parameters, "config": SHAPES[options.shape]}
        load = Load(
            folder=folder,
            prompts=options.requests,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            max_batched_tokens=options.max_batched_tokens,
        )
        vocab_size = SHAPES[options.shape]["vocab_size"]
        prompts = random_prompts(options.requests, options.prompt_tokens, vocab_size, options.seed)
        units = [
            Sizes(tp=tp, dp=dp, transport=transport, micro_batches=number)
            for transport in options.collectives
            for tp, dp in options.ranks
            for number in options.microbatches
        ]
        figures = measure([Sizes(threads=options.threads), *units], load, prompts, options.repeats)
        report["results"] = [asdict(figure) for figure in figures]
        print(table(figures, len(prompts)), file=sys.stderr)
        if options.timeline is not None:
            hidden = trace(units[0], load, prompts, options.timeline)
            report["hidden"] = [asdict(each) | {"share": each.share} for each in hidden]
            print(hidden_table(units[0], hidden), file=sys.stderr)
    write_report(report, options.out)
    return 0 if all(figure.same_texts == len(prompts) for figure in figures) else 1


def _run_on_gpus(options: argparse.Namespace, argv: Sequence[str]) -> int:
    if torch.cuda.device_count() < _NUM_GPUS:
        raise ConfigError(
            f"--device cuda measures {_NUM_GPUS} GPUs of this host, and torch finds {torch.cuda.device_count()}; leave the option out for CPUs"
        )
    free_sms = sorted({number for number in options.free_sms if number})
    setup = Setup(
        shape=options.shape,
        num_ranks=_NUM_GPUS,
        prompts=options.requests,
        prompt_tokens=options.prompt_tokens,
        rows=options.rows,
        context=options.context,
        steps=options.new_tokens - 1,
        free_sms=tuple(free_sms),
        seed=options.seed,
    )
    report = provenance(["baton", "bench", "ranks", *argv])
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        report |= measure_gpus(
            setup,
            ways_of(options.step_tokens, options.microbatches, options.free_sms, local=options.local),
            decodes_of(options.through, options.microbatches),
            repeats=options.repeats,
            profiles=options.profiles,
            scratch=Path(scratch),
            trace=options.timeline,
            told=lambda text: print(text, file=sys.stderr, flush=True),
        )
    print(gpu_table(report), file=sys.stderr)
    write_report(report, options.out)
    return 0


def measure(sizes: Sequence[Sizes], load: Load, prompts: Sequence[Sequence[int]], repeats: int) -> list[Figure]:
    """Of all in turns; the first is what the others are compared with. Raises BatonError."""
    with ExitStack() as stack:
        units = [stack.enter_context(Unit(each, load, _own_folder(load, index))) for index, each in enumerate(sizes)]
        prefills: list[list[float]] = [[] for _ in units]
        wholes: list[list[Generation]] = [[] for _ in units]
        for _ in range(repeats):
            for unit, prefill, whole in zip(units, prefills, wholes, strict=True):
                time.sleep(_PAUSE_S)
                unit.generate(prompts, 1)
                prefill.append(unit.generate(prompts, 1).seconds)
                whole.append(unit.generate(prompts, load.new_tokens))
        for unit in units:
            unit.close()
    figures: list[Figure] = []
    for each, prefill, whole in zip(sizes, prefills, wholes, strict=True):
        figures.append(_figure(each, load, prefill, whole, wholes[0][0].texts, figures[0] if figures else None))
    return figures


def trace(sizes: Sizes, load: Load, prompts: Sequence[Sequence[int]], out: Path) -> list[Hidden]:
    """Of one micro-batch and of two, whose trace goes to `out`."""
    hidden: list[Hidden] = []
    for number in (1, 2):
        traced = replace(sizes, micro_batches=number, traced=True)
        with Unit(traced, load, _own_folder(load, f"trace-{number}")) as unit:
            unit.generate(prompts, min(_TRACED_TOKENS, load.new_tokens))
            traces = unit.close()
        hidden.append(
            Hidden(
                micro_batches=number,
                in_flight_s=sum(rank.in_flight_s for rank in traces),
                exposed_s=sum(rank.exposed_s for rank in traces),
            )
        )
    out.write_text(json.dumps({"traceEvents": merged(traces), "otherData": {"hidden": hidden[-1].share}}))
    return hidden


def merged(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Events of all ranks on one clock, microseconds since the first rank began to note them."""
    first_s = min(rank.begin_s for rank in traces)
    return [event | {"ts": event["ts"] + 1e6 * (rank.begin_s - first_s)} for rank in traces for event in rank.events]


def table(figures: Sequence[Figure], num_prompts: int) -> str:
    """A line each."""
    width = max(len(figure.name) for figure in figures)
    return "\n".join(
        f"{figure.name:<{width}}  decode {figure.decode_tokens_per_s:7.0f} tok/s ({figure.decode_ratio:.2f})  "
        f"prefill {figure.prefill_tokens_per_s:7.0f} ({figure.prefill_ratio:.2f})  all {figure.tokens_per_s:7.0f} ({figure.ratio:.2f})  "
        f"{figure.in_collectives:4.0%} in collectives  {figure.same_texts} of {num_prompts} texts the same"
        for figure in figures
    )


def hidden_table(sizes: Sizes, hidden: Sequence[Hidden]) -> str:
    """A line each."""
    return "\n".join(
        f"{sizes.name}, {each.micro_batches} micro-batch{'es' if each.micro_batches > 1 else ''}: {each.share:.0%} of the communication "
        f"hidden, {1e3 * each.exposed_s:.0f} of {1e3 * each.in_flight_s:.0f} ms exposed over all ranks"
        for each in hidden
    )


def _figure(
    sizes: Sizes,
    load: Load,
    prefill_s: Sequence[float],
    wholes: Sequence[Generation],
    expected: Sequence[Sequence[int]],
    single: Figure | None,
) -> Figure:
    raw = [
        (
            load.prompts * load.prompt_tokens / seconds,
            whole.decode_tokens_per_s,
            load.prompts * load.new_tokens / whole.seconds,
        )
        for seconds, whole in zip(prefill_s, wholes, strict=True)
    ]
    prefill, decode, overall = (statistics.median(figures) for figures in zip(*raw, strict=True))
    if not decode:
        raise ConfigError(f"at no time were all {load.prompts} texts being decoded; raise --new-tokens")
    return Figure(
        name=sizes.name,
        sizes=sizes,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        tokens_per_s=overall,
        prefill_ratio=prefill / single.prefill_tokens_per_s if single else 1.0,
        decode_ratio=decode / single.decode_tokens_per_s if single else 1.0,
        ratio=overall / single.tokens_per_s if single else 1.0,
        in_collectives=statistics.median(statistics.mean(whole.in_collectives) for whole in wholes),
        same_texts=min(same_texts(whole.texts, expected) for whole in wholes),
        raw=raw,
    )


def same_texts(texts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    """How many are equal, token by token."""
    return sum(list(mine) == list(theirs) for mine, theirs in zip(texts, expected, strict=True))


def _own_folder(load: Load, name: object) -> Path:
    """Of one unit: its name is new on this host, as that of what its ranks share has to be."""
    folder = load.folder.parent / f"{load.folder.parent.name}-{name}"
    folder.mkdir()
    return folder


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="baton bench ranks", description="A unit of processes beside one process.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="a built-in model, random weights; if not given cpu-34m, on GPUs slice"
    )
    parser.add_argument(
        "--ranks", type=_sizes, default=[(1, 4), (2, 2)], metavar="TPxDP,...", help="units; EP is all their ranks"
    )
    parser.add_argument(
        "--collectives", type=_transports, default=list(TRANSPORTS), metavar="NAME,...", help=", ".join(TRANSPORTS)
    )
    parser.add_argument(
        "--microbatches", type=_microbatches, metavar="N,...", help="1, 2 or both, as on GPUs if not given"
    )
    parser.add_argument("--timeline", type=Path, help="write a Chrome trace of the first unit, with two micro-batches")
    parser.add_argument(
        "--threads", type=count, default=psutil.cpu_count(logical=False) or 1, help="of the single process"
    )
    parser.add_argument("--requests", type=count, help="sequences at once; if not given 64, on GPUs 32")
    parser.add_argument("--prompt-tokens", type=count, help="if not given 64, on GPUs 2048")
    parser.add_argument("--new-tokens", type=count, default=65)
    parser.add_argument("--max-batched-tokens", type=count, default=256, help="prefill tokens of a DP group's step")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    gpus = parser.add_argument_group("with --device cuda")
    gpus.add_argument(
        "--step-tokens", type=counts, default=[8192, 16384], help="of a rank's prefill step, comma-separated"
    )
    gpus.add_argument(
        "--free-sms",
        type=_numbers,
        default=[0, 8, 16],
        metavar="N,...",
        help="SMs that two micro-batches leave to NCCL",
    )
    gpus.add_argument("--profiles", type=count, default=5, help="of each way, for what is hidden")
    gpus.add_argument(
        "--local", action="store_true", help="also with rows copied on the rank instead of sent: what sending costs"
    )
    gpus.add_argument("--rows", type=count, default=64, help="sequences that decode")
    gpus.add_argument("--context", type=count, default=4096, help="tokens before them")
    gpus.add_argument(
        "--through",
        type=_ways_through,
        default=list(_THROUGH),
        metavar="NAME,...",
        help=f"of decode steps: {', '.join(_THROUGH)}",
    )
    options = parser.parse_args(argv)
    defaults = _GPU_DEFAULTS if options.device == "cuda" else _CPU_DEFAULTS
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _ways_through(text: str) -> list[str]:
    names = text.split(",")
    if set(names) - set(_THROUGH):
        raise argparse.ArgumentTypeError(f"{text}: known are {', '.join(_THROUGH)}")
    return names


def _numbers(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text} are no numbers of SMs; give N,..., 0 for none")
    return [int(number) for number in numbers]


def _sizes(text: str) -> list[tuple[int, int]]:
    found = [part.split("x") for part in text.split(",")]
    if any(len(numbers) != 2 or not all(number.isdigit() and int(number) for number in numbers) for numbers in found):
        raise argparse.ArgumentTypeError(f"{text} are no sizes; give TPxDP, as 1x4,2x2")
    return [(int(tp), int(dp)) for tp, dp in found]


def _microbatches(text: str) -> list[int]:
    numbers = counts(text)
    if max(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text}: a step is computed in 1 or 2 micro-batches")
    return numbers


def _transports(text: str) -> list[str]:
    names = text.split(",")
    if set(names) - set(TRANSPORTS):
        raise argparse.ArgumentTypeError(f"{text}: known are {', '.join(TRANSPORTS)}")
    return names
