"""One step as plain data: what a scheduler asks for and what the engine answers. No torch.

A slot is a row of the engine's static buffers (last token, position, page table, sampling). `open_slot` fills it when a sequence is
admitted, `close_slot` frees it; between them a decode step needs only (slot, position, a new page now and then), because the last token
stays on the device. That lets the host launch step N before it has read the tokens of step N-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from serving.core.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSpec:
    """What a slot starts with.

    `token_ids` are all tokens known so far (prompt, emitted, first token): penalties count them, and the last one is the input of the first
    decode row. `hidden` is the final hidden state [D] of the token before it (bytes in the model's dtype) for its MTP row; empty: none.
    `page_ids` are the pages known so far.
    """

    sampling: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    page_ids: list[int]
    hidden: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Tokens [start, start + len(token_ids)) of one sequence, attending to everything before them in `page_ids`.

    Rows of positions < store_from are computed but not stored (a cached prefix is never written again; its last token is recomputed where its
    hidden state is needed). `sample`: the chunk ends the prompt, so sample the token that follows into the slot.
    """

    slot: int
    token_ids: list[int]
    start: int
    store_from: int
    page_ids: list[int]
    sample: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRow:
    """One token of a running sequence: the slot's last token goes in at `position`, the sampled one becomes the slot's last token.

    With drafts, several: see StepPlan. `position` None: where the steps in flight leave the slot, which the device knows.
    `new_page_id` is appended to the slot's page table first.
    """

    slot: int
    position: int | None
    new_page_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Prefill chunks and decode rows of one step; a slot appears at most once.

    Each row drafts `num_drafts` tokens and computes them with its last one; it yields those that were accepted and one more.
    """

    chunks: tuple[PrefillChunk, ...] = ()
    rows: tuple[DecodeRow, ...] = ()
    num_drafts: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prefill_tokens + len(self.rows) * (1 + self.num_drafts)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What all ranks of a unit run in one step, whatever their own plans hold.

    `prefill_tokens`, `rows`: the most of any rank; where there are none of a kind, no rank runs that kind. A rank with fewer,
    or none, runs the same collectives. `num_micro_batches`: parts that each rank's tokens are computed in.
    """

    prefill_tokens: int = 0
    rows: int = 0
    num_micro_batches: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """One slot's new token. `hidden` is filled for a chunk that sampled, where the model has an MTP layer (bytes in the model's dtype)."""

    slot: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    hidden: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Tokens in the order chunks (those that sample), rows; those of a row in the order of its text, one more than drafts were accepted."""

    tokens: tuple[SampledToken, ...]


class Launched(Protocol):
    """A step in flight; opaque to everybody but the executor that made it."""

    @property
    def plan(self) -> StepPlan: ...


class Executor(Protocol):
    """The device behind a scheduler: real (serving.engine.runner) or simulated. Not thread-safe; owned by one step loop."""

    def open_slot(self, slot: int, spec: SlotSpec) -> None: ...

    def close_slot(self, slot: int) -> None: ...

    def launch(self, plan: StepPlan) -> Launched:
        """Queue the step and return without waiting for the device. At most two steps are in flight."""
        ...

    def settle(self, launched: Launched) -> StepResult:
        """Wait for the step and read its tokens back."""
        ...
