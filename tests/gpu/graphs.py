"""A call captured in a CUDA graph and replayed, to be compared with the same call made directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def replayed(call: Callable[[], T]) -> T:
    """What `call` returns, as a graph's replay left it. Compiles before it captures."""
    stream = torch.cuda.Stream()
    # What `call` reads may still be on its way.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    torch.cuda.synchronize()
    return result
