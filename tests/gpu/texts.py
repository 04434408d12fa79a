"""Texts of two runs of the embedded model beside each other: equal, or parting where two candidates are as good as tied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from serving.core.request import TokenLogprobs
from serving.demo.evaluate import drawn_questions, draws
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "serving" / "demo" / "model"
TIE = 0.05
"""Two candidates so close in the other run's logits are a tie of bf16."""


class Token(Protocol):
    @property
    def token_id(self) -> int: ...

    @property
    def logprobs(self) -> TokenLogprobs | None: ...


def trained_questions(of_each_kind: int) -> list[list[int]]:
    """What the model was trained to answer, in new words: on noise any rounding changes its mind, on a CPU too. Eight kinds."""
    tokenizer = Tokenizer.from_folder(DEMO)
    template = ChatTemplate(tokenizer, "v3")
    asked = [
        question
        for kind, draw in draws(tokenizer, (256, 1024)).items()
        for question in drawn_questions(kind, draw, of_each_kind, seed=3)
    ]
    assert len(asked) == 8 * of_each_kind
    return [template.render(question.messages, tools=question.tools) for question in asked]


def partings(texts: Sequence[Sequence[Token]], others: Sequence[Sequence[Token]]) -> list[float]:
    """Of the texts that part, sorted: how far apart the two candidates are there, in the logits of whichever run has them farther apart."""
    gaps = [_parting(mine, theirs) for mine, theirs in zip(texts, others, strict=True)]
    return sorted(gap for gap in gaps if gap is not None)


def _parting(mine: Sequence[Token], theirs: Sequence[Token]) -> float | None:
    # One ends before the other only where they have parted.
    for a, b in zip(mine, theirs, strict=False):
        if a.token_id != b.token_id:
            return max(_gap(a, b.token_id), _gap(b, a.token_id))
    return None


def _gap(token: Token, other: int) -> float:
    assert token.logprobs is not None
    top = dict(zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True))
    return token.logprobs.logprob - top.get(other, -math.inf)
