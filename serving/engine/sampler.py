"""The sampler: what each slot asked for, and the tokens of one step's rows. Everything stays on the device.

A slot is opened with its parameters and the tokens so far, and closed. What a batch of slots needs is worked out once and
kept while the batch stays the same (`_Recipe`); a batch of greedy rows without extras costs one argmax. Slots with
penalties own a row of the count tables. Must not know where logits come from, nor anything of pages or schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from serving.core.request import SamplingParams, TokenLogprobs
from serving.engine.staging import ids, reals
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
        self._counts = _CountTables(vocab_size, device)
        self._recipes: dict[tuple[int, ...], _Recipe] = {}

    def open(self, slot: int, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        self._params[slot] = params
        self._counts.close(slot)
        if _has_penalties(params):
            self._counts.open(slot, token_ids, num_prompt_tokens)
        self._recipes.clear()

    def close(self, slot: int) -> None:
        self._params[slot] = None
        self._counts.close(slot)
        self._recipes.clear()

    def sample(
        self, slots: tuple[int, ...], logits_BV: Tensor, positions: Sequence[int]
    ) -> tuple[Tensor, Logprobs | None]:
        """Token ids int64 [B], and logprobs where asked. fp32 logits [B, >= vocab_size], which may be overwritten.

        `positions`: index of the token to be drawn in its sequence; with the seed it decides the random number.
        """
        recipe = self._recipe(slots)
        logits_BV = logits_BV[:, : self.vocab_size]
        if recipe.plain:
            return logits_BV.argmax(dim=-1), None
        if recipe.bias is not None:
            logits_BV.index_put_(
                (recipe.bias.rows, recipe.bias.token_ids), recipe.bias.values.to(logits_BV.dtype), accumulate=True
            )
        if recipe.penalties is not None:
            self._penalise(logits_BV, recipe.penalties)
        token_ids_B = logits_BV.argmax(dim=-1)
        if recipe.draws is not None:
            drawn_positions = [positions[row] for row in recipe.draws.host_rows]
            drawn_N = _draw(logits_BV, ids(drawn_positions, self.device), recipe.draws)
            token_ids_B.index_copy_(0, recipe.draws.rows, drawn_N)
        if recipe.penalties is not None:
            self._counts.add(recipe.penalties.table_rows, token_ids_B.index_select(0, recipe.penalties.rows))
        return token_ids_B, _logprobs(logits_BV, token_ids_B, recipe.logprobs)

    def _recipe(self, slots: tuple[int, ...]) -> _Recipe:
        recipe = self._recipes.get(slots)
        if recipe is None:
            params = [self._params[slot] for slot in slots]
            known = [param for param in params if param is not None]
            assert len(known) == len(slots), f"slots {slots} include one that is not open"
            # Two: a step that ends a prompt has a row more than its neighbours.
            if len(self._recipes) >= 2:
                self._recipes.clear()
            recipe = self._recipes[slots] = _make_recipe(
                known, self._counts.rows_of(slots), self.vocab_size, self.device
            )
        return recipe

    def _penalise(self, logits_BV: Tensor, penalties: _Penalties) -> None:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bias:
    """One entry a biased token: row of the batch, token id, what is added."""

    rows: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Penalties:
    """[N] each. `rows` of the batch, `table_rows` of the count tables."""

    rows: Tensor
    table_rows: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Draws:
    """[N] each, float64 where real. `truncated`: which of the N have a top-k or a top-p."""

    host_rows: list[int]
    rows: Tensor
    seeds: Tensor
    temperatures: Tensor
    truncated: Tensor | None
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _WantedLogprobs:
    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    rows_N: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recipe:
    """What a batch needs beyond argmax; None: nobody asked."""

    bias: _Bias | None
    penalties: _Penalties | None
    draws: _Draws | None
    logprobs: _WantedLogprobs | None

    @property
    def plain(self) -> bool:
        return self.bias is None and self.penalties is None and self.draws is None and self.logprobs is None


class _CountTables:
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
        device, vocab_size = self._counts_RV.device, self._counts_RV.shape[1]
        tokens = torch.tensor(token_ids, dtype=torch.int64, device=device)
        self._in_prompt_RV[row] = False
        self._in_prompt_RV[row, tokens[:num_prompt_tokens]] = True
        self._counts_RV[row] = torch.bincount(tokens[num_prompt_tokens:], minlength=vocab_size)

    def close(self, slot: int) -> None:
        row = self._row_of_slot.pop(slot, None)
        if row is not None:
            self._free_rows.append(row)

    def rows_of(self, slots: tuple[int, ...]) -> list[int | None]:
        return [self._row_of_slot.get(slot) for slot in slots]

    def at(self, rows_N: Tensor) -> tuple[Tensor, Tensor]:
        return self._counts_RV.index_select(0, rows_N), self._in_prompt_RV.index_select(0, rows_N)

    def add(self, rows_N: Tensor, token_ids_N: Tensor) -> None:
        places_N = rows_N * self._counts_RV.shape[1] + token_ids_N
        self._counts_RV.view(-1).index_add_(0, places_N, torch.ones_like(places_N, dtype=torch.int32))

    def _grow(self) -> None:
        num_rows = self._counts_RV.shape[0]
        added = max(num_rows, 4)
        self._counts_RV = torch.cat((self._counts_RV, self._counts_RV.new_zeros(added, self._counts_RV.shape[1])))
        self._in_prompt_RV = torch.cat(
            (self._in_prompt_RV, self._in_prompt_RV.new_zeros(added, self._counts_RV.shape[1]))
        )
        self._free_rows.extend(range(num_rows, num_rows + added))


def _has_penalties(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def _make_recipe(
    params: list[SamplingParams], table_rows: list[int | None], vocab_size: int, device: torch.device
) -> _Recipe:
    return _Recipe(
        bias=_make_bias(params, vocab_size, device),
        penalties=_make_penalties(params, table_rows, device),
        draws=_make_draws(params, vocab_size, device),
        logprobs=_make_logprobs(params, vocab_size, device),
    )


def _make_bias(params: list[SamplingParams], vocab_size: int, device: torch.device) -> _Bias | None:
    entries = [
        (row, token_id, value)
        for row, param in enumerate(params)
        for token_id, value in param.logit_bias.items()
        if 0 <= token_id < vocab_size
    ]
    if not entries:
        return None
    rows, token_ids, values = zip(*entries, strict=True)
    return _Bias(rows=ids(rows, device), token_ids=ids(token_ids, device), values=reals(values, device, torch.float32))


def _make_penalties(
    params: list[SamplingParams], table_rows: list[int | None], device: torch.device
) -> _Penalties | None:
    rows = [row for row, table_row in enumerate(table_rows) if table_row is not None]
    if not rows:
        return None
    chosen = [params[row] for row in rows]
    return _Penalties(
        rows=ids(rows, device),
        table_rows=ids([table_row for table_row in table_rows if table_row is not None], device),
        repetition=reals([param.repetition_penalty for param in chosen], device, torch.float32),
        frequency=reals([param.frequency_penalty for param in chosen], device, torch.float32),
        presence=reals([param.presence_penalty for param in chosen], device, torch.float32),
    )


def _make_draws(params: list[SamplingParams], vocab_size: int, device: torch.device) -> _Draws | None:
    rows = [row for row, param in enumerate(params) if param.temperature > 0]
    if not rows:
        return None
    chosen = [params[row] for row in rows]
    truncated = [i for i, param in enumerate(chosen) if 0 < param.top_k < vocab_size or param.top_p < 1]
    top_k = [min(chosen[i].top_k, vocab_size) or vocab_size for i in truncated]
    return _Draws(
        host_rows=rows,
        rows=ids(rows, device),
        seeds=ids([_wrapped(param.seed) for param in chosen], device),
        temperatures=reals([param.temperature for param in chosen], device),
        truncated=ids(truncated, device) if truncated else None,
        top_k=ids(top_k, device),
        top_p=reals([chosen[i].top_p for i in truncated], device),
        min_p=reals([param.min_p for param in chosen], device) if any(param.min_p > 0 for param in chosen) else None,
    )


def _make_logprobs(params: list[SamplingParams], vocab_size: int, device: torch.device) -> _WantedLogprobs | None:
    wanted = [(row, min(param.logprobs, vocab_size)) for row, param in enumerate(params) if param.logprobs is not None]
    if not wanted:
        return None
    rows, num_top = zip(*wanted, strict=True)
    return _WantedLogprobs(rows=rows, num_top=num_top, rows_N=ids(rows, device))


def _draw(logits_BV: Tensor, positions_N: Tensor, draws: _Draws) -> Tensor:
    logits_NV = logits_BV.index_select(0, draws.rows).to(torch.float64) / draws.temperatures[:, None]
    if draws.truncated is not None:
        kept = ops.keep_top(logits_NV.index_select(0, draws.truncated), draws.top_k, draws.top_p)
        logits_NV.index_copy_(0, draws.truncated, kept)
    if draws.min_p is not None:
        logits_NV = ops.keep_likely(logits_NV, draws.min_p)
    return ops.draw(logits_NV, ops.uniforms(draws.seeds, positions_N))


def _logprobs(logits_BV: Tensor, token_ids_B: Tensor, wanted: _WantedLogprobs | None) -> Logprobs | None:
    if wanted is None:
        return None
    chosen_N, top_ids_NK, top_NK = ops.token_logprobs(
        logits_BV.index_select(0, wanted.rows_N), token_ids_B.index_select(0, wanted.rows_N), max(wanted.num_top)
    )
    return Logprobs(rows=wanted.rows, num_top=wanted.num_top, chosen_N=chosen_N, top_ids_NK=top_ids_NK, top_NK=top_NK)


def _wrapped(seed: int) -> int:
    """The same 64 bits as a signed integer; clients may send any integer."""
    return (seed + 2**63) % 2**64 - 2**63
