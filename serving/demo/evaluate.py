"""Asks a model the demo's questions and counts right answers.

The model is any function from a question to a reply: `by_ids` makes one of a `generate(prompt ids) -> ids`, `by_http` of
a running server. Questions come from a seed, kind by kind, so two models are asked the same. Needs no torch.

    python -m serving.demo.evaluate --url http://127.0.0.1:8000 --ask 200
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from urllib.request import Request, urlopen

import msgspec

from serving.demo import questions, tools
from serving.demo.questions import Question
from serving.text import markers as m
from serving.text.messages import ToolCall
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer

MODEL_FOLDER = Path(__file__).parent / "model"
NEEDLE_LENGTHS = (256, 1024, 4096)
UNSEEN: dict[str, Callable[[Random], Question]] = {
    "addition": questions.addition,
    "repeat": questions.repeat,
    "reverse": questions.reverse,
}
CALL = re.compile(rf"{m.CALL_BEGIN}function{m.SEP}(\S+)\n```json\n(.*?)\n```{m.CALL_END}", re.DOTALL)

Draw = Callable[[Random], Question]


@dataclass(frozen=True)
class Reply:
    """What a model said: text and tool calls."""

    content: str
    calls: tuple[ToolCall, ...] = ()


Answer = Callable[[Question], Reply]


@dataclass(frozen=True)
class Score:
    """Of one kind of question; `wrong` pairs each question missed with what was said."""

    asked: int
    wrong: tuple[tuple[Question, Reply], ...]

    @property
    def share(self) -> float:
        return 1 - len(self.wrong) / max(1, self.asked)


def draws(tokenizer: Tokenizer, lengths: Sequence[int] = NEEDLE_LENGTHS) -> dict[str, Draw]:
    """Every kind of question that is measured, by name. Needles lie at depths 0, 5, ... 100 %; sums and spelled words are
    held-out ones."""

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode_text(text))

    def needle(length: int) -> Draw:
        return lambda rng: questions.needle(rng, length, rng.randrange(21) / 20, count_tokens)

    kinds: dict[str, Draw] = {f"needle {length}": needle(length) for length in lengths}
    kinds |= {name: unseen(draw) for name, draw in UNSEEN.items()}
    return kinds | {"greeting": questions.greeting, "tool call": tools.tool_call, "tool answer": tools.tool_answer}


def unseen(draw: Draw) -> Draw:
    """`draw`, but only questions that were kept from training."""

    def drawn(rng: Random) -> Question:
        while not questions.held_out(question := draw(rng)):
            pass
        return question

    return drawn


def drawn_questions(kind: str, draw: Draw, count: int, seed: int) -> list[Question]:
    """The first `count` questions of `seed`; training draws from seeds of another name."""
    rng = Random(f"evaluate/{seed}/{kind}")
    return [draw(rng) for _ in range(count)]


def evaluate(answer: Answer, asked: Sequence[Question], *, parallel: int = 1) -> Score:
    """Ask all of `asked`, `parallel` at a time."""
    with ThreadPoolExecutor(parallel) as pool:
        replies = list(pool.map(answer, asked))
    pairs = zip(asked, replies, strict=True)
    return Score(len(asked), tuple((q, reply) for q, reply in pairs if not q.accepts(reply.content, reply.calls)))


def by_ids(tokenizer: Tokenizer, generate: Callable[[list[int]], Sequence[int]]) -> Answer:
    """An answerer out of greedy generation: `generate` takes prompt ids and returns what follows, with or without the end."""
    template = ChatTemplate(tokenizer, "v3")

    def answer(question: Question) -> Reply:
        ids = generate(template.render(question.messages, tools=question.tools))
        text = tokenizer.decode(ids)
        calls = tuple(ToolCall(name, arguments) for name, arguments in CALL.findall(text))
        return Reply(text.split(m.CALLS_BEGIN)[0], calls)

    return answer


def by_http(url: str, model: str, *, timeout_s: float = 300) -> Answer:
    """An answerer over an OpenAI-compatible server at `url`, at temperature 0."""

    def answer(question: Question) -> Reply:
        body: dict[str, object] = {
            "model": model,
            "messages": question.openai_messages(),
            "temperature": 0,
            "max_tokens": 200,
        }
        if question.tools:
            body["tools"] = question.openai_tools()
        message = _post(f"{url}/v1/chat/completions", body, timeout_s)
        return Reply(message.content or "", tuple(call.function for call in message.tool_calls or ()))

    return answer


def report(answer: Answer, kinds: Mapping[str, Draw], *, count: int, seed: int, parallel: int = 1) -> dict[str, float]:
    """Ask `count` questions of each kind, print a line for each and the first mistake; returns the shares answered right."""
    shares = dict[str, float]()
    for kind, draw in kinds.items():
        score = evaluate(answer, drawn_questions(kind, draw, count, seed), parallel=parallel)
        shares[kind] = score.share
        print(f"{kind:12} {score.share:7.2%} of {score.asked}", flush=True)
        for question, reply in score.wrong[:1]:
            print(f"    wanted {question.needed or question.reply.tool_calls!r}, got {reply.content or reply.calls!r}")
    return shares


class _Call(msgspec.Struct):
    function: ToolCall


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Completion(msgspec.Struct):
    choices: list[_Choice]


def _post(url: str, body: object, timeout_s: float) -> _Message:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=timeout_s) as response:
        return msgspec.json.decode(response.read(), type=_Completion).choices[0].message


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a running server the embedded model's questions.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="baton-demo", help="name the server gives the model")
    parser.add_argument("--ask", type=int, default=200, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", help="only these kinds")
    args = parser.parse_args()
    kinds = draws(Tokenizer.from_folder(MODEL_FOLDER))
    chosen = {kind: draw for kind, draw in kinds.items() if not args.kinds or kind in args.kinds}
    report(by_http(args.url, args.model), chosen, count=args.ask, seed=args.seed, parallel=args.parallel)


if __name__ == "__main__":
    main()
