"""Cases of the ends of a step: what it picks of its slots, from logits to tokens, and what it leaves for the next."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcache.layout import PAGE_TOKENS
from serving.bench.kernel_cases.stage import HIDDEN, Call, Case, Stage, Work, sets_for
from serving.kernels import draft_rows
from serving.kernels import step_rows as rows_of_steps
from serving.kernels.sampling import argmax, sample, sample_reference


def cases(stage: Stage) -> dict[str, Case]:
    """Pages for 160 K tokens; three drafts."""
    of_slots: dict[str, Any] = {"rows": 64, "num_pages": 2560}
    draw = partial(drawn, stage, rows=64, vocab=129280)
    return {
        "step_rows/64": partial(step_rows, stage, **of_slots),
        "draft_rows/opened/64": partial(opened, stage, hidden=HIDDEN, **of_slots),
        "draft_rows/placed/64": partial(placed, stage, num_tokens=4, **of_slots),
        "draft_rows/accepted/64": partial(accepted, stage, rows=64, num_tokens=4, hidden=HIDDEN),
        "sampling/argmax/64": partial(greedy, stage, rows=64, vocab=129280),
        "sampling/draw/64": draw,
        "sampling/top_k/64": partial(draw, top_k=50),
        "sampling/top_p/64": partial(draw, top_p=0.95),
    }


def step_rows(stage: Stage, *, rows: int, num_pages: int) -> Work:
    num_bytes = rows * (8 * num_pages + 48)
    tables = [_page_table(stage, rows, num_pages) for _ in range(sets_for(num_bytes))]
    slots, positions = stage.permutation(2 * rows)[:rows], stage.randint(num_pages * PAGE_TOKENS, rows)
    row_ids = stage.randint(1 << 20, rows) * PAGE_TOKENS + positions % PAGE_TOKENS
    last_token = stage.randint(129280, 2 * rows)

    def own(i: int) -> Tensor:
        return rows_of_steps.step_rows(tables[i], last_token, slots, positions, row_ids).page_table_BP

    def eager(i: int) -> Tensor:
        return rows_of_steps.step_rows_reference(tables[i], last_token, slots, positions, row_ids).page_table_BP

    return Work(own=own, peers={"torch": eager}, num_sets=len(tables), amount=num_bytes, bound="copy")


def opened(stage: Stage, *, rows: int, num_pages: int, hidden: int) -> Work:
    num_bytes = rows * (8 * num_pages + 4 * hidden + 56)
    tables = [_page_table(stage, rows, num_pages) for _ in range(sets_for(num_bytes))]
    states = [stage.randn(2 * rows, hidden) for _ in tables]
    of_slots = stage.randint(num_pages * PAGE_TOKENS, 2 * rows), stage.randint(129280, 2 * rows)
    slots, known = stage.permutation(2 * rows)[:rows], torch.full((rows,), -1, device=stage.device)
    of_rows = slots, known, stage.randint(num_pages, rows), stage.randint(1 << 20, rows)

    def own(i: int) -> Tensor:
        return draft_rows.opened(tables[i], *of_slots, states[i], *of_rows).page_table_BP

    def eager(i: int) -> Tensor:
        return draft_rows.opened_reference(tables[i], *of_slots, states[i], *of_rows).page_table_BP

    return Work(own=own, peers={"torch": eager}, num_sets=len(tables), amount=num_bytes, bound="copy")


def placed(stage: Stage, *, rows: int, num_pages: int, num_tokens: int) -> Work:
    num_bytes = rows * (12 + num_tokens * (4 + 24))
    tables = [_page_table(stage, rows, num_pages)[:rows] for _ in range(sets_for(num_bytes))]
    positions = stage.randint(num_pages * PAGE_TOKENS - num_tokens, rows)

    def own(i: int) -> Tensor:
        return draft_rows.placed(tables[i], positions, first=0, num_tokens=num_tokens).row_ids_N

    def eager(i: int) -> Tensor:
        return draft_rows.placed_reference(tables[i], positions, first=0, num_tokens=num_tokens).row_ids_N

    return Work(own=own, peers={"torch": eager}, num_sets=len(tables), amount=num_bytes, bound="copy")


def accepted(stage: Stage, *, rows: int, num_tokens: int, hidden: int) -> Work:
    """Of two tokens one is drawn: half of all drafts agree."""
    num_bytes = rows * (4 * hidden + 8 * (3 * num_tokens + 4))
    states = [stage.randn(rows, num_tokens, hidden) for _ in range(sets_for(num_bytes))]
    kept = [stage.randn(2 * rows, hidden) for _ in states]
    drawn_tokens = [stage.randint(2, rows, num_tokens) for _ in states]
    drafts = [stage.randint(2, rows, num_tokens - 1) for _ in states]
    last_token, of_slots = stage.randint(129280, 2 * rows), stage.randint(1 << 17, 2 * rows)
    slots, positions = stage.permutation(2 * rows)[:rows], stage.randint(1 << 17, rows)

    def own(i: int) -> Tensor:
        of_rows = slots, positions, states[i], drawn_tokens[i], drafts[i]
        return draft_rows.accepted(last_token, kept[i], of_slots, *of_rows)

    def eager(i: int) -> Tensor:
        of_rows = slots, positions, states[i], drawn_tokens[i], drafts[i]
        return draft_rows.accepted_reference(last_token, kept[i], of_slots, *of_rows)

    return Work(own=own, peers={"torch": eager}, num_sets=len(states), amount=num_bytes, bound="copy")


def greedy(stage: Stage, *, rows: int, vocab: int) -> Work:
    logits = [stage.randn(rows, vocab, dtype=torch.float32) for _ in range(sets_for(4 * rows * vocab))]
    peers: dict[str, Call] = {"torch": lambda i: logits[i].argmax(dim=-1)}
    return Work(
        own=lambda i: argmax(logits[i]), peers=peers, num_sets=len(logits), amount=4 * rows * vocab, bound="copy"
    )


def drawn(stage: Stage, *, rows: int, vocab: int, top_k: int | None = None, top_p: float | None = None) -> Work:
    """Where something is cut off, torch's own sorts, in float64."""
    logits = [stage.randn(rows, vocab, dtype=torch.float32) for _ in range(sets_for(4 * rows * vocab))]
    warm = torch.full((rows,), 0.7, dtype=torch.float64, device=stage.device)
    seeds, positions = stage.randint(1 << 40, rows), stage.randint(1 << 17, rows)

    limits: dict[str, Tensor] = {}
    if top_k is not None:
        limits["top_k_B"] = torch.full((rows,), top_k, device=stage.device)
    if top_p is not None:
        limits["top_p_B"] = torch.full((rows,), top_p, dtype=torch.float64, device=stage.device)

    def own(i: int) -> Tensor:
        return sample(logits[i], warm, seeds, positions, **limits)

    def eager(i: int) -> Tensor:
        return sample_reference(logits[i], warm, seeds, positions, **limits)

    peers: dict[str, Call] = {"torch": eager} if limits else {}
    return Work(own=own, peers=peers, num_sets=len(logits), amount=4 * rows * vocab, bound="copy")


def _page_table(stage: Stage, rows: int, num_pages: int) -> Tensor:
    """int32 [S, P] of twice as many slots."""
    return stage.randint(1 << 20, 2 * rows, num_pages).int()
