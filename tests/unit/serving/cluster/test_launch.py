"""How `baton serve` takes signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from serving.cluster.launch import Stopped, StopSignals


@pytest.fixture
def stop() -> Iterator[StopSignals]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    made = StopSignals()
    made.install()
    yield made
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_the_first_signal_during_the_start_raises_and_the_second_lets_the_cleaning_up_end(stop: StopSignals):
    steps: list[str] = []

    def start() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            steps.append("cleaned up")

    with pytest.raises(Stopped):
        start()
    assert steps == ["cleaned up"]
    assert stop.num_received == 3


def test_once_it_only_counts_a_signal_wakes_whoever_waits(stop: StopSignals):
    woken: list[int] = []
    stop.wake = lambda: woken.append(stop.num_received)
    stop.only_count()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGHUP)
    assert woken == [1, 2]
