"""A unit in one process: bytes by link, delays and deaths on purpose, and the paper's number of ranks."""

from __future__ import annotations

import threading

import pytest
import torch

from serving.parallel.collectives import RanksMissing
from serving.parallel.groups import Groups, Link
from serving.parallel.virtual import Fault, VirtualCollectives, VirtualUnit

GROUPS = Groups(tp=2, dp=2, ep=4, ranks_per_node=2)
DECODE = Groups(tp=4, dp=80, ep=320, ranks_per_node=8)


def _traffic(unit: VirtualUnit, group: str, operation: str) -> dict[Link, tuple[int, int]]:
    """Messages and bytes."""
    return {
        link: (traffic.num_messages, traffic.num_bytes)
        for (name, what, link), traffic in unit.traffic.items()
        if (name, what) == (group, operation)
    }


def _named(unit: VirtualUnit) -> dict[int, tuple[int, ...]]:
    """Whom each rank's error names."""
    return {rank: error.ranks for rank, error in unit.errors.items() if isinstance(error, RanksMissing)}


def test_an_all_to_all_is_counted_by_the_link_of_each_pair() -> None:
    unit = VirtualUnit(GROUPS)

    def main(group: VirtualCollectives) -> None:
        # Rank r has r rows for each rank: 8 bytes in one payload, 2 in the other.
        send, recv = [group.rank] * 4, [0, 1, 2, 3]
        kinds = [torch.float32, torch.float8_e4m3fn]
        tensors = [torch.zeros(4 * group.rank, 2, dtype=kind) for kind in kinds]
        group.all_to_all([torch.empty(6, 2, dtype=kind) for kind in kinds], tensors, recv, send).wait()

    unit.run(main)
    assert _traffic(unit, "world", "all_to_all") == {
        Link.SAME_GPU: (3, 6 * 10),
        Link.NVLINK: (3, 6 * 10),
        Link.IB: (6, 12 * 10),
    }


def test_payload_routing_and_rows_of_zeros_are_told_apart() -> None:
    unit = VirtualUnit(GROUPS)

    def main(group: VirtualCollectives) -> None:
        # Two rows for each rank, of 12 bytes payload and 8 routing; rank 1 has nothing in its second ones, rank 2 only routing.
        values, routing = torch.ones(8, 3), torch.ones(8, 1, dtype=torch.int64)
        if group.rank in (1, 2):
            values[1::2] = 0.0
        if group.rank == 1:
            routing[1::2] = 0
        outs = [torch.empty_like(values), torch.empty_like(routing)]
        group.all_to_all(outs, [values, routing], [2] * 4, [2] * 4).wait()
        # Counts may be 0 without being padding.
        group.all_to_all(
            [torch.empty(4, 1, dtype=torch.int64)], [torch.zeros(4, 1, dtype=torch.int64)], [1] * 4, [1] * 4
        ).wait()

    unit.run(main)
    nvlink = unit.traffic["world", "all_to_all", Link.NVLINK]
    assert (nvlink.payload_rows, nvlink.payload_bytes) == ({12: 7}, 84)
    assert nvlink.padding_bytes == 20
    assert nvlink.routing_bytes == 7 * 8 + 4 * 8
    assert nvlink.num_bytes == 8 * 20 + 4 * 8


def test_every_collective_is_counted_under_its_group_and_name() -> None:
    unit = VirtualUnit(GROUPS)

    def main(group: VirtualCollectives) -> None:
        tp = group.subgroup(GROUPS.tp_group(group.rank), "tp")
        tp.all_gather(torch.empty(3, 4), torch.empty(1 + tp.rank, 4), [1, 2]).wait()
        tp.reduce_scatter(torch.empty(1 + tp.rank, 4), torch.zeros(3, 4), [1, 2]).wait()
        group.broadcast(torch.zeros(5, dtype=torch.int64), 3).wait()
        group.barrier()

    unit.run(main)
    # Two TP groups, each inside a node: 16 bytes one way, 32 the other.
    assert _traffic(unit, "tp", "all_gather") == {Link.SAME_GPU: (4, 96), Link.NVLINK: (4, 96)}
    assert _traffic(unit, "tp", "reduce_scatter") == {Link.SAME_GPU: (4, 96), Link.NVLINK: (4, 96)}
    assert _traffic(unit, "world", "broadcast") == {Link.SAME_GPU: (1, 40), Link.NVLINK: (1, 40), Link.IB: (2, 80)}
    assert _traffic(unit, "world", "barrier") == {}


def test_one_rank_runs_at_a_time_and_320_do() -> None:
    unit = VirtualUnit(DECODE)
    running: list[int] = []
    together = 0

    def main(group: VirtualCollectives) -> float:
        nonlocal together
        total = torch.tensor([[float(group.rank)]])
        out = torch.empty(320, 1)
        for _ in range(2):
            running.append(group.rank)
            together += len(running) > 1
            running.remove(group.rank)
            group.all_gather(out, total).wait()
            total = out.sum(0, keepdim=True)
        return float(total)

    threads = threading.active_count()
    assert unit.run(main) == [320.0 * sum(range(320))] * 320
    assert together == 0
    assert threading.active_count() <= threads + 1


@pytest.mark.parametrize("delay_s", [9.0, 11.0])
def test_a_rank_that_is_later_than_the_deadline_is_named(delay_s: float) -> None:
    unit = VirtualUnit(GROUPS, deadline_s=10.0, faults=[Fault(rank=1, call=2, delay_s=delay_s)])

    def main(group: VirtualCollectives) -> None:
        for _ in range(4):
            group.barrier()

    if delay_s < 10.0:
        unit.run(main)
        assert unit.errors == {}
        return
    with pytest.raises(RanksMissing, match="rank 1 did not come"):
        unit.run(main)
    assert {
        rank: error.ranks for rank, error in unit.errors.items() if isinstance(error, RanksMissing)
    } == dict.fromkeys(range(4), (1,))


def test_a_wait_brings_a_rank_to_the_time_of_those_it_waited_for() -> None:
    # 6 s twice are within the deadline of 10 s if everybody waited in between, and 12 s if nobody did.
    faults = [Fault(rank=1, call=call, delay_s=6.0) for call in (0, 1)]

    def everybody(group: VirtualCollectives) -> None:
        group.barrier()
        group.barrier()

    def own_pair(group: VirtualCollectives) -> None:
        group.subgroup(GROUPS.tp_group(group.rank), "tp").barrier()
        group.barrier()

    VirtualUnit(GROUPS, deadline_s=10.0, faults=faults).run(everybody)
    with pytest.raises(RanksMissing) as caught:
        VirtualUnit(GROUPS, deadline_s=10.0, faults=faults).run(own_pair)
    assert caught.value.ranks == (1,)


def test_a_dead_rank_is_named_by_all_and_not_those_who_wait_for_it_elsewhere() -> None:
    unit = VirtualUnit(GROUPS, faults=[Fault(rank=3, call=1)])

    def main(group: VirtualCollectives) -> None:
        tp = group.subgroup(GROUPS.tp_group(group.rank), "tp")
        group.barrier()
        tp.barrier()
        group.barrier()

    with pytest.raises(RanksMissing, match="rank 3 did not come"):
        unit.run(main)
    assert _named(unit) == dict.fromkeys(range(4), (3,))


def test_ranks_that_wait_for_each_other_in_different_groups_are_told_so() -> None:
    unit = VirtualUnit(GROUPS)

    def main(group: VirtualCollectives) -> None:
        one, other = (group.subgroup((0, 1), name) for name in ("one", "other")) if group.rank < 2 else (group, group)
        (one if group.rank == 0 else other).barrier()

    # Ranks 2 and 3 wait in the world group for 0 and 1.
    with pytest.raises(RanksMissing):
        unit.run(main)
    assert _named(unit) == {
        0: (1,),
        1: (0,),
        2: (0, 1),
        3: (0, 1),
    }


def test_an_error_of_a_rank_is_raised_rather_than_what_the_others_make_of_it() -> None:
    def main(group: VirtualCollectives) -> None:
        if group.rank == 2:
            raise ValueError("its own")
        group.barrier()

    with pytest.raises(ValueError, match="its own"):
        VirtualUnit(GROUPS).run(main)


def test_a_rank_that_keeps_its_turn_is_named() -> None:
    release = threading.Event()

    def main(group: VirtualCollectives) -> None:
        if group.rank == 2:
            release.wait(20.0)
        group.barrier()

    try:
        with pytest.raises(RanksMissing, match="rank 2"):
            VirtualUnit(GROUPS, turn_s=0.1).run(main)
    finally:
        release.set()


def test_counts_that_do_not_agree_are_a_bug_and_said_so() -> None:
    def main(group: VirtualCollectives) -> None:
        expected = [1, 1, 1, 2 if group.rank == 0 else 1]
        group.all_to_all([torch.empty(5, 1)], [torch.empty(4, 1)], expected, [1] * 4).wait()

    unit = VirtualUnit(GROUPS)
    with pytest.raises(AssertionError, match=r"\[\[3, 0\]\]"):
        unit.run(main)
    # Rank 3 came last and found out.
    assert {
        rank: error.ranks for rank, error in unit.errors.items() if isinstance(error, RanksMissing)
    } == dict.fromkeys(range(3), (3,))
