"""Dynamic redundancy in three launches without read-back; see `serving.kernels.redundancy`.

    prepare  a program an expert: its tokens, in all and from each node, and its hosts as bits, noted at each of its slots
    search   a program a start, one warp: a lane is a GPU, its slots are registers, a set of GPUs is the bits of one number, so that a
             level of a breadth-first search over all GPUs is a handful of instructions and one reduction
    split    a program an expert: the best start's tokens, and each source rank's part of them

Integers alone: the same bits everywhere, the interpreter included. Bound: latency, of some 40 rounds of a dozen dependent reductions
over a warp each; memory is nothing beside it (at EP32 the counts are read twice and 64 KB written). S slots, G GPUs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.redundancy import GOAL, GOAL_STEP, HALVINGS, STAGES

LANES = 32


def assign_replicas(
    counts: Tensor, hosted: Tensor, *, active: int, gpus_per_node: int, num_starts: int, max_rounds: int
) -> tuple[Tensor, Tensor]:
    num_sources, num_experts = counts.shape
    num_gpus, num_slots = hosted.shape
    num_nodes = num_gpus // gpus_per_node
    located = num_sources > 1
    device = counts.device
    local = torch.empty(num_nodes, num_experts, dtype=torch.int32, device=device)
    slots = triton.next_power_of_2(num_slots)
    # Of each slot: its expert, that one's tokens, its hosts, and those of them that it may start on. Lanes lie side by side.
    slots_in = torch.empty(4, slots, LANES, dtype=torch.int32, device=device)
    found = torch.empty(num_starts, slots, LANES, dtype=torch.int32, device=device)
    largest = torch.empty(num_starts, dtype=torch.int32, device=device)
    tokens = torch.empty(num_gpus, num_slots, dtype=torch.int32, device=device)
    sent = torch.empty(num_sources, num_gpus, num_slots, dtype=torch.int32, device=device)
    nodes = triton.next_power_of_2(num_nodes)
    ranks = num_sources // num_nodes if located else num_sources
    of_node = triton.next_power_of_2(ranks)
    _prepare_kernel[(num_experts,)](
        counts,
        hosted,
        local,
        slots_in,
        counts.stride(0),
        counts.stride(1),
        hosted.stride(0),
        hosted.stride(1),
        num_experts,
        num_gpus,
        num_slots,
        num_nodes,
        ranks,
        ACTIVE=active,
        LOCATED=located,
        SLOTS=slots,
        NODES=nodes if located else 1,
        RANKS=of_node,
        NUM_NODES=num_nodes,
        LANES=LANES,
        num_warps=1,
    )
    _search_kernel[(num_starts,)](
        local,
        slots_in,
        found,
        largest,
        num_experts,
        num_gpus,
        num_slots,
        gpus_per_node,
        max_rounds,
        ACTIVE=active,
        SLOTS=slots,
        LANES=LANES,
        HALVINGS=HALVINGS,
        STAGES=STAGES,
        GOAL=GOAL,
        GOAL_STEP=GOAL_STEP,
        num_warps=1,
    )
    _split_kernel[(num_experts,)](
        counts,
        hosted,
        found,
        largest,
        tokens,
        sent,
        counts.stride(0),
        counts.stride(1),
        hosted.stride(0),
        hosted.stride(1),
        num_gpus,
        num_slots,
        num_starts,
        num_nodes,
        ranks,
        gpus_per_node,
        LOCATED=located,
        SLOTS=slots,
        NODES=nodes,
        RANKS=of_node,
        GPUS=triton.next_power_of_2(gpus_per_node),
        STARTS=triton.next_power_of_2(num_starts),
        LANES=LANES,
        num_warps=4,
    )
    return tokens, sent


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _lanes_where(holds, bit):
    """The lanes where it holds, as bits."""
    return tl.sum(tl.where(holds, bit, 0), axis=0)


@triton.jit
def _of(values, chosen, here):
    """The one value of `values` [S, G] that is `chosen` in the lane that is `here`."""
    return tl.sum(tl.where(here, tl.sum(tl.where(chosen, values, 0), axis=0), 0), axis=0)


@triton.jit
def _prepare_kernel(
    counts_ptr,
    hosted_ptr,
    local_ptr,
    slots_ptr,
    counts_stride_r,
    counts_stride_e,
    hosted_stride_g,
    hosted_stride_s,
    num_experts,
    num_gpus,
    num_slots,
    num_nodes,
    ranks,
    ACTIVE: tl.constexpr,
    LOCATED: tl.constexpr,
    SLOTS: tl.constexpr,
    NODES: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_NODES: tl.constexpr,
    LANES: tl.constexpr,
):
    """counts as [NODES, RANKS] ranks of a node; a single source has no node."""
    expert = tl.program_id(0)
    node = tl.arange(0, NODES)
    rank = tl.arange(0, RANKS)
    source = node[:, None] * ranks + rank[None, :]
    real = (node[:, None] < (num_nodes if LOCATED else 1)) & (rank[None, :] < ranks)
    counts = tl.load(
        counts_ptr + source.to(tl.int64) * counts_stride_r + expert * counts_stride_e, mask=real, other=0
    ).to(tl.int32)
    by_node = tl.sum(counts, axis=1)
    if LOCATED:
        tl.store(local_ptr + node * num_experts + expert, by_node, mask=node < num_nodes)
    else:
        for index in tl.static_range(NUM_NODES):
            tl.store(local_ptr + index * num_experts + expert, 0)
    slot = tl.arange(0, SLOTS)
    lane = tl.arange(0, LANES)
    hosted = tl.load(
        hosted_ptr + lane[None, :] * hosted_stride_g + slot[:, None] * hosted_stride_s,
        mask=(slot[:, None] < num_slots) & (lane[None, :] < num_gpus),
        other=-1,
    ).to(tl.int32)
    bit = tl.full([LANES], 1, tl.int32) << lane
    here = hosted == expert
    # No expert stands twice on a GPU: the sum of the bits is their union.
    hosts = tl.sum(tl.where(here, bit[None, :], 0), axis=0)
    starts = tl.sum(tl.where(here & (slot[:, None] < ACTIVE), bit[None, :], 0), axis=0)
    out = slots_ptr + slot[:, None] * LANES + lane[None, :]
    nothing = tl.zeros([SLOTS, LANES], tl.int32)
    tl.store(out, nothing + expert, mask=here)
    tl.store(out + SLOTS * LANES, nothing + tl.sum(by_node, axis=0), mask=here)
    tl.store(out + 2 * SLOTS * LANES, nothing + tl.sum(hosts, axis=0), mask=here)
    tl.store(out + 3 * SLOTS * LANES, nothing + tl.sum(starts, axis=0), mask=here)


@triton.jit
def _search_kernel(
    local_ptr,
    slots_ptr,
    found_ptr,
    largest_ptr,
    num_experts,
    num_gpus,
    num_slots,
    gpus_per_node,
    max_rounds,
    ACTIVE: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    HALVINGS: tl.constexpr,
    STAGES: tl.constexpr,
    GOAL: tl.constexpr,
    GOAL_STEP: tl.constexpr,
):
    """Local search from one start: as `_Search` in `serving.kernels.redundancy`, step by step."""
    start = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    lane = tl.arange(0, LANES)
    bit = tl.full([LANES], 1, tl.int32) << lane
    real = (slot[:, None] < num_slots) & (lane[None, :] < num_gpus)
    at = slots_ptr + slot[:, None] * LANES + lane[None, :]
    expert = tl.load(at, mask=real, other=-1)
    totals = tl.load(at + SLOTS * LANES, mask=real, other=0)
    others = tl.load(at + 2 * SLOTS * LANES, mask=real, other=0) & ~bit[None, :]
    homes = tl.load(at + 3 * SLOTS * LANES, mask=real, other=0)
    # The first of them from a GPU on, which is another one in each start.
    begin = start * num_gpus // tl.num_programs(0)
    behind = homes & (tl.full([SLOTS, LANES], -1, tl.int32) << begin)
    homes = tl.where(behind != 0, behind, homes)
    home = homes & -homes
    one = tl.full([], 1, tl.int32)
    # used: the GPUs, but for the slot's own, that have tokens of its expert.
    used = tl.where(totals > 0, home & ~bit[None, :], 0)
    tokens = tl.where(home == bit[None, :], totals, 0)
    open_slots = ACTIVE - tl.sum((tokens > 0).to(tl.int32), axis=0)
    free = _lanes_where(open_slots > 0, bit)
    load = tl.sum(tokens, axis=0)
    mean = (tl.sum(load, axis=0) + num_gpus - 1) // num_gpus
    goal = mean + mean // (GOAL + GOAL_STEP * (start // 2))
    unit = mean // (2 + start % 2)
    # Value and place in one number, so that one reduction finds both; the lower place first.
    fullest = tl.max(load * LANES + (LANES - 1 - lane), axis=0)
    place = SLOTS - 1 - slot[:, None]
    best = tokens
    least = fullest // LANES
    level = 0
    rounds = 0
    while (fullest // LANES > goal) & (level < HALVINGS * STAGES) & (rounds < max_rounds):
        excess = fullest // LANES - mean
        amount = tl.maximum(unit >> (level % HALVINGS), 1)
        if amount > excess:
            level += 1
        else:
            rounds += 1
            small = amount << (level // HALVINGS)
            gpu = LANES - 1 - fullest % LANES
            barred = ~(one << gpu)
            # Arcs: who may take so many tokens of a slot. Who is full may if he can hand a small share on.
            takers = ((others & free) | used) & barred
            passing = (tokens > 0) & (tokens <= small) & (takers != 0)
            can_pass = _lanes_where(tl.max(passing.to(tl.int32), axis=0) > 0, bit)
            arcs = tl.where(tokens >= amount, ((others & (free | can_pass)) | used) & barred, 0)
            arcs_of_gpu = tl.reduce(arcs, 0, _or)
            # Backwards from those with room for so many.
            layer0 = _lanes_where(goal - load >= amount, bit) & barred
            layer1 = _lanes_where((arcs_of_gpu & layer0) != 0, bit) & ~layer0
            layer2 = tl.zeros([], tl.int32)
            layer3 = tl.zeros([], tl.int32)
            hops = tl.full([], 1, tl.int32)
            if (layer1 & ~barred) == 0:
                seen = layer0 | layer1
                layer2 = _lanes_where((arcs_of_gpu & layer1) != 0, bit) & ~seen
                seen = seen | layer2
                layer3 = _lanes_where((arcs_of_gpu & layer2) != 0, bit) & ~seen
                seen = seen | layer3
                layer4 = _lanes_where((arcs_of_gpu & layer3) != 0, bit) & ~seen
                hops = tl.where((layer4 & ~barred) != 0, 4, 0)
                hops = tl.where((layer3 & ~barred) != 0, 3, hops)
                hops = tl.where((layer2 & ~barred) != 0, 2, hops)
            handed_over = False
            count = excess
            while hops > 0:
                layer = tl.where(hops == 1, layer0, tl.where(hops == 2, layer1, tl.where(hops == 3, layer2, layer3)))
                hops -= 1
                here = lane == gpu
                # The slot: one whose expert is in use there, else one that finds a free slot; of these the largest.
                to = arcs & layer
                rank = tl.where((to & used) != 0, 2 << 29, tl.where((to & free) != 0, 1 << 29, 0))
                key = tl.where(to != 0, rank + tokens * SLOTS + place, -1)
                highest = tl.max(key, axis=0)
                chosen = key == highest[None, :]
                there = tl.sum(tl.where(here, (highest & ((1 << 29) - 1)) // SLOTS, 0), axis=0)
                moved = _of(expert, chosen, here)
                to_gpus = _of(to, chosen, here)
                used_by = _of(used, chosen, here)
                # The GPU: likewise; of these the one with most room, a token of its own node counting as half a place.
                own = tl.load(
                    local_ptr + (lane // gpus_per_node) * num_experts + moved,
                    mask=lane < num_gpus,
                    other=0,
                )
                room = goal - load
                value = (room + own // 2 + (1 << 24)) >> 2
                is_used = ((used_by >> lane) & 1) != 0
                is_free = ((free >> lane) & 1) != 0
                gpu_rank = tl.where(is_used, 2 << 29, tl.where(is_free, 1 << 29, 0))
                gpu_key = tl.where(((to_gpus >> lane) & 1) != 0, gpu_rank + value * LANES + (LANES - 1 - lane), -1)
                target_key = tl.max(gpu_key, axis=0)
                target = LANES - 1 - target_key % LANES
                at_target = lane == target
                limit = tl.where(hops == 0, tl.sum(tl.where(at_target, room, 0), axis=0), 2 * amount)
                count = tl.minimum(tl.minimum(count, there), limit)
                goes = (count > 0) & (target_key >= (1 << 29))
                if (count > 0) & (target_key >= 0) & (target_key < (1 << 29)):
                    # Full: its largest small share goes, whole, to the least loaded that takes it.
                    takers = ((others & free) | used) & barred
                    passing = (tokens > 0) & (tokens <= small) & (takers != 0) & (expert != moved)
                    key = tl.where(passing, tokens * SLOTS + place, -1)
                    highest = tl.max(key, axis=0)
                    share = tl.sum(tl.where(at_target, tl.maximum(highest, 0) // SLOTS, 0), axis=0)
                    if share > 0:
                        chosen = key == highest[None, :]
                        passed = _of(expert, chosen, at_target)
                        taken_by = _of(takers, chosen, at_target)
                        used_by_it = _of(used, chosen, at_target)
                        lightest = tl.where(((taken_by >> lane) & 1) != 0, load * LANES + lane, 0x7FFFFFFF)
                        taker = tl.min(lightest, axis=0) % LANES
                        at_taker = lane == taker
                        its = expert == passed
                        change = tl.where(at_taker, share, 0) - tl.where(at_target, share, 0)
                        tokens = tl.where(its, tokens + change[None, :], tokens)
                        used = tl.where(its, ((used & ~(one << target)) | (one << taker)) & ~bit[None, :], used)
                        load += change
                        opens = at_taker & (((used_by_it >> lane) & 1) == 0)
                        open_slots += at_target.to(tl.int32) - opens.to(tl.int32)
                        goes = True
                if goes:
                    its = expert == moved
                    change = tl.where(at_target, count, 0) - tl.where(here, count, 0)
                    tokens = tl.where(its, tokens + change[None, :], tokens)
                    left = tl.where(there == count, ~(one << gpu), -1)
                    used = tl.where(its, ((used & left) | (one << target)) & ~bit[None, :], used)
                    load += change
                    opens = at_target & (((used_by >> lane) & 1) == 0)
                    closes = here & (there == count)
                    open_slots += closes.to(tl.int32) - opens.to(tl.int32)
                    free = _lanes_where(open_slots > 0, bit)
                    gpu = target
                    handed_over = True
                else:
                    hops = tl.zeros([], tl.int32)
            fullest = tl.max(load * LANES + (LANES - 1 - lane), axis=0)
            if fullest // LANES < least:
                best = tokens
                least = fullest // LANES
            if handed_over:
                level = tl.where(level < HALVINGS, level, 0)
            else:
                level += 1
    tl.store(found_ptr + start * (SLOTS * LANES) + slot[:, None] * LANES + lane[None, :], best)
    tl.store(largest_ptr + start, least)


@triton.jit
def _split_kernel(
    counts_ptr,
    hosted_ptr,
    found_ptr,
    largest_ptr,
    tokens_ptr,
    sent_ptr,
    counts_stride_r,
    counts_stride_e,
    hosted_stride_g,
    hosted_stride_s,
    num_gpus,
    num_slots,
    num_starts,
    num_nodes,
    ranks,
    gpus_per_node,
    LOCATED: tl.constexpr,
    SLOTS: tl.constexpr,
    NODES: tl.constexpr,
    RANKS: tl.constexpr,
    GPUS: tl.constexpr,
    STARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Source ranks and GPUs stand in line, first within each node, then what is left, both by index; a part is where two of them overlap."""
    expert = tl.program_id(0)
    index = tl.arange(0, STARTS)
    largest = tl.load(largest_ptr + index, mask=index < num_starts, other=0x7FFFFFFF)
    best = tl.min(tl.where(largest == tl.min(largest, axis=0), index, STARTS), axis=0)

    # GPUs as [NODES, GPUS of a node]: the slot of each, and what it computes.
    gpu_node = tl.arange(0, NODES * GPUS) // GPUS
    gpu = gpu_node * gpus_per_node + tl.arange(0, NODES * GPUS) % GPUS
    gpu_real = (gpu_node < num_nodes) & (tl.arange(0, NODES * GPUS) % GPUS < gpus_per_node)
    slot = tl.arange(0, SLOTS)
    real = gpu_real[:, None] & (slot[None, :] < num_slots)
    hosted = tl.load(
        hosted_ptr + gpu[:, None] * hosted_stride_g + slot[None, :] * hosted_stride_s, mask=real, other=-1
    ).to(tl.int32)
    tokens = tl.load(found_ptr + best * (SLOTS * LANES) + slot[None, :] * LANES + gpu[:, None], mask=real, other=0)
    here = hosted == expert
    wanted = tl.sum(tl.where(here, tokens, 0), axis=1)
    its_slot = tl.max(tl.where(here, slot[None, :], -1), axis=1)

    source_node = tl.arange(0, (NODES if LOCATED else 1) * RANKS) // RANKS
    source = source_node * ranks + tl.arange(0, (NODES if LOCATED else 1) * RANKS) % RANKS
    source_real = (source_node < num_nodes) & (tl.arange(0, (NODES if LOCATED else 1) * RANKS) % RANKS < ranks)
    offered = tl.load(
        counts_ptr + source.to(tl.int64) * counts_stride_r + expert * counts_stride_e, mask=source_real, other=0
    ).to(tl.int32)
    sent = tl.zeros([(NODES if LOCATED else 1) * RANKS, NODES * GPUS], tl.int32)
    if LOCATED:
        rank_ends = tl.reshape(tl.cumsum(tl.reshape(offered, [NODES, RANKS]), axis=1), [NODES * RANKS])
        slot_ends = tl.reshape(tl.cumsum(tl.reshape(wanted, [NODES, GPUS]), axis=1), [NODES * GPUS])
        begins = tl.maximum((rank_ends - offered)[:, None], (slot_ends - wanted)[None, :])
        overlap = tl.maximum(tl.minimum(rank_ends[:, None], slot_ends[None, :]) - begins, 0)
        sent = tl.where(source_node[:, None] == gpu_node[None, :], overlap, 0)
        offered -= tl.sum(sent, axis=1)
        wanted_now = wanted - tl.sum(sent, axis=0)
    else:
        wanted_now = wanted
    rank_ends = tl.cumsum(offered, axis=0)
    slot_ends = tl.cumsum(wanted_now, axis=0)
    begins = tl.maximum((rank_ends - offered)[:, None], (slot_ends - wanted_now)[None, :])
    sent += tl.maximum(tl.minimum(rank_ends[:, None], slot_ends[None, :]) - begins, 0)

    hosts = its_slot >= 0
    place = gpu * num_slots + its_slot
    tl.store(tokens_ptr + place, wanted, mask=hosts)
    tl.store(
        sent_ptr + source[:, None].to(tl.int64) * num_gpus * num_slots + place[None, :],
        sent,
        mask=source_real[:, None] & hosts[None, :],
    )
