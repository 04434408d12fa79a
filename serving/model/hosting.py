"""Dynamic redundancy: replicas chosen for the tokens of one layer in one step (DeepSeek-V3 report, section 3.4.1).

    count    this rank's tokens of each expert, and in flight those of all ranks
    assign   on every rank the same: tokens of each source rank for each hosted slot, at most `active` slots of a rank in use
    slots    of an expert's picks here the first n go to its first slot, the next to the next, in the order of tokens

A rank without tokens takes part. On a GPU nothing is read back and no shape depends on tokens, so that a step can be captured. Which
copy computes a token changes nothing but the order of a sum, as with copies that take turns (`serving.parallel.replicas`).

Legend: L layers, E logical experts, W ranks of the EP group, H hosted slots a rank, S slots (W * H), T tokens, K picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serving.core.errors import ConfigError
from serving.kernels.redundancy import MOST_GPUS, MOST_PICKS, assign_replicas
from serving.model.parallel import Hosting
from serving.parallel.collectives import Handle
from serving.parallel.placement import Placement
from serving.parallel.redundancy import assign


def check_device(ep: int, num_hosted: int) -> None:
    """Raises ConfigError where a GPU's kernel is too small for an EP group."""
    if max(ep, num_hosted) > MOST_GPUS:
        raise ConfigError(
            f"hosted_slots = {num_hosted} with ep = {ep}: on GPUs replicas are chosen for up to {MOST_GPUS} ranks of up to "
            f"{MOST_GPUS} hosted slots; lower them, or set hosted_slots to 0"
        )


class Counting:
    """The exchange of a layer's token counts in flight; when it has been waited for, `counts_WE` int32 are all ranks'."""

    def __init__(self, counts_WE: Tensor, handle: Handle) -> None:
        self.counts_WE = counts_WE
        self.wait = handle.wait


class HostedReplicas:
    """The hosts of every expert under a placement, as tables on `device`. Raises ConfigError where the kernel is too small."""

    def __init__(self, placement: Placement, hosting: Hosting, device: torch.device) -> None:
        if device.type == "cuda":
            check_device(placement.num_gpus, placement.slots_per_gpu)
        self._hosting = hosting
        self._num_experts = placement.num_experts
        hosted_LWH, by_expert_LS = _tables(placement)
        self._hosted_LWH, self._by_expert_LS = hosted_LWH.to(device), by_expert_LS.to(device)

    def write(self, placement: Placement) -> None:
        """A placement of the same sizes, in place: captured steps see it."""
        hosted_LWH, by_expert_LS = _tables(placement)
        self._hosted_LWH.copy_(hosted_LWH)
        self._by_expert_LS.copy_(by_expert_LS)

    def count(self, experts_TK: Tensor) -> Counting:
        """experts_TK: int64, this rank's, -1: none. Every rank of the EP group comes."""
        group = self._hosting.counts
        assert not experts_TK.is_cuda or experts_TK.numel() * group.world_size <= MOST_PICKS, "preflight allows fewer"
        counts = experts_TK.new_zeros(self._num_experts + 1, dtype=torch.int32)
        keys = _keys(experts_TK, self._num_experts).long()
        own_1E = counts.scatter_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))[None, :-1]
        counts_WE = own_1E.new_empty(group.world_size, self._num_experts)
        return Counting(counts_WE, group.all_gather(counts_WE, own_1E))

    def slots(self, layer: int, experts_TK: Tensor, counts_WE: Tensor) -> Tensor:
        """int64 [T, K], a slot of each expert, -1 of -1. counts_WE: as counted, and waited for."""
        tokens_WH, sent_WWH = self._assign(layer, counts_WE)
        if self._hosting.watch is not None:
            self._hosting.watch(layer, tokens_WH)
        share_S = sent_WWH[self._hosting.counts.rank].flatten()
        return slots_by_share(experts_TK, share_S, self._by_expert_LS[layer], self._num_experts)

    def _assign(self, layer: int, counts_WE: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of each slot, and of them those of each source rank."""
        hosted_WH = self._hosted_LWH[layer]
        active, gpus_per_node = self._hosting.active, self._hosting.ranks_per_node
        if counts_WE.is_cuda:
            return assign_replicas(counts_WE, hosted_WH, active=active, gpus_per_node=gpus_per_node)
        found = assign(counts_WE.numpy(), hosted_WH.numpy(), active=active, gpus_per_node=gpus_per_node)
        return torch.from_numpy(found.tokens), torch.from_numpy(found.sent)


def slots_by_share(experts_TK: Tensor, share_S: Tensor, by_expert_S: Tensor, num_experts: int) -> Tensor:
    """int64 [T, K]. share_S: integers, how many picks of its expert each slot gets, all of them in sum. by_expert_S: int64, the slots in the
    order of their experts, and -1 behind them, for picks of -1."""
    # Picks and shares stand in one line: by expert, of one expert by token and by slot.
    line = _keys(experts_TK, num_experts).sort(stable=True).indices
    ends_S = share_S[by_expert_S[:-1]].cumsum(0)
    places = torch.searchsorted(ends_S, torch.arange(len(line), device=line.device), right=True)
    slots = torch.empty_like(line).scatter_(0, line, by_expert_S[places])
    return slots.view_as(experts_TK)


def _keys(experts_TK: Tensor, num_experts: int) -> Tensor:
    """int16 [T * K]: the experts, -1 behind all others. Narrow, since they are sorted."""
    return torch.where(experts_TK < 0, num_experts, experts_TK).flatten().to(torch.int16)


def _tables(placement: Placement) -> tuple[Tensor, Tensor]:
    """int64 [L, W, H], the expert in each slot, and [L, S + 1], the slots in the order of their experts and then -1."""
    slots_LS = torch.from_numpy(placement.slots.copy())
    by_expert_LS = slots_LS.sort(dim=1, stable=True).indices
    none_L1 = by_expert_LS.new_full((len(by_expert_LS), 1), -1)
    return slots_LS.unflatten(1, (placement.num_gpus, -1)), torch.cat([by_expert_LS, none_L1], dim=1)
