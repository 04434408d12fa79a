"""Work of a step that goes beside the rest of it, on a second stream: what waits for memory fills what waits for launches.

    Aside(...)   the second stream may begin once all that was asked of this one so far is done
    start        it is asked to; what was asked of this stream meanwhile has its place on the device first
    join         this stream waits for it and takes the result

All that the second stream reads must be kept until the join. Memory that it gives back is not taken by the next work aside
before this stream is done with it, because that work begins after this stream's. Inside a captured graph all of it becomes edges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


class Aside:
    """A tensor that `compute` makes on the second stream of `device`."""

    def __init__(self, device: torch.device, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._device = device
        self._stream = _second_stream(device)
        self._may_begin = torch.cuda.current_stream(device).record_event()
        self._result: Tensor | None = None

    def start(self) -> None:
        self._stream.wait_event(self._may_begin)
        with torch.cuda.stream(self._stream):
            self._result = self._compute()

    def join(self) -> Tensor:
        assert self._result is not None, "nobody started it"
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return self._result


@lru_cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
