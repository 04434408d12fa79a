"""The runner: turns a step's plan into tensors, runs the model, samples, and hands the tokens back a step later.

    open_slot -> launch ... launch -> close_slot        launch -> settle, in order, at most two launched and not settled

Between steps a sequence lives in its slot: last token, last hidden state (for the MTP layer's rows) and page table stay on
the device, so `launch` reads nothing back. On a CPU `launch` computes before it returns; on a GPU decode rows are a
captured graph. Must not know requests, jobs, or who decides what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvcache.layout import PAGE_TOKENS, num_pages_for
from serving.engine.drafted import DraftedRows, DraftedStep
from serving.engine.graphs import StepGraphs, decode_sizes, prefill_sizes
from serving.engine.plan import DecodeRow, Launched, PrefillChunk, SampledToken, SlotSpec, StepPlan, StepResult
from serving.engine.sampler import Logprobs, Sampler
from serving.engine.speculative import DraftLayer, SlotState, Speculation
from serving.engine.staging import ids, to_device, to_host
from serving.kernels import sampling
from serving.kernels.packed import PIECES, row_pieces
from serving.model.batch import DecodeBatch, PrefillBatch, SeqChunk
from serving.model.heap import blocks_returned

_MAX_IN_FLIGHT = 2
# Larger prefill steps keep the device busy for longer than the host needs to launch their parts one by one.
_MOST_CAPTURED_TOKENS = 4096
_MOST_CAPTURED_CHUNKS = 16


class Model(Protocol):
    """What the runner needs of `serving.model.deepseek_v3.DeepseekV3`."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def mtp(self) -> DraftLayer | None: ...

    @property
    def captures_prefill(self) -> bool: ...

    def prefill(self, batch: PrefillBatch, kv_pool: Tensor) -> Tensor: ...

    def decode(self, batch: DecodeBatch, kv_pool: Tensor) -> Tensor: ...

    def logits(self, hidden_ND: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class LaunchedStep:
    """A step in flight. Host tensors; they hold what they should once `done` has happened (None: already).

    `drafted`: the plan's rows, where positions are on the device; the rest is then of its chunks alone.
    """

    plan: StepPlan
    slots: tuple[int, ...] = ()
    token_ids: Tensor | None = None
    logprobs: Logprobs | None = None
    hidden_ND: Tensor | None = None
    drafted: DraftedStep | None = None
    done: torch.cuda.Event | None = None


class Runner:
    """The real Executor over one model and one pool `[num_pages + 1, layers, 64, row]`, whose last page is scratch.

    `max_pages`: longest page table of a slot. `vocab_size`: the tokenizer's; ids from there on are never drawn.
    Pages beyond a sequence's own are never read; unused entries of the page table name the scratch page.
    `draft_tokens`: the most drafts that a plan may ask for; above 0 the device alone may know a row's position.
    """

    def __init__(
        self,
        model: Model,
        kv_pool: Tensor,
        *,
        num_slots: int,
        max_pages: int,
        vocab_size: int,
        hidden_size: int,
        draft_tokens: int = 0,
    ) -> None:
        device = kv_pool.device
        self.model = model
        self.kv_pool = kv_pool
        self.device = device
        self.sampler = Sampler(num_slots, vocab_size, device)
        self._scratch_page = kv_pool.shape[0] - 1
        # One slot more than there are, for rows that belong to nobody.
        self._scratch_slot, num_slots = num_slots, num_slots + 1
        self._page_ids: list[list[int]] = [[] for _ in range(num_slots)]
        page_dtype = torch.int64 if device.type == "cpu" else torch.int32
        # With drafts a column more than a text has pages, for what is drafted past its end.
        max_pages += draft_tokens > 0
        self._page_table_SP = torch.full((num_slots, max_pages), self._scratch_page, dtype=page_dtype, device=device)
        self._last_token_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._hidden_SD = torch.zeros(num_slots, hidden_size, dtype=model.dtype, device=device)
        self._rows = _RowsBatch((), self._last_token_S[:0], self._page_table_SP[:0])
        self._drafted = self._make_drafted(draft_tokens) if draft_tokens else None
        self._decode_graphs: StepGraphs | None = None
        self._prefill_graphs: StepGraphs | None = None
        if device.type == "cuda" and self._drafted is None:
            self._decode_graphs = StepGraphs(
                self._captured_decode, sizes=decode_sizes(self._scratch_slot), idle=self._idle_rows, device=device
            )
        if device.type == "cuda" and model.captures_prefill:
            sizes = prefill_sizes(_MOST_CAPTURED_TOKENS)
            self._prefill_graphs = StepGraphs(
                self._captured_prefill, sizes=sizes, idle=self._idle_chunks, device=device
            )
        self._num_in_flight = 0

    def warm_up(self, *, max_batched_tokens: int, decodes: bool, told: Callable[[str], None] = lambda _: None) -> None:
        """Compile what steps will run, and on a GPU capture them, so that no request waits for it. `told` hears what comes next.

        `max_batched_tokens`: of a prefill step; 0: there are none. `decodes`: whether there are decode steps.
        """
        # What is compiled stays: beside each other on pages of its own, not in the heap between activations that go.
        with torch.inference_mode(), blocks_returned():
            if max_batched_tokens:
                self._compile_prefill(max_batched_tokens, told, packed=decodes)
                self._capture_prefill(max_batched_tokens, told)
            if decodes and self._drafted is not None:
                self._drafted.warm_up(told)
            elif decodes and self._decode_graphs is not None:
                for size in reversed(self._decode_graphs.sizes):
                    told(f"capturing a decode step of {size} rows")
                    self._decode_graphs.capture(size)
            elif decodes:
                self._compile_decode(told)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _capture_prefill(self, max_batched_tokens: int, told: Callable[[str], None]) -> None:
        """Every size that a step of so many tokens may take."""
        if self._prefill_graphs is None:
            return
        most = self._prefill_graphs.size_for(max_batched_tokens) or self._prefill_graphs.sizes[-1]
        for size in reversed(self._prefill_graphs.sizes):
            if size <= most:
                told(f"capturing a prefill step of {size} tokens")
                self._prefill_graphs.capture(size)

    def _compile_prefill(self, max_batched_tokens: int, told: Callable[[str], None], *, packed: bool) -> None:
        """Steps that are not captured: many tokens, or a part of the context cached; and each number of rows that has code of its own."""
        most = self._page_table_SP.shape[1] * PAGE_TOKENS
        if self.device.type == "cuda":
            small: tuple[int, ...] = (1, 2, 16, 32, PAGE_TOKENS)
        else:
            # On a CPU packed weights have code for each number of rows, plain ones have none.
            small = PIECES if packed else (PAGE_TOKENS,)
        for num_tokens in sorted({max_batched_tokens, *(size for size in small if size < max_batched_tokens)}):
            told(f"compiling prefill of {num_tokens} tokens")
            end = min(PAGE_TOKENS + num_tokens, most)
            chunk = PrefillChunk(
                slot=self._scratch_slot,
                token_ids=[0] * (end - PAGE_TOKENS),
                start=PAGE_TOKENS,
                store_from=end,
                page_ids=[self._scratch_page] * num_pages_for(end),
                sample=True,
            )
            if chunk.token_ids:
                last_ND, _ = self._run_chunks((chunk,))
                sampling.argmax(self.model.logits(last_ND))
        self._set_pages(self._scratch_slot, [])

    def _compile_decode(self, told: Callable[[str], None]) -> None:
        for size in PIECES:
            if size <= row_pieces(self._scratch_slot)[0]:
                told(f"compiling a decode step of {size} rows")
                slots_B, positions_B, row_ids_B = self._ids(self._idle_rows(size)).view(3, size).unbind()
                self._decode(slots_B, positions_B, row_ids_B, self._page_table_SP.index_select(0, slots_B))

    def open_slot(self, slot: int, spec: SlotSpec) -> None:
        self._set_pages(slot, spec.page_ids)
        self.sampler.open(slot, spec.sampling, spec.token_ids, spec.num_prompt_tokens)
        # An assignment would copy the number from the host and wait for the step in flight.
        self._last_token_S[slot].fill_(spec.token_ids[-1])
        if spec.hidden:
            assert self.model.mtp is not None, "a hidden state came for a model without MTP layer"
            hidden_D = torch.frombuffer(bytearray(spec.hidden), dtype=self._hidden_SD.dtype)
            self._hidden_SD[slot] = to_device(hidden_D, self.device)

    def close_slot(self, slot: int) -> None:
        self.sampler.close(slot)
        self._page_ids[slot] = []
        self._rows = self._rows.stale()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        assert self._num_in_flight < _MAX_IN_FLIGHT, "settle a step before launching a third"
        self._num_in_flight += 1
        logits: list[Tensor] = []
        slots: list[int] = []
        positions: list[int] = []
        hidden_ND: Tensor | None = None
        greedy_B: Tensor | None = None
        if plan.chunks:
            last_ND, logits_NV = self._run_chunks(plan.chunks)
            ended = [i for i, chunk in enumerate(plan.chunks) if chunk.sample]
            slots += [plan.chunks[i].slot for i in ended]
            positions += [plan.chunks[i].start + len(plan.chunks[i].token_ids) for i in ended]
            if ended:
                every = len(ended) == len(plan.chunks)
                hidden_ND = last_ND if every else last_ND[self._ids(ended)]
                if logits_NV is None:
                    logits.append(self.model.logits(hidden_ND))
                else:
                    logits.append(logits_NV if every else logits_NV[self._ids(ended)])
        if plan.rows and self._drafted is None:
            at = _positions_of(plan)
            slots += [row.slot for row in plan.rows]
            positions += [position + 1 for position in at]
            logits_BV, greedy_B = self._run_rows(plan.rows, at)
            logits.append(logits_BV)
        launched = LaunchedStep(plan=plan)
        if slots:
            launched = self._sample(plan, tuple(slots), positions, logits, greedy_B, hidden_ND)
        if plan.rows and self._drafted is not None:
            launched = replace(launched, drafted=self._drafted.run(plan))
        return replace(launched, done=self._mark())

    def settle(self, launched: Launched) -> StepResult:
        assert isinstance(launched, LaunchedStep), "a step settles where it was launched"
        if launched.done is not None:
            launched.done.synchronize()
        self._num_in_flight -= 1
        drafted = launched.drafted.tokens(launched.plan) if launched.drafted is not None else ()
        if launched.token_ids is None:
            return StepResult(tokens=drafted)
        logprobs = launched.logprobs.by_row() if launched.logprobs is not None else {}
        hidden = _bytes_of_rows(launched.hidden_ND)
        sampled = tuple(
            SampledToken(
                slot=slot, token_id=token_id, logprobs=logprobs.get(i), hidden=hidden[i] if i < len(hidden) else b""
            )
            for i, (slot, token_id) in enumerate(zip(launched.slots, launched.token_ids.tolist(), strict=True))
        )
        return StepResult(tokens=sampled + drafted)

    def step_s(self, num_rows: int, num_drafts: int) -> float:
        """Seconds of a decode step of so many rows and drafts of each, as `warm_up` measured them with short contexts."""
        assert self._drafted is not None, "an engine without drafts measures nothing"
        return self._drafted.step_s(num_rows, num_drafts)

    def _make_drafted(self, draft_tokens: int) -> DraftedRows:
        assert self.model.mtp is not None, "drafts need the MTP layer"
        state = SlotState(
            last_token_S=self._last_token_S,
            hidden_SD=self._hidden_SD,
            positions_S=torch.zeros_like(self._last_token_S),
            page_table_SP=self._page_table_SP,
        )
        vocab_size = self.sampler.vocab_size
        return DraftedRows(
            Speculation(self.model, self.model.mtp, self.kv_pool, state, vocab_size=vocab_size),
            self.sampler,
            self._page_ids,
            scratch_page=self._scratch_page,
            most_drafts=draft_tokens,
            device=self.device,
        )

    def _sample(
        self,
        plan: StepPlan,
        slots: tuple[int, ...],
        positions: list[int],
        logits: list[Tensor],
        greedy_B: Tensor | None,
        hidden_ND: Tensor | None,
    ) -> LaunchedStep:
        """`greedy_B`: the best token of each row where the step has chosen and noted it already; it holds if nobody asks for more."""
        logprobs: Logprobs | None = None
        if greedy_B is not None and len(logits) == 1 and self.sampler.is_plain(slots):
            token_ids_B = greedy_B
        else:
            logits_BV = logits[0] if len(logits) == 1 else torch.cat(logits)
            token_ids_B, logprobs = self.sampler.sample(slots, logits_BV, positions)
            slots_B = self._rows.slots_B if slots == self._rows.slots else self._ids(slots)
            self._last_token_S.index_copy_(0, slots_B, token_ids_B)
        wants_hidden = hidden_ND is not None and self.model.mtp is not None
        return LaunchedStep(
            plan=plan,
            slots=slots,
            token_ids=to_host(token_ids_B),
            logprobs=logprobs.moved(to_host) if logprobs is not None else None,
            hidden_ND=to_host(hidden_ND) if wants_hidden and hidden_ND is not None else None,
        )

    def _run_chunks(self, chunks: tuple[PrefillChunk, ...]) -> tuple[Tensor, Tensor | None]:
        """Hidden states [N, D] of the last token of each chunk, and their logits [N, V] where the step was captured with them."""
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
        slots = [chunk.slot for chunk in chunks]
        starts = [*(seq.offset for seq in seqs), len(token_ids)]
        replayed = self._replayed_prefill(token_ids, positions, row_ids, slots, starts, chunks)
        if replayed is not None:
            last_ND, logits_NV = replayed
        else:
            token_ids_T, positions_T, row_ids_T = self._ids((token_ids, positions, row_ids)).unbind()
            batch = PrefillBatch(
                token_ids_T=token_ids_T,
                positions_T=positions_T,
                row_ids_T=row_ids_T,
                starts=self._ids(starts).to(torch.int32),
                seqs=tuple(seqs),
            )
            first_N, last_N, slots_N = self._ids((starts[:-1], [end - 1 for end in starts[1:]], slots)).unbind()
            last_ND, logits_NV = self._prefill(batch, first_N, last_N, slots_N), None
        if self.model.mtp is not None:
            for chunk in chunks:
                if chunk.start == 0 and chunk.store_from == 0:
                    # The layout's zero row: a page is a function of its tokens, to the last byte.
                    self.kv_pool[chunk.page_ids[0], -1, 0] = 0
        return last_ND, logits_NV

    def _replayed_prefill(
        self,
        token_ids: list[int],
        positions: list[int],
        row_ids: list[int],
        slots: list[int],
        starts: list[int],
        chunks: tuple[PrefillChunk, ...],
    ) -> tuple[Tensor, Tensor] | None:
        """None: not a step that is captured."""
        graphs, num_tokens, num_chunks = self._prefill_graphs, len(token_ids), len(chunks)
        if graphs is None or num_chunks > _MOST_CAPTURED_CHUNKS or any(chunk.start for chunk in chunks):
            return None
        size = graphs.captured_for(num_tokens)
        if size is None:
            return None
        rest, missing = size - num_tokens, _MOST_CAPTURED_CHUNKS - num_chunks
        values = [*token_ids, *[0] * rest, *positions, *[0] * rest]
        values += [*row_ids, *[self._scratch_page * PAGE_TOKENS] * rest]
        # Tokens of nobody are a sequence of their own, the last; chunks that are missing say what the first one says.
        values += [*starts, *[num_tokens] * missing, size]
        values += [*starts[:-1], *[0] * missing, *(end - 1 for end in starts[1:]), *[starts[1] - 1] * missing]
        values += [*slots, *[slots[0]] * missing]
        last_ND, logits_NV = graphs.run(size, values)
        return last_ND[:num_chunks], logits_NV[:num_chunks]

    def _idle_chunks(self, size: int) -> list[int]:
        """The integers of a captured prefill step in which everything is nobody's."""
        chunks = _MOST_CAPTURED_CHUNKS
        rows = [self._scratch_page * PAGE_TOKENS] * size
        return [
            *[0] * (2 * size),
            *rows,
            0,
            *[size] * (chunks + 1),
            *[0] * (2 * chunks),
            *[self._scratch_slot] * chunks,
        ]

    def _captured_prefill(self, size: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        chunks = _MOST_CAPTURED_CHUNKS
        parts = inputs.split([size, size, size, chunks + 2, chunks, chunks, chunks])
        token_ids_T, positions_T, row_ids_T, starts, first_N, last_N, slots_N = parts
        batch = PrefillBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            row_ids_T=row_ids_T,
            starts=starts.to(torch.int32),
            seqs=(),
        )
        last_ND = self._prefill(batch, first_N, last_N, slots_N)
        return last_ND, self.model.logits(last_ND)

    def _prefill(self, batch: PrefillBatch, first_N: Tensor, last_N: Tensor, slots_N: Tensor) -> Tensor:
        """Hidden states [N, D] of the last tokens. int64 [N]: where each chunk begins and ends in the batch, and its slot."""
        hidden_TD = self.model.prefill(batch, self.kv_pool)
        last_ND = hidden_TD.index_select(0, last_N)
        if self.model.mtp is not None:
            self._store_mtp_chunks(self.model.mtp, batch, hidden_TD, last_ND, first_N, slots_N)
        return last_ND

    def _store_mtp_chunks(
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
        mtp.store_rows(previous_TD, batch.token_ids_T, positions_T, row_ids_T, self.kv_pool)

    def _run_rows(self, rows: tuple[DecodeRow, ...], positions: list[int]) -> tuple[Tensor, Tensor | None]:
        """Logits [B, V], and their argmax [B] where the step has it."""
        batch_rows = self._rows_of(rows)
        row_ids = [
            self._page_ids[row.slot][position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
            for row, position in zip(rows, positions, strict=True)
        ]
        if self._decode_graphs is not None:
            size = self._decode_graphs.size_for(len(rows))
            assert size is not None, "as many rows as slots are captured"
            rest = size - len(rows)
            values = [*batch_rows.slots, *[self._scratch_slot] * rest, *positions, *[0] * rest]
            values += [*row_ids, *[self._scratch_page * PAGE_TOKENS] * rest]
            logits_BV, greedy_B = self._decode_graphs.run(size, values)
            return logits_BV[: len(rows)], greedy_B[: len(rows)]
        positions_B, row_ids_B = self._ids((positions, row_ids)).unbind()
        return self._decode(batch_rows.slots_B, positions_B, row_ids_B, batch_rows.page_table_BP), None

    def _idle_rows(self, size: int) -> list[int]:
        """The integers of a captured decode step without rows."""
        return [*[self._scratch_slot] * size, *[0] * size, *[self._scratch_page * PAGE_TOKENS] * size]

    def _captured_decode(self, size: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and their argmax, noted as the slots' last tokens."""
        slots_B, positions_B, row_ids_B = inputs.view(3, size).unbind()
        # The page of the token itself; those before it were written by earlier steps.
        pages_B = (row_ids_B // PAGE_TOKENS).to(self._page_table_SP.dtype)
        self._page_table_SP.index_put_((slots_B, positions_B // PAGE_TOKENS), pages_B)
        # A few rows are picked several times as fast by indices as by `index_select`.
        page_table_BP = self._page_table_SP[slots_B]
        logits_BV = self._decode(slots_B, positions_B, row_ids_B, page_table_BP)
        greedy_B = sampling.argmax(logits_BV[:, : self.sampler.vocab_size])
        self._last_token_S.index_copy_(0, slots_B, greedy_B)
        return logits_BV, greedy_B

    def _decode(self, slots_B: Tensor, positions_B: Tensor, row_ids_B: Tensor, page_table_BP: Tensor) -> Tensor:
        token_ids_B = self._last_token_S[slots_B]
        batch = DecodeBatch(
            token_ids_B=token_ids_B,
            positions_B=positions_B,
            row_ids_B=row_ids_B,
            page_table_BP=page_table_BP,
            context_lens_B=positions_B + 1,
        )
        hidden_BD = self.model.decode(batch, self.kv_pool)
        if self.model.mtp is not None:
            previous_BD = self._hidden_SD.index_select(0, slots_B)
            self.model.mtp.store_rows(previous_BD, token_ids_B, positions_B - 1, row_ids_B, self.kv_pool)
            self._hidden_SD.index_copy_(0, slots_B, hidden_BD)
        return self.model.logits(hidden_BD)

    def _rows_of(self, rows: tuple[DecodeRow, ...]) -> _RowsBatch:
        """Slots and page tables of the batch, made anew only when a sequence joined, left or got a page."""
        slots = tuple(row.slot for row in rows)
        changed = slots != self._rows.slots
        for row in rows:
            if row.new_page_id is not None:
                pages = self._page_ids[row.slot]
                # A captured step writes it itself.
                if self._decode_graphs is None:
                    self._page_table_SP[row.slot, len(pages)] = row.new_page_id
                    changed = True
                pages.append(row.new_page_id)
        if changed:
            slots_B = self._ids(slots)
            width = 0 if self._decode_graphs is not None else max(len(self._page_ids[slot]) for slot in slots)
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
        self._page_table_SP[slot] = self._ids([*page_ids, *[self._scratch_page] * unused]).to(self._page_table_SP.dtype)
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


def _positions_of(plan: StepPlan) -> list[int]:
    assert plan.num_drafts == 0, "this engine was built without drafts"
    positions = [row.position for row in plan.rows if row.position is not None]
    assert len(positions) == len(plan.rows), "without drafts a row's position is known"
    return positions


def _bytes_of_rows(hidden_ND: Tensor | None) -> list[bytes]:
    if hidden_ND is None:
        return []
    return [row.contiguous().view(torch.uint8).numpy().tobytes() for row in hidden_ND]
