"""The runner: turns a step's plan into tensors, runs the model, samples, and hands the tokens back a step later.

    open_slot -> launch ... launch -> close_slot        launch -> settle, in order, at most two launched and not settled

Between steps a sequence lives in its slot: last token, last hidden state (for the MTP layer's rows) and page table stay on
the device, so `launch` reads nothing back. On a CPU `launch` computes before it returns. Must not know requests, jobs,
or who decides what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvcache.layout import PAGE_TOKENS
from serving.engine.plan import DecodeRow, Launched, PrefillChunk, SampledToken, SlotSpec, StepPlan, StepResult
from serving.engine.sampler import Logprobs, Sampler
from serving.engine.staging import ids, to_host
from serving.model.batch import DecodeBatch, PrefillBatch, SeqChunk

_MAX_IN_FLIGHT = 2


class MtpStore(Protocol):
    def store_rows(
        self, hidden_prev_TD: Tensor, token_ids_T: Tensor, positions_T: Tensor, row_ids_T: Tensor, kv_pool: Tensor
    ) -> None: ...


class Model(Protocol):
    """What the runner needs of `serving.model.deepseek_v3.DeepseekV3`."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def mtp(self) -> MtpStore | None: ...

    def prefill(self, batch: PrefillBatch, kv_pool: Tensor) -> Tensor: ...

    def decode(self, batch: DecodeBatch, kv_pool: Tensor) -> Tensor: ...

    def logits(self, hidden_ND: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class LaunchedStep:
    """A step in flight. Host tensors; they hold what they should once `done` has happened (None: already)."""

    plan: StepPlan
    slots: tuple[int, ...] = ()
    token_ids: Tensor | None = None
    logprobs: Logprobs | None = None
    hidden_ND: Tensor | None = None
    done: torch.cuda.Event | None = None


class Runner:
    """The real Executor over one model and one pool `[num_pages + 1, layers, 64, row]`, whose last page is scratch.

    `max_pages`: longest page table of a slot. `vocab_size`: the tokenizer's; ids from there on are never drawn.
    Pages beyond a sequence's own are never read; unused entries of the page table name the scratch page.
    """

    def __init__(
        self, model: Model, kv_pool: Tensor, *, num_slots: int, max_pages: int, vocab_size: int, hidden_size: int
    ) -> None:
        device = kv_pool.device
        self.model = model
        self.kv_pool = kv_pool
        self.device = device
        self.sampler = Sampler(num_slots, vocab_size, device)
        self._scratch_page = kv_pool.shape[0] - 1
        self._page_ids: list[list[int]] = [[] for _ in range(num_slots)]
        self._page_table_SP = torch.full((num_slots, max_pages), self._scratch_page, dtype=torch.int64, device=device)
        self._last_token_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._hidden_SD = torch.zeros(num_slots, hidden_size, dtype=model.dtype, device=device)
        self._rows = _RowsBatch((), self._last_token_S[:0], self._page_table_SP[:0])
        self._num_in_flight = 0

    def open_slot(self, slot: int, spec: SlotSpec) -> None:
        self._set_pages(slot, spec.page_ids)
        self.sampler.open(slot, spec.sampling, spec.token_ids, spec.num_prompt_tokens)
        self._last_token_S[slot] = spec.token_ids[-1]
        if spec.hidden:
            assert self.model.mtp is not None, "a hidden state came for a model without MTP layer"
            self._hidden_SD[slot] = torch.frombuffer(bytearray(spec.hidden), dtype=self._hidden_SD.dtype)

    def close_slot(self, slot: int) -> None:
        self.sampler.close(slot)
        self._page_ids[slot] = []
        self._rows = self._rows.stale()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        assert self._num_in_flight < _MAX_IN_FLIGHT, "settle a step before launching a third"
        self._num_in_flight += 1
        hidden: list[Tensor] = []
        slots: list[int] = []
        positions: list[int] = []
        if plan.chunks:
            hidden_ND = self._run_chunks(plan.chunks)
            ended = [i for i, chunk in enumerate(plan.chunks) if chunk.sample]
            slots += [plan.chunks[i].slot for i in ended]
            positions += [plan.chunks[i].start + len(plan.chunks[i].token_ids) for i in ended]
            if ended:
                hidden.append(hidden_ND if len(ended) == len(plan.chunks) else hidden_ND[self._ids(ended)])
        num_chunk_tokens = len(slots)
        if plan.rows:
            slots += [row.slot for row in plan.rows]
            positions += [row.position + 1 for row in plan.rows]
            hidden.append(self._run_rows(plan.rows))
        if not slots:
            return LaunchedStep(plan=plan, done=self._mark())
        return self._sample(plan, tuple(slots), positions, num_chunk_tokens, hidden)

    def settle(self, launched: Launched) -> StepResult:
        assert isinstance(launched, LaunchedStep), "a step settles where it was launched"
        if launched.done is not None:
            launched.done.synchronize()
        self._num_in_flight -= 1
        if launched.token_ids is None:
            return StepResult(tokens=())
        logprobs = launched.logprobs.by_row() if launched.logprobs is not None else {}
        hidden = _bytes_of_rows(launched.hidden_ND)
        return StepResult(
            tokens=tuple(
                SampledToken(
                    slot=slot, token_id=token_id, logprobs=logprobs.get(i), hidden=hidden[i] if i < len(hidden) else b""
                )
                for i, (slot, token_id) in enumerate(zip(launched.slots, launched.token_ids.tolist(), strict=True))
            )
        )

    def _sample(
        self,
        plan: StepPlan,
        slots: tuple[int, ...],
        positions: list[int],
        num_chunk_tokens: int,
        hidden: list[Tensor],
    ) -> LaunchedStep:
        hidden_BD = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        logits_BV = self.model.logits(hidden_BD)
        token_ids_B, logprobs = self.sampler.sample(slots, logits_BV, positions)
        slots_B = self._rows.slots_B if slots == self._rows.slots else self._ids(slots)
        self._last_token_S.index_copy_(0, slots_B, token_ids_B)
        wants_hidden = num_chunk_tokens > 0 and self.model.mtp is not None
        return LaunchedStep(
            plan=plan,
            slots=slots,
            token_ids=to_host(token_ids_B),
            logprobs=logprobs.moved(to_host) if logprobs is not None else None,
            hidden_ND=to_host(hidden_BD[:num_chunk_tokens]) if wants_hidden else None,
            done=self._mark(),
        )

    def _run_chunks(self, chunks: tuple[PrefillChunk, ...]) -> Tensor:
        """Hidden states [N, D] of the last token of each chunk."""
        token_ids: list[int] = []
        positions: list[int] = []
        row_ids: list[int] = []
        seqs = []
        for chunk in chunks:
            if chunk.page_ids != self._page_ids[chunk.slot]:
                self._set_pages(chunk.slot, chunk.page_ids)
            end = chunk.start + len(chunk.token_ids)
            seqs.append(
                SeqChunk(
                    offset=len(token_ids),
                    num_tokens=len(chunk.token_ids),
                    context_len=chunk.start,
                    page_ids=self._page_table_SP[chunk.slot],
                )
            )
            token_ids += chunk.token_ids
            positions += range(chunk.start, end)
            row_ids += self._chunk_rows(chunk, end)
        token_ids_T, positions_T, row_ids_T = self._ids((token_ids, positions, row_ids)).unbind()
        batch = PrefillBatch(token_ids_T=token_ids_T, positions_T=positions_T, row_ids_T=row_ids_T, seqs=tuple(seqs))
        hidden_TD = self.model.prefill(batch, self.kv_pool)
        last_N = self._ids([seq.offset + seq.num_tokens - 1 for seq in seqs])
        last_ND = hidden_TD.index_select(0, last_N)
        if self.model.mtp is not None:
            self._store_mtp_chunks(self.model.mtp, chunks, batch, hidden_TD, last_ND)
        return last_ND

    def _store_mtp_chunks(
        self, mtp: MtpStore, chunks: tuple[PrefillChunk, ...], batch: PrefillBatch, hidden_TD: Tensor, last_ND: Tensor
    ) -> None:
        """The row of token p is made from the hidden state of p - 1: the neighbour in the chunk, or what the slot carried.

        Of the first token of all there is none; its row, like those below store_from, goes to scratch.
        """
        slots_N = self._ids([chunk.slot for chunk in chunks])
        first_N = self._ids([seq.offset for seq in batch.seqs])
        previous_TD = hidden_TD.roll(1, dims=0)
        previous_TD.index_copy_(0, first_N, self._hidden_SD.index_select(0, slots_N))
        self._hidden_SD.index_copy_(0, slots_N, last_ND)
        row_ids_T = batch.row_ids_T.masked_fill(batch.positions_T == 0, self._scratch_page * PAGE_TOKENS)
        positions_T = (batch.positions_T - 1).clamp_(min=0)
        mtp.store_rows(previous_TD, batch.token_ids_T, positions_T, row_ids_T, self.kv_pool)
        for chunk in chunks:
            if chunk.start == 0 and chunk.store_from == 0:
                # The layout's zero row: a page is a function of its tokens, to the last byte.
                self.kv_pool[chunk.page_ids[0], -1, 0] = 0

    def _run_rows(self, rows: tuple[DecodeRow, ...]) -> Tensor:
        """Hidden states [B, D]."""
        batch_rows = self._rows_of(rows)
        positions = [row.position for row in rows]
        row_ids = [
            self._page_ids[row.slot][row.position // PAGE_TOKENS] * PAGE_TOKENS + row.position % PAGE_TOKENS
            for row in rows
        ]
        positions_B, row_ids_B, context_lens_B = self._ids((positions, row_ids, [p + 1 for p in positions])).unbind()
        slots_B = batch_rows.slots_B
        token_ids_B = self._last_token_S.index_select(0, slots_B)
        batch = DecodeBatch(
            token_ids_B=token_ids_B,
            positions_B=positions_B,
            row_ids_B=row_ids_B,
            page_table_BP=batch_rows.page_table_BP,
            context_lens_B=context_lens_B,
        )
        hidden_BD = self.model.decode(batch, self.kv_pool)
        if self.model.mtp is not None:
            previous_BD = self._hidden_SD.index_select(0, slots_B)
            self.model.mtp.store_rows(previous_BD, token_ids_B, positions_B - 1, row_ids_B, self.kv_pool)
            self._hidden_SD.index_copy_(0, slots_B, hidden_BD)
        return hidden_BD

    def _rows_of(self, rows: tuple[DecodeRow, ...]) -> _RowsBatch:
        """Slots and page tables of the batch, made anew only when a sequence joined, left or got a page."""
        slots = tuple(row.slot for row in rows)
        changed = slots != self._rows.slots
        for row in rows:
            if row.new_page_id is not None:
                pages = self._page_ids[row.slot]
                self._page_table_SP[row.slot, len(pages)] = row.new_page_id
                pages.append(row.new_page_id)
                changed = True
        if changed:
            slots_B = self._ids(slots)
            width = max(len(self._page_ids[slot]) for slot in slots)
            self._rows = _RowsBatch(slots, slots_B, self._page_table_SP[:, :width].index_select(0, slots_B))
        return self._rows

    def _chunk_rows(self, chunk: PrefillChunk, end: int) -> list[int]:
        """Row of each token of the chunk; scratch below store_from."""
        stored_from = min(max(chunk.start, chunk.store_from), end)
        rows = [self._scratch_page * PAGE_TOKENS + i % PAGE_TOKENS for i in range(stored_from - chunk.start)]
        for page in range(stored_from // PAGE_TOKENS, -(-end // PAGE_TOKENS)):
            first, last = max(stored_from, page * PAGE_TOKENS), min(end, (page + 1) * PAGE_TOKENS)
            shift = (chunk.page_ids[page] - page) * PAGE_TOKENS
            rows += range(first + shift, last + shift)
        return rows

    def _set_pages(self, slot: int, page_ids: list[int]) -> None:
        self._page_ids[slot] = list(page_ids)
        unused = self._page_table_SP.shape[1] - len(page_ids)
        self._page_table_SP[slot] = self._ids([*page_ids, *[self._scratch_page] * unused])
        self._rows = self._rows.stale()

    def _ids(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return ids(values, self.device)

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record()
        return event


@dataclass(frozen=True, eq=False)
class _RowsBatch:
    """The decode batch that was run last: what need not be made again while it stays the same."""

    slots: tuple[int, ...]
    slots_B: Tensor
    page_table_BP: Tensor

    def stale(self) -> _RowsBatch:
        return _RowsBatch((), self.slots_B[:0], self.page_table_BP[:0])


def _bytes_of_rows(hidden_ND: Tensor | None) -> list[bytes]:
    if hidden_ND is None:
        return []
    return [row.contiguous().view(torch.uint8).numpy().tobytes() for row in hidden_ND]
