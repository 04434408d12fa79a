"""Dispatch through peer memory: all ranks in one process, the kernels in Triton's interpreter beside their references."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.kernels import dispatch as ops
from serving.kernels.dispatch import GIVEN_UP, STEP, Layout, Window, arrived_rows, layout_for
from serving.kernels.quant import QuantisedRows, quantise_rows_fp8_reference

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import dispatch as device

PATIENCE = 3


@dataclass(frozen=True, kw_only=True)
class Unit:
    """`capacity` rows of `width`, `top_k` picks among the slots of all ranks."""

    world_size: int = 3
    capacity: int = 5
    width: int = 136
    slots_per_rank: int = 2
    top_k: int = 3
    fp8: bool = False

    @property
    def columns(self) -> int:
        return min(self.top_k, self.slots_per_rank)

    def layout(self, largest: int | None = None) -> Layout:
        return layout_for(self.world_size, largest or self.capacity, width=self.width, columns=self.columns, itemsize=4)

    def tokens(self, rank: int, num_rows: int, seed: int = 0) -> tuple[Any, Tensor, Tensor]:
        some = torch.Generator().manual_seed(100 * seed + rank)
        x = torch.randn(num_rows, self.width, generator=some)
        slots = torch.rand(num_rows, self.world_size * self.slots_per_rank, generator=some).argsort(1)
        slots = slots[:, : self.top_k].contiguous()
        slots[torch.rand(slots.shape, generator=some) < 0.2] = -1
        return quantise_rows_fp8_reference(x) if self.fp8 else x, slots, torch.rand(slots.shape, generator=some)


def windows(unit: Unit, layout: Layout) -> list[Window]:
    """Of every rank, in one process. What nobody has written is NaN, or a slot that does not exist."""
    members = tuple(torch.full((layout.num_bytes,), 0xFF, dtype=torch.uint8) for _ in range(unit.world_size))
    for memory in members:
        memory[: layout.slots] = 0
        memory[layout.slots : layout.weights] = 0x7F
    bases = torch.tensor([memory.data_ptr() for memory in members])
    return [
        Window(
            own=members[rank],
            bases=bases,
            places=torch.full((unit.world_size,), rank),
            state=torch.zeros(3, dtype=torch.int64),
            given_up=torch.zeros(1 + unit.world_size, dtype=torch.int64),
            members=members,
        )
        for rank in range(unit.world_size)
    ]


def exchange(unit: Unit, layout: Layout, at: list[Window], num_rows: list[int], seed: int, by: ModuleType) -> Any:
    """Rows there, each times its rank + 1 plus its slots, and back: [T, D] of each rank, and what arrived."""
    call = (lambda name: getattr(by, name)) if by is device else (lambda name: getattr(by, f"{name}_reference"))
    limit = {"limit_ns": PATIENCE} if by is device else {}
    tokens = [unit.tokens(rank, rows, seed) for rank, rows in enumerate(num_rows)]
    sizes = {"slots_per_rank": unit.slots_per_rank, "capacity": unit.capacity}
    for window, (x, slots, weights) in zip(at, tokens, strict=True):
        call("send")(window, layout, x, slots, weights, **sizes)
    arrived = []
    for rank, window in enumerate(at):
        call("wait")(window, layout.sent, **limit)
        rows = arrived_rows(window, layout, tokens[rank][0], unit.capacity)
        arrived.append((rows.slots_RM.clone(), rows.weights_RM.clone()))
        x = rows.x.dequantise(torch.float32) if isinstance(rows.x, QuantisedRows) else rows.x
        y = x * (rank + 1) + rows.slots_RM.sum(1, keepdim=True)
        call("give_back")(window, layout, y, capacity=unit.capacity)
    totals = []
    for window, (_, slots, _) in zip(at, tokens, strict=True):
        call("wait")(window, layout.returned, **limit)
        totals.append(call("add_up")(window, layout, slots, **sizes, width=unit.width, dtype=torch.float32))
    return totals, arrived


UNITS = [
    (Unit(), [5, 0, 3]),
    (Unit(fp8=True), [5, 1, 4]),
    (Unit(world_size=2, slots_per_rank=8, top_k=6, capacity=4, fp8=True, width=256), [4, 4]),
    (Unit(world_size=5, slots_per_rank=1, top_k=4, capacity=3, width=40), [3, 2, 3, 0, 1]),
    (Unit(world_size=1, slots_per_rank=4, top_k=2, capacity=2, width=8), [2]),
    (Unit(world_size=2, capacity=33, width=16), [33, 20]),
]


@pytest.mark.parametrize(("unit", "num_rows"), UNITS)
def test_the_kernels_move_what_the_references_move(unit: Unit, num_rows: list[int]) -> None:
    layout = unit.layout()
    ours, want = windows(unit, layout), windows(unit, layout)
    for step in range(2):
        totals, arrived = exchange(unit, layout, ours, num_rows, step, device)
        want_totals, want_arrived = exchange(unit, layout, want, num_rows, step, ops)
        for rank in range(unit.world_size):
            assert torch.equal(totals[rank], want_totals[rank])
            assert not totals[rank].isnan().any()
            for one, other in zip(arrived[rank], want_arrived[rank], strict=True):
                assert torch.equal(one, other)
            # All of what anybody may write, rows that nobody wanted and flags among it.
            assert torch.equal(ours[rank].own, want[rank].own)
            assert ours[rank].state.tolist() == [step + 1, 0, 0]


@pytest.mark.parametrize(("unit", "num_rows"), UNITS)
def test_what_comes_back_is_the_sum_over_the_ranks_of_a_row(unit: Unit, num_rows: list[int]) -> None:
    layout = unit.layout()
    totals, _ = exchange(unit, layout, windows(unit, layout), num_rows, 7, device)
    seen = 0
    for rank, rows in enumerate(num_rows):
        x, slots, _ = unit.tokens(rank, rows, 7)
        x = x.dequantise(torch.float32) if isinstance(x, QuantisedRows) else x
        for row in range(rows):
            want = torch.zeros(unit.width)
            for other in range(unit.world_size):
                local = [int(s) - other * unit.slots_per_rank for s in slots[row] if s // unit.slots_per_rank == other]
                unused = unit.columns - len(local)
                want += x[row] * (other + 1) + sum(local) - unused if local else 0
            assert torch.allclose(totals[rank][row], want, rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen == sum(num_rows)


def test_a_smaller_capacity_uses_the_memory_of_a_larger_one() -> None:
    large, small = Unit(capacity=7, fp8=True), Unit(capacity=4, fp8=True)
    layout = large.layout()
    ours, want = windows(large, layout), windows(large, layout)
    for step, unit in enumerate((large, small, large, small)):
        rows = [unit.capacity, 1, 2]
        totals, _ = exchange(unit, layout, ours, rows, step, device)
        want_totals, _ = exchange(unit, layout, want, rows, step, ops)
        assert all(torch.equal(one, other) for one, other in zip(totals, want_totals, strict=True))


def test_rows_that_went_astray_are_seen() -> None:
    unit = Unit()
    layout = unit.layout()
    want, _ = exchange(unit, layout, windows(unit, layout), [5, 5, 5], 1, ops)
    swapped = windows(unit, layout)
    swapped[0].bases[:] = swapped[0].bases[[0, 2, 1]].clone()
    # Rank 0's table is everybody's here, and ranks 1 and 2 are one for the other in it.
    totals, _ = exchange(unit, layout, swapped, [5, 5, 5], 1, device)
    assert not torch.equal(totals[0], want[0])


@pytest.mark.parametrize("by", [device, ops])
def test_who_does_not_come_is_named_and_not_waited_for_again(by: ModuleType) -> None:
    unit = Unit()
    layout = unit.layout()
    at = windows(unit, layout)
    tokens = [unit.tokens(rank, 2) for rank in range(3)]
    for rank in (0, 2):
        ops.send_reference(at[rank], layout, *tokens[rank], slots_per_rank=2, capacity=5)
    wait = (lambda: device.wait(at[0], layout.sent, limit_ns=PATIENCE)) if by is device else (
        lambda: ops.wait_reference(at[0], layout.sent)
    )  # fmt: skip
    assert ops.late_ranks(at[0]) == []
    wait()
    assert ops.late_ranks(at[0]) == [1]
    assert at[0].given_up[0] == at[0].state[GIVEN_UP] == at[0].state[STEP] == 1
    # Who comes after all changes nothing any more.
    ops.send_reference(at[1], layout, *tokens[1], slots_per_rank=2, capacity=5)
    wait()
    assert ops.late_ranks(at[0]) == [1]


def test_the_host_ends_a_wait() -> None:
    unit = Unit()
    layout = unit.layout()
    (first, *_) = windows(unit, layout)
    ops.send_reference(first, layout, *unit.tokens(0, 2), slots_per_rank=2, capacity=5)
    first.given_up[0] = -1
    device.wait(first, layout.sent, limit_ns=1 << 60)
    assert first.state.tolist() == [1, 0, -1]
    assert ops.late_ranks(first) == []


def test_all_memory_may_be_one_ranks_own() -> None:
    """A rehearsal: what this rank sends to rank w comes from rank w."""
    unit = Unit(world_size=4, slots_per_rank=1, top_k=2, capacity=3)
    layout = unit.layout()
    own = torch.zeros(layout.num_bytes, dtype=torch.uint8)

    def window(memory: Tensor) -> Window:
        return Window(
            own=memory,
            bases=torch.full((4,), memory.data_ptr()),
            places=torch.arange(4),
            state=torch.zeros(3, dtype=torch.int64),
            given_up=torch.zeros(5, dtype=torch.int64),
            members=(memory,) * 4,
        )

    at, other = window(own), window(own.clone())
    x, slots, weights = unit.tokens(0, 3)
    slots[0] = -1
    sizes = {"slots_per_rank": 1, "capacity": 3}
    totals = []
    for one, by in ((at, device), (other, ops)):
        suffix = "" if by is device else "_reference"
        getattr(by, f"send{suffix}")(one, layout, x, slots, weights, **sizes)
        ops.wait_reference(one, layout.sent)
        rows = arrived_rows(one, layout, x, 3)
        assert int((rows.slots_RM >= 0).sum()) == int((slots >= 0).sum()) > 0
        getattr(by, f"give_back{suffix}")(one, layout, rows.x * 2, capacity=3)
        ops.wait_reference(one, layout.returned)
        assert not ops.late_ranks(one)
        totals.append(getattr(by, f"add_up{suffix}")(one, layout, slots, **sizes, width=unit.width, dtype=x.dtype))
    assert torch.equal(*totals)
    assert torch.equal(totals[0], 2 * x * (slots >= 0).sum(1, keepdim=True))
