"""Drives a model over a poisoned page pool the way an engine does, for tests that compare logits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from serving.kernels.rows import slots
from serving.model.batch import DecodeBatch, PrefillBatch, PrefillContext, SeqChunk
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.timeline import Timeline

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

    def prefill(
        self, chunks: dict[str, list[int]], *, store_from: int = 0, capacity: int | None = None
    ) -> dict[str, Tensor]:
        """Logits [tokens, V] of the next chunk of each named sequence; positions below `store_from` are not stored.

        `capacity`: what is cached before them as one `PrefillContext` of so many rows, the unused ones NaN.
        """
        packed = None if capacity is None else self._packed_context(list(chunks), capacity)
        batch = self._prefill_batch(chunks, store_from)
        if packed is not None:
            batch = replace(batch, seqs=(), context=packed)
        hidden = self.model.prefill(batch, self.pool)
        return self._logits(hidden, {name: len(chunk) for name, chunk in chunks.items()})

    def prefill_each(
        self, micro_batches: Sequence[dict[str, list[int]]], timeline: Timeline | None = None
    ) -> dict[str, Tensor]:
        """`prefill` of micro-batches that take turns; a text may go on in the second."""
        batches = [self._prefill_batch(chunks, 0) for chunks in micro_batches]
        parts = self.model.prefill_each(batches, self.pool, timeline=timeline)
        return self._joined(parts, [{name: len(ids) for name, ids in chunks.items()} for chunks in micro_batches])

    def _packed_context(self, names: list[str], capacity: int) -> PrefillContext:
        lens = [len(self.tokens.get(name, [])) for name in names]
        nobodys = torch.full((capacity - sum(lens),), self._free[0] * 64)
        cached = [self.rows(name, 0, n) for name, n in zip(names, lens, strict=True) if n]
        return PrefillContext(
            slots_C=slots(self.pool, torch.cat([*cached, nobodys])),
            starts=torch.tensor([0, *lens]).cumsum(0).to(torch.int32),
        )

    def _prefill_batch(self, chunks: dict[str, list[int]], store_from: int) -> PrefillBatch:
        ids, positions, rows, seqs = [], [], [torch.empty(0, dtype=torch.int64)], []
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
        return PrefillBatch(
            token_ids_T=torch.tensor(ids, dtype=torch.int64),
            positions_T=torch.tensor(positions, dtype=torch.int64),
            row_ids_T=torch.cat(rows),
            starts=torch.tensor([*(seq.offset for seq in seqs), len(ids)], dtype=torch.int32),
            seqs=tuple(seqs),
        )

    def decode(self, next_tokens: dict[str, int], *, num_padding: int = 0) -> dict[str, Tensor]:
        """Logits [1, V] of each named sequence after its next token; padding rows ride along."""
        hidden = self.model.decode(self._decode_batch(next_tokens, num_padding), self.pool)
        return self._logits(hidden, dict.fromkeys(next_tokens, 1))

    def decode_each(
        self, micro_batches: Sequence[dict[str, int]], timeline: Timeline | None = None
    ) -> dict[str, Tensor]:
        """`decode` of micro-batches that take turns, each with sequences of its own."""
        batches = [self._decode_batch(next_tokens, 0) for next_tokens in micro_batches]
        parts = self.model.decode_each(batches, self.pool, timeline=timeline)
        return self._joined(parts, [dict.fromkeys(next_tokens, 1) for next_tokens in micro_batches])

    def _decode_batch(self, next_tokens: dict[str, int], num_padding: int) -> DecodeBatch:
        for name, token in next_tokens.items():
            self.tokens[name].append(token)
            self._reserve(name, len(self.tokens[name]))
        lens = [len(self.tokens[name]) for name in next_tokens]
        last_rows = [self.rows(name, n - 1, n) for name, n in zip(next_tokens, lens, strict=True)]
        widest = max((len(self.page_ids[name]) for name in next_tokens), default=0)
        table = [
            [*self.page_ids[name], *[GARBAGE_PAGES[0]] * (widest - len(self.page_ids[name])), *GARBAGE_PAGES]
            for name in next_tokens
        ]
        padding_row = [self.scratch_row // 64, *[GARBAGE_PAGES[1]] * (widest + 1)]
        rows = [*table, *[padding_row] * num_padding]
        return DecodeBatch(
            token_ids_B=torch.tensor([*next_tokens.values(), *[0] * num_padding], dtype=torch.int64),
            positions_B=torch.tensor([*[n - 1 for n in lens], *[0] * num_padding], dtype=torch.int64),
            row_ids_B=torch.cat([*last_rows, torch.full((num_padding,), self.scratch_row)]),
            page_table_BP=torch.tensor(rows, dtype=torch.int64).view(len(rows), widest + 2),
            context_lens_B=torch.tensor([*lens, *[1] * num_padding], dtype=torch.int64),
        )

    def _joined(self, parts: list[Tensor], counts: list[dict[str, int]]) -> dict[str, Tensor]:
        logits: dict[str, Tensor] = {}
        for hidden, names in zip(parts, counts, strict=True):
            for name, part in self._logits(hidden, names).items():
                logits[name] = torch.cat([logits[name], part]) if name in logits else part
        return logits

    def _logits(self, hidden: Tensor, counts: dict[str, int]) -> dict[str, Tensor]:
        hidden = hidden[: sum(counts.values())]
        logits = self.model.logits(hidden).split(list(counts.values()))
        for name, part in zip(counts, hidden.split(list(counts.values())), strict=True):
            self.hidden.setdefault(name, []).append(part)
        return dict(zip(counts, logits, strict=True))

    def _reserve(self, name: str, num_tokens: int) -> None:
        pages = self.page_ids.setdefault(name, [])
        while len(pages) * 64 < num_tokens:
            pages.append(self._free.pop())
