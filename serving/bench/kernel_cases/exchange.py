"""Cases of what an exchange of rows between ranks does on one GPU: whose they are, copies of them, and sums of what came back.

What goes through the ranks' memory is for `baton bench dispatch` and `baton bench collectives`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from serving.bench.kernel_cases.stage import HIDDEN, Case, Stage, Work, sets_for
from serving.kernels import dispatch_rows, part_sums
from serving.kernels import route as routing
from serving.kernels.dispatch_rows import Copies

# Bytes of a pick's expert, weight and slot, read and written.
_PICK_BYTES = 24


def cases(stage: Stage) -> dict[str, Case]:
    """256 experts of 32 ranks, 32 of them with a copy."""
    named: dict[str, Case] = {}
    for tokens in (64, 4096):
        named[f"route/v3/{tokens}"] = partial(route, stage, tokens=tokens, num_experts=256, num_more=32, top_k=8)
        exchanged = {"tokens": tokens, "slots_a_member": 9, "num_members": 32, "top_k": 8}
        named[f"dispatch_rows/copies_for/{tokens}"] = partial(copies_for, stage, **exchanged)
        for way in (spread, total):
            named[f"dispatch_rows/{way.__name__}/{tokens}"] = partial(way, stage, hidden=HIDDEN, **exchanged)
        named[f"dispatch_rows/routing_here/{tokens}"] = partial(routing_here, stage, **exchanged)
        named[f"sum_parts/8x{tokens}"] = partial(sum_parts, stage, num_parts=8, tokens=tokens, hidden=HIDDEN)
    return named


def route(stage: Stage, *, tokens: int, num_experts: int, num_more: int, top_k: int) -> Work:
    """`num_more` experts have two slots, the others one, and so has the shared expert behind them."""
    num_bytes = tokens * (top_k + 1) * _PICK_BYTES
    sets = range(sets_for(num_bytes))
    chosen = [stage.rand(tokens, num_experts).topk(top_k, dim=-1).indices for _ in sets]
    weights = [stage.rand(tokens, top_k) for _ in sets]
    own_slots = torch.arange(num_experts + 1, device=stage.device)
    slots_EC = torch.stack([own_slots, own_slots + num_experts + 1], dim=1)
    copies_E = 1 + (own_slots < num_more).long()
    counts = [torch.zeros(num_experts, dtype=torch.int64, device=stage.device) for _ in range(2)]

    def own(i: int) -> Tensor:
        of_set = chosen[i], weights[i], None, slots_EC, copies_E, counts[0]
        return routing.route(*of_set, first=i, shared=num_experts)[0]

    def eager(i: int) -> Tensor:
        of_set = chosen[i], weights[i], None, slots_EC, copies_E, counts[1]
        return routing.route_reference(*of_set, first=i, shared=num_experts)[0]

    return Work(own=own, peers={"torch": eager}, num_sets=len(sets), amount=num_bytes, bound="copy")


def copies_for(stage: Stage, *, tokens: int, slots_a_member: int, num_members: int, top_k: int) -> Work:
    num_bytes = tokens * (8 * top_k + 4 * min(top_k, num_members))
    picks = [_picks(stage, tokens, slots_a_member * num_members, top_k) for _ in range(sets_for(num_bytes))]

    def own(i: int) -> Tensor:
        return dispatch_rows.copies_for(picks[i], slots_a_member, num_members).places_TP

    def eager(i: int) -> Tensor:
        return dispatch_rows.copies_for_reference(picks[i], slots_a_member, num_members).places_TP

    return Work(own=own, peers={"torch": eager}, num_sets=len(picks), amount=num_bytes, bound="copy")


def spread(stage: Stage, *, tokens: int, hidden: int, slots_a_member: int, num_members: int, top_k: int) -> Work:
    copies = [_copies(stage, tokens, slots_a_member, num_members, top_k) for _ in range(sets_for(2 * tokens * hidden))]
    numbers = [_num_copies(of_set) for of_set in copies]
    x = [stage.randn(tokens, hidden) for _ in copies]

    def own(i: int) -> Tensor:
        return dispatch_rows.spread(x[i], copies[i], numbers[i])

    def eager(i: int) -> Tensor:
        return dispatch_rows.spread_reference(x[i], copies[i], numbers[i])

    num_bytes = 2 * hidden * (tokens + sum(numbers) / len(numbers))
    return Work(own=own, peers={"torch": eager}, num_sets=len(copies), amount=num_bytes, bound="copy")


def total(stage: Stage, *, tokens: int, hidden: int, slots_a_member: int, num_members: int, top_k: int) -> Work:
    copies = [_copies(stage, tokens, slots_a_member, num_members, top_k) for _ in range(sets_for(2 * tokens * hidden))]
    numbers = [_num_copies(of_set) for of_set in copies]
    y = [stage.randn(number, hidden) for number in numbers]

    def own(i: int) -> Tensor:
        return dispatch_rows.total(y[i], copies[i])

    def eager(i: int) -> Tensor:
        return dispatch_rows.total_reference(y[i], copies[i])

    num_bytes = 2 * hidden * (tokens + sum(numbers) / len(numbers))
    return Work(own=own, peers={"torch": eager}, num_sets=len(copies), amount=num_bytes, bound="copy")


def routing_here(stage: Stage, *, tokens: int, slots_a_member: int, num_members: int, top_k: int) -> Work:
    """Of as many rows as a rank sends."""
    num_bytes = tokens * top_k * (8 + 12)
    came = [_picks(stage, tokens, slots_a_member * num_members, top_k) for _ in range(sets_for(num_bytes))]
    weights = [stage.rand(tokens, top_k).view(torch.int32) for _ in came]
    routings = [torch.cat([picks.int() + 1, bits], dim=1) for picks, bits in zip(came, weights, strict=True)]

    def own(i: int) -> Tensor:
        return dispatch_rows.routing_here(routings[i], slots_a_member, slots_a_member)[0]

    def eager(i: int) -> Tensor:
        return dispatch_rows.routing_here_reference(routings[i], slots_a_member, slots_a_member)[0]

    return Work(own=own, peers={"torch": eager}, num_sets=len(came), amount=num_bytes, bound="copy")


def sum_parts(stage: Stage, *, num_parts: int, tokens: int, hidden: int) -> Work:
    num_bytes = 2 * tokens * hidden * (num_parts + 1)
    whole = [stage.randn(num_parts * tokens, hidden) for _ in range(sets_for(num_bytes))]
    outs = [stage.randn(tokens, hidden) for _ in whole]

    def own(i: int) -> Tensor:
        part_sums.sum_parts(whole[i], num_parts, outs[i])
        return outs[i]

    def eager(i: int) -> Tensor:
        return whole[i].view(num_parts, tokens, hidden).sum(0)

    return Work(own=own, peers={"torch": eager}, num_sets=len(whole), amount=num_bytes, bound="copy")


def _picks(stage: Stage, tokens: int, num_slots: int, top_k: int) -> Tensor:
    """Distinct slots of each token, int64 [T, K]."""
    return stage.rand(tokens, num_slots).topk(top_k, dim=-1).indices


def _copies(stage: Stage, tokens: int, slots_a_member: int, num_members: int, top_k: int) -> Copies:
    return dispatch_rows.copies_for(
        _picks(stage, tokens, slots_a_member * num_members, top_k), slots_a_member, num_members
    )


def _num_copies(copies: Copies) -> int:
    return int(copies.counts_WC[:, 0].sum())
