"""What a batch of slots needs beyond an argmax, worked out once and kept while the batch stays the same. Row by row, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.core.request import SamplingParams
from serving.engine.staging import ids, reals

# Far below any difference of two fp32 logits, and no logit divided by it overflows.
_COLDEST = 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotBias:
    """What one slot adds to its logits, [N] each. Made when the slot is opened: a client may name many tokens."""

    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Bias:
    """One entry a biased token: row of the batch, token id, what is added."""

    rows: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Penalties:
    """[N] each. `rows` of the batch, `table_rows` of the count tables."""

    rows: Tensor
    table_rows: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """Of every row, as `kernels.sampling.sample` takes them: temperature 0 is greedy, None is what no row asked for."""

    seeds_B: Tensor
    temperatures_B: Tensor
    top_k_B: Tensor | None
    top_p_B: Tensor | None
    min_p_B: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class WantedLogprobs:
    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    rows_N: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """What a batch needs beyond argmax; None: nobody asked."""

    bias: Bias | None
    penalties: Penalties | None
    draws: Draws | None
    logprobs: WantedLogprobs | None

    @property
    def plain(self) -> bool:
        return self.bias is None and self.penalties is None and self.draws is None and self.logprobs is None


def has_penalties(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def make_slot_bias(params: SamplingParams, vocab_size: int, device: torch.device) -> SlotBias | None:
    entries = [(token_id, value) for token_id, value in params.logit_bias.items() if 0 <= token_id < vocab_size]
    if not entries:
        return None
    token_ids, values = zip(*entries, strict=True)
    return SlotBias(token_ids=ids(token_ids, device), values=reals(values, device, torch.float32))


def make_recipe(
    params: list[SamplingParams],
    biases: list[SlotBias | None],
    table_rows: list[int | None],
    vocab_size: int,
    device: torch.device,
) -> Recipe:
    """A row each of the batch; its cost does not depend on how many tokens are biased."""
    return Recipe(
        bias=_make_bias(biases, device),
        penalties=_make_penalties(params, table_rows, device),
        draws=_make_draws(params, vocab_size, device),
        logprobs=_make_logprobs(params, vocab_size, device),
    )


def _make_bias(biases: list[SlotBias | None], device: torch.device) -> Bias | None:
    biased = [(row, bias) for row, bias in enumerate(biases) if bias is not None]
    if not biased:
        return None
    sizes = [bias.values.shape[0] for _, bias in biased]
    rows_N = ids([row for row, _ in biased], device)
    return Bias(
        rows=rows_N.repeat_interleave(ids(sizes, device), output_size=sum(sizes)),
        token_ids=torch.cat([bias.token_ids for _, bias in biased]),
        values=torch.cat([bias.values for _, bias in biased]),
    )


def _make_penalties(
    params: list[SamplingParams], table_rows: list[int | None], device: torch.device
) -> Penalties | None:
    rows = [row for row, table_row in enumerate(table_rows) if table_row is not None]
    if not rows:
        return None
    chosen = [params[row] for row in rows]
    return Penalties(
        rows=ids(rows, device),
        table_rows=ids([table_row for table_row in table_rows if table_row is not None], device),
        repetition=reals([param.repetition_penalty for param in chosen], device, torch.float32),
        frequency=reals([param.frequency_penalty for param in chosen], device, torch.float32),
        presence=reals([param.presence_penalty for param in chosen], device, torch.float32),
    )


def _make_draws(params: list[SamplingParams], vocab_size: int, device: torch.device) -> Draws | None:
    if all(param.temperature == 0 for param in params):
        return None
    drawn = [param for param in params if param.temperature > 0]
    top_k = [min(param.top_k, vocab_size) or vocab_size for param in params]
    return Draws(
        seeds_B=ids([_wrapped(param.seed) for param in params], device),
        temperatures_B=reals([param.temperature and max(param.temperature, _COLDEST) for param in params], device),
        top_k_B=ids(top_k, device) if any(0 < param.top_k < vocab_size for param in drawn) else None,
        top_p_B=reals([param.top_p for param in params], device) if any(param.top_p < 1 for param in drawn) else None,
        min_p_B=reals([param.min_p for param in params], device) if any(param.min_p > 0 for param in drawn) else None,
    )


def _make_logprobs(params: list[SamplingParams], vocab_size: int, device: torch.device) -> WantedLogprobs | None:
    wanted = [(row, min(param.logprobs, vocab_size)) for row, param in enumerate(params) if param.logprobs is not None]
    if not wanted:
        return None
    rows, num_top = zip(*wanted, strict=True)
    return WantedLogprobs(rows=rows, num_top=num_top, rows_N=ids(rows, device))


def _wrapped(seed: int) -> int:
    """The same 64 bits as a signed integer; clients may send any integer."""
    return (seed + 2**63) % 2**64 - 2**63
