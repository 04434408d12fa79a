"""Which experts a unit's ranks hold, as its sizes ask for. No torch: what does not fit is known before a process is started."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from serving.model.config import ModelConfig
from serving.model.units import UnitShape
from serving.parallel.balance import global_placement, hierarchical_placement, single_placement
from serving.parallel.placement import Floats, Placement
from serving.parallel.redundancy import hosted_placement


def first_placement(shape: UnitShape, config: ModelConfig) -> Placement:
    """Before any load is known: all experts alike, but for a routed shared one, which every token takes. So one layer is as the other."""
    loads = np.ones((1, shape.num_experts))
    if shape.shared_expert_routed:
        loads[:, -1] = config.num_routed_experts / config.num_experts_per_token
    layer = placement_for(loads, shape, config)
    return replace(layer, slots=layer.slots.repeat(config.num_moe_layers + config.num_mtp_layers, axis=0))


def placement_for(loads: Floats, shape: UnitShape, config: ModelConfig) -> Placement:
    """For loads [L, E] of the logical experts: hosts, one a GPU, by nodes, or over all GPUs alike, as the unit's sizes ask for."""
    ep, (num_nodes, num_groups) = shape.groups.ep, nodes_and_groups(shape, config)
    if shape.chooses:
        return hosted_placement(
            loads, num_slots=shape.num_slots, num_gpus=ep, active=shape.active_slots, num_nodes=num_nodes
        )
    if shape.active_slots == 1:
        return single_placement(loads, num_gpus=ep)
    if num_nodes == 1 or num_groups == 1:
        return global_placement(loads, num_slots=shape.num_slots, num_gpus=ep)
    return hierarchical_placement(
        loads, num_slots=shape.num_slots, num_gpus=ep, num_nodes=num_nodes, num_groups=num_groups
    )


def nodes_and_groups(shape: UnitShape, config: ModelConfig) -> tuple[int, int]:
    """Nodes of an EP group, and groups of experts to keep on one of them each: 1 where groups do not divide so."""
    num_nodes = max(1, shape.groups.ep // shape.groups.ranks_per_node)
    divides = config.num_groups % num_nodes == 0 and not shape.shared_expert_routed
    return num_nodes, config.num_groups if divides else 1
