"""The runner: turns a step's plan into tensors, runs the model, samples, and hands the tokens back a step later.

    open_slot -> launch ... launch -> close_slot        launch -> settle, in order, at most two launched and not settled

Between steps a sequence lives in its slot: last token, last hidden state (for the MTP layer's rows) and page table stay on
the device, so `launch` reads nothing back. On a CPU `launch` computes before it returns; on a GPU decode rows are a
captured graph. Prefill chunks are run by `chunks`, rows with drafts by `drafted`. Must not know requests, jobs, or who decides what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvcache.layout import PAGE_TOKENS
from serving.engine.chunks import Chunks, PrefillModel
from serving.engine.drafted import DraftedRows, DraftedStep
from serving.engine.graphs import StepGraphs, decode_sizes
from serving.engine.plan import DecodeRow, Launched, SampledToken, SlotSpec, StepPlan, StepResult, StepShape
from serving.engine.sampler import Logprobs, Sampler
from serving.engine.speculative import SlotState, Speculation
from serving.engine.split import split_rows
from serving.engine.staging import ids, to_device, to_host
from serving.kernels import sampling
from serving.kernels.packed import PIECES, row_pieces
from serving.kernels.step_rows import StepRows, step_rows
from serving.model.batch import DecodeBatch
from serving.model.heap import blocks_returned

_MAX_IN_FLIGHT = 2


class Model(PrefillModel, Protocol):
    """What the runner needs of `serving.model.deepseek_v3.DeepseekV3`."""

    @property
    def dtype(self) -> torch.dtype: ...

    def decode(self, batch: DecodeBatch, kv_pool: Tensor) -> Tensor: ...

    def decode_each(self, batches: Sequence[DecodeBatch], kv_pool: Tensor) -> list[Tensor]: ...

    def fixed_rows(self, num_rows: int) -> AbstractContextManager[None]: ...

    def stop_compiling(self) -> None: ...


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
    `split_rows`: captured decode steps of so many rows or more are two micro-batches, on all ranks of a unit; 0: none.
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
        split_rows: int = 0,
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
        self._chunks = Chunks(model, kv_pool, self._page_table_SP, self._hidden_SD)
        self._split_rows = split_rows
        self._decode_graphs: StepGraphs | None = None
        if device.type == "cuda" and self._drafted is None:
            self._decode_graphs = StepGraphs(
                self._captured_decode, sizes=decode_sizes(self._scratch_slot), idle=self._idle_rows, device=device
            )
        self._num_in_flight = 0

    def warm_up(self, *, max_batched_tokens: int, decodes: bool, told: Callable[[str], None] = lambda _: None) -> None:
        """Compile what steps will run, and on a GPU capture them, so that no request waits for it. `told` hears what comes next.

        `max_batched_tokens`: of a prefill step; 0: there are none. `decodes`: whether there are decode steps.
        """
        # What is compiled stays: beside each other on pages of its own, not in the heap between activations that go.
        with torch.inference_mode(), blocks_returned():
            if max_batched_tokens:
                self._chunks.warm_up(max_batched_tokens, told, packed=decodes)
            if decodes and self._drafted is not None:
                self._drafted.warm_up(told)
            elif decodes and self._decode_graphs is not None:
                for size in reversed(self._decode_graphs.sizes):
                    told(f"capturing a decode step of {size} rows")
                    self._decode_graphs.capture(size)
            elif decodes:
                self._compile_decode(told)
            if self.device.type == "cuda":
                told("compiling the sampler")
                # A row alone keeps the stride of the model's vocabulary, several get that of the tokenizer's: other code.
                for num_rows in (1, 2):
                    self.sampler.warm_up(self.model.logits(self._hidden_SD[:num_rows]))
        self.model.stop_compiling()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _compile_decode(self, told: Callable[[str], None]) -> None:
        for size in PIECES:
            if size <= row_pieces(self._scratch_slot)[0]:
                told(f"compiling a decode step of {size} rows")
                slots_B, positions_B, row_ids_B = self._ids(self._idle_rows(size)).view(3, size).unbind()
                self._decode_rows(slots_B, positions_B, row_ids_B, self._page_table_SP.index_select(0, slots_B))

    def release(self) -> None:
        """The captured steps are let go, and with them the groups that they name."""
        if self._decode_graphs is not None:
            self._decode_graphs.release()
        self._chunks.release()

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
    def launch(self, plan: StepPlan, shape: StepShape | None = None) -> LaunchedStep:
        """`shape`: what all ranks of the unit run, whether the plan has tokens of that kind or not; None: what the plan has."""
        if shape is None:
            shape = StepShape(prefill_tokens=plan.num_prefill_tokens, rows=len(plan.rows))
        assert self._num_in_flight < _MAX_IN_FLIGHT, "settle a step before launching a third"
        self._num_in_flight += 1
        logits: list[Tensor] = []
        slots: list[int] = []
        positions: list[int] = []
        hidden_ND: Tensor | None = None
        greedy_B: Tensor | None = None
        for chunk in plan.chunks:
            if chunk.page_ids != self._page_ids[chunk.slot]:
                self._set_pages(chunk.slot, chunk.page_ids)
        ended = self._chunks.run(plan.chunks, shape.num_micro_batches) if shape.prefill_tokens else None
        if ended is not None:
            slots += ended.slots
            positions += ended.positions
            logits.append(ended.logits_NV)
            hidden_ND = ended.hidden_ND
        if shape.rows and self._drafted is None:
            at = _positions_of(plan)
            logits_BV, greedy_B = self._run_rows(plan.rows, at, shape)
            if plan.rows:
                slots += [row.slot for row in plan.rows]
                positions += [position + 1 for position in at]
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

    def _run_rows(
        self, rows: tuple[DecodeRow, ...], positions: list[int], shape: StepShape
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, V], and their argmax [B] where the step has it. All ranks replay the captured step for the most rows of any."""
        batch_rows = self._rows_of(rows)
        row_ids = [
            self._page_ids[row.slot][position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
            for row, position in zip(rows, positions, strict=True)
        ]
        if self._decode_graphs is not None:
            size = self._decode_graphs.size_for(shape.rows)
            assert size is not None, "as many rows as slots are captured"
            rest = size - len(rows)
            values = [*batch_rows.slots, *[self._scratch_slot] * rest, *positions, *[0] * rest]
            values += [*row_ids, *[self._scratch_page * PAGE_TOKENS] * rest]
            logits_BV, greedy_B = self._decode_graphs.run(size, values)
            return logits_BV[: len(rows)], greedy_B[: len(rows)]
        positions_B, row_ids_B = self._ids((positions, row_ids)).unbind()
        parts = split_rows(positions, shape.num_micro_batches)
        return self._decode_rows(batch_rows.slots_B, positions_B, row_ids_B, batch_rows.page_table_BP, parts), None

    def _idle_rows(self, size: int) -> list[int]:
        """The integers of a captured decode step without rows."""
        return [*[self._scratch_slot] * size, *[0] * size, *[self._scratch_page * PAGE_TOKENS] * size]

    def _captured_decode(self, size: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and their argmax, noted as the slots' last tokens."""
        slots_B, positions_B, row_ids_B = inputs.view(3, size).unbind()
        # The page of the token itself is noted; those before it were by earlier steps.
        rows = step_rows(self._page_table_SP, self._last_token_S, slots_B, positions_B, row_ids_B)
        parts = [slice(0, size)]
        if 0 < self._split_rows <= size:
            parts = [slice(0, -(-size // 2)), slice(-(-size // 2), size)]
        with self.model.fixed_rows(parts[0].stop):
            logits_BV = self._decode(slots_B, positions_B, row_ids_B, rows, parts)
        greedy_B = sampling.argmax(logits_BV[:, : self.sampler.vocab_size])
        self._last_token_S.index_copy_(0, slots_B, greedy_B)
        return logits_BV, greedy_B

    def _decode_rows(
        self,
        slots_B: Tensor,
        positions_B: Tensor,
        row_ids_B: Tensor,
        page_table_BP: Tensor,
        parts: Sequence[slice] = (slice(None),),
    ) -> Tensor:
        """Logits [B, V], not captured: the page table is there. `parts`: the rows of each micro-batch."""
        rows = StepRows(page_table_BP, self._last_token_S[slots_B], positions_B + 1)
        return self._decode(slots_B, positions_B, row_ids_B, rows, parts)

    def _decode(
        self,
        slots_B: Tensor,
        positions_B: Tensor,
        row_ids_B: Tensor,
        rows: StepRows,
        parts: Sequence[slice] = (slice(None),),
    ) -> Tensor:
        batch = DecodeBatch(
            token_ids_B=rows.token_ids_B,
            positions_B=positions_B,
            row_ids_B=row_ids_B,
            page_table_BP=rows.page_table_BP,
            context_lens_B=rows.context_lens_B,
        )
        if len(parts) == 1:
            hidden_BD = self.model.decode(batch, self.kv_pool)
        else:
            hidden_BD = torch.cat(self.model.decode_each([_part(batch, part) for part in parts], self.kv_pool))
        if self.model.mtp is not None:
            previous_BD = self._hidden_SD.index_select(0, slots_B)
            self.model.mtp.store_rows(previous_BD, rows.token_ids_B, positions_B - 1, row_ids_B, self.kv_pool)
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
            width = 0
            if self._decode_graphs is None:
                width = max((len(self._page_ids[slot]) for slot in slots), default=1)
            self._rows = _RowsBatch(slots, slots_B, self._page_table_SP[:, :width].index_select(0, slots_B))
        return self._rows

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


def _part(batch: DecodeBatch, rows: slice) -> DecodeBatch:
    return DecodeBatch(
        token_ids_B=batch.token_ids_B[rows],
        positions_B=batch.positions_B[rows],
        row_ids_B=batch.row_ids_B[rows],
        page_table_BP=batch.page_table_BP[rows],
        context_lens_B=batch.context_lens_B[rows],
    )


def _positions_of(plan: StepPlan) -> list[int]:
    assert plan.num_drafts == 0, "this engine was built without drafts"
    positions = [row.position for row in plan.rows if row.position is not None]
    assert len(positions) == len(plan.rows), "without drafts a row's position is known"
    return positions


def _bytes_of_rows(hidden_ND: Tensor | None) -> list[bytes]:
    if hidden_ND is None:
        return []
    return [row.contiguous().view(torch.uint8).numpy().tobytes() for row in hidden_ND]
