"""The sampler: what each slot asked for, and the tokens of one step's rows. Everything stays on the device.

A slot is opened with its parameters and the tokens so far, and closed. What a batch of slots needs is worked out once and
kept while the batch stays the same (`Recipe`); a batch of greedy rows without extras costs one argmax. Slots with
penalties own a row of the count tables. Must not know where logits come from, nor anything of pages or schedulers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from serving.core.request import SamplingParams, TokenLogprobs
from serving.engine.counts import CountTables
from serving.engine.recipe import (
    Draws,
    Penalties,
    Recipe,
    SlotBias,
    WantedLogprobs,
    has_penalties,
    make_recipe,
    make_slot_bias,
)
from serving.engine.staging import ids
from serving.kernels import sampling as ops


@dataclass(frozen=True, kw_only=True, eq=False)
class Logprobs:
    """Of the rows that asked: `rows[i]` of the batch wanted `num_top[i]` alternatives. Tensors [N], [N, K], [N, K]."""

    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    chosen_N: Tensor
    top_ids_NK: Tensor
    top_NK: Tensor

    def moved(self, move: Callable[[Tensor], Tensor]) -> Logprobs:
        return replace(self, chosen_N=move(self.chosen_N), top_ids_NK=move(self.top_ids_NK), top_NK=move(self.top_NK))

    def by_row(self) -> dict[int, TokenLogprobs]:
        """Host tensors only."""
        chosen, top_ids, top = self.chosen_N.tolist(), self.top_ids_NK.tolist(), self.top_NK.tolist()
        return {
            row: TokenLogprobs(chosen[i], top_ids[i][:num], top[i][:num])
            for i, (row, num) in enumerate(zip(self.rows, self.num_top, strict=True))
        }


class Sampler:
    """Draws tokens below `vocab_size` (the tokenizer's size: ids above it stand for nothing) for up to `num_slots` slots."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._params: list[SamplingParams | None] = [None] * num_slots
        self._biases: list[SlotBias | None] = [None] * num_slots
        self._counts = CountTables(vocab_size, device)
        self._recipes: dict[tuple[int, ...], Recipe] = {}

    def open(self, slot: int, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        self._params[slot] = params
        self._biases[slot] = make_slot_bias(params, self.vocab_size, self.device)
        self._counts.close(slot)
        if has_penalties(params):
            self._counts.open(slot, token_ids, num_prompt_tokens)
        self._recipes.clear()

    def close(self, slot: int) -> None:
        self._params[slot] = self._biases[slot] = None
        self._counts.close(slot)
        self._recipes.clear()

    def is_plain(self, slots: tuple[int, ...]) -> bool:
        """Whether the tokens of these slots are the argmax of their logits and nothing else is asked for."""
        return self._recipe(slots).plain

    def sample(
        self,
        slots: tuple[int, ...],
        logits_BV: Tensor,
        positions: Sequence[int] | Tensor,
        counted_B: Tensor | None = None,
    ) -> tuple[Tensor, Logprobs | None]:
        """Token ids int64 [B], and logprobs where asked. fp32 or bf16 logits [B, >= vocab_size], which may be overwritten.

        `positions`: index of the token to be drawn in its sequence (int64 [B] where only the device knows it); with the
        seed it decides the random number. `counted_B` bool: whose token penalties will count from now on; None: all.
        """
        recipe = self._recipe(slots)
        logits_BV = logits_BV[:, : self.vocab_size]
        if recipe.plain:
            return ops.argmax(logits_BV), None
        logits_BV = logits_BV.to(torch.float32)
        if recipe.bias is not None:
            logits_BV.index_put_(
                (recipe.bias.rows, recipe.bias.token_ids), recipe.bias.values.to(logits_BV.dtype), accumulate=True
            )
        if recipe.penalties is not None:
            self._penalise(logits_BV, recipe.penalties)
        token_ids_B = ops.argmax(logits_BV) if recipe.draws is None else self._draw(logits_BV, positions, recipe.draws)
        if recipe.penalties is not None:
            rows_N = recipe.penalties.rows
            counted_N = None if counted_B is None else counted_B.index_select(0, rows_N)
            self._counts.add(recipe.penalties.table_rows, token_ids_B.index_select(0, rows_N), counted_N)
        return token_ids_B, _logprobs(logits_BV, token_ids_B, recipe.logprobs)

    def sample_drafted(
        self, slots: tuple[int, ...], logits_NV: Tensor, positions_B: Tensor, drafts_BK: Tensor
    ) -> tuple[Tensor, list[Logprobs]]:
        """Token ids int64 [B, T], T = K + 1, for as many positions of each slot, those of a slot side by side in logits_NV.

        `positions_B`: of the first token to be drawn of each slot. Token t counts for the penalties of those after it, and
        of later steps, if the t drafts before it are the tokens drawn. Logprobs name rows of logits_NV.
        """
        num_tokens = drafts_BK.shape[1] + 1
        positions_BT = positions_B[:, None] + torch.arange(num_tokens, device=self.device)
        if self._recipe(slots).penalties is None:
            each = tuple(slot for slot in slots for _ in range(num_tokens))
            token_ids_N, logprobs = self.sample(each, logits_NV, positions_BT.flatten())
            return token_ids_N.view(-1, num_tokens), [logprobs] if logprobs is not None else []
        logits_BTV = logits_NV.unflatten(0, (-1, num_tokens))
        drawn: list[Tensor] = []
        found: list[Logprobs] = []
        counted_B = torch.ones_like(positions_B, dtype=torch.bool)
        for t in range(num_tokens):
            if t > 0:
                counted_B = counted_B & (drawn[-1] == drafts_BK[:, t - 1])
            token_ids_B, logprobs = self.sample(slots, logits_BTV[:, t], positions_BT[:, t], counted_B)
            drawn.append(token_ids_B)
            if logprobs is not None:
                found.append(replace(logprobs, rows=tuple(row * num_tokens + t for row in logprobs.rows)))
        return torch.stack(drawn, dim=1), found

    def warm_up(self, logits_BV: Tensor) -> None:
        """Compiles what rows run on a GPU of which more than the best token is asked. Logits as `sample` gets them."""
        logits_BV = logits_BV[:, : self.vocab_size].to(torch.float32)
        ops.argmax(logits_BV)
        rows = range(logits_BV.shape[0])
        for top_k, top_p, min_p in itertools.product((0, 1), (1.0, 0.5), (0.0, 0.5)):
            asked = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
            recipe = make_recipe(
                [asked for _ in rows], [None for _ in rows], [None for _ in rows], self.vocab_size, self.device
            )
            assert recipe.draws is not None
            self._draw(logits_BV, [0 for _ in rows], recipe.draws)

    def _draw(self, logits_BV: Tensor, positions: Sequence[int] | Tensor, draws: Draws) -> Tensor:
        if isinstance(positions, Tensor):
            # One of several drafted positions lies where no kernel was compiled for, and those of a batch lie apart.
            positions_B = positions.clone(memory_format=torch.contiguous_format)
        else:
            positions_B = ids(positions, self.device)
        return ops.sample(
            logits_BV,
            draws.temperatures_B,
            draws.seeds_B,
            positions_B,
            top_k_B=draws.top_k_B,
            top_p_B=draws.top_p_B,
            min_p_B=draws.min_p_B,
        )

    def _recipe(self, slots: tuple[int, ...]) -> Recipe:
        recipe = self._recipes.get(slots)
        if recipe is None:
            params = [self._params[slot] for slot in slots]
            known = [param for param in params if param is not None]
            assert len(known) == len(slots), f"slots {slots} include one that is not open"
            # Two: a step that ends a prompt has a row more than its neighbours. Two more: with drafts and without.
            if len(self._recipes) >= 4:
                self._recipes.clear()
            biases = [self._biases[slot] for slot in slots]
            recipe = self._recipes[slots] = make_recipe(
                known, biases, self._counts.rows_of(slots), self.vocab_size, self.device
            )
        return recipe

    def _penalise(self, logits_BV: Tensor, penalties: Penalties) -> None:
        counts_NV, in_prompt_NV = self._counts.at(penalties.table_rows)
        penalised_NV = ops.penalise(
            logits_BV.index_select(0, penalties.rows),
            counts_NV,
            in_prompt_NV | (counts_NV > 0),
            penalties.repetition,
            penalties.frequency,
            penalties.presence,
        )
        logits_BV.index_copy_(0, penalties.rows, penalised_NV)


def _logprobs(logits_BV: Tensor, token_ids_B: Tensor, wanted: WantedLogprobs | None) -> Logprobs | None:
    if wanted is None:
        return None
    chosen_N, top_ids_NK, top_NK = ops.token_logprobs(
        logits_BV.index_select(0, wanted.rows_N), token_ids_B.index_select(0, wanted.rows_N), max(wanted.num_top)
    )
    return Logprobs(rows=wanted.rows, num_top=wanted.num_top, chosen_N=chosen_N, top_ids_NK=top_ids_NK, top_NK=top_NK)
