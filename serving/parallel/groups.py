"""Which rank of a unit is where: the groups of TP, DP and EP, the nodes, and the link between any two ranks.

    rank = dp_rank * tp + tp_rank              TP ranks are neighbours, so they share a node
    ep_rank = rank % ep                        an EP group is a run of neighbours too; ep = 1: every rank holds every expert
    node, local_rank = divmod(rank, ranks_per_node)

All of it follows from four sizes that are checked once. Pure data: no torch, no process, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from serving.core.errors import ConfigError


class Link(StrEnum):
    """What a byte from one rank to another travels over."""

    SAME_GPU = "same_gpu"
    NVLINK = "nvlink"
    IB = "ib"


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where one rank is: its index in each kind of group that it belongs to."""

    rank: int
    tp_rank: int
    dp_rank: int
    ep_rank: int
    node: int
    local_rank: int


@dataclass(frozen=True, kw_only=True)
class Groups:
    """One unit of `tp * dp` ranks. `ranks_per_node` may exceed the unit, which then fills a part of one node."""

    tp: int
    dp: int
    ep: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "ep", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is not a size; give 1 or more")
        world, node = self.world_size, self.ranks_per_node
        if world % self.ep:
            raise ConfigError(
                f"ep = {self.ep} does not divide the {world} ranks of tp {self.tp} x dp {self.dp}; "
                f"set ep to tp * dp = {world}, or to a divisor of it"
            )
        if world > node and world % node:
            raise ConfigError(
                f"{world} ranks (tp {self.tp} x dp {self.dp}) do not fill nodes of {node}; "
                f"choose dp so that tp * dp is a multiple of {node}"
            )
        if min(node, world) % self.tp:
            raise ConfigError(
                f"tp = {self.tp} does not divide the {node} ranks of a node, so a TP group would span two; "
                f"choose tp among {_divisors(node)}"
            )
        if self.ep % node if self.ep > node else min(node, world) % self.ep:
            raise ConfigError(
                f"an EP group of {self.ep} ranks neither fills whole nodes of {node} nor divides one; "
                f"choose ep among the divisors of {min(node, world)} or the multiples of {node}"
            )

    @property
    def world_size(self) -> int:
        """Ranks of the unit."""
        return self.tp * self.dp

    @property
    def num_nodes(self) -> int:
        """Nodes that the unit has ranks on."""
        return -(-self.world_size // self.ranks_per_node)

    def coordinates(self, rank: int) -> Coordinates:
        """Of `rank` in [0, world_size)."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        return Coordinates(
            rank=rank,
            tp_rank=rank % self.tp,
            dp_rank=rank // self.tp,
            ep_rank=rank % self.ep,
            node=rank // self.ranks_per_node,
            local_rank=rank % self.ranks_per_node,
        )

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that share `rank`'s batch, by tp_rank."""
        return _block(rank, self.tp)

    def dp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks with `rank`'s tp_rank in every DP group, by dp_rank."""
        return tuple(range(rank % self.tp, self.world_size, self.tp))

    def ep_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold all experts together with `rank`, by ep_rank."""
        return _block(rank, self.ep)

    def node_group(self, rank: int) -> tuple[int, ...]:
        """The ranks of `rank`'s EP group on `rank`'s node: the second hop of a hierarchical dispatch."""
        return _block(rank, min(self.ranks_per_node, self.ep))

    def rail_group(self, rank: int) -> tuple[int, ...]:
        """The ranks of `rank`'s EP group with its local_rank, one a node: the first hop of a hierarchical dispatch."""
        step = min(self.ranks_per_node, self.ep)
        return tuple(other for other in self.ep_group(rank) if other % step == rank % step)

    def link(self, source: int, target: int) -> Link:
        """What bytes from rank `source` to rank `target` travel over."""
        if source == target:
            return Link.SAME_GPU
        return Link.NVLINK if source // self.ranks_per_node == target // self.ranks_per_node else Link.IB


def _block(rank: int, size: int) -> tuple[int, ...]:
    """The run of `size` neighbours that `rank` lies in."""
    first = rank - rank % size
    return tuple(range(first, first + size))


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
