"""`baton bench ranks --device cuda`: ranks of one host, a process and a GPU each, TP1 and all experts spread over them, beside one GPU that
holds every expert. The same prompts, in turns.

    rank processes -> weights drawn where they lie -> prefill of all ways, in turns -> profiled -> decode of all ways, in turns

Model and runner as served, two steps in flight; no scheduler and no lockstep, for every rank has as many tokens in every step. Seconds
are the slowest rank's, from when all are ready until its last step has been read back. A way that is `local` copies rows on the rank where
others send them (`serving.bench.local_copies`): what a step takes when nothing travels.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from kvcache.layout import PageLayout, num_pages_for
from kvcache.pool import KVPool
from serving.bench.filled import fill_random
from serving.bench.kernel_spans import KernelSpan, kernel_spans
from serving.bench.local_copies import Switched
from serving.bench.shapes import SHAPES, random_prompts
from serving.core.config import DecodeTable
from serving.core.errors import BatonError
from serving.core.request import SamplingParams
from serving.engine.joining import parallel_of
from serving.engine.plan import DecodeRow, PrefillChunk, SlotSpec, StepPlan, StepResult, StepShape
from serving.engine.runner import Runner
from serving.engine.split import split_chunks
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.parallel import SINGLE, Parallel
from serving.model.units import shape_of
from serving.parallel.collectives import Collectives
from serving.parallel.dispatch import Dispatch, Returning, Sending
from serving.parallel.distributed import TorchCollectives
from serving.parallel.hops import X
from serving.parallel.symmetric import Exchanged, Symmetric, open_symmetric

_DEADLINE_S = 60.0
_START_S = 600.0
_GREEDY = SamplingParams(temperature=0.0)
_NUM_IN_FLIGHT = 2
_UNCOUNTED_STEPS = 4
"""Of a decode: the first captures."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """`prompts` of `prompt_tokens` are prefilled; `rows` behind `context` tokens decode `steps` tokens each. Of all ranks together.

    `free_sms`: what ways may ask for beside 0.
    """

    shape: str
    num_ranks: int = 2
    device: str = "cuda"
    dtype: str = "bfloat16"
    prompts: int = 32
    prompt_tokens: int = 2048
    rows: int = 64
    context: int = 4096
    steps: int = 64
    free_sms: tuple[int, ...] = ()
    seed: int = 0

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(SHAPES[self.shape])


@dataclass(frozen=True, kw_only=True)
class Way:
    """How one GPU, or the unit, computes. `step_tokens`: of a rank's prefill step. `counted`: rows go where they have experts, which the
    host has to know the numbers of, or to every rank. `free_sms`: left to communication, which then takes no more of them; 0: it takes
    what it finds."""

    unit: bool = True
    step_tokens: int
    counted: bool = True
    micro_batches: int = 1
    free_sms: int = 0
    local: bool = False

    @property
    def name(self) -> str:
        if not self.unit:
            return f"one GPU, {self.step_tokens} tokens a step"
        parts = [f"unit, {self.step_tokens} tokens a rank's step", *([] if self.counted else ["all rows to all ranks"])]
        if self.micro_batches > 1:
            parts.append(f"{self.micro_batches} micro-batches, {self.free_sms} SMs kept free")
        return ", ".join([*parts, *(["rows copied instead of sent"] if self.local else [])])


@dataclass(frozen=True, kw_only=True)
class Prefill:
    way: Way
    profiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Fill:
    """Contexts of the rows that are to decode."""

    way: Way


@dataclass(frozen=True, kw_only=True)
class Decode:
    """A step of all rows, captured. `through`: how rows get to the experts of other ranks, over NCCL or through peer memory."""

    unit: bool = True
    micro_batches: int = 1
    through: str = "nccl"
    profiled: bool = False

    @property
    def name(self) -> str:
        if not self.unit:
            return "one GPU"
        through = {"nccl": "NCCL", "peer-memory": "peer memory"}[self.through]
        return f"unit, {through}" + (f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else "")


Work = Prefill | Fill | Decode


@dataclass(frozen=True, kw_only=True)
class Done:
    """Of one rank. `seconds`: of a decode, of one step. `first_tokens`: of each of its texts. `sent_bytes`: to other ranks."""

    seconds: float
    first_tokens: list[int]
    sent_bytes: int = 0
    spans: list[KernelSpan] | None = None


class GpuRanks:
    """The processes. Rank 0 is the one GPU as well."""

    def __init__(self, setup: Setup, scratch: Path) -> None:
        """`scratch`: a folder of their own. Returns when every rank is ready. Raises BatonError."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["serving.bench.gpu_ranks"])
        self._pipes: list[Connection] = []
        self._processes = []
        try:
            for rank in range(setup.num_ranks):
                ours, theirs = context.Pipe()
                process = context.Process(target=_live, args=(theirs, setup, rank, str(scratch)), daemon=True)
                process.start()
                # With the only other end in the child, its death ends the wait for it.
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
            for rank in range(setup.num_ranks):
                self._hear(rank)
        except BaseException:
            self.close()
            raise

    def run(self, work: Work) -> list[Done]:
        """Of every rank that takes part. Raises BatonError."""
        unit = work.unit if isinstance(work, Decode) else work.way.unit
        ranks = range(len(self._pipes) if unit else 1)
        for rank in ranks:
            self._pipes[rank].send(work)
        return [self._hear(rank) for rank in ranks]

    def close(self) -> None:
        """Ends them, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()

    def __enter__(self) -> GpuRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self, rank: int) -> Any:
        if not self._pipes[rank].poll(_START_S):
            raise BatonError(f"rank {rank} says nothing for {_START_S:g} s")
        try:
            said = self._pipes[rank].recv()
        except EOFError:
            raise BatonError(f"rank {rank} has ended; its error stands above") from None
        if isinstance(said, BatonError):
            raise said
        return said


def slowest(done: Iterable[Done]) -> float:
    return max(each.seconds for each in done)


def median_s(runs: Sequence[Sequence[Done]]) -> float:
    return statistics.median(slowest(run) for run in runs)


def _live(pipe: Connection, setup: Setup, rank: int, scratch: str) -> None:
    """The life of one rank, at most as long as that of who measures."""
    with contextlib.suppress(OSError, EOFError):
        try:
            process = _Rank(setup, rank, Path(scratch))
            pipe.send(None)
            while True:
                pipe.send(process.run(pipe.recv()))
        except BatonError as error:
            pipe.send(error)


class _Rank:
    """One process: its part of the unit, and on rank 0 the whole model too."""

    def __init__(self, setup: Setup, rank: int, scratch: Path) -> None:
        self._setup = setup
        self._device = torch.device(setup.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(rank)
        else:
            torch.set_num_threads(1)
        self._store = FileStore(str(scratch / "store"), setup.num_ranks)
        self._rank = rank
        self._control = self._group("gloo", "control", range(setup.num_ranks))
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        self._groups: dict[int, Collectives] = {
            sms: self._group(backend, f"ep-{sms}", range(setup.num_ranks), sms) for sms in (0, *setup.free_sms)
        }
        self._ep = Switched(self._groups[0])
        shape = shape_of(DecodeTable(dp=setup.num_ranks), setup.config)
        parallel = parallel_of(shape, rank, setup.config, lambda name, ranks: self._ep)
        self._slots_per_rank = shape.hosted_slots
        self._through = "nccl"
        assert parallel.fixed is not None
        self._over_nccl = parallel.fixed
        self._peer_memory: Symmetric | None = None
        parallel = replace(parallel, fixed=lambda capacity: _Chosen(partial(self._fixed, capacity)))
        self._unit = _Texts(setup, parallel, setup.num_ranks, rank, self._device)
        self._alone = _Texts(setup, SINGLE, 1, 0, self._device) if rank == 0 else None
        self._wait()
        self._control.barrier()

    def run(self, work: Work) -> Done:
        texts = self._texts(work.unit if isinstance(work, Decode) else work.way.unit)
        if isinstance(work, Fill):
            return self._fill(texts, work.way)
        if isinstance(work, Decode):
            self._through = work.through
            measured = partial(self._decode, texts, work)
        else:
            if work.way.unit:
                self._go(work.way)
            measured = partial(self._prefill, texts, work.way)
        if not work.profiled:
            return measured()
        with torch.profiler.profile(activities=self._activities()) as profile:
            done = measured()
        return replace(done, spans=kernel_spans(profile))

    def _go(self, way: Way) -> None:
        """From now on in this way."""
        self._ep.group, self._ep.local = self._groups[way.free_sms], way.local
        self._through = "nccl"
        self._unit.keep_free(way.free_sms)

    def _prefill(self, texts: _Texts, way: Way) -> Done:
        prompts = texts.prompts(self._setup.prompts, self._setup.prompt_tokens)
        texts.open(prompts)
        before = self._meet(way.unit)
        begin = time.perf_counter()
        first_tokens = texts.prefill(prompts, way)
        seconds = time.perf_counter() - begin
        return Done(seconds=seconds, first_tokens=first_tokens, sent_bytes=self._ep.sent_bytes - before)

    def _fill(self, texts: _Texts, way: Way) -> Done:
        if way.unit:
            self._go(way)
        prompts = texts.prompts(self._setup.rows, self._setup.context)
        texts.open(prompts)
        self._meet(way.unit)
        return Done(seconds=0.0, first_tokens=texts.prefill(prompts, way))

    def _decode(self, texts: _Texts, work: Decode) -> Done:
        setup = self._setup
        rows = setup.rows // texts.num_ranks
        texts.open(texts.prompts(setup.rows, setup.context), work)
        texts.decode(rows, setup.context, _UNCOUNTED_STEPS, work)
        self._meet(work.unit)
        begin = time.perf_counter()
        results = texts.decode(rows, setup.context + _UNCOUNTED_STEPS, setup.steps, work)
        seconds = (time.perf_counter() - begin) / setup.steps
        if self._peer_memory is not None:
            self._peer_memory.check()
        return Done(seconds=seconds, first_tokens=[token.token_id for token in results[0].tokens])

    def _fixed(self, capacity: int) -> Dispatch:
        """Of the step that is being captured."""
        if self._through == "nccl":
            return self._over_nccl(capacity)
        if self._peer_memory is None:
            config = self._setup.config
            exchanged = Exchanged(
                slots_per_rank=self._slots_per_rank,
                capacity=self._setup.rows // self._setup.num_ranks,
                width=config.hidden_size,
                top_k=config.num_experts_per_token,
                deadline_s=_DEADLINE_S,
            )
            self._peer_memory = open_symmetric(self._control, self._device, exchanged)
        return self._peer_memory.dispatch(capacity)

    def _texts(self, unit: bool) -> _Texts:
        if unit:
            return self._unit
        assert self._alone is not None
        return self._alone

    def _meet(self, unit: bool) -> int:
        """Bytes sent so far. The device has done all that came before, and every rank is here."""
        self._wait()
        if unit:
            self._control.barrier()
        return self._ep.sent_bytes

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _activities(self) -> list[Any]:
        activity = torch.profiler.ProfilerActivity
        return [activity.CUDA if self._device.type == "cuda" else activity.CPU]

    def _group(self, backend: str, name: str, ranks: Sequence[int], max_ctas: int = 0) -> Collectives:
        return TorchCollectives(
            backend=backend,
            store=self._store,
            ranks=ranks,
            rank=self._rank,
            name=name,
            deadline_s=_DEADLINE_S,
            max_ctas=max_ctas if backend == "nccl" else 0,
        )


class _Chosen:
    """The dispatch that `choose` makes for a step when that is captured."""

    def __init__(self, choose: Callable[[], Dispatch]) -> None:
        self._choose = choose
        self._chosen: Dispatch | None = None

    def send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Sending[X]:
        self._chosen = self._choose()
        return self._chosen.send(x, slots_TK, weights_TK)

    def give_back(self, sending: Sending[X], y_RD: Tensor, added_TD: Tensor | None = None) -> Returning:
        assert self._chosen is not None
        return self._chosen.give_back(sending, y_RD, added_TD)


class _Texts:
    """A model filled with random weights, a runner over it, and the pages of as many texts as it ever has at once."""

    def __init__(self, setup: Setup, parallel: Parallel, num_ranks: int, rank: int, device: torch.device) -> None:
        config, dtype = setup.config, getattr(torch, setup.dtype)
        self.num_ranks, self._rank = num_ranks, rank
        self._setup = setup
        self._model = DeepseekV3(config, dtype, device, parallel=parallel)
        fill_random(self._model, setup.seed)
        most = max(setup.prompts, setup.rows) // num_ranks
        longest = max(setup.prompt_tokens, setup.context + _UNCOUNTED_STEPS + setup.steps)
        pages_each = num_pages_for(longest)
        layout = PageLayout(
            num_layers=config.num_layers,
            num_mtp_layers=config.num_mtp_layers,
            row_width=config.latent_width,
            element_bytes=dtype.itemsize,
        )
        self._pages = [list(range(slot * pages_each, (slot + 1) * pages_each)) for slot in range(most)]
        pool = KVPool(layout, most * pages_each, dtype, device)
        self._new_runner = partial(
            Runner,
            self._model,
            pool.tensor,
            num_slots=most,
            max_pages=pages_each,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
        )
        self._runner = self._new_runner()
        self._decoders: dict[Decode, Runner] = {}

    def keep_free(self, num_sms: int) -> None:
        self._model.parallel = replace(self._model.parallel, free_sms=num_sms)

    def prompts(self, number: int, num_tokens: int) -> list[list[int]]:
        """This rank's."""
        return random_prompts(number, num_tokens, self._setup.config.vocab_size, self._setup.seed)[
            self._rank :: self.num_ranks
        ]

    def open(self, prompts: Sequence[list[int]], work: Decode | None = None) -> None:
        """A slot each, from the first on; of the runner that is to do `work`."""
        runner = self._runner if work is None else self._decoder(work)
        for slot, prompt in enumerate(prompts):
            spec = SlotSpec(
                sampling=_GREEDY, token_ids=prompt, num_prompt_tokens=len(prompt), page_ids=self._pages[slot]
            )
            runner.open_slot(slot, spec)

    def prefill(self, prompts: Sequence[list[int]], way: Way) -> list[int]:
        """The first token of each."""
        plans = prefill_plans(prompts, self._pages, way.step_tokens)
        parts = [part for plan in plans for part in split_chunks(plan.chunks, way.micro_batches)]
        most = max(sum(len(chunk.token_ids) for chunk in part) for part in parts)
        with contextlib.nullcontext() if way.counted else self._model.fixed_rows(most):
            results = self._run(self._runner, [(plan, plan.num_prefill_tokens, 0) for plan in plans], way.micro_batches)
        found = {token.slot: token.token_id for result in results for token in result.tokens}
        return [found[slot] for slot in range(len(prompts))]

    def decode(self, num_rows: int, start: int, steps: int, work: Decode) -> list[StepResult]:
        """Of the first slots, whose texts have `start` tokens."""
        plans = [
            StepPlan(rows=tuple(DecodeRow(slot=slot, position=position) for slot in range(num_rows)))
            for position in range(start, start + steps)
        ]
        return self._run(self._decoder(work), [(plan, 0, num_rows) for plan in plans], work.micro_batches)

    def _decoder(self, work: Decode) -> Runner:
        """With captured steps of its own."""
        work = replace(work, profiled=False)
        if work not in self._decoders:
            self._decoders[work] = self._new_runner(split_rows=1 if work.micro_batches > 1 else 0)
        return self._decoders[work]

    def _run(self, runner: Runner, steps: Sequence[tuple[StepPlan, int, int]], micro_batches: int) -> list[StepResult]:
        results: list[StepResult] = []
        in_flight: deque[Any] = deque()
        for plan, prefill_tokens, rows in steps:
            if len(in_flight) == _NUM_IN_FLIGHT:
                results.append(runner.settle(in_flight.popleft()))
            shape = StepShape(prefill_tokens=prefill_tokens, rows=rows, num_micro_batches=micro_batches)
            in_flight.append(runner.launch(plan, shape))
        return results + [runner.settle(launched) for launched in in_flight]


def prefill_plans(prompts: Sequence[list[int]], pages: Sequence[list[int]], step_tokens: int) -> list[StepPlan]:
    """All tokens of the prompts, prompt i in slot i, in steps of so many; the last may have fewer."""
    parts: list[list[PrefillChunk]] = [[] for _ in range(math.ceil(sum(map(len, prompts)) / step_tokens))]
    before = 0
    for slot, prompt in enumerate(prompts):
        start = 0
        while start < len(prompt):
            step, used = divmod(before + start, step_tokens)
            end = min(len(prompt), start + step_tokens - used)
            parts[step].append(
                PrefillChunk(
                    slot=slot,
                    token_ids=prompt[start:end],
                    start=start,
                    store_from=0,
                    page_ids=pages[slot],
                    sample=end == len(prompt),
                )
            )
            start = end
        before += len(prompt)
    return [StepPlan(chunks=tuple(chunks)) for chunks in parts]
