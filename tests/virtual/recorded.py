"""A rank's dispatch that remembers what it was asked for."""

from __future__ import annotations

from torch import Tensor

from serving.parallel.dispatch import Dispatch, Returning, Sending
from serving.parallel.placement import Ints


class Recorded:
    """A dispatch that notes the slots that it was asked for."""

    def __init__(self, dispatch: Dispatch, slots: list[Ints]) -> None:
        self._dispatch, self._slots = dispatch, slots

    def send(self, x: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Sending[Tensor]:
        self._slots.append(slots_TK.numpy().copy())
        return self._dispatch.send(x, slots_TK, weights_TK)

    def give_back(self, sending: Sending[Tensor], y_RD: Tensor, added_TD: Tensor | None = None) -> Returning:
        return self._dispatch.give_back(sending, y_RD, added_TD)
