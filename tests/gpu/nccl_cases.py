"""What one rank does over NCCL in `test_nccl`, beside the cases that all implementations share: steps that are captured, rows to experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from serving.kernels.quant import QuantisedRows, quantise_rows_fp8
from serving.parallel.collectives import Collectives
from serving.parallel.dispatch import DirectDispatch, Dispatch, FixedDispatch
from serving.parallel.distributed import TorchCollectives
from tests.gpu.graphs import replayed
from tests.unit.serving.parallel.rank_cases import DTYPES, rows

WIDTH = 256
SLOTS_PER_RANK = 3


def sums(group: Collectives, dtype: str, rows_each: int) -> tuple[bytes, bytes, bytes]:
    """This rank's rows of the sum by the group, of a + b, and of a + b summed in fp32 by other rows."""
    terms = []
    for rank in range(group.world_size):
        torch.manual_seed(rank)
        terms.append(torch.randn(rows_each * group.world_size, WIDTH).to(DTYPES[dtype]))
    out = torch.empty_like(terms[0][:rows_each])
    group.reduce_scatter(out, terms[group.rank]).wait()
    mine = slice(group.rank * rows_each, (group.rank + 1) * rows_each)
    return _bytes(out), _bytes(terms[0][mine] + terms[1][mine]), _bytes(terms[0][mine] + terms[1][mine].roll(1, 0))


def captured(group: Collectives, dtype: str) -> list[list[float]]:
    """What a captured step with an all-gather, a reduce-scatter and an all-to-all of two payloads left at each of three replays, and the
    same made directly."""
    kind, world = DTYPES[dtype], group.world_size
    x = torch.zeros(2 * world, WIDTH, dtype=kind)

    def step() -> list[Tensor]:
        gathered = x.new_empty(world * len(x), WIDTH)
        handle = group.all_gather(gathered, x * 2)
        part = x.new_empty(2, WIDTH)
        group.reduce_scatter(part, x + 1).wait()
        handle.wait()
        outs = [torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)]
        group.all_to_all(outs, [gathered[: len(x)] + 1, x.to(torch.int32)], [2] * world, [2] * world).wait()
        return [gathered, part, *outs]

    graph, results = _captured(step)
    found = []
    for turn in range(3):
        torch.manual_seed(turn)
        x.copy_(torch.randint(8, x.shape) + 8 * group.rank)
        graph.replay()
        torch.cuda.synchronize()
        for tensors in (results, step()):
            found.append([number for tensor in tensors for number in _numbers(tensor)])
    return found


def _captured(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step()
    return graph, results


def few_processors(group: TorchCollectives, max_ctas: int) -> list[float]:
    """An all-gather of a group that may use so many."""
    few = TorchCollectives(
        backend="nccl", store=group._store, ranks=group.ranks, rank=group.rank, name=f"few-{max_ctas}", deadline_s=20.0, max_ctas=max_ctas
    )  # fmt: skip
    out = torch.empty(2 * 5000, 3)
    few.all_gather(out, rows(group.rank, 0, 5000, torch.float32)).wait()
    found = out[:, 0].tolist()
    few.close()
    return found


def moved(group: Collectives, form: str, num_tokens: list[int], fp8: bool, replays: bool, harm: bool) -> float:
    """Rows to the ranks of their experts and the same rows back in bf16. The largest error against the row times the number of its ranks,
    relative to it. `replays`: as a captured step. `harm`: two rows are swapped at the far end."""
    # Numbers for the host are pinned, which is for CPU tensors alone.
    torch.set_default_device("cpu")
    try:
        with torch.inference_mode():
            return _moved(group, form, num_tokens, fp8, replays, harm)
    finally:
        torch.set_default_device("cuda")


def _moved(group: Collectives, form: str, num_tokens: list[int], fp8: bool, replays: bool, harm: bool) -> float:
    torch.manual_seed(group.rank)
    count = num_tokens[group.rank]
    x = torch.randn(count, WIDTH).to("cuda", torch.bfloat16)
    # The last column of picks is of no expert.
    slots = torch.rand(count, group.world_size * SLOTS_PER_RANK).argsort(1)[:, :3].contiguous().cuda()
    slots[:, 2] = -1
    weights = torch.rand(count, 3).cuda()
    sent: Tensor | QuantisedRows = quantise_rows_fp8(x) if fp8 else x
    dispatch: Dispatch = DirectDispatch(group, SLOTS_PER_RANK)
    if form == "fixed":
        dispatch = FixedDispatch(group, SLOTS_PER_RANK, max(num_tokens) + 1)

    def there_and_back() -> Tensor:
        sending = dispatch.send(sent, slots, weights)
        arrived = sending.wait()
        used = (arrived.slots_RK >= 0).any(1)
        rows_RD = arrived.x_RD.dequantise(torch.bfloat16) if isinstance(arrived.x_RD, QuantisedRows) else arrived.x_RD
        y = rows_RD * used[:, None]
        if harm:
            y = y.roll(1, 0)
        return dispatch.give_back(sending, y).wait()

    out = replayed(there_and_back) if replays else there_and_back()
    wide = sent.dequantise(torch.float32) if isinstance(sent, QuantisedRows) else sent.float()
    num_ranks = [len({slot // SLOTS_PER_RANK for slot in picks if slot >= 0}) for picks in slots.tolist()]
    want = wide * torch.tensor(num_ranks, device="cuda")[:, None]
    return float(((out.float() - want) / want.abs().clamp(min=1e-2)).abs().max()) if count else 0.0


def still_computes(group: Collectives) -> float:
    return float(torch.full((3,), 2.0).sum())


def _numbers(tensor: Tensor) -> list[float]:
    return [float(number) for number in tensor.flatten().tolist()]


def _bytes(tensor: Tensor) -> bytes:
    found: Any = tensor.cpu().view(torch.uint8).numpy()
    return bytes(found.tobytes())
