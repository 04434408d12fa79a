"""The engine as processes that generate the same texts: one alone, or the ranks of a unit, an engine each in lockstep with the others.

    Unit() -> every rank loads, warms up and says so -> generate ... generate -> close: leaders drain, every rank tells what it saw

Between generations the unit is parked and takes no processor time, so several may be measured in turns. Prompts are shared out to the DP
groups beforehand; there is no router. Times are the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from kvcache.layout import num_pages_for
from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.bench.timed import Timed, TimedExchanges
from serving.core.collector import pass_over_what_is_loaded
from serving.core.config import BalanceTable, Config, DecodeTable, KVTable, ModelTable, PrefillTable
from serving.core.errors import BatonError, ConfigError
from serving.core.request import SamplingParams, TokenLogprobs
from serving.core.request import Sequence as Job
from serving.core.spec import WorkerSpec
from serving.engine.balancing import Balancing
from serving.engine.build import Engine, build_engine, build_engine_for
from serving.engine.joining import parallel_of
from serving.engine.unit import Alone, Follower, Leader, Lockstep, MicroBatches
from serving.engine.unit import Unit as LoopUnit
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.parallel import SINGLE, Parallel
from serving.model.timeline import Timeline
from serving.model.units import shape_of
from serving.parallel.bell import TcpBell
from serving.parallel.collectives import Collectives, SingleRank
from serving.parallel.distributed import TorchCollectives
from serving.parallel.shared_memory import SharedMemoryCollectives

TRANSPORTS = ("shared-memory", "gloo")
_DEADLINE_S = 60.0
_START_S = 300.0
_LOOPBACK = "127.0.0.1"
_SPLIT = MicroBatches(prefill_tokens=64, rows=8)
"""As the engine splits steps where a configuration has two micro-batches."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """tp x dp processes of `threads` each; their experts are spread over all of them. `traced`: keep what overlapped.

    `device`, `role`, `dtype`, `dispatch`, `hosted_slots`, `balances`, `split_from`, `ranks_per_node`: the engines are built and joined as the server's
    are, on "cpu" or on a GPU for each, "cuda", of which a process sees its own alone or not; those of role "prefill" generate one token a text.
    None: over `transport`, in fp32, and what collectives take is measured. More ranks than `ranks_per_node` are as if on several hosts, also to NCCL.
    """

    tp: int = 1
    dp: int = 1
    transport: str = TRANSPORTS[0]
    micro_batches: int = 1
    threads: int = 1
    traced: bool = False
    device: str | None = None
    role: str = "both"
    sees_own_gpu_alone: bool = False
    dtype: str = "float32"
    dispatch: str = "auto"
    hosted_slots: int = 0
    balances: bool = False
    split_from: MicroBatches | None = None
    ranks_per_node: int = 8

    @property
    def num_ranks(self) -> int:
        return self.tp * self.dp

    @property
    def name(self) -> str:
        if self.num_ranks == 1:
            return f"one process, {self.threads} threads" if self.device != "cuda" else "one GPU"
        split = ", 2 micro-batches" if self.micro_batches > 1 else ""
        nodes = f", {self.ranks_per_node} a node" if self.ranks_per_node < self.num_ranks else ""
        return f"TP{self.tp} x DP{self.dp}, EP{self.num_ranks}, {self.device or self.transport}{nodes}{split}"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of an engine at most: prompts of `prompt_tokens`, `new_tokens` each; `max_batched_tokens` of a DP group's step."""

    folder: Path
    prompts: int
    prompt_tokens: int
    new_tokens: int
    max_batched_tokens: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """One DP group's texts, in the order of its prompts. `steps`: when each ended, and its tokens. All texts were being decoded
    from `all_since` to `all_until`."""

    texts: list[list[int]]
    steps: list[tuple[float, int]]
    all_since: float
    all_until: float
    logprobs: list[list[TokenLogprobs | None]] = field(default_factory=list)
    placement_version: int = 0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """`logprobs`: of each token, if they were asked for. `placement_version`: of the experts at the end, 0 where they stay where they are.
    `decode_tokens_per_s`: while all texts were being decoded. `in_collectives`: each rank's share of `seconds`."""

    texts: list[list[int]]
    logprobs: list[list[TokenLogprobs | None]]
    placement_version: int
    seconds: float
    decode_tokens_per_s: float
    in_collectives: list[float]


@dataclass(frozen=True)
class _Meeting:
    """Where the ranks of a unit find each other. `listener`: on the rank that holds what is there, of an address."""

    rendezvous: str
    listener: socket.socket | None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one rank's micro-batches had in flight. `events`: of a Chrome trace, from the monotonic clock's `begin_s` on."""

    begin_s: float
    events: list[dict[str, Any]]
    in_flight_s: float
    exposed_s: float


class Unit:
    """`sizes.num_ranks` processes over the folder's weights."""

    def __init__(
        self, sizes: Sizes, load: Load, scratch: Path, *, altered: Callable[[Engine, int], None] | None = None
    ) -> None:
        """`scratch`: a folder of this unit's own. `altered`, a function of a module, changes each rank's engine. Returns when every rank is
        ready. Raises BatonError."""
        if load.prompts < sizes.dp:
            raise ConfigError(f"{load.prompts} prompts leave some of {sizes.dp} DP groups without one; ask for more")
        self.sizes = sizes
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["serving.bench.processes"])
        self._seconds: Any = context.RawArray("d", sizes.num_ranks)
        self.processes = []
        self._pipes: list[Connection] = []
        listener: socket.socket | None = None
        rendezvous = str(scratch / f"{scratch.name}-rendezvous")
        if sizes.ranks_per_node < sizes.num_ranks:
            listener = socket.create_server((_LOOPBACK, 0))
            rendezvous = f"tcp://{_LOOPBACK}:{listener.getsockname()[1]}/{scratch.name}"
        try:
            for rank in range(sizes.num_ranks):
                ours, theirs = context.Pipe()
                meeting = _Meeting(rendezvous, listener if rank == 0 else None)
                process = context.Process(
                    target=_rank, args=(theirs, sizes, load, rank, scratch, meeting, self._seconds, altered)
                )
                process.start()
                # With the only other end in the child, its death ends the wait for it.
                theirs.close()
                self._pipes.append(ours)
                self.processes.append(process)
            for rank in range(sizes.num_ranks):
                self._hear(rank)
        except BaseException:
            self._kill()
            raise
        finally:
            if listener is not None:
                listener.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int | Sequence[int], logprobs: int | None = None
    ) -> Generation:
        """Greedy texts, never stopping early, in the order of the prompts. `new_tokens`: of each, or of every one. `logprobs`: of so many
        candidates for each token."""
        lengths = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
        dp, before, begin = self.sizes.dp, list(self._seconds), time.perf_counter()
        for group in range(dp):
            self._pipes[group * self.sizes.tp].send((prompts[group::dp], lengths[group::dp], logprobs))
        groups: list[Group] = [self._hear(group * self.sizes.tp) for group in range(dp)]
        seconds = time.perf_counter() - begin
        return Generation(
            texts=[groups[index % dp].texts[index // dp] for index in range(len(prompts))],
            logprobs=[groups[index % dp].logprobs[index // dp] for index in range(len(prompts))],
            placement_version=max(group.placement_version for group in groups),
            seconds=seconds,
            decode_tokens_per_s=decode_rate(groups),
            in_collectives=[(after - was) / seconds for was, after in zip(before, self._seconds, strict=True)],
        )

    def close(self) -> list[Trace]:
        """What each rank saw, where it kept a trace."""
        try:
            for group in range(self.sizes.dp):
                self._pipes[group * self.sizes.tp].send(None)
            return [self._hear(rank) for rank in range(self.sizes.num_ranks) if self.sizes.traced]
        finally:
            for process in self.processes:
                process.join(5.0)
            self._kill()

    def __enter__(self) -> Unit:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def _hear(self, rank: int) -> Any:
        if not self._pipes[rank].poll(_START_S):
            raise BatonError(f"{self.sizes.name}: rank {rank} says nothing for {_START_S:g} s")
        try:
            said = self._pipes[rank].recv()
        except EOFError:
            raise BatonError(f"{self.sizes.name}: rank {rank} has ended; its error stands above") from None
        if isinstance(said, BatonError):
            raise said
        return said

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def decode_rate(groups: Sequence[Group]) -> float:
    """Tokens a second while every group had all its texts to go on with; 0 if that was never."""
    since, until = max(group.all_since for group in groups), min(group.all_until for group in groups)
    ends = [(end, tokens) for group in groups for end, tokens in group.steps if since < end <= until]
    return sum(tokens for _, tokens in ends) / (max(end for end, _ in ends) - since) if ends else 0.0


def _rank(
    pipe: Connection,
    sizes: Sizes,
    load: Load,
    rank: int,
    scratch: Path,
    meeting: _Meeting,
    seconds: Any,
    altered: Callable[[Engine, int], None] | None,
) -> None:
    """The life of one process, at most as long as that of who measures."""
    said: Trace | BatonError | None
    try:
        engine = _joined(sizes, load, rank, meeting) if sizes.device else _built(sizes, load, rank, scratch, seconds)
        if altered is not None:
            altered(engine, rank)
        said = _live(pipe, sizes, rank, engine)
    except BatonError as error:
        said = error
    except EOFError:
        return
    with contextlib.suppress(OSError):
        pipe.send(said)


def _joined(sizes: Sizes, load: Load, rank: int, meeting: _Meeting) -> Engine:
    """As the server has it."""
    most_jobs, most_tokens = -(-load.prompts // sizes.dp), load.prompt_tokens + load.new_tokens
    if sizes.ranks_per_node < sizes.num_ranks:
        # NCCL would find its way inside the host.
        os.environ["NCCL_HOSTID"] = f"node-{rank // sizes.ranks_per_node}"
    if sizes.device == "cuda" and sizes.sees_own_gpu_alone:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    elif sizes.device == "cuda":
        torch.cuda.set_device(rank)
    unit: dict[str, Any] = {
        "tp": sizes.tp,
        "dp": sizes.dp,
        "ranks_per_node": sizes.ranks_per_node,
        "microbatches": sizes.micro_batches,
        "dispatch": sizes.dispatch,
        "hosted_slots": sizes.hosted_slots,
        "max_num_seqs": most_jobs,
    }
    prefills = sizes.role == "prefill"
    num_pages = most_jobs * num_pages_for(most_tokens)
    config = Config(
        model=ModelTable(device=sizes.device or "cpu", dtype=sizes.dtype, max_model_len=most_tokens),
        prefill=PrefillTable(max_batched_tokens=load.max_batched_tokens, **(unit if prefills else {})),
        decode=DecodeTable(**({} if prefills else unit)),
        kv=KVTable(prefill_pages=num_pages, decode_pages=num_pages),
        balance=BalanceTable(threshold=1.0, min_gain=0.001) if sizes.balances else BalanceTable(period_s=0),
    )
    spec = WorkerSpec(
        worker_id=f"{sizes.role}-0.{rank}",
        role=sizes.role,
        incarnation=1,
        host=_LOOPBACK,
        secret=b"",
        model_dir=str(load.folder),
        num_threads=sizes.threads,
        config=config,
        rank=rank,
        rendezvous=meeting.rendezvous,
        listener=meeting.listener.detach() if meeting.listener is not None else -1,
    )
    return build_engine_for(spec, micro_batches=sizes.split_from)


def _built(sizes: Sizes, load: Load, rank: int, scratch: Path, seconds: Any) -> Engine:
    """Over groups whose time is taken."""
    torch.set_num_threads(sizes.threads)
    parallel, lockstep = SINGLE, None
    if sizes.num_ranks > 1:
        parallel, lockstep = _place(sizes, load, rank, _opener(sizes, rank, scratch, seconds))
    most_jobs = -(-load.prompts // sizes.dp)
    most_tokens = load.prompt_tokens + load.new_tokens
    engine = build_engine(
        load.folder,
        max_num_seqs=most_jobs,
        max_batched_tokens=load.max_batched_tokens,
        num_pages=most_jobs * num_pages_for(most_tokens),
        max_model_len=most_tokens,
        device="cpu",
        dtype="float32",
        parallel=parallel,
        lockstep=lockstep,
        num_threads=sizes.threads,
    )
    engine.runner.warm_up(max_batched_tokens=engine.max_batched_tokens, decodes=True)
    return engine


def _live(pipe: Connection, sizes: Sizes, rank: int, engine: Engine) -> Trace | None:
    lockstep, on_gpu = engine.lockstep, sizes.device == "cuda"
    traced = _traced(engine.runner.model, rank) if sizes.traced else None
    pass_over_what_is_loaded()
    if lockstep is not None:
        lockstep.meet()
    pipe.send(None)
    if lockstep is not None and rank % sizes.tp:
        Follower(engine.runner, lockstep, run_ahead=on_gpu).run()
    else:
        unit: LoopUnit = Alone(engine.runner) if lockstep is None else Leader(engine.runner, lockstep)
        loop = Aggregated(
            unit.executor,
            KVManager(engine.pool.num_pages, prefix_cache=False),
            num_slots=engine.max_num_seqs,
            max_batched_tokens=engine.max_batched_tokens,
            max_model_len=engine.max_model_len,
            run_ahead=on_gpu,
        )
        _lead(pipe, unit, loop, engine.balancing)
    if lockstep is not None:
        lockstep.close()
    if traced is None:
        return None
    begin, timeline = traced
    return Trace(
        begin_s=begin,
        events=timeline.chrome_trace()["traceEvents"],
        in_flight_s=timeline.in_flight_s,
        exposed_s=timeline.exposed_s,
    )


def _place(
    sizes: Sizes, load: Load, rank: int, group_of: Callable[[str, Sequence[int]], Collectives]
) -> tuple[Parallel, Lockstep]:
    """A rank's part of the model, and in the rounds."""
    config = ModelConfig.from_folder(load.folder)
    shape = shape_of(DecodeTable(tp=sizes.tp, dp=sizes.dp), config)
    parallel = parallel_of(shape, rank, config, group_of)
    world, tp_ranks = group_of("world", range(sizes.num_ranks)), shape.groups.tp_group(rank)
    split = _SPLIT if sizes.micro_batches > 1 else MicroBatches()
    tp = group_of("control-tp", tp_ranks) if sizes.tp > 1 else SingleRank(ranks=tp_ranks)
    bell = TcpBell(world, host=_LOOPBACK, deadline_s=_START_S)
    return parallel, Lockstep(world, tp, bell, micro_batches=split)


def _opener(sizes: Sizes, rank: int, scratch: Path, seconds: Any) -> Callable[[str, Sequence[int]], Collectives]:
    def of_file(name: str, ranks: Sequence[int]) -> Timed:
        group = SharedMemoryCollectives(
            name=f"{scratch.name}-{name}", ranks=ranks, rank=list(ranks).index(rank), deadline_s=_DEADLINE_S
        )
        return TimedExchanges(group, seconds, rank)

    store = FileStore(str(scratch / "store"), sizes.num_ranks) if sizes.transport == "gloo" else None

    def of_gloo(name: str, ranks: Sequence[int]) -> Timed:
        assert store is not None
        group = TorchCollectives(
            backend="gloo", store=store, ranks=ranks, rank=list(ranks).index(rank), name=name, deadline_s=_DEADLINE_S
        )
        return Timed(group, seconds, rank)

    return of_file if store is None else of_gloo


def _traced(model: Any, rank: int) -> tuple[float, Timeline]:
    """Every step of the model from now on is noted."""
    assert isinstance(model, DeepseekV3)
    begin, timeline = time.perf_counter(), Timeline(rank=rank)
    for name in ("prefill_each", "decode_each"):
        setattr(model, name, partial(getattr(model, name), timeline=timeline))
    return begin, timeline


def _lead(pipe: Connection, unit: LoopUnit, loop: Aggregated, balancing: Balancing | None) -> None:
    """Generations until there are no more to come."""
    rung, ring = socket.socketpair()
    ring.setblocking(False)

    def wake() -> None:
        # At the end nobody listens; where it is full, whoever listens wakes anyway.
        with contextlib.suppress(OSError):
            ring.send(b".")

    unit.tell(wake)

    def asked() -> Any:
        """What is asked next. A unit that has parked before the others had all their tokens counts on this rank when it is rung."""
        while pipe not in wait([pipe, rung], 0.0 if unit.awake else None):
            if not unit.awake:
                rung.recv(4096)
            unit.turned(stopping=False, drained=False)
        return pipe.recv()

    for prompts, lengths, logprobs in iter(asked, None):
        generated = _generate(unit, loop, prompts, lengths, logprobs)
        pipe.send(replace(generated, placement_version=balancing.placement_version if balancing is not None else 0))
    while not unit.turned(stopping=False, drained=True):
        pass


def _generate(
    unit: LoopUnit, loop: Aggregated, prompts: Sequence[Sequence[int]], lengths: Sequence[int], logprobs: int | None
) -> Group:
    texts: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    found: dict[str, list[TokenLogprobs | None]] = {job_id: [] for job_id in texts}
    wanted = dict(zip(texts, lengths, strict=True))
    for job_id, prompt in zip(texts, prompts, strict=True):
        loop.add(
            Job(
                job_id=job_id,
                token_ids=list(prompt),
                num_prompt_tokens=len(prompt),
                sampling=SamplingParams(temperature=0.0, logprobs=logprobs),
                max_new_tokens=wanted[job_id],
                deadline_s=math.inf,
            )
        )
    steps: list[tuple[float, int]] = []
    num_begun, all_since, all_until = 0, math.inf, -math.inf
    while loop.has_work or unit.awake:
        unit.turned(stopping=False, drained=False)
        events = loop.step(0.0).events
        now = time.perf_counter()
        for event in events:
            text = texts[event.sequence.job_id]
            text.append(event.token_id)
            found[event.sequence.job_id].append(event.logprobs)
            num_begun += len(text) == 1
            if num_begun == len(texts):
                all_since = min(all_since, now)
            if len(text) == wanted[event.sequence.job_id] and all_until < 0:
                all_until = now
        if events:
            steps.append((now, len(events)))
    return Group(
        texts=list(texts.values()), logprobs=list(found.values()), steps=steps, all_since=all_since, all_until=all_until
    )
