"""From the experts that a gate chose to slots of their copies, counted on the way: what stands between a gate and a dispatch.

Legend: T tokens, K picks, J = K, or K + 1 with the shared expert, E logical experts, C the most copies of one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(
    experts_TK: Tensor,
    weights_TK: Tensor,
    slots_EC: Tensor,
    copies_E: Tensor,
    counts_E: Tensor,
    *,
    first: int,
    shared: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(slots int64 [T, J], as `physical_slots`; weights fp32 [T, J]); the tokens of each expert are added to counts_E, int64.

    experts_TK: int64, below len(counts_E). weights_TK: fp32. `shared`: the expert that every token takes besides, with weight 1; it is not counted.
    """
    if experts_TK.is_cuda:
        from serving.kernels.triton import route as device

        return device.route(experts_TK, weights_TK, slots_EC, copies_E, counts_E, first=first, shared=shared)
    return route_reference(experts_TK, weights_TK, slots_EC, copies_E, counts_E, first=first, shared=shared)


def route_reference(
    experts_TK: Tensor,
    weights_TK: Tensor,
    slots_EC: Tensor,
    copies_E: Tensor,
    counts_E: Tensor,
    *,
    first: int,
    shared: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `route`."""
    count(experts_TK, counts_E)
    experts_TK, weights_TK = with_shared(experts_TK, weights_TK, shared)
    return physical_slots(slots_EC, copies_E, experts_TK, first), weights_TK


def count(experts_TK: Tensor, counts_E: Tensor) -> None:
    """Adds to counts_E the tokens of each expert."""
    chosen = experts_TK.flatten()
    counts_E.scatter_add_(0, chosen, torch.ones_like(chosen))


def with_shared(experts_TK: Tensor, weights_TK: Tensor, shared: int | None) -> tuple[Tensor, Tensor]:
    """[T, J] each: `shared` as the last pick of every token."""
    if shared is None:
        return experts_TK, weights_TK
    return F.pad(experts_TK, (0, 1), value=shared), F.pad(weights_TK, (0, 1), value=1.0)


def physical_slots(slots_EC: Tensor, copies_E: Tensor, experts_TK: Tensor, first: int) -> Tensor:
    """int64 [T, K], a slot of each expert, -1 of -1: row t's pick k takes copy (first + t + k) of its expert, counted round.

    slots_EC: int64, expert e's slots are its first copies_E[e]; the last row is what -1 takes.
    """
    if slots_EC.shape[1] == 1:
        return slots_EC[:, 0][experts_TK]
    num_tokens, top_k = experts_TK.shape
    turn_TK = torch.arange(first, first + num_tokens, device=experts_TK.device)[:, None] + torch.arange(
        top_k, device=experts_TK.device
    )
    return slots_EC[experts_TK, turn_TK.remainder_(copies_E[experts_TK])]
