"""Prefill chunks: from those of a plan to the logits of the prompts that they end; on a GPU small steps are captured and replayed.

    plan's chunks -> one packed batch -> latents into their pages, rows of the MTP layer, hidden states of the last tokens -> logits

Knows slots and pages as the runner does: a slot's page table is set before its chunk is run. Must not know decode rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from kvcache.layout import PAGE_TOKENS, num_pages_for
from serving.engine.graphs import StepGraphs, prefill_sizes
from serving.engine.plan import PrefillChunk
from serving.engine.speculative import DraftLayer
from serving.engine.split import split_chunks
from serving.engine.staging import ids
from serving.kernels import sampling
from serving.kernels.packed import PIECES
from serving.kernels.rows import packed_context_slots
from serving.model.batch import PrefillBatch, PrefillContext, SeqChunk

# Larger prefill steps keep the device busy for longer than the host needs to launch their parts one by one.
_MOST_CAPTURED_TOKENS = 4096
_MOST_CAPTURED_CHUNKS = 16
# Cached rows, of all chunks together, that a captured step has room for, and its most tokens. It expands as many rows, whatever is there,
# which larger steps would pay for with more than the host's launches. Steps with more are launched piece by piece.
_CAPTURED_CONTEXTS = {4096: 2048, 16384: 512}
# Behind a context steps are captured for fewer numbers of tokens, but for each of those rooms.
_SIZES_AN_OCTAVE = 2


class PrefillModel(Protocol):
    """What prefill needs of `serving.model.deepseek_v3.DeepseekV3`."""

    @property
    def mtp(self) -> DraftLayer | None: ...

    @property
    def captures_prefill(self) -> bool: ...

    def prefill(self, batch: PrefillBatch, kv_pool: Tensor) -> Tensor: ...

    def prefill_each(self, batches: Sequence[PrefillBatch], kv_pool: Tensor) -> list[Tensor]: ...

    def logits(self, hidden_ND: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class EndedPrompts:
    """Of the N chunks that end their prompts: slots, positions of the tokens that follow, what these are drawn from."""

    slots: list[int]
    positions: list[int]
    hidden_ND: Tensor
    logits_NV: Tensor


@dataclass(frozen=True, slots=True)
class _Packed:
    """N chunks one after the other: T tokens, their positions and rows; N + 1 borders; N slots."""

    token_ids: list[int]
    positions: list[int]
    row_ids: list[int]
    starts: list[int]
    slots: list[int]

    @property
    def lasts(self) -> list[int]:
        return [end - 1 for end in self.starts[1:]]


class Chunks:
    """Of one runner: `page_table_SP` and `hidden_SD` by slot are its own, the last slot and the last page of `kv_pool` belong to nobody."""

    def __init__(self, model: PrefillModel, kv_pool: Tensor, page_table_SP: Tensor, hidden_SD: Tensor) -> None:
        self._model = model
        self._kv_pool = kv_pool
        self._page_table_SP = page_table_SP
        self._hidden_SD = hidden_SD
        self._scratch_slot = page_table_SP.shape[0] - 1
        self._scratch_page = kv_pool.shape[0] - 1
        self._device = kv_pool.device
        # By the cached rows that a step may have, in ascending order.
        self._graphs: dict[int, StepGraphs] = {}
        if self._device.type == "cuda" and model.captures_prefill:
            self._make_graphs()

    def warm_up(self, max_batched_tokens: int, told: Callable[[str], None], *, packed: bool) -> None:
        """Compile, and capture, what steps of so many tokens run. `packed`: whether weights are (`kernels.packed`). In inference mode."""
        self._compile(max_batched_tokens, told, packed=packed)
        self._capture(max_batched_tokens, told)

    def release(self) -> None:
        for graphs in self._graphs.values():
            graphs.release()

    def run(self, chunks: tuple[PrefillChunk, ...], num_micro_batches: int = 1) -> EndedPrompts | None:
        """None: no prompt ends with them. There may be no chunk, where other ranks of the unit have some."""
        if num_micro_batches == 1:
            last_ND, logits_NV = self._run(chunks)
        else:
            parts = split_chunks(chunks, num_micro_batches)
            chunks = tuple(chunk for part in parts for chunk in part)
            last_ND, logits_NV = self._launch_each(parts), None
        ended = [i for i, chunk in enumerate(chunks) if chunk.sample]
        if not ended:
            return None
        if len(ended) < len(chunks):
            ended_N = self._ids(ended)
            last_ND = last_ND[ended_N]
            logits_NV = None if logits_NV is None else logits_NV[ended_N]
        return EndedPrompts(
            slots=[chunks[i].slot for i in ended],
            positions=[chunks[i].start + len(chunks[i].token_ids) for i in ended],
            hidden_ND=last_ND,
            logits_NV=self._model.logits(last_ND) if logits_NV is None else logits_NV,
        )

    def _compile(self, max_batched_tokens: int, told: Callable[[str], None], *, packed: bool) -> None:
        """Steps that are not captured: many tokens, or much of the context cached; and each number of rows that has code of its own."""
        if self._device.type == "cuda":
            small: tuple[int, ...] = (1, 2, 16, 32, PAGE_TOKENS)
        else:
            # On a CPU packed weights have code for each number of rows, plain ones have none.
            small = PIECES if packed else (PAGE_TOKENS,)
        for num_tokens in sorted({max_batched_tokens, *(size for size in small if size < max_batched_tokens)}):
            told(f"compiling prefill of {num_tokens} tokens")
            self._compile_step(PAGE_TOKENS, num_tokens)
        if not self._graphs:
            # Where nothing is cached attention has code of its own.
            self._compile_step(0, min(PAGE_TOKENS, max_batched_tokens))

    def _compile_step(self, start: int, num_tokens: int) -> None:
        """Of the tokens from `start` on, from the first on where no text is longer, of as many prompts as have so many."""
        longest = self._page_table_SP.shape[1] * PAGE_TOKENS
        start = start if start < longest else 0
        most = longest - start
        sizes = [min(most, num_tokens - before) for before in range(0, num_tokens, most)]
        chunks = tuple(
            PrefillChunk(
                slot=self._scratch_slot,
                token_ids=[0] * size,
                start=start,
                store_from=start + size,
                page_ids=[self._scratch_page] * num_pages_for(start + size),
                sample=True,
            )
            for size in sizes
        )
        last_ND, _ = self._run(chunks)
        if self._device.type == "cuda":
            # As many prompts may end in a step that is not captured, and each number of them has code of its own.
            last_ND = last_ND[:1].expand(min(num_tokens, PAGE_TOKENS), -1).contiguous()
        sampling.argmax(self._model.logits(last_ND))

    def _capture(self, max_batched_tokens: int, told: Callable[[str], None]) -> None:
        """Every size that a step of so many tokens may take; what needs most memory first."""
        for capacity, graphs in reversed(self._graphs.items()):
            behind = f" behind a context of {capacity}" if capacity else ""
            most = graphs.size_for(max_batched_tokens) or graphs.sizes[-1]
            for size in reversed(graphs.sizes):
                if size <= most:
                    told(f"capturing a prefill step of {size} tokens{behind}")
                    graphs.capture(size)

    def _run(self, chunks: tuple[PrefillChunk, ...]) -> tuple[Tensor, Tensor | None]:
        """Hidden states [N, D] of the last token of each chunk, and their logits [N, V] where the step was captured with them."""
        packed = self._pack(chunks)
        last_ND, logits_NV = self._replay(packed, chunks) or (self._launch(packed, chunks), None)
        self._store_zero_rows(chunks)
        return last_ND, logits_NV

    def _store_zero_rows(self, chunks: tuple[PrefillChunk, ...]) -> None:
        if self._model.mtp is not None:
            for chunk in chunks:
                if chunk.start == 0 and chunk.store_from == 0:
                    # The layout's zero row: a page is a function of its tokens, to the last byte.
                    self._kv_pool[chunk.page_ids[0], -1, 0] = 0

    def _pack(self, chunks: tuple[PrefillChunk, ...]) -> _Packed:
        token_ids: list[int] = []
        positions: list[int] = []
        row_ids: list[int] = []
        starts = [0]
        for chunk in chunks:
            end = chunk.start + len(chunk.token_ids)
            token_ids += chunk.token_ids
            positions += range(chunk.start, end)
            row_ids += self._rows(chunk, end)
            starts.append(len(token_ids))
        return _Packed(token_ids, positions, row_ids, starts, [chunk.slot for chunk in chunks])

    def _launch(self, packed: _Packed, chunks: tuple[PrefillChunk, ...]) -> Tensor:
        """Piece by piece."""
        return self._prefill(self._batch(packed, chunks), *self._places(packed))

    def _launch_each(self, parts: list[tuple[PrefillChunk, ...]]) -> Tensor:
        """The same of micro-batches that take turns; the last tokens of all their chunks, in order."""
        packed = [self._pack(part) for part in parts]
        batches = [self._batch(*each) for each in zip(packed, parts, strict=True)]
        hidden = self._model.prefill_each(batches, self._kv_pool)
        last = [
            self._conclude(batch, hidden_TD, *self._places(of_part))
            for batch, hidden_TD, of_part in zip(batches, hidden, packed, strict=True)
        ]
        for part in parts:
            self._store_zero_rows(part)
        return torch.cat(last)

    def _places(self, packed: _Packed) -> tuple[Tensor, ...]:
        """int64 [N] each: first and last token of each chunk, and its slot."""
        return self._ids((packed.starts[:-1], packed.lasts, packed.slots)).unbind()

    def _batch(self, packed: _Packed, chunks: tuple[PrefillChunk, ...]) -> PrefillBatch:
        token_ids_T, positions_T, row_ids_T = self._ids((packed.token_ids, packed.positions, packed.row_ids)).unbind()
        seqs = [
            SeqChunk(
                offset=offset,
                num_tokens=len(chunk.token_ids),
                context_len=chunk.start,
                page_ids=self._page_table_SP[chunk.slot],
            )
            for offset, chunk in zip(packed.starts, chunks, strict=False)
        ]
        return PrefillBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            row_ids_T=row_ids_T,
            starts=self._ids(packed.starts).to(torch.int32),
            seqs=tuple(seqs),
        )

    def _replay(self, packed: _Packed, chunks: tuple[PrefillChunk, ...]) -> tuple[Tensor, Tensor] | None:
        """None: not a step that is captured."""
        context_starts = [0, *accumulate(chunk.start for chunk in chunks)]
        capacity = next((rows for rows in self._graphs if rows >= context_starts[-1]), None)
        if capacity is None or not 0 < len(chunks) <= _MOST_CAPTURED_CHUNKS:
            return None
        size = self._graphs[capacity].captured_for(len(packed.token_ids))
        if size is None:
            return None
        last_ND, logits_NV = self._graphs[capacity].run(size, self._values(size, packed, context_starts))
        return last_ND[: len(chunks)], logits_NV[: len(chunks)]

    def _values(self, size: int, packed: _Packed, context_starts: list[int]) -> list[int]:
        """The integers of a captured step."""
        num_tokens, num_chunks = len(packed.token_ids), len(packed.slots)
        rest, missing = size - num_tokens, _MOST_CAPTURED_CHUNKS - num_chunks
        values = [*packed.token_ids, *[0] * rest, *packed.positions, *[0] * rest]
        values += [*packed.row_ids, *[self._scratch_page * PAGE_TOKENS] * rest]
        # Tokens of nobody are a sequence of their own, the last; chunks that are missing say what the first one says.
        values += [*packed.starts, *[num_tokens] * missing, size]
        values += [*context_starts, *[context_starts[-1]] * (missing + 1)]
        values += [*packed.starts[:-1], *[0] * missing, *packed.lasts, *[packed.lasts[0]] * missing]
        return [*values, *packed.slots, *[packed.slots[0]] * missing]

    def _make_graphs(self) -> None:
        """No text of one page has a context worth a captured step."""
        behind = _CAPTURED_CONTEXTS if self._page_table_SP.shape[1] > 1 else {}
        first: StepGraphs | None = None
        for capacity, most in {0: _MOST_CAPTURED_TOKENS, **behind}.items():
            self._graphs[capacity] = StepGraphs(
                partial(self._captured, capacity),
                sizes=prefill_sizes(most, an_octave=_SIZES_AN_OCTAVE if capacity else 8),
                idle=self._idle,
                device=self._device,
                beside=first,
            )
            first = first or self._graphs[capacity]

    def _idle(self, size: int) -> list[int]:
        """The integers of a captured step in which everything is nobody's."""
        chunks = _MOST_CAPTURED_CHUNKS
        rows = [self._scratch_page * PAGE_TOKENS] * size
        return [
            *[0] * (2 * size),
            *rows,
            0,
            *[size] * (chunks + 1),
            *[0] * (chunks + 2),
            *[0] * (2 * chunks),
            *[self._scratch_slot] * chunks,
        ]

    def _captured(self, capacity: int, size: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """`capacity`: room for cached rows, of all chunks together; 0: nothing is cached of any."""
        chunks = _MOST_CAPTURED_CHUNKS
        parts = inputs.split([size, size, size, chunks + 2, chunks + 2, chunks, chunks, chunks])
        token_ids_T, positions_T, row_ids_T, starts, context_starts, first_N, last_N, slots_N = parts
        batch = PrefillBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            row_ids_T=row_ids_T,
            starts=starts.to(torch.int32),
            seqs=(),
            context=self._context(capacity, context_starts.to(torch.int32), slots_N) if capacity else None,
        )
        last_ND = self._prefill(batch, first_N, last_N, slots_N)
        return last_ND, self._model.logits(last_ND)

    def _context(self, capacity: int, starts: Tensor, slots_N: Tensor) -> PrefillContext:
        """Where the slots' page tables have it."""
        page_table_NP = self._page_table_SP.index_select(0, slots_N)
        return PrefillContext(
            slots_C=packed_context_slots(self._kv_pool, page_table_NP, starts, capacity), starts=starts
        )

    def _prefill(self, batch: PrefillBatch, first_N: Tensor, last_N: Tensor, slots_N: Tensor) -> Tensor:
        """Hidden states [N, D] of the last tokens. int64 [N]: where each chunk begins and ends in the batch, and its slot."""
        return self._conclude(batch, self._model.prefill(batch, self._kv_pool), first_N, last_N, slots_N)

    def _conclude(
        self, batch: PrefillBatch, hidden_TD: Tensor, first_N: Tensor, last_N: Tensor, slots_N: Tensor
    ) -> Tensor:
        last_ND = hidden_TD.index_select(0, last_N)
        if self._model.mtp is not None:
            self._store_mtp_rows(self._model.mtp, batch, hidden_TD, last_ND, first_N, slots_N)
        return last_ND

    def _store_mtp_rows(
        self,
        mtp: DraftLayer,
        batch: PrefillBatch,
        hidden_TD: Tensor,
        last_ND: Tensor,
        first_N: Tensor,
        slots_N: Tensor,
    ) -> None:
        """The row of token p is made from the hidden state of p - 1: the neighbour in the chunk, or what the slot carried.

        Of the first token of all there is none; its row, like those below store_from, goes to scratch.
        """
        previous_TD = hidden_TD.roll(1, dims=0)
        previous_TD.index_copy_(0, first_N, self._hidden_SD.index_select(0, slots_N))
        self._hidden_SD.index_copy_(0, slots_N, last_ND)
        row_ids_T = batch.row_ids_T.masked_fill(batch.positions_T == 0, self._scratch_page * PAGE_TOKENS)
        positions_T = (batch.positions_T - 1).clamp_(min=0)
        mtp.store_rows(previous_TD, batch.token_ids_T, positions_T, row_ids_T, self._kv_pool)

    def _rows(self, chunk: PrefillChunk, end: int) -> list[int]:
        """Row of each token of the chunk; scratch below store_from."""
        stored_from = min(max(chunk.start, chunk.store_from), end)
        rows = [self._scratch_page * PAGE_TOKENS + i % PAGE_TOKENS for i in range(stored_from - chunk.start)]
        for page in range(stored_from // PAGE_TOKENS, -(-end // PAGE_TOKENS)):
            first, last = max(stored_from, page * PAGE_TOKENS), min(end, (page + 1) * PAGE_TOKENS)
            shift = (chunk.page_ids[page] - page) * PAGE_TOKENS
            rows += range(first + shift, last + shift)
        return rows

    def _ids(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return ids(values, self._device)
