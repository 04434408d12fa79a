"""A group in front of another one: the small calls through memory, bit by bit what the other brings; all else as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.peer_shares import share_sizes
from serving.parallel.collectives import Collectives, RanksMissing
from serving.parallel.groups import Groups
from serving.parallel.peer_shares import MOST_BYTES, PeerShares, layout_of
from serving.parallel.symmetric import new_window
from serving.parallel.virtual import VirtualCollectives, VirtualUnit

WORLD = 3


def through_memory(group: VirtualCollectives, members: list[Tensor]) -> PeerShares:
    addresses = [memory.data_ptr() for memory in members]
    window = new_window(members[group.rank], addresses, [group.rank] * WORLD, members=members)
    return PeerShares(group, window, deadline_s=1.0)


def outcome(group: Collectives, meet: Collectives, num_rows: int, width: int) -> list[Tensor]:
    """Twice of each kind. Ranks take turns only where they meet."""
    some = torch.Generator().manual_seed(group.rank)
    sizes = share_sizes(num_rows, WORLD)
    counts = sizes if num_rows % WORLD else None
    found = []
    for _ in range(2):
        share = torch.randn(sizes[group.rank], width, generator=some)
        whole = torch.empty(num_rows, width)
        handle = group.all_gather(whole, share, counts)
        meet.barrier()
        handle.wait()
        part = torch.randn(num_rows, width, generator=some)
        summed = torch.empty(sizes[group.rank], width)
        handle = group.reduce_scatter(summed, part, counts)
        meet.barrier()
        handle.wait()
        found += [whole, summed]
    return found


@pytest.mark.parametrize(
    ("num_rows", "width"), [(6, 8), (7, 8), (1, 8), (3, MOST_BYTES // 12), (6, MOST_BYTES // 12), (4, 7)]
)
def test_it_brings_what_the_group_brings(num_rows: int, width: int) -> None:
    members = [torch.zeros(layout_of(WORLD).num_bytes, dtype=torch.uint8) for _ in range(WORLD)]
    unit = VirtualUnit(Groups(tp=1, dp=WORLD, ep=WORLD, ranks_per_node=WORLD))

    def main(group: VirtualCollectives) -> tuple[list[Tensor], list[Tensor], int]:
        shares = through_memory(group, members)
        found = outcome(shares, group, num_rows, width)
        shares.check()
        begun = int(shares.window.state[0])
        return found, outcome(group, group, num_rows, width), begun

    for found, want, begun in unit.run(main):
        assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))
        small = -(-num_rows // WORLD) * WORLD * width * 4 <= MOST_BYTES and width % 2 == 0
        assert begun == (4 if small else 0)


def test_who_is_late_is_named_and_calls_do_not_overlap() -> None:
    members = [torch.zeros(layout_of(WORLD).num_bytes, dtype=torch.uint8) for _ in range(WORLD)]

    def main(group: VirtualCollectives) -> tuple[int, ...]:
        if group.rank:
            return ()
        shares = through_memory(group, members)
        handle = shares.all_gather(torch.empty(3, 8), torch.ones(1, 8))
        with pytest.raises(AssertionError, match="ends before"):
            shares.all_gather(torch.empty(3, 8), torch.ones(1, 8))
        handle.wait()
        with pytest.raises(RanksMissing) as missing:
            shares.check()
        return missing.value.ranks

    unit = VirtualUnit(Groups(tp=1, dp=WORLD, ep=WORLD, ranks_per_node=WORLD))
    assert unit.run(main)[0] == (1, 2)
