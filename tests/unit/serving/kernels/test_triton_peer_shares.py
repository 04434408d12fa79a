"""Gathered and summed shares through peer memory: all ranks in one process, the kernels in Triton's interpreter beside their references."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from serving.kernels import peer_shares as ops
from serving.kernels.dispatch import Window, late_ranks
from serving.kernels.peer_shares import SharesLayout, share_sizes, shares_layout

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import peer_shares as device

PATIENCE = 3
SIZES = [(2, 6, 16), (3, 7, 1032), (4, 2, 8), (2, 0, 8), (1, 3, 8), (3, 9, 700)]


def windows(layout: SharesLayout) -> list[Window]:
    """What nobody has written is NaN."""
    members = tuple(torch.full((layout.num_bytes,), 0xFF, dtype=torch.uint8) for _ in range(layout.world_size))
    for memory in members:
        memory[: layout.places] = 0
    return [
        Window(
            own=members[rank],
            bases=torch.tensor([memory.data_ptr() for memory in members]),
            places=torch.full((layout.world_size,), rank),
            state=torch.zeros(3, dtype=torch.int64),
            given_up=torch.zeros(1 + layout.world_size, dtype=torch.int64),
            members=members,
        )
        for rank in range(layout.world_size)
    ]


def push(by: ModuleType, window: Window, layout: SharesLayout, x: Tensor, *, whole: bool) -> None:
    (device.push if by is device else ops.push_reference)(window, layout, x, whole=whole)


def gathered(by: ModuleType, at: list[Window], layout: SharesLayout, rows: list[Tensor]) -> list[Tensor]:
    for window, x in zip(at, rows, strict=True):
        push(by, window, layout, x, whole=True)
    outs = [torch.full((sum(map(len, rows)), rows[0].shape[1]), float("nan")) for _ in at]
    for window, out in zip(at, outs, strict=True):
        if by is device:
            device.pull(window, layout, out, limit_ns=PATIENCE)
        else:
            ops.pull_reference(window, layout, out)
    return outs


def summed(by: ModuleType, at: list[Window], layout: SharesLayout, rows: list[Tensor]) -> list[Tensor]:
    for window, x in zip(at, rows, strict=True):
        push(by, window, layout, x, whole=False)
    outs = [rows[0].new_full((size, rows[0].shape[1]), float("nan")) for size in share_sizes(len(rows[0]), len(at))]
    for window, out in zip(at, outs, strict=True):
        if by is device:
            device.pull_sum(window, layout, out, limit_ns=PATIENCE)
        else:
            ops.pull_sum_reference(window, layout, out)
    return outs


@pytest.mark.parametrize(("world_size", "num_rows", "width"), SIZES)
def test_shares_are_gathered_and_summed_in_turn(world_size: int, num_rows: int, width: int) -> None:
    layout = shares_layout(world_size, -(-num_rows // world_size) * width * 4)
    ours, want = windows(layout), windows(layout)
    some = torch.Generator().manual_seed(num_rows)
    for _ in range(3):
        whole = torch.randn(num_rows, width, generator=some)
        shares = list(whole.split(share_sizes(num_rows, world_size)))
        for out in (*gathered(device, ours, layout, shares), *gathered(ops, want, layout, shares)):
            assert torch.equal(out, whole)
        parts = [torch.randn(num_rows, width, generator=some) for _ in range(world_size)]
        total = torch.zeros(num_rows, width)
        for part in parts:
            total += part
        found, wanted = summed(device, ours, layout, parts), summed(ops, want, layout, parts)
        for out, other, share in zip(found, wanted, total.split(share_sizes(num_rows, world_size)), strict=True):
            assert torch.equal(out, other)
            assert torch.equal(out, share)
        for one, other in zip(ours, want, strict=True):
            assert torch.equal(one.own, other.own)
            assert torch.equal(one.state, other.state)
            assert late_ranks(one) == []


def test_sums_of_fp64_are_the_references() -> None:
    layout = shares_layout(3, 2 * 8 * 8)
    ours, want = windows(layout), windows(layout)
    some = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, 8, generator=some, dtype=torch.float64) for _ in ours]
    found, wanted = summed(device, ours, layout, parts), summed(ops, want, layout, parts)
    for out, other in zip(found, wanted, strict=True):
        assert torch.equal(out, other)
        assert not torch.equal(out, out.float().double())


def test_sums_go_to_rows_that_lie_one_behind_the_other() -> None:
    layout = shares_layout(2, 256)
    (first, _) = windows(layout)
    with pytest.raises(AssertionError, match="one behind the other"):
        device.pull_sum(first, layout, torch.zeros(8, 4).t(), limit_ns=PATIENCE)


def test_a_share_too_large_and_a_rank_that_is_late_are_seen() -> None:
    layout = shares_layout(3, 256)
    (first, *_) = windows(layout)
    with pytest.raises(AssertionError, match="264 bytes where 256 fit"):
        device.push(first, layout, torch.zeros(1, 66), whole=True)
    device.push(first, layout, torch.zeros(1, 64), whole=True)
    device.pull(first, layout, torch.zeros(3, 64), limit_ns=PATIENCE)
    assert set(late_ranks(first)) <= {1, 2}
    assert late_ranks(first)


def test_a_rank_that_is_ahead_writes_nothing_that_is_still_read() -> None:
    layout = shares_layout(2, 64)
    at = windows(layout)
    ones, twos = torch.full((1, 16), 1.0), torch.full((1, 16), 2.0)
    for window in at:
        device.push(window, layout, ones, whole=True)
    out = torch.zeros(2, 16)
    device.pull(at[0], layout, out, limit_ns=PATIENCE)
    # The other one has not pulled yet.
    device.push(at[0], layout, twos, whole=True)
    late = torch.zeros(2, 16)
    device.pull(at[1], layout, late, limit_ns=PATIENCE)
    assert torch.equal(late, out)
    assert (out == 1).all()
