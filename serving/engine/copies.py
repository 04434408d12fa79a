"""Pages that came from a prefill worker, from the leader of a DP group to its followers: every TP rank holds every page.

A page crosses between units once, to the leader; what goes on from there stays inside the node. Leader and followers copy at the same
place of the unit's round, between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.parallel.collectives import Collectives

_PIECE_BYTES = 64 << 20


class PageCopies:
    """One TP rank's end. `kv_pool` [pages, ...] where the group `tp` exchanges; rank 0 of it is the leader."""

    def __init__(self, tp: Collectives, kv_pool: Tensor) -> None:
        self._tp = tp
        self._kv_pool = kv_pool
        self._pages_at_once = max(1, _PIECE_BYTES // (kv_pool[0].numel() * kv_pool.element_size()))

    def share(self, page_ids: Sequence[int]) -> None:
        """The leader's content of these pages becomes everybody's. On all ranks of the group with the same ids; raises RanksMissing."""
        for start in range(0, len(page_ids), self._pages_at_once):
            ids = torch.tensor(page_ids[start : start + self._pages_at_once], device=self._kv_pool.device)
            pages = self._kv_pool.index_select(0, ids)
            self._tp.broadcast(pages, 0).wait()
            if self._tp.rank:
                self._kv_pool.index_copy_(0, ids, pages)
