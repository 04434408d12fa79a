"""`baton bench served`: what HTTP, router, two workers and the hand-off between them cost over the engine alone.

    same checkpoint, threads and settings:   engine alone (one process)   |   `baton serve` (router, prefill, decode, Ray)

Both are loaded and take turns, wave by wave, each wave with prompts that neither has seen; all streams of a wave are asked
at once. Overhead = 1 - served / engine, of the decode rate and of the rate over whole waves; the larger one is judged.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serving.bench.alone import EngineAlone
from serving.bench.options import count, counts
from serving.bench.report import provenance, write_report
from serving.bench.shapes import SHAPES, random_prompts, write_checkpoint
from serving.bench.streams import Rates, Stream, ask_all, rates
from serving.bench.usage import cpu_between, cpu_seconds
from serving.cluster.placement import num_threads
from serving.cluster.served import ServedProcess
from serving.core.config import Config, load_config
from serving.demo import vocabulary
from serving.text.tokenizer import Tokenizer

GATE = 0.20
_NAME = "bench"
_NUM_WARM_UP = 2
_PAUSE_S = 0.3
"""Between waves: heartbeats and states of the one before have been sent."""


class Contest:
    """One engine alone and one server, both loaded."""

    def __init__(self, alone: EngineAlone, server: ServedProcess, tokenizer: Tokenizer, new_tokens: int) -> None:
        self._alone = alone
        self._server = server
        self._tokenizer = tokenizer
        self._new_tokens = new_tokens

    def wave_alone(self, prompts: list[list[int]]) -> list[Stream]:
        time.sleep(_PAUSE_S)
        return [
            Stream(
                first_s=answer.first_s,
                last_s=answer.last_s,
                num_tokens=len(answer.token_ids),
                text=self._tokenizer.decode(answer.token_ids),
            )
            for answer in self._alone.generate(prompts, self._new_tokens)
        ]

    def wave_served(self, prompts: list[list[int]]) -> list[Stream]:
        time.sleep(_PAUSE_S)
        fixed = {"model": _NAME, "temperature": 0, "ignore_eos": True, "max_tokens": self._new_tokens}
        return ask_all(self._server.url, [fixed | {"prompt": prompt} for prompt in prompts])

    def run(self, waves: Sequence[list[list[int]]]) -> dict[str, Any]:
        """Result of one shape. CPU shares are of the server's processes and of this client, over its waves only."""
        alone, served = [], []
        pid, used, length_s = self._server.process.pid, dict[str, float](), 0.0
        for prompts in waves:
            alone.append(self.wave_alone(prompts))
            before, begin_s = cpu_seconds([pid, os.getpid()]), time.perf_counter()
            served.append(self.wave_served(prompts))
            length_s += time.perf_counter() - begin_s - _PAUSE_S
            for name, seconds in cpu_between(before, cpu_seconds([pid, os.getpid()])).items():
                used[name] = used.get(name, 0.0) + seconds
        engine_rates, served_rates = rates(alone), rates(served)
        texts = [(a.text, b.text) for pair in zip(alone, served, strict=True) for a, b in zip(*pair, strict=True)]
        return {
            "engine": asdict(engine_rates),
            "served": asdict(served_rates),
            "overhead_decode": 1 - served_rates.decode_tokens_per_s / engine_rates.decode_tokens_per_s,
            "overhead_total": 1 - served_rates.tokens_per_s / engine_rates.tokens_per_s,
            "same_text": sum(a == b for a, b in texts) / len(texts),
            "served_cpu_cores": {name: seconds / length_s for name, seconds in used.items()},
        }


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: over the gate."""
    options = _parse(argv)
    config = load_config(overrides=[*_settings(options), *options.set])
    threads = num_threads(config, "decode", num_cores=len(os.sched_getaffinity(0)), num_workers=2)
    report = provenance(["baton", "bench", "served", *argv])
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        model_dir = Path(scratch)
        num_parameters = write_servable(model_dir, options.shape, options.seed)
        report["model"] = {"name": options.shape, "num_parameters": num_parameters, "config": SHAPES[options.shape]}
        report["settings"] = vars(options) | {"out": None, "threads": threads}
        results = _measure(options, config, model_dir, threads)
    overhead = max(max(result["overhead_decode"], result["overhead_total"]) for result in results)
    report |= {"results": results, "overhead": overhead, "gate": GATE, "passed": overhead <= GATE}
    print(_table(results, overhead), file=sys.stderr)
    write_report(report, options.out)
    return 0 if report["passed"] else 1


def write_servable(folder: Path, shape: str, seed: int) -> int:
    """A checkpoint with a tokenizer that has a text for each of its tokens. Returns the number of parameters."""
    num_parameters = write_checkpoint(folder, shape, seed)
    vocabulary.write(folder, seed=seed, size=SHAPES[shape]["vocab_size"])
    return num_parameters


def _measure(options: argparse.Namespace, config: Config, model_dir: Path, threads: int) -> list[dict[str, Any]]:
    settings = [part for setting in [*_settings(options), *options.set] for part in ("--set", setting)]
    vocab_size = SHAPES[options.shape]["vocab_size"]
    results = []
    with (
        EngineAlone(model_dir, config, threads) as alone,
        ServedProcess(["--model", str(model_dir), *settings]) as server,
    ):
        contest = Contest(alone, server, Tokenizer.from_folder(model_dir), options.new_tokens)
        for num_tokens in options.prompt_tokens:
            waves = [
                random_prompts(options.streams, num_tokens, vocab_size, 1000 * (options.seed + 1) + index)
                for index in range(_NUM_WARM_UP + options.repeats)
            ]
            contest.run(waves[:_NUM_WARM_UP])
            results.append({"prompt_tokens": num_tokens} | contest.run(waves[_NUM_WARM_UP:]))
    return results


def _settings(options: argparse.Namespace) -> list[str]:
    """In force on both sides."""
    pages = options.streams * (2 + (max(options.prompt_tokens) + options.new_tokens) // 64) * 4
    return [
        f"model.name={_NAME}",
        f"model.dtype={options.dtype}",
        f"kv.prefill_pages={pages}",
        f"kv.decode_pages={pages}",
    ]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="baton bench served", description="The served path beside the engine alone.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="cpu-34m", help="a model with random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--streams", type=count, default=8, help="at once")
    parser.add_argument("--prompt-tokens", type=counts, default=[64, 128], help="comma-separated")
    parser.add_argument("--new-tokens", type=count, default=128, help="of every stream; at least 2")
    parser.add_argument("--repeats", type=count, default=7, help="waves of each system and prompt length")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="on both sides")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    options = parser.parse_args(argv)
    if options.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the first token is the prefill's")
    return options


def _table(results: Sequence[dict[str, Any]], overhead: float) -> str:
    head = ("prompt", "system", "decode tok/s", "all tok/s", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms")
    lines = ["".join(f"{name:>14}" for name in head)]
    for result in results:
        for system in ("engine", "served"):
            r = Rates(**result[system])
            times = (r.ttft_p50_s, r.ttft_p99_s, r.tpot_p50_s, r.tpot_p99_s)
            lines.append(
                f"{result['prompt_tokens']:>14}{system:>14}{r.decode_tokens_per_s:>14.1f}{r.tokens_per_s:>14.1f}"
                + "".join(f"{1000 * seconds:>14.2f}" for seconds in times)
            )
        shares = ", ".join(f"{name} {cores:.2f}" for name, cores in result["served_cpu_cores"].items() if cores >= 0.01)
        lines.append(
            f"  overhead: decode {result['overhead_decode']:.1%}, whole waves {result['overhead_total']:.1%}; "
            f"same text {result['same_text']:.0%}; cores in use: {shares}"
        )
    return "\n".join([*lines, f"overhead {overhead:.1%}, at most {GATE:.0%} allowed"])
