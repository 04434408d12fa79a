"""`baton bench ask`: how often the embedded model answers right through the whole path, at temperature 0.

    questions of a seed that training never drew -> /v1/chat/completions, several at once -> share right by kind, needles also by depth

A wrong hand-off is a wrong answer, so this is a test of the server as much as of the model. Needles lie at even distances from
the beginning of the text (0 %) to its end (100 %).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from openai import OpenAI, OpenAIError

from serving.bench.options import count, counts
from serving.bench.report import provenance, write_report
from serving.cluster.preflight import resolve_model_dir
from serving.cluster.served import ServedProcess
from serving.core.config import Config
from serving.core.errors import BatonError
from serving.demo import questions
from serving.demo.evaluate import by_http, drawn_questions, draws, evaluate
from serving.demo.questions import Question
from serving.text.tokenizer import Tokenizer

GATE = 0.95
_GATED = ("needle", "addition")
_KINDS = ("addition", "repeat", "reverse", "greeting", "tool call", "tool answer")
_DECILES = 10
_NUM_SHOWN = 5


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: below the gate."""
    options, server_arguments = _parse(argv)
    report = provenance(["baton", "bench", "ask", *argv])
    results = []
    with _server(options.url, server_arguments) as url:
        for kind, asked in _questions(options):
            results.append(_ask(url, kind, asked, options.parallel))
            print(_line(results[-1]), file=sys.stderr, flush=True)
    worst = min(result["share"] for result in results if result["kind"].startswith(_GATED))
    settings = {name: getattr(options, name) for name in ("ask", "lengths", "kinds", "seed", "parallel")}
    report |= {"settings": settings, "results": results, "gate": GATE, "passed": worst >= GATE}
    write_report(report, options.out)
    return 0 if report["passed"] else 1


def _questions(options: argparse.Namespace) -> Iterator[tuple[str, list[Question]]]:
    """Shortest first."""
    tokenizer = Tokenizer.from_folder(resolve_model_dir(Config()))
    kinds = draws(tokenizer, ())
    for kind in options.kinds:
        yield kind, drawn_questions(kind, kinds[kind], options.ask, options.seed)
    for length in options.lengths:
        yield f"needle {length}", _needles(tokenizer, length, options.ask, options.seed)


def _needles(tokenizer: Tokenizer, length: int, number: int, seed: int) -> list[Question]:
    """In the order of their depth."""
    rng = Random(f"ask/{seed}/needle {length}")
    depths = [index / max(1, number - 1) for index in range(number)]
    return [questions.needle(rng, length, depth, lambda text: len(tokenizer.encode_text(text))) for depth in depths]


def _ask(url: str, kind: str, asked: Sequence[Question], parallel: int) -> dict[str, Any]:
    """Shares right, tokens and seconds of one kind."""
    answer = by_http(url, _model(url))
    begin_s = time.perf_counter()
    score = evaluate(answer, asked, parallel=parallel)
    seconds = time.perf_counter() - begin_s
    wrong = {id(question): reply for question, reply in score.wrong}
    result: dict[str, Any] = {"kind": kind, "asked": score.asked, "share": score.share, "seconds": seconds}
    if kind.startswith("needle"):
        right = [id(question) not in wrong for question in asked]
        cuts = [len(asked) * decile // _DECILES for decile in range(_DECILES + 1)]
        parts = [right[low:high] for low, high in itertools.pairwise(cuts)]
        result["share_by_depth_decile"] = [sum(part) / len(part) if part else None for part in parts]
    shown = [
        {"wanted": question.needed or repr(question.reply.tool_calls), "got": reply.content or repr(reply.calls)}
        for question, reply in score.wrong[:_NUM_SHOWN]
    ]
    return result | {"wrong": shown}


def _model(url: str) -> str:
    try:
        return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).models.list().data[0].id
    except OpenAIError as error:
        raise BatonError(f"{url} does not answer: {error}; give the --url of a server, or none to start one") from error


@contextlib.contextmanager
def _server(url: str | None, arguments: Sequence[str]) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with ServedProcess(arguments) as server:
        yield server.url


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="baton bench ask", description="The embedded model's answers. Other options go to `baton serve`."
    )
    parser.add_argument("--url", help="of a running server; without it, one is started")
    parser.add_argument("--ask", type=count, default=200, help="questions of each kind")
    parser.add_argument("--lengths", type=counts, default=[256, 1024, 4096], help="of needles' texts in tokens")
    parser.add_argument("--kinds", nargs="*", choices=_KINDS, default=list(_KINDS), help="other kinds of questions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parallel", type=count, default=4, help="questions at once")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    return parser.parse_known_args(argv)


def _line(result: dict[str, Any]) -> str:
    depths = result.get("share_by_depth_decile", ())
    by_depth = "  by depth " + " ".join("  -" if share is None else f"{share:4.0%}" for share in depths)
    text = f"{result['kind']:<12}{result['share']:7.1%} of {result['asked']} in {result['seconds']:.1f} s"
    return text + (by_depth if depths else "")
