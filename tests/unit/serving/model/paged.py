"""Drives a model over a poisoned page pool the way an engine does, for tests that compare logits."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from serving.model.batch import DecodeBatch, PrefillBatch, SeqChunk
from serving.model.deepseek_v3 import DeepseekV3

GARBAGE_PAGES = (-(1 << 40), 1 << 40)


class Paged:
    """Sequences over one pool: every page NaN until written, pages handed out in random order."""

    def __init__(self, model: DeepseekV3, num_pages: int = 24, seed: int = 0) -> None:
        config = model.config
        self.model = model
        shape = (num_pages + 1, config.num_kv_layers, 64, config.latent_width)
        self.pool = torch.full(shape, float("nan"), dtype=model.dtype)
        self.scratch_row = num_pages * 64
        self._free = random.Random(seed).sample(range(num_pages), num_pages)
        self.page_ids: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.hidden: dict[str, list[Tensor]] = {}

    def rows(self, name: str, start: int, end: int) -> Tensor:
        pages = self.page_ids[name]
        return torch.tensor([pages[p // 64] * 64 + p % 64 for p in range(start, end)])

    def prefill(self, chunks: dict[str, list[int]], *, store_from: int = 0) -> dict[str, Tensor]:
        """Logits [tokens, V] of the next chunk of each named sequence; positions below `store_from` are not stored."""
        ids, positions, rows, seqs = [], [], [], []
        for name, chunk in chunks.items():
            known = self.tokens.setdefault(name, [])
            start, end = len(known), len(known) + len(chunk)
            self._reserve(name, end)
            kept = self.rows(name, start, end)
            kept[: max(0, store_from - start)] = self.scratch_row
            context_pages = torch.tensor([*self.page_ids[name], *GARBAGE_PAGES])
            seqs.append(SeqChunk(offset=len(ids), num_tokens=len(chunk), context_len=start, page_ids=context_pages))
            ids += chunk
            positions += range(start, end)
            rows.append(kept)
            known += chunk
        batch = PrefillBatch(
            token_ids_T=torch.tensor(ids),
            positions_T=torch.tensor(positions),
            row_ids_T=torch.cat(rows),
            starts=torch.tensor([*(seq.offset for seq in seqs), len(ids)], dtype=torch.int32),
            seqs=tuple(seqs),
        )
        hidden = self.model.prefill(batch, self.pool)
        return self._logits(hidden, {name: len(chunk) for name, chunk in chunks.items()})

    def decode(self, next_tokens: dict[str, int], *, num_padding: int = 0) -> dict[str, Tensor]:
        """Logits [1, V] of each named sequence after its next token; padding rows ride along."""
        for name, token in next_tokens.items():
            self.tokens[name].append(token)
            self._reserve(name, len(self.tokens[name]))
        lens = [len(self.tokens[name]) for name in next_tokens]
        last_rows = [self.rows(name, n - 1, n) for name, n in zip(next_tokens, lens, strict=True)]
        widest = max(len(self.page_ids[name]) for name in next_tokens)
        table = [
            [*self.page_ids[name], *[GARBAGE_PAGES[0]] * (widest - len(self.page_ids[name])), *GARBAGE_PAGES]
            for name in next_tokens
        ]
        padding_row = [self.scratch_row // 64, *[GARBAGE_PAGES[1]] * (widest + 1)]
        batch = DecodeBatch(
            token_ids_B=torch.tensor([*next_tokens.values(), *[0] * num_padding]),
            positions_B=torch.tensor([*[n - 1 for n in lens], *[0] * num_padding]),
            row_ids_B=torch.cat([*last_rows, torch.full((num_padding,), self.scratch_row)]),
            page_table_BP=torch.tensor([*table, *[padding_row] * num_padding]),
            context_lens_B=torch.tensor([*lens, *[1] * num_padding]),
        )
        hidden = self.model.decode(batch, self.pool)
        return self._logits(hidden, dict.fromkeys(next_tokens, 1))

    def _logits(self, hidden: Tensor, counts: dict[str, int]) -> dict[str, Tensor]:
        parts = hidden[: sum(counts.values())].split(list(counts.values()))
        for name, part in zip(counts, parts, strict=True):
            self.hidden.setdefault(name, []).append(part)
        return {name: self.model.logits(part) for name, part in zip(counts, parts, strict=True)}

    def _reserve(self, name: str, num_tokens: int) -> None:
        pages = self.page_ids.setdefault(name, [])
        while len(pages) * 64 < num_tokens:
            pages.append(self._free.pop())
