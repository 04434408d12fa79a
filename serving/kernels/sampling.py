"""From logits to tokens: penalties, truncation, and a draw whose random number is a function of (seed, position) alone.

Every operation works row by row, so a row's token does not depend on its neighbours. Drawn rows are computed in float64:
rounding inside the sampler is then far below one unit of an fp32 logit. Legend: B rows of a batch, N those among them that
an operation concerns, V vocabulary. `*_reference` of what has none here are in the tests: loops over plain Python floats.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Weyl increment and multipliers of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014),
# as signed 64-bit integers: torch's int64 products wrap, which is the arithmetic modulo 2^64 that the mix needs.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
_RANDOM_BITS = 48


def uniforms(seeds_N: Tensor, positions_N: Tensor) -> Tensor:
    """float64 [N] in [0, 1), multiples of 2^-48, from int64 [N] each: word `position` of a SplitMix64 stream begun at mix(seed)."""
    state_N = _mix(seeds_N + _GAMMA) + (positions_N + 1) * _GAMMA
    return _shifted(_mix(state_N), 64 - _RANDOM_BITS).to(torch.float64) * 2.0**-_RANDOM_BITS


def penalise(
    logits_NV: Tensor, counts_NV: Tensor, seen_NV: Tensor, repetition_N: Tensor, frequency_N: Tensor, presence_N: Tensor
) -> Tensor:
    """New logits [N, V]. `counts_NV`: how often the output holds a token; `seen_NV`: whether prompt or output holds it.

    Repetition divides a seen token's positive logit and multiplies a negative one (CTRL, arXiv 1909.05858, eq. 4.1);
    frequency is subtracted per occurrence, presence once.
    """
    factor_NV = torch.where(seen_NV, repetition_N[:, None], 1.0)
    logits_NV = torch.where(logits_NV > 0, logits_NV / factor_NV, logits_NV * factor_NV)
    return logits_NV - frequency_N[:, None] * counts_NV - presence_N[:, None] * (counts_NV > 0)


def keep_top(logits_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor) -> Tensor:
    """New logits [N, V], -inf outside the `top_k` best and then outside the fewest of those that hold probability `top_p`.

    At least the best token stays; a token that ties with the last one kept stays too. `top_k` is in [1, V].
    """
    sorted_NV = _descending(logits_NV)
    worst_kept_N1 = sorted_NV.gather(1, top_k_N[:, None] - 1)
    sorted_NV = sorted_NV.masked_fill(sorted_NV < worst_kept_N1, -torch.inf)
    probs_NV = sorted_NV.softmax(dim=-1)
    before_NV = probs_NV.cumsum(dim=-1) - probs_NV
    # At top_p 1 rounding in the sum must not cut the tail.
    kept_NV = (before_NV < top_p_N[:, None]) | (top_p_N[:, None] >= 1.0)
    num_kept_N = (kept_NV & (sorted_NV > -torch.inf)).sum(dim=-1).clamp(min=1)
    worst_kept_N1 = sorted_NV.gather(1, num_kept_N[:, None] - 1)
    return logits_NV.masked_fill(logits_NV < worst_kept_N1, -torch.inf)


def keep_likely(logits_NV: Tensor, min_p_N: Tensor) -> Tensor:
    """New logits [N, V], -inf where the probability is below `min_p` times the best token's."""
    bound_N1 = logits_NV.amax(dim=-1, keepdim=True) + min_p_N[:, None].log()
    return logits_NV.masked_fill(logits_NV < bound_N1, -torch.inf)


def draw(logits_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """int64 [N]: inverse of the cumulative distribution softmax(logits), in the order of token ids, at `uniforms`.

    float64 in. A token of probability 0 is never drawn: the answer is the first one whose cumulative sum exceeds the target.
    """
    sums_NV = logits_NV.softmax(dim=-1).cumsum(dim=-1)
    targets_N1 = uniforms_N[:, None] * sums_NV[:, -1:]
    # Logits that are NaN (a latent was damaged on its way) must not become an id that no embedding has.
    return torch.searchsorted(sums_NV, targets_N1, right=True)[:, 0].clamp_(max=logits_NV.shape[1] - 1)


def argmax(logits_BV: Tensor) -> Tensor:
    """int64 [B]: the lowest id of each row's largest logit. fp32 or bf16 logits, rows strided."""
    if not logits_BV.is_cuda:
        return argmax_reference(logits_BV)
    from serving.kernels.triton import sampling as device

    return device.argmax(logits_BV)


def argmax_reference(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(dim=-1)


def sample(
    logits_BV: Tensor,
    temperatures_B: Tensor,
    seeds_B: Tensor,
    positions_B: Tensor,
    *,
    top_k_B: Tensor | None = None,
    top_p_B: Tensor | None = None,
    min_p_B: Tensor | None = None,
) -> Tensor:
    """int64 [B]: the argmax of rows of temperature 0, a draw with `uniforms(seeds, positions)` of the others, after
    `keep_top` and `keep_likely`. Nothing is read back.

    fp32 logits [B, V], rows strided; temperatures, top-p and min-p float64 [B]; seeds, positions and top-k (in [1, V])
    int64 [B]. What is None is not asked for by any row.
    """
    if not logits_BV.is_cuda:
        return sample_reference(
            logits_BV, temperatures_B, seeds_B, positions_B, top_k_B=top_k_B, top_p_B=top_p_B, min_p_B=min_p_B
        )
    from serving.kernels.triton import sampling as device

    return device.sample(
        logits_BV, temperatures_B, seeds_B, positions_B, top_k_B=top_k_B, top_p_B=top_p_B, min_p_B=min_p_B
    )


def sample_reference(
    logits_BV: Tensor,
    temperatures_B: Tensor,
    seeds_B: Tensor,
    positions_B: Tensor,
    *,
    top_k_B: Tensor | None = None,
    top_p_B: Tensor | None = None,
    min_p_B: Tensor | None = None,
) -> Tensor:
    tokens_B = argmax_reference(logits_BV)
    drawn_N = (temperatures_B > 0).nonzero()[:, 0]
    if not len(drawn_N):
        return tokens_B
    wide_NV = logits_BV[drawn_N].to(torch.float64) / temperatures_B[drawn_N, None]
    if top_k_B is not None or top_p_B is not None:
        top_k_N = torch.full_like(drawn_N, logits_BV.shape[1]) if top_k_B is None else top_k_B[drawn_N]
        top_p_N = torch.ones_like(temperatures_B[drawn_N]) if top_p_B is None else top_p_B[drawn_N]
        # Whole rows are sorted for it.
        cut_M = ((top_k_N < logits_BV.shape[1]) | (top_p_N < 1)).nonzero()[:, 0]
        wide_NV[cut_M] = keep_top(wide_NV[cut_M], top_k_N[cut_M], top_p_N[cut_M])
    if min_p_B is not None:
        wide_NV = keep_likely(wide_NV, min_p_B[drawn_N])
    tokens_B[drawn_N] = draw(wide_NV, uniforms(seeds_B[drawn_N], positions_B[drawn_N]))
    return tokens_B


def token_logprobs(logits_NV: Tensor, token_ids_N: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of softmax(logits): the chosen token's [N], and ids and values [N, num_top] in falling order."""
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    top = logprobs_NV.topk(num_top, dim=-1)
    return logprobs_NV.gather(1, token_ids_N[:, None])[:, 0], top.indices, top.values


def _descending(logits_NV: Tensor) -> Tensor:
    if logits_NV.device.type != "cpu":
        return logits_NV.sort(dim=-1, descending=True).values
    # On a CPU torch sorts pairs of value and index, stably: twenty times the time of numpy's vector instructions.
    return torch.from_numpy(np.sort(logits_NV.numpy(), axis=-1)).flip(-1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection on 64-bit integers."""
    x = (x ^ _shifted(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shifted(x, 27)) * _MULTIPLIER_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
