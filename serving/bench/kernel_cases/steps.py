"""Cases of the ends of a step: from logits to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from serving.bench.kernel_cases.stage import Call, Stage, Work, sets_for
from serving.kernels.sampling import argmax, sample


def greedy(stage: Stage, *, rows: int, vocab: int) -> Work:
    logits = [stage.randn(rows, vocab, dtype=torch.float32) for _ in range(sets_for(4 * rows * vocab))]
    peers: dict[str, Call] = {"torch": lambda i: logits[i].argmax(dim=-1)}
    return Work(
        own=lambda i: argmax(logits[i]), peers=peers, num_sets=len(logits), amount=4 * rows * vocab, bound="copy"
    )


def drawn(stage: Stage, *, rows: int, vocab: int) -> Work:
    logits = [stage.randn(rows, vocab, dtype=torch.float32) for _ in range(sets_for(4 * rows * vocab))]
    warm = torch.full((rows,), 0.7, dtype=torch.float64, device=stage.device)
    seeds, positions = stage.randint(1 << 40, rows), stage.randint(1 << 17, rows)

    def own(i: int) -> Tensor:
        return sample(logits[i], warm, seeds, positions)

    return Work(own=own, num_sets=len(logits), amount=4 * rows * vocab, bound="copy")
