"""Decode rows where positions are on the device: from a plan's rows to a step with drafts, captured on a GPU, and its tokens.

What a step takes, by rows and by drafts, is measured once (`warm_up`), because what drafting is worth depends on it. Knows
slots, pages and sampling as the runner does; what the step computes is `speculative`'s.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.graphs import StepGraphs, decode_sizes
from serving.engine.plan import DecodeRow, SampledToken, StepPlan
from serving.engine.sampler import Logprobs, Sampler
from serving.engine.speculative import Drafted, Speculation
from serving.engine.staging import ids, to_host

# Logits of every captured size stay in memory: 2 GB of these at a vocabulary of 100,000.
_MOST_CAPTURED_TOKENS = 128
_TIMED_POSITION = 8
_NUM_TIMED = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftedStep:
    """The rows of a step in flight. Host tensors: `outcome_BX` as in `speculative.Drafted`; logprobs by row and draft."""

    outcome_BX: Tensor
    logprobs: tuple[Logprobs, ...]

    def tokens(self, plan: StepPlan) -> tuple[SampledToken, ...]:
        """What the rows of `plan` yield, once the step has run."""
        found = {row: of for each in self.logprobs for row, of in each.by_row().items()}
        num_each = plan.num_drafts + 1
        return tuple(
            SampledToken(slot=row.slot, token_id=token_id, logprobs=found.get(i * num_each + t))
            for i, (row, outcome) in enumerate(zip(plan.rows, self.outcome_BX.tolist(), strict=True))
            for t, token_id in enumerate(outcome[: outcome[-1] + 1])
        )


class DraftedRows:
    """Of one runner: `page_ids` by slot are its own, the last slot and `scratch_page` belong to nobody."""

    def __init__(
        self,
        speculation: Speculation,
        sampler: Sampler,
        page_ids: list[list[int]],
        *,
        scratch_page: int,
        most_drafts: int,
        device: torch.device,
    ) -> None:
        self._speculation = speculation
        self._sampler = sampler
        self._page_ids = page_ids
        self._scratch_slot = len(page_ids) - 1
        self._scratch_page = scratch_page
        self._device = device
        self._most_drafts = most_drafts
        self._graphs: list[StepGraphs] = []
        if device.type == "cuda":
            self._graphs = [self._make_graphs(number) for number in range(most_drafts + 1)]
        self._seconds: dict[int, list[tuple[int, float]]] = {}

    def warm_up(self, told: Callable[[str], None]) -> None:
        """Capture, and measure. In inference mode."""
        for number, graphs in enumerate(self._graphs):
            for size in reversed(graphs.sizes):
                told(f"capturing a decode step of {size} rows with {number} drafts")
                graphs.capture(size)
        told("timing decode steps with drafts and without")
        for number in range(self._most_drafts + 1):
            self._seconds[number] = [(size, self._time(size, number)) for size in self._sizes(number)]
        self._speculation.state.last_token_S.zero_()
        self._speculation.state.hidden_SD.zero_()

    def step_s(self, num_rows: int, num_drafts: int) -> float:
        """Seconds of a step, short contexts assumed; without end where nothing was captured for so many rows."""
        timed = self._seconds.get(num_drafts)
        if not timed or num_rows > timed[-1][0]:
            return float("inf") if num_drafts else 1.0
        return timed[bisect_left(timed, num_rows, key=lambda entry: entry[0])][1]

    def run(self, plan: StepPlan) -> DraftedStep:
        rows, num_drafts, num_rows = plan.rows, plan.num_drafts, len(plan.rows)
        slots = tuple(row.slot for row in rows)
        drafted = self._run(rows, num_drafts)
        outcome_BX, found = drafted.outcome_BX[:num_rows], list[Logprobs]()
        if not self._sampler.is_plain(slots):
            positions_B, drafts_BK = drafted.positions_B[:num_rows], drafted.drafts_BK[:num_rows]
            logits_NV = drafted.logits_NV[: num_rows * (num_drafts + 1)]
            tokens_BT, found = self._sampler.sample_drafted(slots, logits_NV, positions_B + 1, drafts_BK)
            slots_B, hidden_BTD = ids(slots, self._device), drafted.hidden_BTD[:num_rows]
            outcome_BX = self._speculation.accept(slots_B, positions_B, hidden_BTD, tokens_BT, drafts_BK)
        logprobs = tuple(each.moved(to_host) for each in found)
        return DraftedStep(outcome_BX=to_host(outcome_BX), logprobs=logprobs)

    def _run(self, rows: Sequence[DecodeRow], num_drafts: int) -> Drafted:
        graphs = self._graphs[num_drafts] if self._graphs else None
        size = graphs.size_for(len(rows)) if graphs is not None else None
        if graphs is not None and size is not None:
            return Drafted(*graphs.run(size, self._inputs(rows, size)))
        return self._body(num_drafts, ids(self._inputs(rows, len(rows)), self._device))

    def _body(self, num_drafts: int, inputs: Tensor) -> Drafted:
        slots_B, known_B, page_places_B, page_ids_B = inputs.view(4, -1).unbind()
        return self._speculation.step(num_drafts, slots_B, known_B, page_places_B, page_ids_B)

    def _inputs(self, rows: Sequence[DecodeRow], size: int) -> list[int]:
        """The integers of a step of `size` rows; those that are missing are nobody's. New pages are noted."""
        rest, spare = size - len(rows), self._speculation.state.page_table_SP.shape[1] - 1
        places, page_ids = [spare] * size, [self._scratch_page] * size
        for i, row in enumerate(rows):
            if row.new_page_id is not None:
                pages = self._page_ids[row.slot]
                places[i], page_ids[i] = len(pages), row.new_page_id
                pages.append(row.new_page_id)
        slots = [*(row.slot for row in rows), *[self._scratch_slot] * rest]
        known = [*(-1 if row.position is None else row.position for row in rows), *[0] * rest]
        return [*slots, *known, *places, *page_ids]

    def _make_graphs(self, num_drafts: int) -> StepGraphs:
        most = self._scratch_slot
        if num_drafts:
            most = max(1, min(most, _MOST_CAPTURED_TOKENS // (num_drafts + 1)))
        return StepGraphs(
            lambda _, inputs: self._body(num_drafts, inputs),
            sizes=decode_sizes(most),
            idle=lambda size: self._inputs([], size),
            device=self._device,
        )

    def _sizes(self, num_drafts: int) -> list[int]:
        """Numbers of rows that are measured."""
        if self._graphs:
            return self._graphs[num_drafts].sizes
        most = self._scratch_slot
        return [size for size in decode_sizes(most) if size & (size - 1) == 0 or size == most]

    def _time(self, num_rows: int, num_drafts: int) -> float:
        """A step of different tokens, so that they meet different experts, in slots without pages."""
        rows = [DecodeRow(slot=slot, position=_TIMED_POSITION) for slot in range(num_rows)]
        tokens = torch.arange(num_rows, device=self._device) % self._sampler.vocab_size
        self._speculation.state.last_token_S[:num_rows] = tokens
        best_s = float("inf")
        for _ in range(_NUM_TIMED):
            begin_s = time.perf_counter()
            self._run(rows, num_drafts)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            best_s = min(best_s, time.perf_counter() - begin_s)
        return best_s
