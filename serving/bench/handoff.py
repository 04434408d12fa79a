"""`baton bench handoff`: what it costs to prefill on one device and decode on another, and what it spares those who decode.

    prefill worker --pages--> decode worker      |  one worker of role both, on the first device

Real worker processes, real transfer, real messages; no router, no HTTP and no Ray, so that the differences are the hand-off's.
Prompts asked one at a time, the systems in turns:

    TTFT     asked -> first token          gap     first token -> second          TPOT     per token from the second on

then streams that decode, alone and while another prompt is being prefilled all the time: TPOT of each stream, and every step of all.
With two GPUs prefill has the first and decode the second, as under `baton serve`; on a CPU all share its cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvcache.layout import num_pages_for
from serving.bench.options import count, counts
from serving.bench.report import provenance, write_report
from serving.bench.shapes import SHAPES, random_prompts, write_checkpoint
from serving.bench.streams import percentile
from serving.bench.workers import Answer, Client, Route, WorkerProcess
from serving.cluster.placement import num_threads
from serving.core.config import Config, load_config
from serving.core.errors import ConfigError
from serving.core.spec import WorkerSpec
from serving.model.config import ModelConfig

APART, TOGETHER = "apart", "together"
_NUM_WARM_UP = 2
_WAIT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Single:
    """Prompts one at a time, nothing else running. Medians, in seconds; `stages_s`: what the workers measured of themselves."""

    system: str
    prompt_tokens: int
    ttft_s: float
    gap_s: float
    tpot_s: float
    stages_s: dict[str, float]
    raw_s: list[tuple[float, float, float]]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """`num_streams` that decode; `loaded`: while prompts are prefilled, `num_prefills` in all. TPOT over the streams, steps over all tokens."""

    system: str
    loaded: bool
    num_streams: int
    num_prefills: int
    tpot_p50_s: float
    tpot_p99_s: float
    step_p50_s: float
    step_p99_s: float
    prefill_ttft_p50_s: float | None
    prefill_gap_p50_s: float | None


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A figure against what is asked for on two GPUs with prompts of 4096 tokens of `lite`."""

    what: str
    figure: float
    gate: float
    goal: float


class Contest:
    """Both systems, loaded; `routes` by name."""

    def __init__(self, client: Client, routes: dict[str, Route], vocab_size: int, seed: int) -> None:
        self._client = client
        self._routes = routes
        self._vocab_size = vocab_size
        self._seed = seed
        self._num_drawn = 0

    def single(self, prompt_tokens: int, new_tokens: int, repeats: int) -> tuple[list[Single], float]:
        """Each prompt goes to every system in turn. Also the share of prompts for which all wrote the same."""
        answers: dict[str, list[Answer]] = {name: [] for name in self._routes}
        for turn in range(_NUM_WARM_UP + repeats):
            prompt = self._prompts(1, prompt_tokens)[0]
            for name, route in self._routes.items():
                answer = self._client.ask(route, prompt, new_tokens)
                self._client.wait(lambda answer=answer: answer.done, _WAIT_S)  # type: ignore[misc]
                if turn >= _NUM_WARM_UP:
                    answers[name].append(answer)
        texts = zip(*([answer.token_ids for answer in each] for each in answers.values()), strict=True)
        same = [all(text == first for text in others) for first, *others in texts]
        return [single_of(name, prompt_tokens, each) for name, each in answers.items()], sum(same) / len(same)

    def streams(
        self, name: str, num_streams: int, prompt_tokens: int, new_tokens: int, load_tokens: int, load_depth: int
    ) -> Streams:
        """`load_depth` prompts of `load_tokens` are asked for at every moment, two tokens each; 0: none."""
        route = self._routes[name]
        streams = [self._client.ask(route, prompt, new_tokens) for prompt in self._prompts(num_streams, prompt_tokens)]
        self._client.wait(lambda: all(len(stream.token_ids) > 1 for stream in streams), _WAIT_S)
        first = max(len(stream.token_ids) for stream in streams) + 1
        load: list[Answer] = []

        def keep_up() -> bool:
            for _ in range(load_depth - sum(not answer.done for answer in load)):
                load.append(self._client.ask(route, self._prompts(1, load_tokens)[0], 2))
            return all(stream.done for stream in streams)

        self._client.wait(keep_up, _WAIT_S)
        finished = [answer for answer in load if answer.done]
        self._client.wait(lambda: all(answer.done for answer in load), _WAIT_S)
        return streams_of(name, streams, finished, first, loaded=load_depth > 0)

    def _prompts(self, number: int, num_tokens: int) -> list[list[int]]:
        """Never the same twice."""
        self._num_drawn += 1
        return random_prompts(number, num_tokens, self._vocab_size, self._seed * 1_000_003 + self._num_drawn)


def single_of(name: str, prompt_tokens: int, answers: Sequence[Answer]) -> Single:
    raw = [(answer.ttft_s, answer.gap_s, answer.tpot_s()) for answer in answers]
    ttft_s, gap_s, tpot_s = (statistics.median(column) for column in zip(*raw, strict=True))
    stages = {stage: statistics.median(a.stages[stage] for a in answers) for stage in answers[0].stages}
    return Single(
        system=name,
        prompt_tokens=prompt_tokens,
        ttft_s=ttft_s,
        gap_s=gap_s,
        tpot_s=tpot_s,
        stages_s=stages,
        raw_s=raw,
    )


def streams_of(name: str, streams: Sequence[Answer], load: Sequence[Answer], first: int, *, loaded: bool) -> Streams:
    """Tokens after token `first` count: the load is there by then. Raises ConfigError if hardly any are left."""
    if min(len(stream.times_s) for stream in streams) < first + 3 or (loaded and not load):
        raise ConfigError("the streams ended too soon to see a prefill beside them; raise --stream-tokens")
    tpots = [stream.tpot_s(first) for stream in streams]
    steps = [step_s for stream in streams for step_s in stream.steps_s(first)]
    return Streams(
        system=name,
        loaded=loaded,
        num_streams=len(streams),
        num_prefills=len(load),
        tpot_p50_s=percentile(tpots, 50),
        tpot_p99_s=percentile(tpots, 99),
        step_p50_s=percentile(steps, 50),
        step_p99_s=percentile(steps, 99),
        prefill_ttft_p50_s=percentile([answer.ttft_s for answer in load], 50) if load else None,
        prefill_gap_p50_s=percentile([answer.gap_s for answer in load], 50) if load else None,
    )


def limits(singles: Sequence[Single], streams: Sequence[Streams]) -> list[Limit]:
    """Of the first two singles: both systems at one length."""
    single = {figure.system: figure for figure in singles[:2]}
    alone = {figure.system: figure for figure in streams if not figure.loaded}
    loaded = {figure.system: figure for figure in streams if figure.loaded}
    apart, together = single[APART], single[TOGETHER]
    ratios = {name: loaded[name].tpot_p99_s / alone[name].tpot_p50_s for name in loaded}
    none = float("inf")
    return [
        Limit(what="TTFT over together, ms", figure=1e3 * (apart.ttft_s - together.ttft_s), gate=2, goal=1),
        Limit(what="first to second token over TPOT, ms", figure=1e3 * (apart.gap_s - apart.tpot_s), gate=5, goal=3),
        Limit(what="TPOT p99 while prefills run / TPOT alone", figure=ratios[APART], gate=1.15, goal=1.05),
        Limit(what="the same, together", figure=ratios[TOGETHER], gate=none, goal=none),
    ]


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: over a gate, on two GPUs."""
    options = _parse(argv)
    gpus = _num_gpus(options.device)
    report = provenance(["baton", "bench", "handoff", *argv])
    with ExitStack() as stack:
        model_dir = options.model or _checkpoint(options, stack)
        model = ModelConfig.from_folder(model_dir)
        config = load_config(overrides=[*_settings(options, model), *options.set])
        report |= {"model": {"name": options.model.name if options.model else options.shape, "config": asdict(model)}}
        unsaid = ("out", "model", "shape") if options.model else ("out", "model")
        report["settings"] = {key: value for key, value in vars(options).items() if key not in unsaid}
        client, routes = _start(config, model_dir, gpus, stack)
        contest = Contest(client, routes, model.vocab_size, options.seed)
        singles: list[Single] = []
        same: dict[int, float] = {}
        for prompt_tokens in options.prompt_tokens:
            measured, same[prompt_tokens] = contest.single(prompt_tokens, options.new_tokens, options.repeats)
            singles += measured
        sizes = (options.streams, options.stream_prompt_tokens, options.stream_tokens, options.prompt_tokens[0])
        figures = [contest.streams(name, *sizes, depth) for name in routes for depth in (0, options.load_depth)]
    judged = limits(singles, figures)
    passed = gpus < 2 or all(limit.figure <= limit.gate for limit in judged)
    report |= {"gpus": gpus, "single": [asdict(s) for s in singles], "streams": [asdict(f) for f in figures]}
    report |= {"same_text": same, "limits": [_plain(limit) for limit in judged], "passed": passed}
    print(_table(singles, figures, judged, same), file=sys.stderr)
    write_report(report, options.out)
    return 0 if passed else 1


def _start(config: Config, model_dir: Path, gpus: int, stack: ExitStack) -> tuple[Client, dict[str, Route]]:
    """All workers load at once."""
    secret = secrets.token_bytes(32)
    placed = {"prefill": 0, "decode": min(1, gpus - 1), "both": 0}
    workers = {}
    for role, gpu in placed.items():
        spec = WorkerSpec(
            worker_id=f"{role}-0",
            role=role,
            incarnation=1,
            host="127.0.0.1",
            secret=secret,
            model_dir=str(model_dir),
            num_threads=num_threads(config, role, num_cores=len(os.sched_getaffinity(0)), num_workers=2),
            config=_mode(config, role),
            gpu_share=1 / list(placed.values()).count(gpu),
        )
        workers[role] = stack.enter_context(WorkerProcess(spec, gpu=gpu if gpus else None))
    routes = {
        APART: Route(prefill=workers["prefill"].address, decode=workers["decode"].address),
        TOGETHER: Route(prefill=workers["both"].address, decode=None),
    }
    client = Client(secret, list(routes.values()))
    stack.callback(client.close)
    return client, routes


def _mode(config: Config, role: str) -> Config:
    return dataclasses.replace(
        config, engine=dataclasses.replace(config.engine, mode="both" if role == "both" else "disaggregated")
    )


def _num_gpus(device: str) -> int:
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count()


def _checkpoint(options: argparse.Namespace, stack: ExitStack) -> Path:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))
    write_checkpoint(folder, options.shape, options.seed)
    return folder


def _settings(options: argparse.Namespace, model: ModelConfig) -> list[str]:
    """Pages and slots for what is measured, and no more; nothing is cached, so that every prompt is computed and sent."""
    longest = max(options.prompt_tokens) + options.new_tokens
    stream = options.stream_prompt_tokens + options.stream_tokens
    if max(longest, stream) > model.max_position_embeddings:
        raise ConfigError(
            f"{max(longest, stream)} tokens are more than the model's limit of {model.max_position_embeddings}"
        )
    slots = options.streams + options.load_depth + 2
    pages = options.streams * num_pages_for(stream) + (options.load_depth + 2) * num_pages_for(longest)
    return [
        f"model.device={options.device}",
        f"model.dtype={options.dtype}",
        f"model.max_model_len={max(longest, stream)}",
        f"prefill.max_num_seqs={slots}",
        f"decode.max_num_seqs={slots}",
        f"kv.prefill_pages={pages}",
        f"kv.decode_pages={pages}",
        "kv.prefix_cache=false",
        f"kv.expected_new_tokens={max(options.stream_tokens, options.new_tokens)}",
        "telemetry.log_level=warning",
    ]


def _plain(limit: Limit) -> dict[str, Any]:
    """JSON has no infinity."""
    return {key: None if value == float("inf") else value for key, value in asdict(limit).items()}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="baton bench handoff", description="Prefill and decode apart, beside together."
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--shape", choices=sorted(SHAPES), default="cpu-34m", help="a built-in model with random weights"
    )
    model.add_argument("--model", type=Path, help="a Hugging Face folder instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument(
        "--prompt-tokens",
        type=counts,
        default=[4096],
        help="of the prompts asked one at a time, comma-separated; the first is what the limits are for, and the load's",
    )
    parser.add_argument("--new-tokens", type=count, default=33, help="of each; at least 3")
    parser.add_argument("--repeats", type=count, default=9, help="prompts to each system")
    parser.add_argument("--streams", type=count, default=16, help="that decode at once")
    parser.add_argument("--stream-prompt-tokens", type=count, default=512)
    parser.add_argument("--stream-tokens", type=count, default=256, help="new tokens of each stream")
    parser.add_argument(
        "--load-depth", type=count, default=2, help="prompts that wait or are prefilled at every moment"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="for every worker")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    options = parser.parse_args(argv)
    if options.new_tokens < 3:
        parser.error("--new-tokens must be at least 3: a time per token needs two after the first")
    return options


def _table(
    singles: Sequence[Single], figures: Sequence[Streams], judged: Sequence[Limit], same: dict[int, float]
) -> str:
    lines = [f"{'one prompt at a time':<22}{'tokens':>6}{'TTFT ms':>10}{'gap ms':>10}{'TPOT ms':>10}   stages ms"]
    for single in singles:
        stages = ", ".join(f"{stage} {1e3 * seconds:.2f}" for stage, seconds in single.stages_s.items())
        times = "".join(f"{1e3 * seconds:>10.2f}" for seconds in (single.ttft_s, single.gap_s, single.tpot_s))
        lines.append(f"{single.system:<22}{single.prompt_tokens:>6}{times}   {stages}")
    lines.append(
        f"{'streams':<16}{'prefills':>8}{'TPOT p50':>10}{'p99':>10}{'step p50':>10}{'p99 ms':>10}   TTFT, gap of the prefills"
    )
    for f in figures:
        times = "".join(f"{1e3 * s:>10.2f}" for s in (f.tpot_p50_s, f.tpot_p99_s, f.step_p50_s, f.step_p99_s))
        load = [f"{1e3 * s:.1f}" for s in (f.prefill_ttft_p50_s, f.prefill_gap_p50_s) if s is not None]
        lines.append(f"{f.system:<16}{f.num_prefills:>8}{times}   {', '.join(load)}")
    lines += [f"{limit.what:<44}{limit.figure:>8.3f}   gate {limit.gate:g}, goal {limit.goal:g}" for limit in judged]
    texts = ", ".join(f"{share:.0%} of those of {num_tokens}" for num_tokens, share in same.items())
    return "\n".join([*lines, f"same text: {texts}"])
