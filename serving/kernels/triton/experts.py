"""The routed experts' MLPs on a GPU: rows to where their experts have them (`expert_rows`), two products, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from serving.kernels.gemm import linear, linear_silu_mul
from serving.kernels.libraries import expert_of_rows
from serving.kernels.quant import BLOCK, Fp8Weight, QuantisedRows
from serving.kernels.triton.expert_rows import Alone, combine, mostly_alone, scatter, send
from serving.kernels.triton.placing import Partial, place
from serving.kernels.triton.product import RING_TILE, grouped_tile, has_ring, placed_product, product
from serving.kernels.triton.quant import silu_mul_quantise

# Tokens up to which shared experts are computed in the launches of the routed ones: each tile of tokens reads their weights again.
_MOST_BESIDE = 64


def grouped_mlp(
    x_TD: Tensor | QuantisedRows,
    gate_up_EID: Tensor | Fp8Weight,
    down_EDI: Tensor | Fp8Weight,
    experts_TK: Tensor,
    weights_TK: Tensor,
    shared: tuple[Tensor | Fp8Weight, Tensor | Fp8Weight] | None = None,
    *,
    partial: Partial | None = None,
    fill: bool = True,
) -> Tensor:
    assert fill or (partial is not None and shared is None), "every token has a result"
    fp8 = isinstance(gate_up_EID, Fp8Weight)
    values = x_TD.values if isinstance(x_TD, QuantisedRows) else x_TD
    if not experts_TK.numel():
        dtype = torch.bfloat16 if fp8 else values.dtype
        return torch.empty(0, down_EDI.shape[1], dtype=dtype, device=values.device)
    num_experts = gate_up_EID.shape[0]
    tile = _tile(experts_TK, num_experts, torch.float8_e4m3fn if fp8 else values.dtype, partial)
    if tile == RING_TILE and has_ring(values):
        return _few(x_TD, gate_up_EID, down_EDI, experts_TK, weights_TK, shared, tile, partial, fill=fill)
    added_TD = None if shared is None else linear(linear_silu_mul(x_TD, shared[0]), shared[1])
    library = gate_up_EID.library if isinstance(gate_up_EID, Fp8Weight) else None
    goes_to_places = values.is_cuda and library is None and added_TD is None and fill
    if goes_to_places and partial is not None and mostly_alone(experts_TK, num_experts, tile, partial):
        return _alone(x_TD, gate_up_EID, down_EDI, experts_TK, weights_TK, tile, partial)
    slots, x_SD = send(x_TD, experts_TK, num_experts, tile, quantise=fp8, partial=partial)
    y_SD: Tensor | QuantisedRows
    if (
        library is not None
        and tile == library.ROWS_OF_AN_EXPERT
        and slots.tiles.num_expected * 2 > slots.tiles.max_tiles
        and library.takes(slots.num_slots, gate_up_EID.shape)
    ):
        assert isinstance(x_SD, QuantisedRows)
        assert isinstance(gate_up_EID, Fp8Weight)
        assert isinstance(down_EDI, Fp8Weight)
        expert_S = expert_of_rows(slots.tiles)
        hidden_SI = silu_mul_quantise(library.grouped(x_SD, gate_up_EID, expert_S))
        y_SD = library.grouped(hidden_SI, down_EDI, expert_S)
    else:
        y_SD = product(product(x_SD, gate_up_EID, silu=True, tiles=slots.tiles), down_EDI, tiles=slots.tiles)
    assert isinstance(y_SD, Tensor)
    return combine(y_SD, slots, weights_TK, added_TD, fill=fill)


def _alone(
    x_TD: Tensor | QuantisedRows,
    gate_up_EID: Tensor | Fp8Weight,
    down_EDI: Tensor | Fp8Weight,
    experts_TK: Tensor,
    weights_TK: Tensor,
    tile: int,
    partial: Partial,
) -> Tensor:
    """Where most of many tokens have one expert here: what that makes of one goes from the product to the token's place, weighted."""
    from serving.kernels.gluon.gemm import Places

    num_tokens, (num_experts, width, _) = len(experts_TK), down_EDI.shape
    slots = place(experts_TK, num_experts, tile, partial)
    alone = Alone.of(slots, weights_TK)
    x_SD = scatter(x_TD, slots, quantise=isinstance(down_EDI, Fp8Weight), alone=alone)
    hidden_SI = product(x_SD, gate_up_EID, silu=True, tiles=slots.tiles)
    dtype = torch.bfloat16 if isinstance(x_SD, QuantisedRows) else x_SD.dtype
    both = torch.empty(slots.num_slots + num_tokens, width, dtype=dtype, device=experts_TK.device)
    places = Places(into=both, place_S=alone.place_S, factor_S=alone.factor_S)
    placed_product(hidden_SI, down_EDI, slots.tiles, places)
    return combine(both[: slots.num_slots], slots, weights_TK, into_TD=both[slots.num_slots :])


def _tile(experts_TK: Tensor, num_experts: int, dtype: torch.dtype, partial: Partial | None) -> int:
    if partial is None:
        return grouped_tile(experts_TK.numel(), num_experts, dtype)
    expected, most = partial.bounds(experts_TK, num_experts)
    tile = grouped_tile(expected, num_experts, dtype)
    # The kernel between the ring's and the one of many rows has a program for every tile there may be.
    return RING_TILE if tile == 32 and most > 2 * expected else tile


def _few(
    x_TD: Tensor | QuantisedRows,
    gate_up_EID: Tensor | Fp8Weight,
    down_EDI: Tensor | Fp8Weight,
    experts_TK: Tensor,
    weights_TK: Tensor,
    shared: tuple[Tensor | Fp8Weight, Tensor | Fp8Weight] | None,
    tile: int,
    partial: Partial | None = None,
    *,
    fill: bool = True,
) -> Tensor:
    """Where the weights' bytes are the bound: the shared experts in the launches of the routed ones, before them."""
    from serving.kernels.gluon.few_rows import Shared, few_rows

    num_experts, _, inner = down_EDI.shape
    fp8 = isinstance(gate_up_EID, Fp8Weight)
    num_tokens, num_shared, num_beside = len(experts_TK), 0, 0
    added_TD, gate_up_beside, down_beside = None, None, None
    if shared is not None:
        num_shared = shared[1].shape[1] // inner
        apart = (
            num_tokens > _MOST_BESIDE or (num_shared > 1 and inner % BLOCK) or fp8 != isinstance(x_TD, QuantisedRows)
        )
        if apart:
            added_TD, num_shared = linear(linear_silu_mul(x_TD, shared[0]), shared[1]), 1
        else:
            gate_up_beside = Shared(x=x_TD, w=shared[0], num_experts=num_shared, num_tokens=num_tokens)
            down_beside = Shared(x=None, w=shared[1], num_experts=num_shared, num_tokens=num_tokens)
            num_beside = num_shared * down_beside.num_tiles(tile)
    slots, x_SD = send(x_TD, experts_TK, num_experts, tile, quantise=fp8, partial=partial, num_beside=num_beside)
    hidden_SI = few_rows(x_SD, gate_up_EID, silu=True, tiles=slots.tiles, shared=gate_up_beside)
    # Known: gate_up waits for `send` before it lets this one start. So nothing may be launched between the two. Nor may memory that
    # gate_up reads be had for the result: an SM without work begins with down while others are still at gate_up.
    y_SD = few_rows(hidden_SI, down_EDI, tiles=slots.tiles, shared=down_beside, known=True)
    assert isinstance(y_SD, Tensor)
    if gate_up_beside is not None:
        added_TD = y_SD[slots.num_slots :]
    return combine(y_SD, slots, weights_TK, added_TD, num_added=num_shared or 1, fill=fill)
