"""Dispatch through peer memory on the device: all ranks on one GPU, one after the other and at once; a GPU each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.bench.dispatch import Case, measure, rehearsed
from serving.kernels.quant import QuantisedRows
from serving.parallel.collectives import RanksMissing
from serving.parallel.symmetric import Symmetric
from tests.unit.serving.parallel.symmetric_ranks import symmetric_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

CPU, RANKS = torch.device("cpu"), 4
CASES = [
    Case(rows=26, slots_per_rank=1, top_k=3, width=7168, fp8=True),
    Case(rows=32, slots_per_rank=64, top_k=8, width=7168, fp8=True),
    Case(rows=5, slots_per_rank=2, top_k=4, width=264, fp8=False),
]
Tokens = list[tuple[Any, Tensor, Tensor]]


def _tokens(case: Case, seed: int) -> Tokens:
    return [case.tokens(RANKS * seed + rank, RANKS, torch.device("cuda")) for rank in range(RANKS)]


def _on(device: torch.device, tokens: Tokens) -> Tokens:
    return [(_moved(x, device), slots.to(device), weights.to(device)) for x, slots, weights in tokens]


def _moved(x: Tensor | QuantisedRows, device: torch.device) -> Tensor | QuantisedRows:
    if isinstance(x, Tensor):
        return x.to(device)
    return QuantisedRows(values=x.values.to(device), scales=x.scales.to(device))


def _experts(rank: int, arrived: Any) -> Tensor:
    """Of each row something that depends on the rank, on its slots and on its weights, in one rounding each."""
    x = arrived.x_RD
    x = x.dequantise(torch.bfloat16) if isinstance(x, QuantisedRows) else x
    some = arrived.slots_RK.clamp(min=0).sum(1) + (arrived.weights_RK[:, 0] > 0.5)
    return x * (1 << (rank + some % 3)).to(x.dtype)[:, None]


def _of_rank(symmetric: Symmetric, rank: int, capacity: int, tokens: Tokens) -> Iterator[Tensor | None]:
    """Gives way before each wait."""
    dispatch = symmetric.dispatch(capacity)
    sending = dispatch.send(*tokens[rank])
    yield None
    returning = dispatch.give_back(sending, _experts(rank, sending.wait()))
    yield None
    yield returning.wait()


def _in_turn(ranks: list[Symmetric], capacity: int, tokens: Tokens) -> list[Tensor]:
    parts = [_of_rank(symmetric, rank, capacity, tokens) for rank, symmetric in enumerate(ranks)]
    for _ in range(2):
        for part in parts:
            next(part)
    totals = [next(part) for part in parts]
    for symmetric in ranks:
        symmetric.check()
    return [total for total in totals if total is not None]


@pytest.mark.parametrize("case", CASES)
def test_a_graph_and_eager_calls_equal_the_reference_bit_by_bit(case: Case) -> None:
    ranks, on_cpu = (symmetric_ranks(RANKS, case.exchanged, torch.device(device)) for device in ("cuda", "cpu"))
    inputs = _tokens(case, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _in_turn(ranks, case.rows, inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _in_turn(ranks, case.rows, inputs)
    for seed in (1, 2, 1):
        fresh = _tokens(case, seed)
        want = _in_turn(on_cpu, case.rows, _on(CPU, fresh))
        for into, source in zip(inputs, fresh, strict=True):
            _write(into, source)
        graph.replay()
        eager = _in_turn(ranks, case.rows, fresh)
        for rank in range(RANKS):
            assert torch.equal(captured[rank].cpu(), want[rank])
            assert torch.equal(eager[rank].cpu(), want[rank])
        assert not torch.equal(want[0], want[1])


def _write(into: Any, source: Any) -> None:
    for one, other in zip(into, source, strict=True):
        if isinstance(one, QuantisedRows):
            one.values.copy_(other.values)
            one.scales.copy_(other.scales)
        else:
            one.copy_(other)


def test_ranks_at_once_wait_for_each_other_exchange_after_exchange() -> None:
    case, num_exchanges = CASES[0], 20
    ranks = symmetric_ranks(RANKS, case.exchanged, torch.device("cuda"))
    tokens = [_tokens(case, seed) for seed in range(num_exchanges)]
    # Everything is compiled, and its memory taken, before anybody waits.
    want = [_in_turn(ranks, case.rows, each) for each in tokens]
    graphs, totals = [], []
    for rank, symmetric in enumerate(ranks):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            totals.append([list(_of_rank(symmetric, rank, case.rows, each))[-1] for each in tokens])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in ranks]
    torch.cuda.synchronize()
    for _ in range(3):
        # The first waits for what is launched last.
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for rank, symmetric in enumerate(ranks):
            symmetric.check()
            for index in range(num_exchanges):
                total = totals[rank][index]
                assert total is not None
                assert torch.equal(total, want[index][rank])
                total.zero_()


def test_a_wait_ends_at_its_deadline_and_names_who_is_late() -> None:
    case = CASES[2]
    ranks = symmetric_ranks(RANKS, replace(case.exchanged, deadline_s=0.2), torch.device("cuda"))
    tokens = _tokens(case, 0)
    _in_turn(ranks, case.rows, tokens)
    sendings = [ranks[rank].dispatch(case.rows).send(*tokens[rank]) for rank in (0, 1, 3)]
    torch.cuda.synchronize()
    ranks[0].check()
    begin_s = time.monotonic()
    sendings[0].wait()
    torch.cuda.synchronize()
    assert 0.19 < time.monotonic() - begin_s < 2.0
    with pytest.raises(RanksMissing) as missing:
        ranks[0].check()
    assert missing.value.ranks == (2,)
    # From then on nobody waits again.
    begin_s = time.monotonic()
    for _ in range(20):
        ranks[0].wait(ranks[0].windows[0], ranks[0].layout.returned)
    torch.cuda.synchronize()
    assert time.monotonic() - begin_s < 0.15


def test_the_host_ends_a_wait() -> None:
    case = CASES[2]
    ranks = symmetric_ranks(RANKS, case.exchanged, torch.device("cuda"))
    tokens = _tokens(case, 0)
    _in_turn(ranks, case.rows, tokens)
    sending = ranks[0].dispatch(case.rows).send(*tokens[0])
    done = torch.cuda.Event()
    sending.wait()
    done.record()
    time.sleep(0.1)
    assert not done.query()
    ranks[0].abort()
    begin_s = time.monotonic()
    torch.cuda.synchronize()
    assert time.monotonic() - begin_s < 1.0


def test_a_rank_of_320_rehearses_alone() -> None:
    point = rehearsed(Case(rows=26, slots_per_rank=1, top_k=9, width=7168, fp8=True), 320, rounds=2)
    assert point["rows_used"] == 26 * 9
    assert 0 < point["symmetric_us"] < 1000


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("see_all", [True, False])
def test_two_gpus_come_to_what_nccl_brings(see_all: bool) -> None:
    """Rows to experts and back, and a TP group's shares gathered and summed."""
    cases = [
        Case(rows=rows, slots_per_rank=128, top_k=8, width=7168, fp8=fp8) for rows in (8, 33) for fp8 in (True, False)
    ]
    points = measure(cases, 2, rounds=2, see_all=see_all, shares=[8 << 10, 1 << 20])
    assert len(points) == len(cases) + 4
    for point in points:
        assert point["equal"]
        assert 0 < point["symmetric_us"] < 10_000
