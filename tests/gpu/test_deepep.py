"""DeepEP brings what our own dispatch over NCCL brings: two processes, a GPU each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore

from serving.kernels.quant import quantise_rows_fp8
from serving.parallel.deepep import deepep_dispatch
from serving.parallel.dispatch import DirectDispatch, Dispatch, Sending
from serving.parallel.distributed import TorchCollectives

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="DeepEP is not installed"),
]

SLOTS_PER_RANK, TOP_K, WIDTH = 16, 6, 2048
TOKENS = {"both": (300, 500), "one idle": (0, 77), "none": (0, 0), "one token": (1, 0)}


def tokens_of(rank: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x bf16, slots of which a quarter is none and those of the last token all are, weights."""
    some = torch.Generator("cuda").manual_seed(7 + rank)
    x = torch.randn(num_tokens, WIDTH, generator=some, device="cuda").bfloat16()
    slots = torch.rand(num_tokens, 2 * SLOTS_PER_RANK, generator=some, device="cuda").argsort(1)[:, :TOP_K]
    slots = slots.masked_fill(torch.rand(slots.shape, generator=some, device="cuda") < 0.25, -1)
    slots[2:3] = -1
    return x, slots, torch.rand(slots.shape, generator=some, device="cuda") + 0.1


def there_and_back(
    dispatch: Dispatch, rank: int, num_tokens: int, fp8: bool, harm: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Everything that arrives, and sums of rows times what their weights here add up to."""
    x, slots, weights = tokens_of(rank, num_tokens)
    sending: Sending[Any] = dispatch.send(quantise_rows_fp8(x) if fp8 else x, slots, weights)
    arrived = sending.wait()
    rows = arrived.x_RD.dequantise(torch.bfloat16) if fp8 else arrived.x_RD
    here_RK = arrived.weights_RK * (arrived.slots_RK >= 0)
    y = (rows.float() * here_RK.sum(1, keepdim=True)).bfloat16()
    sums = dispatch.give_back(sending, harm(y)).wait()
    torch.cuda.synchronize()
    return [rows, arrived.slots_RK, here_RK], sums


def rank_process(rank: int, path: str, fails: list[str]) -> None:
    torch.cuda.set_device(rank)
    store = FileStore(path, 2)
    store.set_timeout(timedelta(seconds=60))
    ours: Dispatch = DirectDispatch(
        TorchCollectives(backend="nccl", store=store, ranks=(0, 1), rank=rank, name="ep", deadline_s=60.0),
        SLOTS_PER_RANK,
    )
    theirs: Dispatch = deepep_dispatch(
        PrefixStore("deepep", store),
        rank=rank,
        world_size=2,
        slots_per_rank=SLOTS_PER_RANK,
        row_bytes=4 * WIDTH,
        deadline_s=60.0,
    )
    with torch.inference_mode():
        for name, num_tokens in TOKENS.items():
            for fp8 in (False, True):
                want = there_and_back(ours, rank, num_tokens[rank], fp8, torch.clone)
                got = there_and_back(theirs, rank, num_tokens[rank], fp8, torch.clone)
                same = [torch.equal(a, b) for a, b in zip([*got[0], got[1]], [*want[0], want[1]], strict=True)]
                if not all(same):
                    fails.append(f"{name}, fp8 {fp8}, rank {rank}: rows, slots, weights, sums {same}")
        turned = there_and_back(theirs, rank, 300, False, lambda y: y.roll(1, 0))
        if torch.equal(turned[1], there_and_back(ours, rank, 300, False, torch.clone)[1]):
            fails.append(f"rank {rank}: rows in another order on the way back were not seen")


def test_what_arrives_and_what_returns_is_what_our_dispatch_brings(tmp_path: Path) -> None:
    with mp.Manager() as manager:
        fails = manager.list()
        mp.spawn(rank_process, (str(tmp_path / "store"), fails), nprocs=2)
        assert list(fails) == []
