"""Rows to the members of a group that want them, and sums of what they made of them: what a dispatch does on one GPU.

    slots of a rank's tokens -> copies_for: where each row's copies stand among those that go out, by member
    rows [T, ...]            -> spread:     the copies [N, ...]
    routing that came [R, M] -> routing_here: slots and weights of what is here
    results [N, D]           -> total:      a row's sum over the members that had it

Nothing here is read on the host; N is, from `counts_WC`, by whoever sends.

Legend: T rows here, W members, N copies, R rows that came, K picks, P = min(K, W) members of a row, M = 2K columns of routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Of each row one copy for every member that its picks name; copies stand by member, and in the order of the rows.

    counts_WC: int64 [W, 2], of each member its copies, and the picks that they have there. places_TP: int32, where a row's copies
    stand, in the members' order, -1 behind the last.
    """

    counts_WC: Tensor
    places_TP: Tensor


def copies_for(slots_TK: Tensor, slots_per_member: int, num_members: int) -> Copies:
    """slots_TK: int64, contiguous, below W * slots_per_member; -1: none."""
    if slots_TK.is_cuda:
        from serving.kernels.triton import dispatch_rows as device

        return device.copies_for(slots_TK, slots_per_member, num_members)
    return copies_for_reference(slots_TK, slots_per_member, num_members)


def copies_for_reference(slots_TK: Tensor, slots_per_member: int, num_members: int) -> Copies:
    """As `copies_for`."""
    num_rows, top_k = slots_TK.shape
    targets_TK = torch.where(slots_TK >= 0, slots_TK // slots_per_member, num_members)
    picks_TW = slots_TK.new_zeros(num_rows, num_members + 1).scatter_add_(1, targets_TK, torch.ones_like(slots_TK))
    picks_TW = picks_TW[:, :num_members]
    wanted_TW = picks_TW > 0
    counts_W = wanted_TW.sum(0)
    places_TW = wanted_TW.cumsum(0) - 1 + (counts_W.cumsum(0) - counts_W)
    # Members that want a row before those that do not, each in their order.
    num_places = min(top_k, num_members)
    order_TP = wanted_TW.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :num_places]
    places_TP = torch.where(wanted_TW, places_TW, -1).gather(1, order_TP).to(torch.int32)
    return Copies(counts_WC=torch.stack([counts_W, picks_TW.sum(0)], dim=1), places_TP=places_TP)


def spread(x_TX: Tensor, copies: Copies, num_copies: int) -> Tensor:
    """[num_copies, ...], contiguous: each row of x [T, ...], of any dtype and strides, where its copies stand. Rows behind all copies
    are not written."""
    if x_TX.is_cuda:
        from serving.kernels.triton import dispatch_rows as device

        return device.spread(x_TX, copies, num_copies)
    return spread_reference(x_TX, copies, num_copies)


def spread_reference(x_TX: Tensor, copies: Copies, num_copies: int) -> Tensor:
    """As `spread`."""
    out_NX = torch.empty((num_copies, *x_TX.shape[1:]), dtype=x_TX.dtype, device=x_TX.device)
    rows, which = (copies.places_TP >= 0).nonzero(as_tuple=True)
    out_NX[copies.places_TP[rows, which].long()] = x_TX[rows]
    return out_NX


def total(y_ND: Tensor, copies: Copies, added_TD: Tensor | None = None) -> Tensor:
    """[T, D] in the dtype of y: of each row its copies, added in the members' order in fp32 (fp64 of fp64), and `added_TD` at the end;
    rounded once."""
    if y_ND.is_cuda:
        from serving.kernels.triton import dispatch_rows as device

        return device.total(y_ND, copies, added_TD)
    return total_reference(y_ND, copies, added_TD)


def total_reference(y_ND: Tensor, copies: Copies, added_TD: Tensor | None = None) -> Tensor:
    """As `total`."""
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    total_TD = torch.zeros(len(copies.places_TP), y_ND.shape[1], dtype=wide, device=y_ND.device)
    for places_T in copies.places_TP.t():
        has_copy_T = places_T >= 0
        total_TD[has_copy_T] += y_ND[places_T[has_copy_T].long()].to(wide)
    if added_TD is not None:
        total_TD += added_TD.to(wide)
    return total_TD.to(y_ND.dtype)


def routing_here(routing_RM: Tensor, first: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """Slots int64 [R, K], counted from `first` on, -1 where they are none of the `num_slots` there; weights fp32 [R, K].

    routing_RM: int32, contiguous: slots + 1, 0 for none, then the bits of the weights.
    """
    if routing_RM.is_cuda:
        from serving.kernels.triton import dispatch_rows as device

        return device.routing_here(routing_RM, first, num_slots)
    return routing_here_reference(routing_RM, first, num_slots)


def routing_here_reference(routing_RM: Tensor, first: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """As `routing_here`."""
    top_k = routing_RM.shape[1] // 2
    slots_RK = routing_RM[:, :top_k].to(torch.int64).sub_(first + 1)
    slots_RK = slots_RK.masked_fill_(slots_RK.div(num_slots, rounding_mode="floor") != 0, -1)
    return slots_RK, routing_RM[:, top_k:].contiguous().view(torch.float32)
