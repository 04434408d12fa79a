"""How well weights answer, by teacher forcing: prompt and trained reply go through once, and every greedy choice on the
way must be the reply's next token. That is what greedy decoding of this reply comes to, many questions at a time.

The same pass gives the MTP layer's acceptance: its choice at i, made of the main state at i and token i + 1, against
token i + 2, over replies that came out right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.demo.data import Corpus
from serving.demo.questions import Question
from serving.demo.trainable import Pieces, Shape, forward
from serving.text.template import ChatTemplate


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
