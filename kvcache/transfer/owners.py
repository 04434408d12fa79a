"""Which TP rank of a DP group moves a page that lies on all of them: so that a page crosses between units once, and every rank carries its part.

Page p of a group belongs to its TP rank p mod tp, which sends it, or receives it and copies it to the others. Knows neither jobs nor bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def owner_of(page_id: int, tp: int) -> int:
    """TP rank, of `tp`."""
    return page_id % tp


@dataclass(frozen=True, slots=True)
class Stripe:
    """`indices` into the two lists of pages: those that TP rank `source` has to bring to TP rank `target` of the other group."""

    source: int
    target: int
    indices: list[int]


def stripes(
    source_page_ids: Sequence[int], target_page_ids: Sequence[int], *, source_tp: int, target_tp: int
) -> list[Stripe]:
    """Each index once; in the order of the ranks, indices rising."""
    assert len(source_page_ids) == len(target_page_ids)
    of_ranks: dict[tuple[int, int], list[int]] = {}
    for index, (source, target) in enumerate(zip(source_page_ids, target_page_ids, strict=True)):
        of_ranks.setdefault((owner_of(source, source_tp), owner_of(target, target_tp)), []).append(index)
    return [Stripe(*ranks, indices) for ranks, indices in sorted(of_ranks.items())]
