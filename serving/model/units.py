"""What the sizes in `[prefill]` or `[decode]` come to: groups of ranks, and for one model the heads and experts of each rank.

    routed experts + redundant_experts = ep * active slots      what a step uses
    slots of an EP group = ep * hosted slots                    what is in memory; hosted slots >= active slots

Where the shared expert is routed it is one logical expert more, whose copies stand among the redundant ones. All of it is known before
a process is started, so every mistake is a ConfigError of one line that names the key and the values that would fit. No torch, no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.core.config import DecodeTable, PrefillTable, UnitTable
from serving.core.errors import ConfigError
from serving.model.config import ModelConfig
from serving.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class UnitShape:
    """One rank's part of a model, alike on all ranks of the unit.

    `num_experts`: logical experts a layer, the shared one among them if it is routed. `active_slots` of the `hosted_slots` experts
    in a rank's memory, a layer, are used in a step.
    """

    groups: Groups
    heads: int
    num_experts: int
    active_slots: int
    hosted_slots: int
    shared_expert_routed: bool

    @property
    def num_slots(self) -> int:
        """Of an EP group: the physical experts of a layer."""
        return self.groups.ep * self.hosted_slots

    @property
    def chooses(self) -> bool:
        """Whether a step uses some of the slots, chosen for its tokens, and not all."""
        return self.hosted_slots > self.active_slots


def groups_of(table: UnitTable) -> Groups:
    """Who is where in a unit. Raises ConfigError that names the table."""
    try:
        return Groups(tp=table.tp, dp=table.dp, ep=table.ep or table.tp * table.dp, ranks_per_node=table.ranks_per_node)
    except ConfigError as error:
        raise ConfigError(f"{_name(table)} {error}") from None


def shape_of(table: UnitTable, model: ModelConfig) -> UnitShape:
    """The same for one model. Raises ConfigError."""
    groups = groups_of(table)
    if model.num_heads % table.tp:
        raise ConfigError(
            f"{_name(table)} tp = {table.tp} does not divide the model's {model.num_heads} attention heads; choose a divisor of {model.num_heads}"
        )
    if table.kv_sharding and table.tp == 1:
        raise ConfigError(
            f"{_name(table)} kv_sharding spreads pages over the ranks of a tp group; set tp above 1, or kv_sharding to false"
        )
    if isinstance(table, DecodeTable) and table.dispatch == "symmetric" and groups.ep > groups.ranks_per_node:
        raise ConfigError(
            f"{_name(table)} dispatch = symmetric writes into the memory of GPUs of one node, and ep = {groups.ep} ranks are on several "
            f"of {groups.ranks_per_node}; set dispatch to auto, or ep to {groups.ranks_per_node} at most"
        )
    if isinstance(table, PrefillTable) and table.dispatch == "deepep" and groups.ep > groups.ranks_per_node:
        raise ConfigError(
            f"{_name(table)} dispatch = deepep is for GPUs of one node, and ep = {groups.ep} ranks are on several of {groups.ranks_per_node}; "
            f"set dispatch to auto, or ep to {groups.ranks_per_node} at most"
        )
    _check_shared(table, model)
    num_experts = model.num_routed_experts + table.shared_expert_routed
    active = _active_slots(table, model.num_routed_experts, groups.ep)
    hosted = table.hosted_slots or active
    for key, slots in (("redundant_experts", active), ("hosted_slots", hosted)):
        if slots > num_experts:
            raise ConfigError(
                f"{_name(table)} {key} = {getattr(table, key)} gives a rank {slots} slots for {num_experts} experts, so it would hold one twice; "
                f"choose {key} up to {_most(key, num_experts, groups.ep, model.num_routed_experts)}"
            )
    if table.hosted_slots and hosted <= active:
        raise ConfigError(
            f"{_name(table)} hosted_slots = {hosted} leaves no choice where every step uses {active} a rank "
            f"((routed + redundant) / ep); {_choice(active, num_experts)}"
        )
    return UnitShape(
        groups=groups,
        heads=model.num_heads // table.tp,
        num_experts=num_experts,
        active_slots=active,
        hosted_slots=hosted,
        shared_expert_routed=table.shared_expert_routed,
    )


def check_drafts(draft_tokens: str, *, alone: bool) -> None:
    """Raises ConfigError where a unit is to draft and cannot. `alone`: its ranks share neither heads nor experts."""
    if draft_tokens not in ("auto", "0") and not alone:
        raise ConfigError(
            f"[decode] draft_tokens = {draft_tokens}: units of several ranks make no drafts as yet; set it to 0 or auto, or tp and ep to 1"
        )


def _choice(active: int, num_experts: int) -> str:
    if active == num_experts:
        return "set it to 0, or raise ep, so that a rank does not hold every expert"
    return f"choose {active + 1} to {num_experts}, or 0"


def _name(table: UnitTable) -> str:
    """As it stands in the file; units of mode `both` are in [decode]."""
    return "[prefill]" if isinstance(table, PrefillTable) else "[decode]"


def _check_shared(table: UnitTable, model: ModelConfig) -> None:
    if not table.shared_expert_routed:
        return
    if model.num_shared_experts != 1:
        raise ConfigError(
            f"{_name(table)} shared_expert_routed needs a shared expert as wide as a routed one, and the model has {model.num_shared_experts} in one; set it to false"
        )
    if not table.redundant_experts:
        raise ConfigError(
            f"{_name(table)} shared_expert_routed keeps the shared expert among the redundant ones, and redundant_experts = 0; set it to 1 or more"
        )


def _active_slots(table: UnitTable, num_routed: int, ep: int) -> int:
    slots = num_routed + table.redundant_experts
    if slots % ep:
        below, above = slots // ep * ep - num_routed, -(-slots // ep) * ep - num_routed
        fitting = f"{below} or {above}" if below >= table.shared_expert_routed else str(above)
        raise ConfigError(
            f"{_name(table)} redundant_experts = {table.redundant_experts}: {num_routed} routed experts and these are {slots}, "
            f"which do not divide over ep = {ep} ranks; set redundant_experts to {fitting}"
        )
    return slots // ep


def _most(key: str, num_experts: int, ep: int, num_routed: int) -> int:
    return num_experts if key == "hosted_slots" else num_experts * ep - num_routed
