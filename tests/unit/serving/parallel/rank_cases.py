"""What one rank does in the contract's tests: each case takes its end of the group and returns plain data to compare.

Values say where they come from, 100 * source + row, so that a row in the wrong place is seen. They are small whole numbers,
which every dtype but float8 holds; there they are taken modulo 8.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch import Tensor

from serving.parallel.collectives import Collectives, Exchanges, RanksMissing
from tests.unit.serving.parallel.dispatch_cases import dispatched as dispatched

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int64": torch.int64,
}
WIDTH = 3
POISON = 7


def rows(source: int, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """[count, WIDTH], what `source` has from row `first`."""
    numbers = (100 * source + first + torch.arange(count, dtype=torch.float32)) % (8 if dtype.itemsize == 1 else 256)
    return numbers[:, None].expand(-1, WIDTH).to(dtype).contiguous()


def buffer(count: int, dtype: torch.dtype) -> Tensor:
    return torch.full((count, WIDTH), POISON, dtype=torch.float32).to(dtype)


def all_gather(group: Collectives, counts: list[int] | None, dtype: str) -> list[list[float]]:
    kind, count = DTYPES[dtype], counts[group.rank] if counts else 2
    out = buffer(sum(counts) if counts else 2 * group.world_size, kind)
    group.all_gather(out, rows(group.rank, 0, count, kind), counts).wait()
    return out.float().tolist()


def reduce_scatter(group: Collectives, counts: list[int] | None, dtype: str) -> list[list[float]]:
    kind, total = DTYPES[dtype], sum(counts) if counts else 2 * group.world_size
    out = buffer(counts[group.rank] if counts else 2, kind)
    group.reduce_scatter(out, rows(0, 0, total, kind) * (group.rank + 1), counts).wait()
    return out.float().tolist()


def reduce_scatter_bits(group: Collectives) -> list[int]:
    """Of sums that depend on their order."""
    torch.manual_seed(group.rank)
    tensor, out = torch.randn(4 * group.world_size, WIDTH) * 10.0**group.rank, torch.empty(4, WIDTH)
    group.reduce_scatter(out, tensor).wait()
    return out.view(torch.int32).flatten().tolist()


def all_to_all(group: Collectives, counts: list[list[int]], dtypes: list[str]) -> list[list[list[float]]]:
    """counts[source][target]; buffers have two rows more than are sent and received."""
    send, recv = counts[group.rank], [of_source[group.rank] for of_source in counts]
    kinds = [DTYPES[dtype] for dtype in dtypes]
    tensors = [rows(group.rank, 0, sum(send) + 2, kind) for kind in kinds]
    outs = [buffer(sum(recv) + 2, kind) for kind in kinds]
    group.all_to_all(outs, tensors, recv, send).wait()
    return [out.float().tolist() for out in outs]


def exchange(
    group: Collectives, counts: list[list[int]], dtypes: list[str]
) -> tuple[list[int], list[list[list[float]]]]:
    """The same where nobody is told what comes."""
    assert isinstance(group, Exchanges)
    send = counts[group.rank]
    incoming = group.exchange([rows(group.rank, 0, sum(send), DTYPES[dtype]) for dtype in dtypes], send)
    incoming.wait()
    incoming.wait()
    return incoming.received, [out.float().tolist() for out in incoming.outs]


def broadcast(group: Collectives, src: int, dtype: str) -> list[list[float]]:
    tensor = rows(group.rank, 0, 2, DTYPES[dtype])
    group.broadcast(tensor, src).wait()
    return tensor.float().tolist()


def many_in_flight(group: Collectives, backwards: bool) -> list[list[float]]:
    """More calls at once than any ring is deep, waited for in either order, each twice."""
    outs = [buffer(group.world_size, torch.float32) for _ in range(9)]
    handles = [group.all_gather(out, rows(group.rank, 10 * index, 1, torch.float32)) for index, out in enumerate(outs)]
    for handle in reversed(handles) if backwards else handles:
        handle.wait()
        handle.wait()
    return [out[:, 0].tolist() for out in outs]


def subgroup_sums(group: Collectives, members: list[list[int]], name: str) -> list[float]:
    (mine,) = [ranks for ranks in members if group.ranks[group.rank] in ranks]
    part = group.subgroup(mine, name)
    out = torch.empty(part.world_size, 1)
    part.all_gather(out, torch.tensor([[float(group.rank)]])).wait()
    part.close()
    return out.flatten().tolist()


def rank_stays_away(group: Collectives, absent: int, name: str, deadline_s: float) -> dict[str, Any]:
    """Every rank but `absent` comes to a barrier; then `absent` comes late, and everybody comes once more."""
    part = group.subgroup(group.ranks, name, deadline_s)
    part.barrier()
    if group.rank == absent:
        time.sleep(2 * deadline_s)
    first, first_s = _named(part)
    again, again_s = _named(part)
    part.close()
    return {"first": first, "first_s": first_s, "again": again, "again_s": again_s}


def rank_dies(group: Collectives, victim: int, name: str, deadline_s: float) -> dict[str, Any]:
    part = group.subgroup(group.ranks, name, deadline_s)
    part.barrier()
    if group.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    first, first_s = _named(part)
    return {"first": first, "first_s": first_s}


def joins_alone(group: Collectives, absent: int, name: str, deadline_s: float) -> tuple[list[int], float]:
    """`absent` never joins the new group."""
    begin_s, named = time.monotonic(), []
    try:
        if group.rank != absent:
            group.subgroup(group.ranks, name, deadline_s)
    except RanksMissing as error:
        named = list(error.ranks)
    return named, time.monotonic() - begin_s


def cpu_share_of_a_wait(group: Collectives, late: int, wait_s: float) -> float:
    """Of one core, while `late` is asleep."""
    group.barrier()
    if group.rank == late:
        time.sleep(wait_s)
    begin_s, used_s = time.monotonic(), time.process_time()
    group.barrier()
    return (time.process_time() - used_s) / max(time.monotonic() - begin_s, 1e-3)


def _named(group: Collectives) -> tuple[list[int], float]:
    """Ranks that are named, and after how many seconds."""
    begin_s = time.monotonic()
    try:
        group.barrier()
    except RanksMissing as error:
        return list(error.ranks), time.monotonic() - begin_s
    return [], time.monotonic() - begin_s
