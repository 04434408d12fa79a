"""`baton bench transfer`: the pages of one prompt from one process's pool into another's, by each way there is.

    NIXL, pages        as the workers do it: scattered pages, one descriptor each
    NIXL, one piece    adjacent pages on both sides, one descriptor in all
    NIXL, planes       one descriptor a page and layer: what pages stored layer by layer would need
    NCCL               pages gathered into one buffer, sent, received, scattered: both sides take part (two GPUs)
    peer copy          one buffer, one process that sees both GPUs: what the link can do (two GPUs)

A time runs from the call in the source's process to the moment the target's knows that its pages are complete; what arrived is compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from kvcache.layout import PAGE_TOKENS, PageLayout, num_pages_for
from kvcache.pool import KVPool
from kvcache.transfer.base import runs
from kvcache.transfer.manifest import page_checksums
from kvcache.transfer.nixl import NixlSource, NixlTarget
from serving.bench.options import count
from serving.bench.report import provenance, write_report
from serving.bench.shapes import SHAPES
from serving.cluster.process import end_with_parent
from serving.core.errors import BatonError
from serving.kernels.pages import gather_pages, scatter_pages
from serving.model.config import ModelConfig

_TIMEOUT_S = 90.0
_NUM_WARM_UP = 3
_SPREAD = 6  # pages of a pool for each that is moved: neighbours are rare


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is moved. `sources[i]` goes to `targets[i]`; pools have `num_pages` pages of `num_layers` planes of bf16 rows."""

    device: str
    num_layers: int
    row_width: int
    num_pages: int
    sources: list[int]
    targets: list[int]
    repeats: int
    rendezvous: str = ""

    @property
    def layout(self) -> PageLayout:
        return PageLayout(
            num_layers=self.num_layers,
            num_mtp_layers=0,
            row_width=self.row_width,
            element_bytes=torch.bfloat16.itemsize,
        )

    @property
    def num_bytes(self) -> int:
        return len(self.sources) * self.layout.page_bytes

    def pool(self, seed: int) -> KVPool:
        pool = KVPool(self.layout, self.num_pages, torch.bfloat16, self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        pool.tensor.view(torch.int16).random_(generator=generator)
        if pool.tensor.is_cuda:
            torch.cuda.synchronize()
        return pool

    def sums(self, pool: KVPool, page_ids: Sequence[int]) -> list[int]:
        return list(page_checksums(pool, {page_id: (page_id, PAGE_TOKENS) for page_id in page_ids}).values())


@dataclass(frozen=True, kw_only=True)
class Way:
    """Medians in seconds. `posted_s`: the source's call has returned; `seen_s`: the target knows."""

    name: str
    num_descriptors: int
    num_bytes: int
    posted_s: float
    seen_s: float
    gb_per_s: float
    raw_s: list[float]


Times = list[tuple[float, float]]
Side = Callable[[Setup, Connection], Any]


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error."""
    options = _parse(argv)
    model = ModelConfig.from_dict(SHAPES[options.shape])
    gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    report = provenance(["baton", "bench", "transfer", *argv])
    report |= {"settings": vars(options) | {"out": None}, "gpus": gpus}
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        ways = measure(options, model, gpus, Path(scratch))
    report["ways"] = [asdict(way) for way in ways]
    print(_table(ways), file=sys.stderr)
    write_report(report, options.out)
    return 0


def measure(options: argparse.Namespace, model: ModelConfig, gpus: int, scratch: Path) -> list[Way]:
    setups = setups_of(model, options.tokens, options.device, options.repeats, options.seed)
    ways = [
        _way(f"NIXL, {name}", setup, _run(_nixl_source, _nixl_target, setup, gpus)) for name, setup in setups.items()
    ]
    if gpus > 1:
        pages = replace(setups["pages"], rendezvous=str(scratch / "nccl"))
        ways.append(_way("NCCL", pages, _run(_nccl_source, _nccl_target, pages, gpus), num_descriptors=1))
        ways.append(_way("peer copy", pages, _run(_peer_copy, None, pages, gpus), num_descriptors=1))
    return ways


def setups_of(model: ModelConfig, num_tokens: int, device: str, repeats: int, seed: int) -> dict[str, Setup]:
    """Pages of `num_tokens` tokens, drawn at random from pools a few times as large; adjacent; and a plane each."""
    num_moved = num_pages_for(num_tokens)
    rng = random.Random(seed)

    def setup(num_layers: int, num_moved: int, *, adjacent: bool) -> Setup:
        every = range(_SPREAD * num_moved)
        return Setup(
            device=device,
            num_layers=num_layers,
            row_width=model.latent_width,
            num_pages=len(every),
            sources=list(every[:num_moved]) if adjacent else rng.sample(every, num_moved),
            targets=list(every[-num_moved:]) if adjacent else rng.sample(every, num_moved),
            repeats=repeats,
        )

    return {
        "pages": setup(model.num_layers, num_moved, adjacent=False),
        "one piece": setup(model.num_layers, num_moved, adjacent=True),
        "planes": setup(1, num_moved * model.num_layers, adjacent=False),
    }


def _way(name: str, setup: Setup, times: Times, *, num_descriptors: int | None = None) -> Way:
    posted, seen = zip(*times[_NUM_WARM_UP:], strict=True)
    seen_s = statistics.median(seen)
    return Way(
        name=name,
        num_descriptors=num_descriptors or len(list(runs(setup.sources, setup.targets))),
        num_bytes=setup.num_bytes,
        posted_s=statistics.median(posted),
        seen_s=seen_s,
        gb_per_s=setup.num_bytes / seen_s / 1e9,
        raw_s=list(seen),
    )


# Two processes: the source's first, on the first GPU; what `source` returns is the result.


def _run(source: Side, target: Side | None, setup: Setup, gpus: int) -> Times:
    """Raises BatonError with what either side said."""
    context = multiprocessing.get_context("spawn")
    link, far = context.Pipe()
    answers, told = context.Pipe(duplex=False)
    processes = []
    for side, pipe, gpu in ((source, link, 0), (target, far, min(1, gpus - 1))):
        if side is not None:
            visible = None if gpus == 0 or target is None else gpu
            arguments = (side, setup, visible, pipe, told, os.getpid())
            processes.append(context.Process(target=_live, args=arguments, daemon=True))
            processes[-1].start()
    told.close()
    try:
        answer = answers.recv() if answers.poll(_TIMEOUT_S) else f"nothing was heard for {_TIMEOUT_S:g} s"
    except EOFError:
        answer = "both processes have ended; their own messages say why"
    finally:
        for process in processes:
            process.kill()
            process.join()
    if isinstance(answer, str):
        raise BatonError(answer)
    times: Times = answer
    return times


def _live(side: Side, setup: Setup, gpu: int | None, link: Connection, told: Connection, parent_pid: int) -> None:
    """`gpu`: the only one that this process sees; None: all."""
    end_with_parent(parent_pid, signal.SIGKILL)
    os.environ["UCX_NET_DEVICES"] = "lo"
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    try:
        answer = side(setup, link)
    except Exception as error:  # the parent raises it
        answer = f"{side.__name__}: {type(error).__name__}: {error}"
    if answer is not None:
        told.send(answer)


def _nixl_source(setup: Setup, link: Connection) -> Times:
    pool = setup.pool(1)
    source = NixlSource("bench-source", pool)
    peer = source.connect(link.recv())
    times: Times = []
    for _ in range(_NUM_WARM_UP + setup.repeats):
        begin_s = time.monotonic()
        source.write(peer, setup.sources, setup.targets, b"all")
        posted_s = time.monotonic()
        while source.num_open:
            for done in source.poll():
                if done.error is not None:
                    raise BatonError(done.error)
        times.append((posted_s - begin_s, link.recv() - begin_s))
    _compare(setup, pool, link)
    return times


def _nixl_target(setup: Setup, link: Connection) -> None:
    pool = setup.pool(2)
    target = NixlTarget("bench-target", pool)
    link.send(target.agent)
    for _ in range(_NUM_WARM_UP + setup.repeats):
        while not target.notifications():
            pass
        link.send(time.monotonic())
    link.send(setup.sums(pool, setup.targets))


def _nccl_source(setup: Setup, link: Connection) -> Times:
    pool, stage, page_ids = _staged(setup, 0, setup.sources)
    times: Times = []
    for _ in range(_NUM_WARM_UP + setup.repeats):
        link.recv()  # the target has posted its receive, as one that knows what comes
        begin_s = time.monotonic()
        gather_pages(pool.tensor, page_ids, 0, setup.num_layers, stage)
        torch.distributed.send(stage, 1)
        posted_s = time.monotonic()
        times.append((posted_s - begin_s, link.recv() - begin_s))
    _compare(setup, pool, link)
    return times


def _nccl_target(setup: Setup, link: Connection) -> None:
    pool, stage, page_ids = _staged(setup, 1, setup.targets)
    for _ in range(_NUM_WARM_UP + setup.repeats):
        torch.cuda.synchronize()
        link.send("posted")
        torch.distributed.recv(stage, 0)
        scatter_pages(pool.tensor, page_ids, 0, setup.num_layers, stage)
        torch.cuda.synchronize()
        link.send(time.monotonic())
    link.send(setup.sums(pool, setup.targets))


def _staged(setup: Setup, rank: int, page_ids: Sequence[int]) -> tuple[KVPool, torch.Tensor, torch.Tensor]:
    """Pool, buffer of the pages' size, page ids on the device; and a group of two."""
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", init_method=f"file://{setup.rendezvous}", rank=rank, world_size=2)
    pool = setup.pool(rank + 1)
    stage = torch.empty(len(page_ids), *pool.tensor.shape[1:], dtype=pool.tensor.dtype, device=pool.tensor.device)
    return pool, stage, torch.tensor(page_ids, device=pool.tensor.device)


def _peer_copy(setup: Setup, link: Connection) -> Times:
    near, far = (torch.empty(setup.num_bytes, dtype=torch.uint8, device=f"cuda:{gpu}") for gpu in (0, 1))
    times: Times = []
    for _ in range(_NUM_WARM_UP + setup.repeats):
        begin_s = time.monotonic()
        far.copy_(near, non_blocking=True)
        posted_s = time.monotonic()
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        times.append((posted_s - begin_s, time.monotonic() - begin_s))
    return times


def _compare(setup: Setup, pool: KVPool, link: Connection) -> None:
    if link.recv() != setup.sums(pool, setup.sources):
        raise BatonError("the pages that arrived are not those that were sent")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="baton bench transfer", description="Pages from pool to pool, by each way.")
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="lite", help="whose pages")
    parser.add_argument("--tokens", type=count, default=4096, help="of the prompt whose pages are moved")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--repeats", type=count, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    return parser.parse_args(argv)


def _table(ways: Sequence[Way]) -> str:
    lines = [f"{'way':<18}{'descriptors':>12}{'MB':>8}{'posted ms':>11}{'there ms':>10}{'GB/s':>8}"]
    lines += [
        f"{way.name:<18}{way.num_descriptors:>12}{way.num_bytes / 1e6:>8.1f}{1e3 * way.posted_s:>11.3f}{1e3 * way.seen_s:>10.3f}{way.gb_per_s:>8.1f}"
        for way in ways
    ]
    return "\n".join(lines)
