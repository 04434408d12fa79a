"""The schedule of a step's micro-batches: while one has something in flight, the other computes.

A micro-batch's way through the model is a generator, a *pass*. It gives way where it has sent something, and where its
attention is half done; when its turn comes again, what it waits for is waited for first. D, M, C: dispatch, experts, combine.

    prefill     A0 D> A1 D> M0 C> M1 C> A0 D> ...      attention and experts of one hide dispatch and combine of the other
    decode   a0 b0 D> a1    M0 C> b1 D> a0  M1 C> b0 ...  the halves a, b of one's attention hide dispatch and combine of the other

So in decode the first pass is one turn ahead. Passes of one step give way equally often, whatever their tokens, so the order
of collectives is the same on every rank. On a GPU collectives run on streams of their own, so the same order of launches overlaps
them; kernels then leave some SMs to them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from serving.kernels.triton.device import keep_free
from serving.model.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a pass waits for: it goes on with what `wait` returns, in its next turn or, where it does not give way, at once."""

    name: str
    wait: Callable[[], Any]
    gives_way: bool = True


Pass = Generator[Sent | None, Any, Tensor]
"""None: it gives way with nothing in flight."""


def run(passes: Sequence[Pass], *, ahead: int = 0, free_sms: int = 0, timeline: Timeline | None = None) -> list[Tensor]:
    """What the passes return, in their order. `ahead`: turns by which the first leads the others. `free_sms`: of a GPU, left to what one
    has in flight while the other computes."""
    running = [_Running(index, steps, timeline) for index, steps in enumerate(passes)]
    several = len(running) > 1
    with keep_free(free_sms if several else 0):
        for _ in range(ahead if several else 0):
            running[0].turn()
        while any(one.result is None for one in running):
            for one in running:
                one.turn()
    return [one.result for one in running if one.result is not None]


class _Running:
    """A pass between its turns."""

    def __init__(self, index: int, steps: Pass, timeline: Timeline | None) -> None:
        self.result: Tensor | None = None
        self._index = index
        self._steps = steps
        self._timeline = timeline
        self._in_flight: Sent | None = None

    def turn(self) -> None:
        """On to where it next gives way, or to its end; nothing where it has ended."""
        if self.result is not None:
            return
        self._go_on()
        while self._in_flight is not None and not self._in_flight.gives_way:
            self._go_on()

    def _go_on(self) -> None:
        if self._timeline is not None:
            self._timeline.waits(self._index)
        arrived = None if self._in_flight is None else self._in_flight.wait()
        if self._timeline is not None:
            self._timeline.computes(self._index)
        try:
            self._in_flight = self._steps.send(arrived)
        except StopIteration as end:
            self.result, self._in_flight = end.value, None
        if self._timeline is not None:
            self._timeline.stops(self._index, None if self._in_flight is None else self._in_flight.name)
