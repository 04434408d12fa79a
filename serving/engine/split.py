"""A rank's part of a step in micro-batches of equal cost. Pure: no torch.

A chunk may be split: its later tokens attend to what its earlier ones have stored, as they do from one step to the next. A rank with too
few tokens has micro-batches without any, since every rank runs as many.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from serving.engine.plan import PrefillChunk

_EQUAL_CONTEXT = 16384
"""Positions that a token attends to at the price of all else that is computed for it, at V3's shape."""


def split_chunks(chunks: Sequence[PrefillChunk], num_parts: int) -> list[tuple[PrefillChunk, ...]]:
    """`num_parts` runs of chunks that are `chunks` one after the other."""
    ends = list(accumulate((_chunk_cost(chunk) for chunk in chunks), initial=0.0))
    parts: list[list[PrefillChunk]] = [[] for _ in range(num_parts)]
    for chunk, before in zip(chunks, ends, strict=False):
        done = 0
        for index, part in enumerate(parts):
            border = ends[-1] * (index + 1) / num_parts - before
            upto = len(chunk.token_ids) if index == num_parts - 1 else _tokens_of(chunk, border)
            if upto > done:
                part.append(_part(chunk, done, upto))
                done = upto
    return [tuple(part) for part in parts]


def split_rows(positions: Sequence[int], num_parts: int) -> list[slice]:
    """Runs of decode rows. A row costs as much as any other, and what its context takes to read."""
    ends = list(accumulate((1 + position / _EQUAL_CONTEXT for position in positions), initial=0.0))
    borders = [_nearest(ends, ends[-1] * index / num_parts) for index in range(num_parts)]
    return [slice(start, end) for start, end in zip(borders, [*borders[1:], len(positions)], strict=True)]


def _nearest(ends: list[float], cost: float) -> int:
    """Index of the end that is nearest to `cost`, of two the later."""
    after = min(bisect_left(ends, cost), len(ends) - 1)
    return after if after == 0 or ends[after] - cost <= cost - ends[after - 1] else after - 1


def _chunk_cost(chunk: PrefillChunk) -> float:
    return _cost(chunk, len(chunk.token_ids))


def _cost(chunk: PrefillChunk, num_tokens: int) -> float:
    """Of the chunk's first tokens."""
    return num_tokens * (1 + (chunk.start + num_tokens / 2) / _EQUAL_CONTEXT)


def _tokens_of(chunk: PrefillChunk, cost: float) -> int:
    """How many of its first tokens cost so much."""
    return min(
        bisect_left(range(len(chunk.token_ids)), cost - 1e-9, key=lambda number: _cost(chunk, number)),
        len(chunk.token_ids),
    )


def _part(chunk: PrefillChunk, first: int, end: int) -> PrefillChunk:
    if end - first == len(chunk.token_ids):
        return chunk
    return dataclasses.replace(
        chunk,
        token_ids=chunk.token_ids[first:end],
        start=chunk.start + first,
        sample=chunk.sample and end == len(chunk.token_ids),
    )
