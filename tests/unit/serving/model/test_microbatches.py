"""Two micro-batches take turns in one order, and a timeline says what was hidden."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.bench.shapes import SHAPES
from serving.kernels.triton import device
from serving.kernels.triton.device import keep_free, num_programs
from serving.model import timeline
from serving.model.config import ModelConfig
from serving.model.experts import Moe
from serving.model.microbatches import Pass, Sent, run
from serving.model.timeline import Timeline

SMALL = {"hidden_size": 8, "moe_intermediate_size": 8}
ROWS_S, EXPERTS_S, HALF_S = 3.0, 2.0, 2.0


class Clock:
    """Time that passes where something is computed or waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(timeline.time, "perf_counter", lambda: self.now_s)

    def send(self, name: str) -> Sent:
        """Rows that are there ROWS_S from now."""
        there_s = self.now_s + ROWS_S

        def wait() -> str:
            self.now_s = max(self.now_s, there_s)
            return name

        return Sent(name=name, wait=wait)


def layers(clock: Clock, index: int, order: list[str], *, halves: bool, num_layers: int = 2) -> Pass:
    """What the model's passes do, with the time it takes."""

    def compute(what: str, seconds: float) -> None:
        order.append(f"{what}{index}")
        clock.now_s += seconds

    for _ in range(num_layers):
        compute("a", HALF_S)
        if halves:
            yield None
        compute("b", HALF_S)
        assert (yield clock.send("dispatch")) == "dispatch"
        compute("M", EXPERTS_S)
        assert (yield clock.send("combine")) == "combine"
    return torch.tensor(index)


def test_prefill_alternates_and_decode_leads_by_half_an_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), list[str]()
    assert run([layers(clock, index, order, halves=False) for index in (0, 1)]) == [0, 1]
    assert " ".join(order) == "a0 b0 a1 b1 M0 M1 a0 b0 a1 b1 M0 M1"

    order = []
    assert run([layers(clock, index, order, halves=True) for index in (0, 1)], ahead=1) == [0, 1]
    assert " ".join(order) == "a0 b0 a1 M0 b1 a0 M1 b0 a1 M0 b1 M1"

    # One alone keeps its turn.
    order = []
    assert run([layers(clock, 0, order, halves=True)], ahead=1) == [0]
    assert " ".join(order) == "a0 b0 M0 a0 b0 M0"


def test_what_does_not_give_way_is_waited_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), list[str]()

    def stays(index: int) -> Pass:
        order.append(f"a{index}")
        yield replace(clock.send("counts"), gives_way=False)
        order.append(f"b{index}")
        yield clock.send("dispatch")
        order.append(f"M{index}")
        return torch.tensor(index)

    taken = timed(clock, [lambda: stays(0), lambda: stays(1)], 0)
    assert " ".join(order) == "a0 b0 a1 b1 M0 M1"
    assert taken.exposed_s == 2 * ROWS_S + ROWS_S


def test_what_a_pass_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Pass:
        yield Sent(name="dispatch", wait=lambda: 1 / 0)
        return torch.zeros(1)

    with pytest.raises(ZeroDivisionError):
        run([layers(Clock(monkeypatch), 0, [], halves=False), fails()])


def test_two_passes_leave_processors_to_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "num_processors", lambda _device: 132)
    gpu = torch.device("cpu")
    seen: list[int] = []

    def computes() -> Pass:
        seen.append(num_programs(gpu))
        yield None
        return torch.tensor(num_programs(gpu))

    assert [int(result) for result in run([computes(), computes()], free_sms=20)] == [112, 112]
    assert seen == [112, 112]
    # One alone has nobody to hide behind, and none is kept free afterwards.
    assert [int(result) for result in run([computes()], free_sms=20)] == [132]
    assert num_programs(gpu) == 132
    with keep_free(100):
        with keep_free(200):
            assert num_programs(gpu) == 1
        assert num_programs(gpu) == 32
    with pytest.raises(ZeroDivisionError), keep_free(100):
        _ = 1 / 0
    assert num_programs(gpu) == 132


def timed(clock: Clock, passes: list[Callable[[], Pass]], ahead: int) -> Timeline:
    taken = Timeline(rank=3)
    results: list[Tensor] = run([each() for each in passes], ahead=ahead, timeline=taken)
    assert results == list(range(len(passes)))
    return taken


def test_a_timeline_tells_what_was_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    alone = timed(clock, [lambda: layers(clock, 0, [], halves=False)], 0)
    assert (alone.in_flight_s, alone.exposed_s, alone.hidden) == (4 * ROWS_S, 4 * ROWS_S, 0.0)

    # Dispatch hides behind four seconds of attention, or behind two of the other's experts; the last combines behind nothing.
    both = timed(clock, [lambda: layers(clock, 0, [], halves=False), lambda: layers(clock, 1, [], halves=False)], 0)
    assert both.exposed_s < alone.exposed_s
    assert 0.5 < both.hidden < 1.0
    assert both.hidden_beside(alone) == 1.0 - both.exposed_s / alone.exposed_s
    assert alone.hidden_beside(alone) == 0.0

    path = tmp_path / "trace.json"
    both.write(path)
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {3}
    seconds = {
        kind: sum(e["dur"] for e in events if e["cat"] == kind) / 1e6 for kind in ("compute", "in flight", "wait")
    }
    assert seconds["compute"] == pytest.approx(2 * 2 * (2 * HALF_S + EXPERTS_S))
    assert seconds["in flight"] == pytest.approx(both.in_flight_s)
    assert seconds["wait"] == pytest.approx(both.exposed_s)
    names = {(event["name"], event["tid"]) for event in events if event["cat"] == "compute"}
    assert names == {("attention", 0), ("experts", 0), ("attention", 2), ("experts", 2)}
    # The other's computation lies inside what was in flight.
    first = next(e for e in events if e["cat"] == "in flight" and e["tid"] == 1)
    inside = [e for e in events if e["cat"] == "compute" and e["tid"] == 2 and e["ts"] >= first["ts"]]
    assert inside[0]["ts"] + inside[0]["dur"] <= first["ts"] + first["dur"]


class Queueing:
    """A dispatch of one rank that writes down what is called, by micro-batch."""

    def __init__(self, called: list[str], *, queues_rest: bool) -> None:
        self._called, self._queues_rest, self._num_sent = called, queues_rest, 0

    def send(self, _layer: int, x: Tensor, *_: object) -> Any:
        name = "AB"[self._num_sent]
        self._num_sent += 1
        self._called.append(f"send {name}")

        def advance() -> None:
            self._called.append(f"counts {name}")

        def wait() -> Any:
            self._called.append(f"rows {name}")
            return SimpleNamespace(x_RD=x)

        return SimpleNamespace(name=name, num_more=1, queues_rest=self._queues_rest, advance=advance, wait=wait)

    def give_back(self, sending: Any, y_RD: Tensor, added_TD: Tensor) -> Any:
        self._called.append(f"back {sending.name}")
        return SimpleNamespace(num_more=0, wait=lambda: y_RD + added_TD)


@pytest.mark.parametrize("queues_rest", [False, True])
def test_counts_are_read_late_where_the_rest_is_queued_at_once(
    queues_rest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    moe = Moe(ModelConfig.from_dict(SHAPES["slice"] | SMALL), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(moe, "routing", Queueing(called, queues_rest=queues_rest))
    monkeypatch.setattr(moe, "choose", lambda _: ())
    monkeypatch.setattr(moe, "shared", SimpleNamespace(forward=lambda x: 10 * x))
    monkeypatch.setattr(moe, "compute", lambda arrived: 2 * arrived.x_RD)
    results = run([moe.forward(torch.full((1, 1), value)) for value in (1.0, 2.0)])
    assert [float(result) for result in results] == [12.0, 24.0]
    early = ["send A", "counts A", "send B", "counts B", "rows A", "back A", "rows B", "back B"]
    late = ["send A", "send B", "counts A", "rows A", "back A", "counts B", "rows B", "back B"]
    assert called == (late if queues_rest else early)
