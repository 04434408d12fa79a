"""Gives memory back to the system while weights are loaded and packed, and steps compiled.

Every weight exists twice for a moment, plain and packed. glibc keeps freed blocks of that size for itself, and the packed
copies do not fit the holes, so without this a loaded model holds a quarter more than its weights.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_WHILE_LOADING_BYTES = 64 << 10
# Where glibc's own adjustment ends: activations of later steps come from the heap, not from fresh pages.
_AFTERWARDS_BYTES = 32 << 20
# A threshold set by hand ends glibc's adjustment of when free memory at the top of the heap is given back, too: at its 128 KiB a worker's
# thread faulted the same pages in again at every step (85,000 faults a second, a quarter of the decode rate).
_KEPT_BYTES = 512 << 20


def products_use_the_heap() -> None:
    """MKL's own pool never shrinks; without it a product's buffers come from the heap, as fast. Before the first product."""
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")


@contextmanager
def blocks_returned() -> Iterator[None]:
    """Inside, each larger block is a mapping of its own, returned when freed. No effect but on Linux with glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _WHILE_LOADING_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _AFTERWARDS_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
