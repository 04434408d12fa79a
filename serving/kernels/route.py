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
    nobody_T: Tensor | None,
    slots_EC: Tensor,
    copies_E: Tensor,
    counts_E: Tensor,
    *,
    first: int,
    shared: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(slots int64 [T, J], as `physical_slots`; weights fp32 [T, J]); the tokens of each expert are added to counts_E, int64.

    experts_TK: int64, below len(counts_E). weights_TK: fp32. nobody_T: bool, rows that go to no slot and count for none. `shared`: the
    expert that every token takes besides, with weight 1; it is not counted.
    """
    arguments = experts_TK, weights_TK, nobody_T, slots_EC, copies_E, counts_E
    if experts_TK.is_cuda:
        from serving.kernels.triton import route as device

        return device.route(*arguments, first=first, shared=shared)
    return route_reference(*arguments, first=first, shared=shared)


def route_reference(
    experts_TK: Tensor,
    weights_TK: Tensor,
    nobody_T: Tensor | None,
    slots_EC: Tensor,
    copies_E: Tensor,
    counts_E: Tensor,
    *,
    first: int,
    shared: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `route`."""
    experts_TJ, weights_TJ = counted(experts_TK, weights_TK, nobody_T, counts_E, shared)
    return physical_slots(slots_EC, copies_E, experts_TJ, first), weights_TJ


def counted(
    experts_TK: Tensor, weights_TK: Tensor, nobody_T: Tensor | None, counts_E: Tensor, shared: int | None
) -> tuple[Tensor, Tensor]:
    """[T, J] each, as `route` takes them on to slots: `shared` is the last pick of every token, nobody's picks are -1."""
    ones_TK = torch.ones_like(experts_TK)
    if nobody_T is not None:
        ones_TK.masked_fill_(nobody_T[:, None], 0)
    counts_E.scatter_add_(0, experts_TK.flatten(), ones_TK.flatten())
    if shared is not None:
        experts_TK, weights_TK = F.pad(experts_TK, (0, 1), value=shared), F.pad(weights_TK, (0, 1), value=1.0)
    if nobody_T is not None:
        experts_TK = experts_TK.masked_fill(nobody_T[:, None], -1)
    return experts_TK, weights_TK


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
