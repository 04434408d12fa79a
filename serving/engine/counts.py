"""How often each slot's tokens occur, on the device: what penalties are computed from. Only slots with penalties take a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.staging import ids


class CountTables:
    """Occurrences per slot with penalties: `counts` int32 [R, V] of the output, `in_prompt` bool [R, V]. Grows by doubling."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts_RV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._in_prompt_RV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._row_of_slot: dict[int, int] = {}
        self._free_rows: list[int] = []

    def open(self, slot: int, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        if not self._free_rows:
            self._grow()
        row = self._row_of_slot[slot] = self._free_rows.pop()
        self._in_prompt_RV[row].zero_().index_fill_(0, self._known(token_ids[:num_prompt_tokens]), True)
        output = self._known(token_ids[num_prompt_tokens:])
        self._counts_RV[row].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def close(self, slot: int) -> None:
        row = self._row_of_slot.pop(slot, None)
        if row is not None:
            self._free_rows.append(row)

    def rows_of(self, slots: tuple[int, ...]) -> list[int | None]:
        return [self._row_of_slot.get(slot) for slot in slots]

    def at(self, rows_N: Tensor) -> tuple[Tensor, Tensor]:
        return self._counts_RV.index_select(0, rows_N), self._in_prompt_RV.index_select(0, rows_N)

    def add(self, rows_N: Tensor, token_ids_N: Tensor, counted_N: Tensor | None = None) -> None:
        """`counted_N` bool: which of them; None: all."""
        places_N = rows_N * self._counts_RV.shape[1] + token_ids_N
        ones_N = torch.ones_like(places_N, dtype=torch.int32) if counted_N is None else counted_N.to(torch.int32)
        self._counts_RV.view(-1).index_add_(0, places_N, ones_N)

    def _known(self, token_ids: Sequence[int]) -> Tensor:
        """Without ids above the tokenizer's size: a client may send them, nobody can draw them."""
        known = [token_id for token_id in token_ids if token_id < self._counts_RV.shape[1]]
        return ids(known, self._counts_RV.device)

    def _grow(self) -> None:
        num_rows = self._counts_RV.shape[0]
        added = max(num_rows, 4)
        self._counts_RV = torch.cat((self._counts_RV, self._counts_RV.new_zeros(added, self._counts_RV.shape[1])))
        self._in_prompt_RV = torch.cat(
            (self._in_prompt_RV, self._in_prompt_RV.new_zeros(added, self._counts_RV.shape[1]))
        )
        self._free_rows.extend(range(num_rows, num_rows + added))
