"""A layer of a unit that any rank can make again from a few numbers, what one rank does with it, and what it should come to.

A `Layer` is small plain data, so it crosses to processes; weights, tokens and routing follow from its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from serving.kernels.experts import grouped_mlp
from serving.kernels.quant import quantise_rows_fp8
from serving.parallel.collectives import Collectives, SingleRank
from serving.parallel.dispatch import DirectDispatch, Dispatch, FixedDispatch, HierarchicalDispatch
from serving.parallel.groups import Groups
from serving.parallel.placement import Placement
from serving.parallel.replicas import Replicas

FORMS = ["direct", "hierarchical", "fixed"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """`slots`: the logical expert in each slot of the unit. `routing`: which slots tokens take.

    random: any, each expert once a token; to rank 1: its slots alone; same rank: one rank's slots, another for each token;
    replicated: random experts, and of each the copy that `Replicas` says; partial: random, a third of the picks of none.
    """

    num_tokens: tuple[int, ...]
    slots: tuple[int, ...]
    top_k: int
    routing: str = "random"
    ranks_per_node: int = 2
    width: int = 16
    dtype: str = "float64"
    seed: int = 0

    @property
    def groups(self) -> Groups:
        world_size = len(self.num_tokens)
        return Groups(tp=1, dp=world_size, ep=world_size, ranks_per_node=self.ranks_per_node)

    @property
    def slots_per_rank(self) -> int:
        return len(self.slots) // len(self.num_tokens)

    def tokens(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D], slots int64 [T, K] and weights fp32 [T, K] of `rank`."""
        some = torch.Generator().manual_seed(1000 * self.seed + rank)
        num_tokens = self.num_tokens[rank]
        x = torch.randn(num_tokens, self.width, generator=some).to(getattr(torch, self.dtype))
        weights = 0.1 + torch.rand(num_tokens, self.top_k, generator=some)
        return x, self._slots(some, rank, num_tokens), weights

    def _slots(self, some: torch.Generator, rank: int, num_tokens: int) -> Tensor:
        def distinct(num_choices: int) -> Tensor:
            return torch.rand(num_tokens, num_choices, generator=some).argsort(1)[:, : self.top_k].contiguous()

        if self.routing == "to rank 1":
            return distinct(self.slots_per_rank) + min(1, len(self.num_tokens) - 1) * self.slots_per_rank
        if self.routing == "same rank":
            ranks = torch.randint(len(self.num_tokens), (num_tokens, 1), generator=some)
            return distinct(self.slots_per_rank) + ranks * self.slots_per_rank
        num_experts = max(self.slots) + 1
        placement = Placement(slots=np.array([self.slots]), num_experts=num_experts, num_gpus=len(self.num_tokens))
        slots = Replicas(placement, torch.device("cpu")).slots(0, distinct(num_experts), first=rank)
        taken = torch.rand(slots.shape, generator=some) > (0.33 if self.routing == "partial" else -1.0)
        return slots.where(taken, -1)

    def expected(self, rank: int) -> Tensor:
        """[T, D]: all experts on one rank."""
        x, slots, weights = self.tokens(rank)
        experts = torch.tensor([*self.slots, -1])[slots]
        return grouped_mlp(x, *_matrices(max(self.slots) + 1, self.width, self.dtype), experts, weights)


@lru_cache(maxsize=4)
def _matrices(num_experts: int, width: int, dtype: str) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2I, D] and down [E, D, I]."""
    some = torch.Generator().manual_seed(1)
    gate_up, down = (torch.randn(num_experts, *shape, generator=some) for shape in ((16, width), (width, 8)))
    return gate_up.to(getattr(torch, dtype)) / width**0.5, down.to(getattr(torch, dtype))


def make_dispatch(form: str, group: Collectives, layer: Layer, name: str = "") -> Dispatch:
    """`name`: new for each call among processes."""
    if form == "direct":
        return DirectDispatch(group, layer.slots_per_rank)
    if form == "fixed":
        return FixedDispatch(group, layer.slots_per_rank, max(layer.num_tokens) + 1)
    assert form == "hierarchical"
    if isinstance(group, SingleRank):
        return HierarchicalDispatch(group, group, layer.slots_per_rank)
    rail = group.subgroup(layer.groups.rail_group(group.rank), f"rail{name}")
    node = group.subgroup(layer.groups.node_group(group.rank), f"node{name}")
    return HierarchicalDispatch(rail, node, layer.slots_per_rank)


def compute(layer: Layer, rank: int, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """[R, D] of the experts in the rank's slots."""
    held = list(layer.slots[rank * layer.slots_per_rank : (rank + 1) * layer.slots_per_rank])
    gate_up, down = _matrices(max(layer.slots) + 1, layer.width, layer.dtype)
    return grouped_mlp(x, gate_up[held], down[held], slots, weights)


def dispatched(group: Collectives, form: str, layer: Layer, name: str, harm: str = "") -> list[list[float]]:
    """[T, D] by way of the ranks. `harm`: two rows that are in use are swapped on the way "there" or "back"."""
    with torch.inference_mode():
        dispatch = make_dispatch(form, group, layer, name)
        sending = dispatch.send(*layer.tokens(group.rank))
        arrived = sending.wait()
        used = (arrived.slots_RK >= 0).any(1).nonzero().flatten()
        y = compute(layer, group.rank, _swap(arrived.x_RD, used, harm == "there"), arrived.slots_RK, arrived.weights_RK)
        returned: list[list[float]] = dispatch.give_back(sending, _swap(y, used, harm == "back")).wait().tolist()
    return returned


def moved_in_fp8(group: Collectives, form: str, layer: Layer, harm: str = "") -> float:
    """Rows of FP8 to their ranks, and in the place of results the same rows in bf16 back, once from each of the ranks.
    The largest error against the row times the number of its ranks, relative to it."""
    with torch.inference_mode():
        dispatch = make_dispatch(form, group, layer)
        x, slots, weights = layer.tokens(group.rank)
        rows = quantise_rows_fp8(x)
        sending = dispatch.send(rows, slots, weights)
        arrived = sending.wait()
        num_rows = len(arrived.slots_RK)
        assert arrived.x_RD.values.dtype == torch.float8_e4m3fn
        assert arrived.x_RD.scales.stride() == (1, -(-num_rows // 4) * 4)
        used = (arrived.slots_RK >= 0).any(1)
        y = arrived.x_RD.dequantise(torch.bfloat16) * used[:, None]
        out = dispatch.give_back(sending, _swap(y, used.nonzero().flatten(), harm == "there")).wait()
        assert out.dtype == torch.bfloat16
        num_ranks = [len({slot // layer.slots_per_rank for slot in picks}) for picks in slots.tolist()]
        want = rows.dequantise(torch.float32) * torch.tensor(num_ranks)[:, None]
        return float(((out.float() - want) / want.abs().clamp(min=1e-2)).abs().max()) if len(x) else 0.0


def _swap(rows: Tensor, used: Tensor, wanted: bool) -> Tensor:
    if not wanted or len(used) < 2:
        return rows
    rows = rows.clone()
    rows[used[:2]] = rows[used[:2].flip(0)]
    return rows
