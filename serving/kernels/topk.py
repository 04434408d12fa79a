"""The MoE gate: which experts a token goes to, and with what weight (report section 2.1.2, REFERENCE section 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def gate_topk(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    num_groups: int,
    num_groups_kept: int,
    top_k: int,
    renormalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, K] and weights fp32 [T, K] from fp32 gate logits; order within K is not fixed.

    The bias only chooses: scores are sigmoid(logits), a group's score is the sum of its two best biased scores, the best
    groups are kept, the best experts of those are chosen, and their weights are the unbiased scores.
    """
    if logits_TE.is_cuda and logits_TE.dtype == torch.float32:
        from serving.kernels.triton import topk as device

        return device.gate_topk(
            logits_TE,
            bias_E,
            num_groups=num_groups,
            num_groups_kept=num_groups_kept,
            top_k=top_k,
            renormalise=renormalise,
            scaling=scaling,
        )
    return gate_topk_reference(
        logits_TE,
        bias_E,
        num_groups=num_groups,
        num_groups_kept=num_groups_kept,
        top_k=top_k,
        renormalise=renormalise,
        scaling=scaling,
    )


def gate_topk_reference(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    num_groups: int,
    num_groups_kept: int,
    top_k: int,
    renormalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    scores_TE = logits_TE.sigmoid()
    biased_TE = scores_TE + bias_E
    if num_groups_kept < num_groups:
        biased_TE = _drop_groups(biased_TE, num_groups, num_groups_kept)
    experts_TK = biased_TE.topk(top_k, dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    if renormalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return experts_TK, weights_TK * scaling


def _drop_groups(biased_TE: Tensor, num_groups: int, num_groups_kept: int) -> Tensor:
    grouped_TGS = biased_TE.unflatten(1, (num_groups, -1))
    best_two_TG = grouped_TGS.topk(2, dim=-1, sorted=False).values.sum(dim=-1)
    dropped_TG = best_two_TG.topk(num_groups - num_groups_kept, dim=-1, largest=False, sorted=False).indices
    lost_TG = torch.zeros_like(best_two_TG, dtype=torch.bool).scatter_(1, dropped_TG, True)
    kept_TGS: Tensor = grouped_TGS.masked_fill(lost_TG[:, :, None], float("-inf"))
    return kept_TGS.flatten(1)
