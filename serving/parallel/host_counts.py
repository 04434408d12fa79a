"""A few numbers of a collective on the host, as soon as they have come and not when what was queued behind them has ended.

On a GPU they go over a stream of their own into pinned memory, and the host waits for that alone: products queued after the
collective was issued keep the device busy meanwhile, and until rows that the numbers speak of are queued too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.parallel.collectives import Handle


class HostCounts:
    """A collective's numbers on their way; a handle to wait for. `numbers`: of each tensor [W, C], to be read after the wait."""

    def __init__(self, handle: Handle, tensors: Sequence[Tensor], stream: torch.cuda.Stream | None) -> None:
        """`stream`: of CUDA tensors, one on which no products are queued; both are kept until the wait."""
        self._handle = handle
        self._tensors = list(tensors)
        self._came: torch.cuda.Event | None = None
        if stream is None:
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            handle.wait()
            self._pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in self._tensors]
            for pinned, tensor in zip(self._pinned, self._tensors, strict=True):
                pinned.copy_(tensor, non_blocking=True)
            self._came = stream.record_event()

    def wait(self) -> None:
        """Returns when the numbers are here, and on a GPU the tensors may be read by any stream. Raises RanksMissing."""
        if self._came is None:
            self._handle.wait()
            return
        self._came.synchronize()
        self._tensors = self._pinned

    @property
    def numbers(self) -> list[list[list[int]]]:
        """Of each tensor its columns: few lists, where a unit's ranks are many rows."""
        return [tensor.t().tolist() for tensor in self._tensors]


def stream_beside(device: torch.device) -> torch.cuda.Stream | None:
    """For `HostCounts`, and rows that leave while products are queued; before all that is queued elsewhere. None: nothing waits there."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
