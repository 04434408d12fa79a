"""Every rank is in one place of each kind of group, and sizes that do not fit are refused with the fix."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serving.core.errors import ConfigError
from serving.parallel.groups import Groups, Link

PREFILL = Groups(tp=4, dp=8, ep=32, ranks_per_node=8)
DECODE = Groups(tp=4, dp=80, ep=320, ranks_per_node=8)
PRODUCTION = Groups(tp=1, dp=144, ep=144, ranks_per_node=8)
LAPTOP = Groups(tp=2, dp=1, ep=2, ranks_per_node=8)
HALF = Groups(tp=2, dp=8, ep=4, ranks_per_node=8)
UNITS = {"prefill": PREFILL, "decode": DECODE, "production": PRODUCTION, "laptop": LAPTOP, "ep4 of 16": HALF}


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("kind", ["tp_group", "dp_group", "ep_group", "node_group", "rail_group"])
def test_the_groups_of_a_kind_part_the_unit_and_all_members_agree(unit: Groups, kind: str) -> None:
    group_of: Callable[[int], tuple[int, ...]] = getattr(unit, kind)
    groups = {group_of(rank) for rank in range(unit.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(unit.world_size))
    assert all(group_of(rank) == group for group in groups for rank in group)


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_a_rank_stands_in_its_groups_where_its_coordinates_say(unit: Groups) -> None:
    for rank in range(unit.world_size):
        at = unit.coordinates(rank)
        assert unit.tp_group(rank)[at.tp_rank] == unit.dp_group(rank)[at.dp_rank] == rank
        assert unit.ep_group(rank)[at.ep_rank] == at.node * unit.ranks_per_node + at.local_rank == rank
        assert {unit.coordinates(peer).node for peer in unit.tp_group(rank)} == {at.node}
        assert set(unit.node_group(rank)) & set(unit.rail_group(rank)) == {rank}


def test_the_papers_units_have_the_papers_groups() -> None:
    assert (PREFILL.world_size, PREFILL.num_nodes) == (32, 4)
    assert (DECODE.world_size, DECODE.num_nodes) == (320, 40)
    assert PREFILL.tp_group(13) == (12, 13, 14, 15)
    assert PREFILL.dp_group(13) == (1, 5, 9, 13, 17, 21, 25, 29)
    assert PREFILL.rail_group(13) == (5, 13, 21, 29)
    assert PREFILL.node_group(13) == tuple(range(8, 16))
    assert len(DECODE.rail_group(0)) == 40
    assert HALF.ep_group(13) == HALF.node_group(13) == (12, 13, 14, 15)


def test_links_follow_from_nodes() -> None:
    assert PREFILL.link(9, 9) is Link.SAME_GPU
    assert PREFILL.link(8, 15) is Link.NVLINK
    assert PREFILL.link(7, 8) is Link.IB


@pytest.mark.parametrize(
    ("sizes", "fix"),
    [
        ({"tp": 0, "dp": 1, "ep": 1, "ranks_per_node": 8}, "tp = 0 is not a size"),
        ({"tp": 4, "dp": 8, "ep": 33, "ranks_per_node": 8}, "set ep to tp \\* dp = 32"),
        ({"tp": 4, "dp": 3, "ep": 12, "ranks_per_node": 8}, "tp \\* dp is a multiple of 8"),
        ({"tp": 16, "dp": 2, "ep": 32, "ranks_per_node": 8}, "choose tp among 1, 2, 4, 8"),
        ({"tp": 3, "dp": 8, "ep": 24, "ranks_per_node": 8}, "choose tp among 1, 2, 4, 8"),
        ({"tp": 1, "dp": 48, "ep": 12, "ranks_per_node": 8}, "multiples of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_fix(sizes: dict[str, int], fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        Groups(**sizes)
