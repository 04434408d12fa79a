"""`baton bench drafts`: the embedded model's answers with drafts of its MTP layer and without, in the engine alone.

    questions of a seed that training never drew -> waves of 1 and of 8 answers, each to its end -> tokens a second

Without drafts, with 1, 2 and 3 a step, and with as many as the engine chooses, in turn, so that a change of the machine's
speed meets all alike. "decode" leaves out the time until every answer of a wave has its first token. The model's answers
are so regular that most drafts are accepted: the figures say what drafting costs, not what it brings to another model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.bench.options import count, counts
from serving.bench.report import provenance, write_report
from serving.core.collector import passing_over_what_is_loaded
from serving.core.config import MOST_DRAFTS
from serving.core.request import SamplingParams
from serving.core.request import Sequence as Job
from serving.demo.evaluate import MODEL_FOLDER, drawn_questions, draws
from serving.engine.build import Engine, build_engine
from serving.engine.drafting import Drafting
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer

GATE, GOAL = 1.2, 1.4
_NEEDLE_TOKENS = 256
_NUM_PAGES = 256
_MOST_NEW_TOKENS = 80
_MODES = ("none", *(str(number) for number in range(1, MOST_DRAFTS + 1)), "chosen")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Medians over the repeats. `accepted`: share of the drafts. `parted`: answers that are not those without drafts."""

    streams: int
    drafts: str
    tokens_per_s: float
    decode_tokens_per_s: float
    times: float
    decode_times: float
    accepted: float | None
    parted: float


class _Always(Drafting):
    """The same number in every step."""

    def __init__(self, number: int) -> None:
        super().__init__(number, lambda num_rows, num_drafts: 1.0)

    def choose(self, num_rows: int, most: int) -> int:
        return self._most


@dataclass(slots=True)
class _Run:
    num_tokens: int = 0
    seconds: float = 0.0
    num_late: int = 0
    late_s: float = 0.0


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: below the gate."""
    options = _parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = provenance(["baton", "bench", "drafts", *argv])
    if torch.cuda.is_available():
        report["machine"]["gpu"] = torch.cuda.get_device_name()
    plain, drafting = _engine(options, "0"), _engine(options, str(MOST_DRAFTS))
    step_ms = {
        number: {rows: 1e3 * drafting.runner.step_s(rows, number) for rows in options.streams}
        for number in range(MOST_DRAFTS + 1)
    }
    figures: list[Figure] = []
    print(_HEADER, file=sys.stderr)
    with passing_over_what_is_loaded():
        for streams in options.streams:
            for figure in _measure(plain, drafting, streams, options):
                figures.append(figure)
                print(_line(figure), file=sys.stderr, flush=True)
    chosen = [figure.times for figure in figures if figure.drafts == "chosen"]
    settings = {name: getattr(options, name) for name in ("device", "dtype", "streams", "ask", "repeats", "seed")}
    report |= {"settings": settings, "step_ms": step_ms, "figures": [asdict(figure) for figure in figures]}
    report |= {"gate": GATE, "goal": GOAL, "passed": min(chosen) >= GATE}
    write_report(report, options.out)
    return 0 if report["passed"] else 1


def _engine(options: argparse.Namespace, draft_tokens: str) -> Engine:
    engine = build_engine(
        MODEL_FOLDER,
        max_num_seqs=max(options.streams),
        num_pages=_NUM_PAGES,
        device=options.device,
        dtype=options.dtype,
        draft_tokens=draft_tokens,
    )
    # As a worker does at its start: a step that is not captured would be launched piece by piece.
    engine.runner.warm_up(max_batched_tokens=engine.max_batched_tokens, decodes=True)
    return engine


def _measure(plain: Engine, drafting: Engine, streams: int, options: argparse.Namespace) -> Iterator[Figure]:
    """Every mode once before the repeats, uncounted; what the engine has learnt of acceptance then, it keeps."""
    waves = list(_waves(streams, options.ask, options.seed))
    drafting_of = {mode: _drafting(mode, drafting) for mode in _MODES}
    runs: dict[str, list[tuple[_Run, list[list[int]], tuple[int, int]]]] = {mode: [] for mode in _MODES}
    for repeat in range(options.repeats + 1):
        for mode in _MODES:
            chosen = drafting_of[mode]
            run, texts = _answer(plain if chosen is None else drafting, chosen, waves)
            counted = chosen.take_counts() if chosen is not None else (0, 0)
            if repeat:
                runs[mode].append((run, texts, counted))
    rates = {
        mode: (
            statistics.median(run.num_tokens / run.seconds for run, *_ in of_mode),
            statistics.median(run.num_late / run.late_s for run, *_ in of_mode),
        )
        for mode, of_mode in runs.items()
    }
    wanted = runs["none"][0][1]
    for mode, (whole, decode) in rates.items():
        _, texts, (num_drafted, num_accepted) = runs[mode][-1]
        yield Figure(
            streams=streams,
            drafts=mode,
            tokens_per_s=whole,
            decode_tokens_per_s=decode,
            times=whole / rates["none"][0],
            decode_times=decode / rates["none"][1],
            accepted=num_accepted / num_drafted if num_drafted else None,
            parted=sum(text != other for text, other in zip(texts, wanted, strict=True)) / len(wanted),
        )


def _drafting(mode: str, engine: Engine) -> Drafting | None:
    if mode == "none":
        return None
    return Drafting(MOST_DRAFTS, engine.runner.step_s) if mode == "chosen" else _Always(int(mode))


def _waves(streams: int, ask: int, seed: int) -> Iterator[list[list[int]]]:
    """Prompts of one kind, so that the answers of a wave are of like length."""
    tokenizer = Tokenizer.from_folder(MODEL_FOLDER)
    template = ChatTemplate(tokenizer, "v3")
    for kind, draw in draws(tokenizer, (_NEEDLE_TOKENS,)).items():
        asked = drawn_questions(kind, draw, max(ask, streams), seed)
        prompts = [template.render(question.messages, tools=question.tools) for question in asked]
        for start in range(0, len(prompts) - streams + 1, streams):
            yield prompts[start : start + streams]


def _answer(
    engine: Engine, drafting: Drafting | None, waves: Sequence[list[list[int]]]
) -> tuple[_Run, list[list[int]]]:
    loop = Aggregated(
        engine.runner,
        KVManager(engine.pool.num_pages, prefix_cache=False),
        num_slots=engine.max_num_seqs,
        max_batched_tokens=engine.max_batched_tokens,
        max_model_len=engine.max_model_len,
        run_ahead=engine.pool.tensor.is_cuda,
        drafting=drafting,
    )
    sampling = SamplingParams(temperature=0.0, stop_token_ids=[Tokenizer.from_folder(MODEL_FOLDER).eos_id])
    run, texts = _Run(), list[list[int]]()
    for wave in waves:
        texts += _wave(loop, wave, sampling, run)
    return run, texts


def _wave(loop: Aggregated, prompts: list[list[int]], sampling: SamplingParams, run: _Run) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in prompts]
    begin_s = time.perf_counter()
    for index, prompt in enumerate(prompts):
        loop.add(
            Job(
                job_id=str(index),
                token_ids=list(prompt),
                num_prompt_tokens=len(prompt),
                sampling=sampling,
                max_new_tokens=_MOST_NEW_TOKENS,
                deadline_s=float("inf"),
            )
        )
    started_s, num_before = 0.0, 0
    while loop.has_work:
        for event in loop.step(0.0).events:
            texts[int(event.sequence.job_id)].append(event.token_id)
        if not started_s and all(texts):
            started_s, num_before = time.perf_counter(), sum(map(len, texts))
    end_s, num_tokens = time.perf_counter(), sum(map(len, texts))
    run.num_tokens += num_tokens
    run.seconds += end_s - begin_s
    run.num_late += num_tokens - num_before
    run.late_s += end_s - started_s
    return texts


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="baton bench drafts", description="The embedded model with drafts and without."
    )
    parser.add_argument("--streams", type=counts, default=[1, 8], help="answers at once, as 1,8")
    parser.add_argument("--ask", type=count, default=8, help="questions of each kind")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=count, help="of a CPU; torch's own choice without it")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    return parser.parse_args(argv)


_HEADER = (
    f"{'streams':>7}{'drafts':>8}{'tok/s':>9}{'times':>7}{'decode tok/s':>14}{'times':>7}{'accepted':>10}{'parted':>8}"
)


def _line(figure: Figure) -> str:
    accepted = "-" if figure.accepted is None else f"{figure.accepted:.1%}"
    return (
        f"{figure.streams:>7}{figure.drafts:>8}{figure.tokens_per_s:>9.0f}{figure.times:>7.2f}"
        f"{figure.decode_tokens_per_s:>14.0f}{figure.decode_times:>7.2f}{accepted:>10}{figure.parted:>8.1%}"
    )
