"""Steps as CUDA graphs: captured once for a size, replayed for every step of up to that size.

    host: integers -> pinned block -> static input -> replay -> static outputs

A replay costs the host one copy and one launch, where the step's own launches would cost more than a small step takes.
Must not know what a step computes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Two steps may be in flight; the block of the third is free again.
_NUM_BLOCKS = 3


def decode_sizes(most: int) -> list[int]:
    """Numbers of rows: at most a fifth of a replay's rows belong to nobody, or one."""
    sizes = [1, 2]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(2, 1 << max(sizes[-1].bit_length() - 3, 0)))
    return [size for size in sizes if size < most] + [most]


def prefill_sizes(most: int, *, an_octave: int = 8) -> list[int]:
    """Numbers of tokens: multiples of 64, at most `an_octave`, a power of two, between a power of two and the next."""
    sizes = [64]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(64, (1 << sizes[-1].bit_length() - 1) // an_octave))
    return [size for size in sizes if size < most] + [most]


class StepGraphs:
    """`body`: (size, int64 [n]) -> tensors, without waiting for anything. `idle(size)`: the n integers of a step of nobody.

    `beside`: others, whose outputs nobody wants any more when one of these runs, and the other way round; they share their memory.
    """

    def __init__(
        self,
        body: Callable[[int, Tensor], tuple[Tensor, ...]],
        *,
        sizes: Sequence[int],
        idle: Callable[[int], Sequence[int]],
        device: torch.device,
        beside: StepGraphs | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self._body = body
        self._idle = idle
        self._device = device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]] = {}
        self._memory: Any = torch.cuda.graph_pool_handle() if beside is None else beside._memory
        most = len(idle(self.sizes[-1]))
        self._blocks = [torch.empty(most, dtype=torch.int64, pin_memory=True) for _ in range(_NUM_BLOCKS)]
        self._next_block = 0

    def size_for(self, number: int) -> int | None:
        """The smallest that holds `number`; None: too many."""
        index = bisect_left(self.sizes, number)
        return self.sizes[index] if index < len(self.sizes) else None

    def captured_for(self, number: int) -> int | None:
        """The same among those captured; None: this step is launched piece by piece."""
        size = self.size_for(number)
        return size if size in self._graphs else None

    def capture(self, size: int) -> None:
        """The largest first: the others then find enough memory in its pool."""
        inputs = torch.tensor(self._idle(size), dtype=torch.int64, device=self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            # Kernels are compiled and libraries pick their algorithms outside the capture.
            self._body(size, inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The I/O thread of a worker may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            outputs = self._body(size, inputs)
        self._graphs[size] = (graph, inputs, outputs)

    def release(self) -> None:
        """Gives the captured steps back, when the last of them has run."""
        torch.cuda.synchronize(self._device)
        self._graphs.clear()

    def run(self, size: int, values: Sequence[int]) -> tuple[Tensor, ...]:
        """The body's outputs; overwritten by the next run of the same size, in stream order."""
        if size not in self._graphs:
            self.capture(size)
        graph, inputs, outputs = self._graphs[size]
        block = self._blocks[self._next_block][: len(values)]
        self._next_block = (self._next_block + 1) % _NUM_BLOCKS
        # A third of the time that torch takes for a tensor of thousands of integers.
        block.numpy()[:] = values
        inputs.copy_(block, non_blocking=True)
        graph.replay()
        return outputs
