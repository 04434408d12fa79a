"""Dispatch through peer memory comes to what every other dispatch comes to, and the memory is opened and given back together."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from serving.core.errors import ConfigError
from serving.kernels.quant import quantise_rows_fp8
from serving.parallel.collectives import RanksMissing
from serving.parallel.groups import Groups
from serving.parallel.peer_memory import DriverError, PeerMemory, PeersUnreachable
from serving.parallel.symmetric import Exchanged, Symmetric, rehearse_symmetric
from serving.parallel.virtual import VirtualCollectives, VirtualUnit
from tests.unit.serving.parallel import dispatch_cases
from tests.unit.serving.parallel.dispatch_cases import Layer
from tests.unit.serving.parallel.symmetric_ranks import symmetric_ranks

CPU = torch.device("cpu")
ROUTINGS = ["random", "to rank 1", "same rank", "partial"]


def _layer(routing: str, num_tokens: tuple[int, ...] = (5, 0, 3, 8)) -> Layer:
    return Layer(num_tokens=num_tokens, slots=tuple(range(12)), top_k=3, routing=routing, dtype="float32")


def _exchanged(layer: Layer, capacity: int) -> Exchanged:
    sizes = {"width": layer.width, "top_k": layer.top_k, "itemsize": 4, "deadline_s": 1.0}
    return Exchanged(slots_per_rank=layer.slots_per_rank, capacity=capacity, **sizes)


def _through(ranks: list[Symmetric], layer: Layer, capacity: int, *, poison: bool = True) -> list[Tensor]:
    """[T, D] of each rank. Results that nobody may read are NaN."""
    with torch.inference_mode():
        ends = [rank.dispatch(capacity) for rank in ranks]
        sendings = [end.send(*layer.tokens(rank)) for rank, end in enumerate(ends)]
        returnings = []
        for rank, (end, sending) in enumerate(zip(ends, sendings, strict=True)):
            arrived = sending.wait()
            assert not arrived.fill
            unused = (arrived.slots_RK < 0).all(1)
            y = dispatch_cases.compute(layer, rank, arrived.x_RD.nan_to_num(), arrived.slots_RK, arrived.weights_RK)
            returnings.append(end.give_back(sending, y.masked_fill(unused[:, None] & poison, float("nan"))))
        totals = [returning.wait() for returning in returnings]
        for rank in ranks:
            rank.check()
        return totals


@pytest.mark.parametrize("routing", ROUTINGS)
def test_it_comes_to_what_the_fixed_dispatch_comes_to(routing: str) -> None:
    layer = _layer(routing)
    ranks = symmetric_ranks(4, _exchanged(layer, 12), CPU)
    for capacity, seed in ((9, 0), (12, 1), (9, 2)):
        drawn = replace(layer, seed=seed)
        fixed = VirtualUnit(layer.groups).run(
            lambda group, drawn=drawn: dispatch_cases.dispatched(group, "fixed", drawn, "")
        )
        totals = _through(ranks, drawn, capacity)
        for rank, total in enumerate(totals):
            want = drawn.expected(rank)
            assert torch.allclose(total, want, rtol=1e-5, atol=1e-6)
            assert torch.allclose(total, torch.tensor(fixed[rank]).view(want.shape), rtol=1e-6, atol=1e-7)
        assert not torch.allclose(totals[3], replace(layer, seed=seed + 1).expected(3), rtol=1e-2)


def test_rows_of_fp8_arrive_as_products_want_them() -> None:
    layer = replace(_layer("random"), width=256)
    ranks = symmetric_ranks(4, _exchanged(layer, 8), CPU)
    tokens = [layer.tokens(rank) for rank in range(4)]
    rows = [quantise_rows_fp8(x) for x, _, _ in tokens]
    sendings = [
        rank.dispatch(8).send(x, slots, weights)
        for rank, x, (_, slots, weights) in zip(ranks, rows, tokens, strict=True)
    ]
    for rank, sending in enumerate(sendings):
        arrived = sending.wait()
        assert arrived.x_RD.scales.stride() == (1, 32)
        for row in (arrived.slots_RK >= 0).any(1).nonzero().flatten().tolist():
            source, token = divmod(row, 8)
            assert torch.equal(arrived.x_RD.values[row].float(), rows[source].values[token].float())
            assert torch.equal(arrived.x_RD.scales[row], rows[source].scales[token])
            here = [slot - 3 * rank for slot in tokens[source][1][token].tolist() if slot // 3 == rank]
            assert arrived.slots_RK[row].tolist() == here + [-1] * (3 - len(here))


def test_exchanges_of_micro_batches_overlap() -> None:
    layers = [_layer("random"), replace(_layer("partial"), seed=5)]
    ranks = symmetric_ranks(4, _exchanged(layers[0], 8), CPU, num_windows=2)
    for _ in range(2):
        sendings = [[end.dispatch(8).send(*layer.tokens(rank)) for rank, end in enumerate(ranks)] for layer in layers]
        returnings = []
        for layer, of_layer in zip(layers, sendings, strict=True):
            arrived = [sending.wait() for sending in of_layer]
            results = [
                dispatch_cases.compute(layer, rank, one.x_RD, one.slots_RK, one.weights_RK)
                for rank, one in enumerate(arrived)
            ]
            returnings.append([ranks[rank].dispatch(8).give_back(of_layer[rank], y) for rank, y in enumerate(results)])
        for layer, of_layer in zip(layers, returnings, strict=True):
            for rank, returning in enumerate(of_layer):
                assert torch.allclose(returning.wait(), layer.expected(rank), rtol=1e-5, atol=1e-6)


def test_exchanges_of_one_window_do_not_overlap() -> None:
    layer = _layer("random")
    (first, *_) = symmetric_ranks(4, _exchanged(layer, 8), CPU)
    first.dispatch(8).send(*layer.tokens(0))
    with pytest.raises(AssertionError, match="ends before"):
        first.dispatch(8).send(*layer.tokens(0))
    with pytest.raises(AssertionError, match="fit"):
        first.dispatch(9)


def test_the_ranks_that_did_not_come_are_named() -> None:
    layer = _layer("random")
    ranks = symmetric_ranks(4, _exchanged(layer, 8), CPU)
    sendings = [ranks[rank].dispatch(8).send(*layer.tokens(rank)) for rank in (0, 1, 3)]
    ranks[0].check()
    sendings[0].wait()
    with pytest.raises(RanksMissing) as missing:
        ranks[0].check()
    assert missing.value.ranks == (2,)
    assert "deadline 1 s" in str(missing.value)


def test_a_rank_alone_rehearses_a_unit() -> None:
    layer = _layer("random", num_tokens=(6,) * 4)
    alone = rehearse_symmetric((0, 1, 2, 3), CPU, _exchanged(layer, 6))
    x, slots, weights = layer.tokens(0)
    sending = alone.dispatch(6).send(x, slots, weights)
    arrived = sending.wait()
    pairs = {(token, slot // 3) for token, picks in enumerate(slots.tolist()) for slot in picks}
    rows = (arrived.slots_RK >= 0).any(1).nonzero().flatten().tolist()
    assert {(row % 6, row // 6) for row in rows} == pairs
    total = alone.dispatch(6).give_back(sending, arrived.x_RD * 2, 3 * x).wait()
    alone.check()
    num_ranks = torch.tensor([len({slot // 3 for slot in picks}) for picks in slots.tolist()])
    assert torch.allclose(total, 2 * x * num_ranks[:, None] + 3 * x)


class FakeDriver:
    """A host's GPUs: who frees what others have mapped, or unmaps what nobody mapped, is found out."""

    def __init__(self, host: dict[int, set[int]], rank: int, log: list[str], fails: str = "") -> None:
        self.host, self.rank, self.log, self.fails = host, rank, log, fails

    def _call(self, name: str) -> None:
        self.log.append(f"{name} {self.rank}")
        if self.fails == name:
            raise DriverError(217, name, "peer access is not supported between these two devices")

    def allocate(self, num_bytes: int) -> int:
        self._call("allocate")
        assert num_bytes % (2 << 20) == 0
        self.host[1000 + self.rank] = set()
        return 1000 + self.rank

    def free(self, address: int) -> None:
        self._call("free")
        assert not self.host.pop(address), "freed while others have it"

    def handle(self, address: int) -> bytes:
        return address.to_bytes(64, "little")

    def map(self, handle: bytes) -> int:
        self._call("map")
        address = int.from_bytes(handle, "little")
        self.host[address].add(self.rank)
        return address

    def unmap(self, address: int) -> None:
        self._call("unmap")
        self.host[address].remove(self.rank)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        return torch.ones(num_bytes, dtype=torch.uint8)

    def synchronise(self) -> None: ...


def _opened(
    world_size: int, fails: dict[int, str]
) -> tuple[dict[int, set[int]], list[str], list[BaseException | list[int]]]:
    host: dict[int, set[int]] = {}
    log: list[str] = []

    def main(group: VirtualCollectives) -> BaseException | list[int]:
        try:
            memory = PeerMemory(group, 1 << 10, FakeDriver(host, group.rank, log, fails.get(group.rank, "")))
        except PeersUnreachable as error:
            return error
        assert memory.own.shape == (1 << 10,)
        assert not memory.own.any()
        memory.close()
        return memory.addresses

    groups = Groups(tp=1, dp=world_size, ep=world_size, ranks_per_node=world_size)
    return host, log, VirtualUnit(groups).run(main)


def test_memory_is_freed_when_nobody_has_it_any_more() -> None:
    host, log, found = _opened(3, {})
    assert found == [[1000, 1001, 1002]] * 3
    assert not host
    calls = [line.split()[0] for line in log]
    assert [name for name, _ in itertools.groupby(calls)] == ["allocate", "map", "unmap", "free"]
    assert calls.count("map") == calls.count("unmap") == 6


@pytest.mark.parametrize("step", ["allocate", "map"])
def test_all_ranks_hear_that_one_cannot_reach_the_others(step: str) -> None:
    host, _, found = _opened(3, {1: step})
    assert not host
    for error in found:
        assert isinstance(error, ConfigError)
        assert "rank 1 cannot reach" in str(error)
        assert "CUDA error 217" in str(error)
        assert "nccl" in str(error)
