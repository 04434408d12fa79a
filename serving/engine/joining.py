"""From a worker's spec to its place in its unit: the groups of ranks, the dispatch of its experts, the lockstep.

    rendezvous -> world -> control, control-tp       of the lockstep, in host memory        bell, and on GPUs what watches the device
                        -> tp | ep | rail, node      of tensors where the model is
                        -> counts-rail, counts-node, back-rail, back-node       what else goes by nodes on GPUs, whose groups are queues
                        -> counts                    of the tokens of each expert, where replicas are chosen for them
                        -> peers, peers-tp           of decode's ranks on GPUs, which write each other's memory, in host memory
                        -> control-ep, weights       of experts that change their places, in host memory and where the model is

Tensors of GPUs go over NCCL; each rank has its own, which is the process's current device. In host memory the ranks of one node exchange
through shared memory, those of several over gloo. All ranks of a unit come here at once and ask for the same groups in the same order.
Who is missing, what watches the device hears of a group in shared memory where all ranks are on one node, else of the bell. GPUs of one node
may write each other's memory, others exchange over NCCL. Ranks that share neither heads nor experts join nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from serving.core.config import Config, DecodeTable, unit_table
from serving.core.spec import WorkerSpec
from serving.engine.placing import first_placement
from serving.engine.unit import Lockstep, MicroBatches
from serving.engine.watch import LAST_DEADLINE_S, WARM_UP_DEADLINE_S, DeviceWatch
from serving.model.config import ModelConfig
from serving.model.parallel import SINGLE, Hosting, Parallel
from serving.model.units import UnitShape, groups_of, shape_of
from serving.parallel.bell import TcpBell
from serving.parallel.collectives import Collectives, Presence, RanksMissing, SingleRank
from serving.parallel.deepep import deepep_dispatch
from serving.parallel.dispatch import DirectDispatch, Dispatch, FixedDispatch, HierarchicalDispatch
from serving.parallel.distributed import TorchCollectives
from serving.parallel.groups import Groups
from serving.parallel.peer_memory import PeersUnreachable
from serving.parallel.peer_shares import open_peer_shares
from serving.parallel.placement import Placement
from serving.parallel.rendezvous import name_of, open_store
from serving.parallel.shared_memory import SharedMemoryCollectives
from serving.parallel.symmetric import Exchanged, open_symmetric

START_DEADLINE_S = 600.0
"""Ranks load at different speeds."""
STEP_DEADLINE_S = 60.0
"""More than any step takes; a rank whose process ends is known at once."""
_LARGE_BYTES, _SMALL_BYTES = 1 << 20, 1 << 14
"""Shared memory that a rank fills at once: where the model exchanges, and elsewhere."""
_SPLIT = MicroBatches(prefill_tokens=64, rows=8)
_SPLIT_ON_GPU = MicroBatches(prefill_tokens=16384)
"""From so many tokens on two micro-batches lose nothing, measured on two H200. Experts' weights are then read twice, which is all that a decode
step of one node takes."""

_log = logging.getLogger("baton.unit")

GroupOf = Callable[[str, Sequence[int]], Collectives]
"""Name and ranks of a group that this rank is in -> its end of it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a rank has joined. No lockstep: it computes alone. `ep`, `ep_data`: its EP group, for what concerns experts between steps, in host
    memory and, on a GPU whose experts change their places, there."""

    parallel: Parallel = SINGLE
    lockstep: Lockstep | None = None
    shape: UnitShape
    ep: Collectives | None = None
    ep_data: Collectives | None = None


def join(
    spec: WorkerSpec, config: ModelConfig, device: torch.device, *, micro_batches: MicroBatches | None = None
) -> Place:
    """`micro_batches`: where a step is split, if it is; None: as suits the device. Raises ConfigError, StartupError, RanksMissing."""
    table = unit_table(spec.config, spec.role)
    shape = shape_of(table, config)
    groups = shape.groups
    alone, on_gpu = groups.tp == groups.ep == 1, device.type == "cuda"
    store = _store(spec, groups, needed=not alone and (on_gpu or groups.num_nodes > 1))
    if alone:
        return Place(shape=shape)
    bells: list[TcpBell] = []
    opened = _opener(spec, groups, store, lambda: bells[0] if bells else None)
    world = opened("world", range(groups.world_size), START_DEADLINE_S, _SMALL_BYTES)

    def control_of(name: str, ranks: Sequence[int]) -> Collectives:
        return opened(name, ranks, STEP_DEADLINE_S, _SMALL_BYTES)

    control = control_of("control", world.ranks)
    bell = TcpBell(world, host=spec.host, deadline_s=START_DEADLINE_S)
    bells.append(bell)
    lockstep = Lockstep(
        control,
        _group(control_of, "control-tp", groups.tp_group(spec.rank)),
        bell,
        start=world,
        micro_batches=(micro_batches or micro_batches_for(device)) if table.microbatches > 1 else None,
        watch=watch_over(control, bell) if on_gpu else None,
    )

    def host_group_of(name: str, ranks: Sequence[int]) -> Collectives:
        return opened(name, ranks, STEP_DEADLINE_S, _LARGE_BYTES)

    group_of: GroupOf = host_group_of
    if lockstep.watch is not None:
        assert store is not None
        group_of = nccl_opener(store, spec.rank, lockstep.watch)
    parallel = parallel_of(
        shape,
        spec.rank,
        config,
        group_of,
        by_nodes=spec.role == "prefill" or (on_gpu and spec.role == "both"),
        queues=on_gpu,
        captures=on_gpu and spec.role != "prefill",
    )
    ep_ranks = groups.ep_group(spec.rank)
    if lockstep.watch is not None and groups.ep > 1:
        assert store is not None
        if spec.role == "prefill" and spec.config.prefill.dispatch == "deepep":
            parallel = replace(parallel, experts=_over_deepep(spec, config, shape, store))
        elif spec.role != "prefill" and writes_peers(spec.config.decode, groups):
            peers = control_of("peers", ep_ranks)
            parallel = through_peer_memory(parallel, spec.config, config, shape, device, peers, lockstep.watch)
    if (
        lockstep.watch is not None
        and groups.tp > 1
        and spec.role != "prefill"
        and spec.config.decode.dispatch != "nccl"
    ):
        peers = control_of("peers-tp", groups.tp_group(spec.rank))
        parallel = shares_through_peer_memory(parallel, spec.config, device, peers, lockstep.watch)
    ep = control_of("control-ep", ep_ranks) if groups.ep > 1 else None
    moves = groups.ep > 1 and on_gpu and spec.config.balance.period_s > 0
    ep_data = group_of("weights", ep_ranks) if moves else None
    return Place(parallel=parallel, lockstep=lockstep, shape=shape, ep=ep, ep_data=ep_data)


def writes_peers(table: DecodeTable, groups: Groups) -> bool:
    """Whether captured steps dispatch through peer memory, if the GPUs can: those of one node may. By name it is refused across nodes
    before (`shape_of`)."""
    return table.dispatch != "nccl" and 1 < groups.ep <= groups.ranks_per_node


def _over_deepep(spec: WorkerSpec, config: ModelConfig, shape: UnitShape, store: Store) -> Dispatch:
    ranks = shape.groups.ep_group(spec.rank)
    return deepep_dispatch(
        PrefixStore(f"deepep/{ranks[0]}", store),
        rank=ranks.index(spec.rank),
        world_size=len(ranks),
        slots_per_rank=shape.hosted_slots,
        row_bytes=config.hidden_size * _element_bytes(spec.config),
        deadline_s=START_DEADLINE_S,
    )


def through_peer_memory(
    parallel: Parallel,
    config: Config,
    model: ModelConfig,
    shape: UnitShape,
    device: torch.device,
    peers: Collectives,
    watch: DeviceWatch,
) -> Parallel:
    """`parallel` whose captured steps dispatch so; as it is where that cannot be and was not asked for by name. `peers`: the EP group, in host
    memory. Raises PeersUnreachable, RanksMissing."""
    exchanged = Exchanged(
        slots_per_rank=shape.hosted_slots,
        capacity=-(-config.decode.max_num_seqs // shape.groups.tp),
        width=model.hidden_size,
        top_k=model.num_experts_per_token + shape.shared_expert_routed,
        deadline_s=LAST_DEADLINE_S,
        itemsize=_element_bytes(config),
    )
    try:
        symmetric = open_symmetric(peers, device, exchanged, num_windows=config.decode.microbatches)
    except PeersUnreachable as error:
        if config.decode.dispatch == "symmetric":
            raise
        _log.info("decode dispatches over NCCL: %s", error)
        return parallel
    _ends_with(watch, symmetric.check, symmetric.abort, symmetric.close)
    return replace(parallel, fixed=symmetric.dispatch)


def shares_through_peer_memory(
    parallel: Parallel, config: Config, device: torch.device, peers: Collectives, watch: DeviceWatch
) -> Parallel:
    """The same of the small collectives of the TP group, captured or not. `peers`: that group, in host memory."""
    try:
        shares = open_peer_shares(parallel.tp, peers, device, deadline_s=LAST_DEADLINE_S, issued=watch.advance)
    except PeersUnreachable as error:
        if config.decode.dispatch == "symmetric":
            raise
        _log.info("a TP group sums over NCCL: %s", error)
        return parallel
    _ends_with(watch, shares.check, shares.abort, shares.close_memory)
    return replace(parallel, tp=shares)


def _ends_with(
    watch: DeviceWatch, check: Callable[[], None], abort: Callable[[], None], close: Callable[[], None]
) -> None:
    def release() -> None:
        # Memory that a rank which is gone might still write is left to the end of the process.
        with suppress(RanksMissing):
            close()

    watch.also_checks(check)
    watch.also_aborts(abort)
    watch.also_releases(release)


def _element_bytes(config: Config) -> int:
    """Of an activation on a GPU."""
    return 4 if config.model.dtype == "float32" else 2


def micro_batches_for(device: torch.device) -> MicroBatches:
    """From how many tokens on a step is two micro-batches: below, they hide less than they cost."""
    return _SPLIT_ON_GPU if device.type == "cuda" else _SPLIT


def watch_over(control: Collectives, bell: TcpBell) -> DeviceWatch:
    """`control`: of the whole unit, in host memory. Over a network it does not know of its ranks, and the bell does."""
    return DeviceWatch(control if isinstance(control, Presence) else bell, bell, deadline_s=STEP_DEADLINE_S)


def nccl_opener(store: Store, rank: int, watch: DeviceWatch) -> GroupOf:
    """Groups of GPUs, in which rank `rank` of the unit has the current one."""

    def opened(name: str, ranks: Sequence[int]) -> Collectives:
        group = TorchCollectives(
            backend="nccl",
            store=store,
            ranks=ranks,
            rank=list(ranks).index(rank),
            name=name,
            deadline_s=WARM_UP_DEADLINE_S,
            issued=watch.advance,
        )
        watch.also_aborts(group.abort)
        return group

    return opened


def leads(spec: WorkerSpec) -> bool:
    """Whether the rank has the scheduler of its DP group."""
    return groups_of(unit_table(spec.config, spec.role)).coordinates(spec.rank).tp_rank == 0


def parallel_of(
    shape: UnitShape,
    rank: int,
    config: ModelConfig,
    group_of: GroupOf,
    *,
    by_nodes: bool = False,
    queues: bool = False,
    captures: bool = False,
    placement: Placement | None = None,
) -> Parallel:
    """`by_nodes`: one copy of a token to each node, where an EP group has several. `queues`: a group's calls run in their order, so that there
    rows, counts and what returns go over groups of their own.
    `captures`: also steps that are captured, in which each rank sends to each. `placement` None: the first. Raises ConfigError."""
    groups = shape.groups
    tp = _group(group_of, "tp", groups.tp_group(rank))
    if groups.ep == 1:
        return Parallel(tp=tp)
    dispatch: Dispatch
    fixed: Callable[[int], Dispatch] | None = None
    by_nodes = by_nodes and groups.ep > groups.ranks_per_node
    if captures or not by_nodes:
        ep = group_of("ep", groups.ep_group(rank))
        dispatch = DirectDispatch(ep, shape.hosted_slots)
        fixed = partial(FixedDispatch, ep, shape.hosted_slots)
    if by_nodes:

        def ways(prefix: str) -> tuple[Collectives, Collectives]:
            rail, node = groups.rail_group(rank), groups.node_group(rank)
            return group_of(f"{prefix}rail", rail), group_of(f"{prefix}node", node)

        apart = (ways("counts-"), ways("back-")) if queues else ()
        dispatch = HierarchicalDispatch(*ways(""), shape.hosted_slots, *apart)
    hosting = None
    if shape.chooses:
        hosting = Hosting(
            counts=group_of("counts", groups.ep_group(rank)),
            active=shape.active_slots,
            ranks_per_node=min(groups.ranks_per_node, groups.ep),
        )
    return Parallel(
        tp=tp,
        experts=dispatch,
        fixed=fixed,
        placement=placement or first_placement(shape, config),
        ep_rank=groups.coordinates(rank).ep_rank,
        shared_is_routed=shape.shared_expert_routed,
        hosting=hosting,
    )


def _group(group_of: GroupOf, name: str, ranks: tuple[int, ...]) -> Collectives:
    return group_of(name, ranks) if len(ranks) > 1 else SingleRank(ranks=ranks)


def _store(spec: WorkerSpec, groups: Groups, *, needed: bool) -> Store | None:
    """Where it is not needed, what listens for it is closed: nobody would ever answer there."""
    if not needed:
        if spec.listener >= 0:
            os.close(spec.listener)
        return None
    return open_store(
        spec.rendezvous,
        world_size=groups.world_size,
        listener=spec.listener,
        deadline_s=START_DEADLINE_S,
    )


def _opener(
    spec: WorkerSpec, groups: Groups, store: Store | None, presence: Callable[[], Presence | None]
) -> Callable[[str, Sequence[int], float, int], Collectives]:
    """(name, ranks, deadline_s, bytes that a rank posts at once) -> this rank's end of a group in host memory. `presence`: as
    `TorchCollectives` takes it."""
    unit = name_of(spec.rendezvous)

    def opened(name: str, ranks: Sequence[int], deadline_s: float, part_bytes: int) -> Collectives:
        index = list(ranks).index(spec.rank)
        if len({groups.coordinates(rank).node for rank in ranks}) == 1:
            return SharedMemoryCollectives(
                name=f"{unit}-{name}", ranks=ranks, rank=index, deadline_s=deadline_s, part_bytes=part_bytes
            )
        assert store is not None, "ranks of several nodes meet in one"
        return TorchCollectives(
            backend="gloo",
            store=store,
            ranks=ranks,
            rank=index,
            name=name,
            deadline_s=deadline_s,
            host=spec.host,
            presence=presence,
        )

    return opened
