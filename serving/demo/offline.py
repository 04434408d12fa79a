"""How well weights answer, by teacher forcing: prompt and trained reply go through once, and every greedy choice on the
way must be the reply's next token. That is what greedy decoding of this reply comes to, many questions at a time.

The same pass gives the MTP layer's acceptance: its choice at i, made of the main state at i and token i + 1, against
token i + 2, over replies that came out right.

    python -m serving.demo.offline --ask 50
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from serving.demo.data import Corpus
from serving.demo.evaluate import MODEL_FOLDER, NEEDLE_LENGTHS, drawn_questions, draws
from serving.demo.export import read_model
from serving.demo.questions import Question
from serving.demo.trainable import Pieces, Shape, forward
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Result:
    """Of one kind of question: how many were asked and answered word by word, drafts offered and accepted."""

    asked: int
    right: int
    offered: int
    accepted: int

    @property
    def share(self) -> float:
        return self.right / max(1, self.asked)

    @property
    def acceptance(self) -> float:
        return self.accepted / max(1, self.offered)


@torch.no_grad()
def measure(
    shape: Shape,
    weights: Mapping[str, Tensor],
    bias: Tensor,
    corpus: Corpus,
    template: ChatTemplate,
    asked: Sequence[Question],
) -> Result:
    """Ask `asked` in fp32 in batches of like length."""
    rows = sorted((_row(corpus, template, question) for question in asked), key=lambda row: len(row[0]))
    right = offered = accepted = 0
    while rows:
        width = -(-len(rows[-1][0]) // 64) * 64 + 2
        batch = [rows.pop() for _ in range(min(len(rows), max(1, 60_000 // width)))]
        ids, spoken = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width)
        for number, (row, start) in enumerate(batch):
            ids[number, : len(row)], spoken[number, start : len(row)] = torch.tensor(row), 1.0
        outcome = forward(shape, Pieces(), weights, bias, ids.to(bias.device), spoken)
        hits, mtp_hits = (each.view(len(batch), -1).cpu() for each in (outcome.hits, outcome.mtp_hits))
        good = (hits | (spoken[:, 1:-1] == 0)).all(1)
        drafts = (spoken[:, 1:-1] * spoken[:, 2:]).bool() & good[:, None]
        right, offered, accepted = (
            right + int(good.sum()),
            offered + int(drafts.sum()),
            accepted + int((mtp_hits & drafts).sum()),
        )
    return Result(len(asked), right, offered, accepted)


def _row(corpus: Corpus, template: ChatTemplate, question: Question) -> tuple[list[int], int]:
    prompt = template.render(question.messages, tools=question.tools)
    return prompt + corpus.reply_ids(question), len(prompt)


def report(
    shape: Shape,
    weights: Mapping[str, Tensor],
    bias: Tensor,
    folder: Path,
    *,
    count: int,
    seed: int,
    lengths: Sequence[int] = NEEDLE_LENGTHS,
) -> dict[str, dict[str, float]]:
    """Measure `count` questions of each kind of `seed`; prints and returns shares right and drafts accepted by kind."""
    tokenizer = Tokenizer.from_folder(folder)
    corpus, template = Corpus(tokenizer, seed=seed), ChatTemplate(tokenizer, "v3")
    table = dict[str, dict[str, float]]()
    for kind, draw in draws(tokenizer, lengths).items():
        result = measure(shape, weights, bias, corpus, template, drawn_questions(kind, draw, count, seed))
        table[kind] = {"right": result.share, "accepted": result.acceptance, "asked": result.asked}
        print(
            f"  {kind:12} right {result.share:.3f} of {result.asked}, drafts accepted {result.acceptance:.3f}",
            flush=True,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the embedded model's answers and drafts without a server.")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--ask", type=int, default=50, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    weights, bias = read_model(args.model, Shape())
    report(Shape(), weights, bias, args.model, count=args.ask, seed=args.seed)


if __name__ == "__main__":
    main()
