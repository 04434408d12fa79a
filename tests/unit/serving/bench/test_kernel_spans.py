"""What was in flight while something was computed, from the spans of kernels."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from serving.bench.kernel_spans import (
    Interval,
    KernelSpan,
    Overlap,
    common,
    kernel_spans,
    length,
    overlaps,
    saved_share,
    together,
    trace_events,
    union,
)


def span(name: str, begin_us: float, end_us: float) -> KernelSpan:
    return KernelSpan(name=name, begin_us=begin_us, end_us=end_us)


def test_communication_is_hidden_where_another_kernel_runs() -> None:
    sent = [span("ncclDevKernel_SendRecv(x)", 10, 30), span("ncclDevKernel_SendRecv(x)", 25, 40)]
    computed = [span("product_kernel", 0, 15), span("attend_kernel", 12, 20), span("combine_kernel", 35, 60)]
    [found] = overlaps([[*sent, *computed]])
    # In flight from 10 to 40, computed until 20 and from 35 on.
    assert [found.in_flight_s, found.exposed_s] == pytest.approx([30e-6, 15e-6])
    assert found.hidden == pytest.approx(0.5)
    # What nobody computes beside is exposed, and nothing sent is nothing hidden.
    [exposed] = overlaps([sent])
    assert exposed.hidden == 0.0
    [nothing] = overlaps([computed])
    assert nothing == Overlap(in_flight_s=0.0, exposed_s=0.0, moving_s=0.0, moving_exposed_s=0.0)
    assert nothing.hidden == nothing.hidden_moving == 0.0
    assert together([found, exposed]).hidden == pytest.approx(15 / 60)


def test_rows_move_when_the_last_rank_has_come() -> None:
    name = "ncclDevKernel_SendRecv(x)"
    # Of the first collective rank 0 waits 20 us for rank 1 with nothing to compute, of the second rank 1 waits 5, computing. Clocks differ.
    early = [span("product_kernel", 0, 10), span(name, 10, 40), span("product_kernel", 35, 60), span(name, 50, 55)]
    late = [span("product_kernel", 990, 1020), span(name, 1010, 1020), span(name, 1030, 1040)]
    one, other = overlaps([early, late])
    assert [one.in_flight_s, one.exposed_s] == pytest.approx([35e-6, 25e-6])
    assert [one.moving_s, one.moving_exposed_s] == pytest.approx([15e-6, 5e-6])
    assert [other.in_flight_s, other.exposed_s] == pytest.approx([20e-6, 10e-6])
    assert [other.moving_s, other.moving_exposed_s] == pytest.approx([15e-6, 5e-6])
    assert [one.hidden_moving, other.hidden_moving] == pytest.approx([2 / 3, 2 / 3])
    assert together([one, other]).hidden == pytest.approx(20 / 55)
    with pytest.raises(ValueError, match="shorter"):
        overlaps([early, late[:2]])


def test_unions_and_what_they_share_are_those_of_points() -> None:
    rng = random.Random(0)

    def drawn() -> tuple[list[Interval], set[int]]:
        begins = [rng.randrange(100) for _ in range(rng.randrange(12))]
        pairs = [(begin, begin + rng.randrange(1, 15)) for begin in begins]
        return [(float(begin), float(end)) for begin, end in pairs], {
            point for begin, end in pairs for point in range(begin, end)
        }

    for _ in range(200):
        (one, in_one), (other, in_other) = drawn(), drawn()
        assert length(union(one)) == len(in_one)
        assert common(union(one), union(other)) == len(in_one & in_other)


def test_what_is_saved_is_held_against_steps_that_copy_instead() -> None:
    # 10 of 60 ms are communication; of two micro-batches, slower by 2, only 3.
    assert saved_share(60.0, 55.0, 50.0, 52.0) == pytest.approx(0.7)
    assert saved_share(60.0, 62.0, 50.0, 52.0) == 0.0
    assert saved_share(50.0, 50.0, 50.0, 50.0) == 0.0


def test_the_profiler_s_kernels_are_a_trace() -> None:
    def event(name: str, device: str, start: float, end: float) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=device), time_range=SimpleNamespace(start=start, end=end)
        )

    events = [event("ncclDevKernel", "CUDA", 130, 150), event("aten::mm", "CPU", 0, 1), event("mm", "CUDA", 100, 140)]
    spans = kernel_spans(SimpleNamespace(events=lambda: events))
    assert [each.name for each in spans] == ["mm", "ncclDevKernel"]
    assert overlaps([spans])[0].hidden == pytest.approx(0.5)
    *threads, mm, nccl = trace_events(spans, 1)
    assert {thread["args"]["name"] for thread in threads} == {"computes", "communicates"}
    assert (mm["ts"], mm["dur"], mm["tid"]) == (0.0, 40.0, 0)
    assert (nccl["ts"], nccl["dur"], nccl["tid"], nccl["pid"]) == (30.0, 20.0, 1, 1)
    assert trace_events([], 0)[2:] == []
