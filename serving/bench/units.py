"""Whole units in one process, every rank executed: prompts through a prefill unit, latents from rank to rank, tokens from a decode unit.

    prompts -> prefill groups -> first token, pages -> decode groups: reserved, exposed, filled, owned -> the other tokens

A rank is here what it is as a process of its own: its part of the model, its own pool, a Runner in lockstep with the others', and on TP
rank 0 of each DP group a scheduler over the group's pages. Only one rank runs at a time (`serving.parallel.virtual`), and what it
sends is counted by link. Jobs are shared out beforehand, as a router does that sees nothing running: no sockets, no clock.

Page p of a group belongs to its TP rank p mod tp: that one sends it, or receives it and copies it to the other ranks of its group. So
a page crosses between units once.
"""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decode.scheduler import DecodeScheduler
from kvcache.layout import PAGE_TOKENS, PageLayout, num_pages_for
from kvcache.manager import KVManager
from kvcache.pool import KVPool
from kvcache.transfer.local import LocalFabric
from prefill.scheduler import PrefillScheduler
from serving.aggregated import Aggregated
from serving.core.request import SamplingParams
from serving.core.request import Sequence as Job
from serving.engine.joining import parallel_of
from serving.engine.plan import SlotSpec
from serving.engine.runner import Runner
from serving.engine.slots import Slots
from serving.engine.unit import Follower, Leader, Lockstep, MicroBatches
from serving.model.checkpoint import read_entries
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.parallel import Parallel, num_moe_layers
from serving.model.units import UnitShape
from serving.model.weights import load_weights
from serving.parallel.collectives import SingleRank
from serving.parallel.dispatch import DirectDispatch, Dispatch
from serving.parallel.groups import Groups
from serving.parallel.placement import Ints, Placement
from serving.parallel.virtual import VirtualBell, VirtualCollectives, VirtualUnit

DTYPE = torch.float64
"""Exact enough that a sum's order decides neither an expert nor a token."""
DISPATCH_GROUPS = ("counts", "ep", "rail", "node")
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class UnitSizes:
    """One unit. `placement`: of the experts of each layer. `static`: where those are hosts, what a unit would have that always uses all of its
    slots, to be held against it. `by_nodes`: dispatch goes from node to node and then inside. Steps in which some DP group has `split_from`
    tokens are computed in two micro-batches; 0: none are."""

    shape: UnitShape
    placement: Placement
    static: Placement | None = None
    by_nodes: bool
    split_from: int
    max_batched_tokens: int = 256

    @property
    def groups(self) -> Groups:
        """Which rank is where."""
        return self.shape.groups


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """A job whose prompt is computed: its first token, the final hidden state before it, and the pages of its DP group that hold it."""

    job: Job
    dp_rank: int
    first_token: int
    hidden: bytes
    page_ids: list[int]


@dataclass(kw_only=True)
class LatentBytes:
    """Of valid rows, the MTP layer's among them: between the units, and from the owners of pages to the rest of their TP groups."""

    between_units: int = 0
    inside_nodes: int = 0


class Unit:
    """The pools, managers and ranks of one unit over the folder's weights."""

    def __init__(
        self,
        folder: Path,
        sizes: UnitSizes,
        *,
        num_pages: int,
        max_num_seqs: int,
        wrap: Callable[[int, Dispatch], Dispatch] = lambda _, dispatch: dispatch,
    ) -> None:
        """`num_pages` and `max_num_seqs` of each DP group. `wrap`: what a rank's model is given for its dispatch, for who wants to see
        what is sent."""
        self.sizes = sizes
        self.config = ModelConfig.from_folder(folder)
        self.layout = _layout(self.config)
        self.virtual = VirtualUnit(sizes.groups)
        self.pools = [KVPool(self.layout, num_pages, DTYPE) for _ in range(sizes.groups.world_size)]
        for pool in self.pools:
            pool.poison_all()
        self.managers = [KVManager(num_pages) for _ in range(sizes.groups.dp)]
        self._wrap = wrap
        self._folder = folder
        self._entries = read_entries(folder)
        self._num_tokens_LE: list[Tensor] = []
        self.chosen: list[tuple[int, Ints]] = []
        """Where replicas are chosen for each layer's tokens: of every choice of an EP group, the layer and the tokens of each slot [GPUs, slots]."""
        self._max_num_seqs = max_num_seqs

    def owner(self, dp_rank: int, page_id: int) -> int:
        """The rank that sends or receives a page of a DP group."""
        return dp_rank * self.sizes.groups.tp + page_id % self.sizes.groups.tp

    def expert_tokens(self) -> Ints:
        """[L, E]: tokens that the gates of all ranks gave each routed expert."""
        counts: Ints = torch.stack(self._num_tokens_LE).sum(0).numpy()
        return counts

    def run(self, lead: Callable[[Leader, KVManager, int], None]) -> None:
        """`lead` is called with each DP group's leader, its pages and its number; the unit ends when all have returned."""
        groups = self.sizes.groups
        torch.set_num_threads(1)

        def main(world: VirtualCollectives) -> None:
            at = groups.coordinates(world.rank)
            with torch.inference_mode():
                runner = self._runner(world)
                control = world.subgroup(groups.tp_group(world.rank), "plans")
                split = MicroBatches(prefill_tokens=self.sizes.split_from, rows=self.sizes.split_from)
                lockstep = Lockstep(world, control, VirtualBell(world), micro_batches=split)
                if at.tp_rank:
                    Follower(runner, lockstep).run()
                    return
                lead(Leader(runner, lockstep), self.managers[at.dp_rank], at.dp_rank)

        with _collector_paused(), _on_one_core():
            self.virtual.run(main)

    def _runner(self, world: VirtualCollectives) -> Runner:
        sizes = self.sizes
        parallel = parallel_of(
            sizes.shape,
            world.rank,
            self.config,
            lambda name, ranks: world.subgroup(ranks, name),
            by_nodes=sizes.by_nodes,
            placement=sizes.placement,
        )
        assert parallel.experts is not None
        parallel = replace(parallel, experts=self._wrap(world.rank, parallel.experts))
        if parallel.hosting is not None and parallel.ep_rank == 0:
            # All ranks of the group find the same.
            parallel = replace(parallel, hosting=replace(parallel.hosting, watch=self._note))
        model = load_weights(self._folder, self.config, DTYPE, parallel=parallel, entries=self._entries)
        assert model.routing is not None
        self._num_tokens_LE.append(model.routing.num_tokens_LE)
        pool = self.pools[world.rank]
        return Runner(
            model,
            pool.tensor,
            num_slots=self._max_num_seqs,
            max_pages=pool.num_pages,
            vocab_size=self.config.vocab_size,
            hidden_size=self.config.hidden_size,
        )

    def _note(self, layer: int, tokens: Tensor) -> None:
        self.chosen.append((layer, tokens.numpy()))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Its rounds over the objects of hundreds of ranks, which make no cycles meanwhile, would take a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _on_one_core() -> Iterator[None]:
    """Threads that begin inside share a core. One runs at a time, and to wake the next on another core would take a quarter of the time."""
    if sys.platform != "linux":
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def generate(
    prefill: Unit, decode: Unit, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[list[int]], LatentBytes]:
    """Greedy texts of `new_tokens` > 1 tokens each, prompts through one unit and the rest through the other."""
    jobs = [_job(f"job-{index}", prompt, new_tokens) for index, prompt in enumerate(prompts)]
    prefilled: dict[str, Prefilled] = {}
    shares = _shared_out(jobs, prefill.sizes.groups.dp, lambda job: job.num_tokens)

    def lead_prefill(leader: Leader, manager: KVManager, dp_rank: int) -> None:
        for done in _prefill(leader, manager, dp_rank, shares[dp_rank], prefill.sizes.max_batched_tokens):
            prefilled[done.job.job_id] = done

    prefill.run(lead_prefill)
    latents = LatentBytes()
    arrived: list[list[tuple[Job, bytes]]] = [[] for _ in range(decode.sizes.groups.dp)]
    for dp_rank, share in enumerate(
        _shared_out(jobs, decode.sizes.groups.dp, lambda job: num_pages_for(job.num_tokens))
    ):
        for job in share:
            arrived[dp_rank].append(_hand_over(prefill, decode, prefilled[job.job_id], dp_rank, latents))
    texts = {job.job_id: [prefilled[job.job_id].first_token] for job in jobs}

    def lead_decode(leader: Leader, manager: KVManager, dp_rank: int) -> None:
        _decode(leader, manager, arrived[dp_rank], texts)

    decode.run(lead_decode)
    return [texts[job.job_id] for job in jobs], latents


def generate_alone(folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The same texts from one rank that holds everything, in the same type: what the units are held to."""
    model = load_weights(folder, ModelConfig.from_folder(folder), DTYPE)
    return _generate_on_one_rank(model, prompts, new_tokens)


def tokens_of_experts(folder: Path, prompts: Sequence[Sequence[int]]) -> Ints:
    """[L, E]: how many tokens of these prompts, and of two more of each, the gates give each routed expert; the MTP layer's last."""
    config = ModelConfig.from_folder(folder)
    num_experts = config.num_routed_experts
    everything = Placement(
        slots=np.tile(np.arange(num_experts), (num_moe_layers(config), 1)), num_experts=num_experts, num_gpus=1
    )
    here = Parallel(experts=DirectDispatch(SingleRank(), num_experts), placement=everything)
    model = load_weights(folder, config, DTYPE, parallel=here)
    _generate_on_one_rank(model, prompts, 2)
    assert model.routing is not None
    tokens: Ints = model.routing.num_tokens_LE.numpy()
    return tokens


def _generate_on_one_rank(model: DeepseekV3, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    config = model.config
    num_pages = sum(num_pages_for(len(prompt) + new_tokens) for prompt in prompts)
    runner = Runner(
        model,
        KVPool(_layout(config), num_pages, DTYPE).tensor,
        num_slots=len(prompts),
        max_pages=num_pages,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
    )
    loop = Aggregated(
        runner,
        KVManager(num_pages),
        num_slots=len(prompts),
        max_batched_tokens=512,
        max_model_len=num_pages * PAGE_TOKENS,
    )
    return loop.generate(prompts, _GREEDY, new_tokens)


def _prefill(
    leader: Leader, manager: KVManager, dp_rank: int, jobs: Sequence[Job], max_batched_tokens: int
) -> list[Prefilled]:
    slots = Slots(max(1, len(jobs)), on_give=leader.close_slot)
    scheduler = PrefillScheduler(manager, slots, max_num_seqs=slots.num_slots, max_batched_tokens=max_batched_tokens)
    for job in jobs:
        scheduler.add(job)
    done: list[Prefilled] = []
    while not leader.turned(stopping=False, drained=len(done) == len(jobs)):
        plan = scheduler.schedule(0.0)
        if plan is None:
            continue
        for job in plan.opened:
            leader.open_slot(_slot(job), _slot_spec(job))
        settled = scheduler.settle(plan.step, leader.settle(leader.launch(plan.step)))
        for first in settled.finished:
            job = first.sequence
            # Until they are handed over.
            manager.hold(job.page_ids)
            done.append(
                Prefilled(
                    job=job,
                    dp_rank=dp_rank,
                    first_token=first.token.token_id,
                    hidden=first.token.hidden,
                    page_ids=list(job.page_ids),
                )
            )
            scheduler.finish(job.job_id)
    return done


def _hand_over(prefill: Unit, decode: Unit, done: Prefilled, dp_rank: int, latents: LatentBytes) -> tuple[Job, bytes]:
    """The job as its decode group `dp_rank` takes it up, with the hidden state; its pages are on every rank of that group."""
    manager, layout = decode.managers[dp_rank], decode.layout
    prompt = done.job.token_ids[: done.job.num_prompt_tokens]
    has_room = manager.reserve(done.job.job_id, num_pages_for(len(prompt) + done.job.max_new_tokens), prompt)
    binding = manager.bind(done.job.job_id, prompt)
    assert has_room, "pools are made as large as their jobs"
    assert binding is not None, "what was reserved can be bound"
    for index, target_page in enumerate(binding.page_ids, start=binding.first_page):
        source_page = done.page_ids[index]
        owner = decode.owner(dp_rank, target_page)
        sender = prefill.owner(done.dp_rank, source_page)
        num_tokens = min(PAGE_TOKENS, len(prompt) - index * PAGE_TOKENS)
        num_bytes = layout.latent_bytes(num_tokens) + layout.mtp_bytes(num_tokens)
        _copy_page(prefill.pools[sender], source_page, decode.pools[owner], target_page)
        latents.between_units += num_bytes
        for peer in decode.sizes.groups.tp_group(owner):
            if peer != owner:
                _copy_page(decode.pools[owner], target_page, decode.pools[peer], target_page)
                latents.inside_nodes += num_bytes
    job = _job(done.job.job_id, [*prompt, done.first_token], done.job.max_new_tokens)
    job.num_prompt_tokens, job.num_new_tokens = len(prompt), 1
    job.page_ids = manager.accept(done.job.job_id, binding.epochs)
    prefill.managers[done.dp_rank].release(done.page_ids)
    return job, done.hidden


def _copy_page(source: KVPool, source_page: int, target: KVPool, target_page: int) -> None:
    fabric = LocalFabric()
    writer = fabric.source(source)
    writer.write(writer.connect(fabric.target("pool", target).agent), [source_page], [target_page], b"")


def _decode(
    leader: Leader, manager: KVManager, arrived: Sequence[tuple[Job, bytes]], texts: dict[str, list[int]]
) -> None:
    """Appends to `texts` what is drawn after the first tokens."""
    slots = Slots(max(1, len(arrived)), on_give=leader.close_slot)
    scheduler = DecodeScheduler(
        manager, slots, max_num_seqs=slots.num_slots, max_model_len=manager.num_pages * PAGE_TOKENS
    )
    hidden = {job.job_id: state for job, state in arrived}
    for job, _ in arrived:
        scheduler.add(job)
    while not leader.turned(stopping=False, drained=scheduler.num_running + scheduler.num_waiting == 0):
        plan = scheduler.schedule(0.0)
        if plan is None:
            continue
        for job in plan.opened:
            leader.open_slot(_slot(job), _slot_spec(job, hidden[job.job_id]))
        for event in scheduler.settle(plan.step, leader.settle(leader.launch(plan.step))):
            texts[event.sequence.job_id].append(event.token_id)


def _shared_out(jobs: Sequence[Job], num_groups: int, cost: Callable[[Job], int]) -> list[list[Job]]:
    """Each job to the group with the least cost so far, in order of arrival."""
    shares: list[list[Job]] = [[] for _ in range(num_groups)]
    loads = [0] * num_groups
    for job in jobs:
        group = loads.index(min(loads))
        shares[group].append(job)
        loads[group] += cost(job)
    return shares


def _job(job_id: str, token_ids: Sequence[int], new_tokens: int) -> Job:
    return Job(
        job_id=job_id,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        sampling=_GREEDY,
        max_new_tokens=new_tokens,
        deadline_s=math.inf,
    )


def _slot(job: Job) -> int:
    assert job.slot is not None
    return job.slot


def _slot_spec(job: Job, hidden: bytes = b"") -> SlotSpec:
    return SlotSpec(
        sampling=job.sampling,
        token_ids=list(job.token_ids),
        num_prompt_tokens=job.num_prompt_tokens,
        page_ids=list(job.page_ids),
        hidden=hidden,
    )


def _layout(config: ModelConfig) -> PageLayout:
    return PageLayout(
        num_layers=config.num_layers,
        num_mtp_layers=config.num_mtp_layers,
        row_width=config.latent_width,
        element_bytes=DTYPE.itemsize,
    )
