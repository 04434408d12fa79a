"""What a rank of a unit keeps and computes of the model, and the collectives of a TP group.

    between blocks   each TP rank holds its share of the group's tokens: runs of neighbours, as even as can be
    attention        its heads over all tokens of the group; every rank stores every latent in its own pool
    embedding, head  its rows of the vocabulary
    experts          the slots that the placement gives it; tokens get there and back through a Dispatch

Outside the model, hidden states and logits are whole on every TP rank. A rank without tokens comes to every collective all the
same. Alone, all of this is the identity: no copy, no launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serving.core.errors import ConfigError
from serving.kernels.peer_shares import share_sizes
from serving.model.config import ModelConfig
from serving.parallel.collectives import Collectives, SingleRank
from serving.parallel.dispatch import Dispatch
from serving.parallel.placement import Placement


@dataclass(frozen=True, kw_only=True, eq=False)
class Hosting:
    """Dynamic redundancy: of the slots in a rank's memory a step uses at most `active`, chosen for each layer's tokens.

    `counts`: the EP group, whose ranks exchange how many tokens each expert has; best one of its own, so that it waits for no rows.
    `ranks_per_node`: of the EP group. `watch`: called with the layer and the tokens of each slot [W, slots a rank], for who wants to see.
    """

    counts: Collectives
    active: int
    ranks_per_node: int
    watch: Callable[[int, Tensor], None] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Parallel:
    """One rank's place in its unit.

    `tp`: its end of the TP group. `experts`: its end of the dispatch of the EP group, whose rank `ep_rank` it is; None: it holds
    all experts itself. `fixed`: makes the dispatch of captured steps of up to so many tokens of every rank. `placement`: the logical expert in each slot of the EP group, of each layer with experts (the MTP layer is
    the last). `shared_is_routed`: the shared expert is the last logical expert, which every token selects. `near`: EP ranks
    whose copies of an expert are taken first. `hosting`: a step uses some of the slots; None: all.
    `free_sms`: of a GPU, left to communication where a step is computed in micro-batches.
    """

    tp: Collectives = field(default_factory=SingleRank)
    experts: Dispatch | None = None
    fixed: Callable[[int], Dispatch] | None = None
    placement: Placement | None = None
    ep_rank: int = 0
    shared_is_routed: bool = False
    near: range | None = None
    hosting: Hosting | None = None
    free_sms: int = 0

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError where the model does not divide so."""
        if config.num_heads % self.tp.world_size:
            raise ConfigError(
                f"tp = {self.tp.world_size} does not divide the model's {config.num_heads} heads; choose a tp that does"
            )
        if self.shared_is_routed and config.num_shared_experts != 1:
            raise ConfigError(
                f"the model has {config.num_shared_experts} shared experts, and only one can be routed; let every rank hold them"
            )
        assert (self.experts is None) == (self.placement is None), "a dispatch goes by a placement"
        assert self.hosting is None or self.near is None, "which copies are near, the assignment knows itself"
        if self.placement is not None:
            wanted = num_moe_layers(config), config.num_routed_experts + self.shared_is_routed
            placed = len(self.placement.slots), self.placement.num_experts
            if placed != wanted:
                raise ConfigError(
                    f"the placement is of {placed[0]} layers and {placed[1]} experts, the model has {wanted[0]} and {wanted[1]}; "
                    "make one for this model"
                )

    def experts_here(self, config: ModelConfig, layer: int) -> list[int]:
        """The logical expert in each slot of this rank; `layer` counts those with experts."""
        if self.placement is None:
            return list(range(config.num_routed_experts))
        first = self.ep_rank * self.placement.slots_per_gpu
        experts: list[int] = self.placement.slots[layer, first : first + self.placement.slots_per_gpu].tolist()
        return experts


SINGLE = Parallel()


def num_moe_layers(config: ModelConfig) -> int:
    """Layers with experts, the MTP layer among them."""
    return config.num_layers - config.num_dense_layers + config.num_mtp_layers


shares = share_sizes
"""(tokens, tp) -> tokens of each TP rank."""


def own_share(tp: Collectives, x_TX: Tensor) -> Tensor:
    """This rank's rows, as a view."""
    if tp.world_size == 1:
        return x_TX
    counts = shares(len(x_TX), tp.world_size)
    return x_TX.narrow(0, sum(counts[: tp.rank]), counts[tp.rank])


def gather(tp: Collectives, share: Tensor, num_tokens: int) -> Tensor:
    """[num_tokens, ...] of the whole group from each rank's share of it."""
    if tp.world_size == 1:
        return share
    out_TX = share.new_empty(num_tokens, *share.shape[1:])
    tp.all_gather(out_TX, share.contiguous(), _uneven(num_tokens, tp)).wait()
    return out_TX


def scatter_sum(tp: Collectives, part_TX: Tensor) -> Tensor:
    """This rank's share of the sum over the ranks."""
    if tp.world_size == 1:
        return part_TX
    counts = shares(len(part_TX), tp.world_size)
    out = part_TX.new_empty(counts[tp.rank], *part_TX.shape[1:])
    tp.reduce_scatter(out, part_TX.contiguous(), _uneven(len(part_TX), tp)).wait()
    return out


def gather_columns(tp: Collectives, part_NX: Tensor) -> Tensor:
    """[N, tp * X]: every rank's columns side by side."""
    if tp.world_size == 1:
        return part_NX
    parts = part_NX.new_empty(tp.world_size * len(part_NX), part_NX.shape[1])
    tp.all_gather(parts, part_NX.contiguous()).wait()
    return parts.view(tp.world_size, *part_NX.shape).transpose(0, 1).flatten(1)


def vocabulary_rows(vocab_size: int, tp: int) -> int:
    """Rows of embedding and head on each rank; the last rank's, or ranks', may lie past the vocabulary."""
    return -(-vocab_size // tp)


def new_embedding(config: ModelConfig, tp: Collectives, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[V, D]; of a group, this rank's rows and then one of zeros, which stands for all tokens of the others."""
    if tp.world_size == 1:
        return torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
    rows = vocabulary_rows(config.vocab_size, tp.world_size)
    return torch.zeros(rows + 1, config.hidden_size, dtype=dtype, device=device)


def local_ids(tp: Collectives, ids_T: Tensor, embed_VD: Tensor) -> Tensor:
    """Rows of `embed_VD` for these tokens; the sum over the ranks of what they look up is the embedding."""
    if tp.world_size == 1:
        return ids_T
    rows = len(embed_VD) - 1
    local_T = ids_T - tp.rank * rows
    return torch.where((local_T >= 0) & (local_T < rows), local_T, rows)


def _uneven(num_tokens: int, tp: Collectives) -> Sequence[int] | None:
    """Counts where they differ; equal ones have collectives of their own."""
    return shares(num_tokens, tp.world_size) if num_tokens % tp.world_size else None
