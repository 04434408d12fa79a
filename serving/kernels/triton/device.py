"""What a launch has to know of the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

_kept_free: ContextVar[int] = ContextVar("kept_free", default=0)


@contextmanager
def keep_free(num_sms: int) -> Iterator[None]:
    """What is launched, or captured, inside leaves so many SMs to communication that runs beside it.

    A kernel whose programs stay until all its work is done would otherwise hold every SM: what comes from another stream waits for its
    end, and holds up as many programs of the next. Only how many programs share the work changes, never a sum.
    """
    before = _kept_free.set(num_sms)
    try:
        yield
    finally:
        _kept_free.reset(before)


def num_programs(device: torch.device) -> int:
    """Programs of a kernel that stay until all its work is done: one for each SM that is not kept free."""
    return max(1, num_processors(device) - _kept_free.get())


@lru_cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; one elsewhere, where the interpreter runs the programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel that is set up while the one before it ends, and waits for it before it reads (Hopper's
    programmatic dependent launch): about 1 us less between two kernels of a decode step."""
    return {"PDL": True, "launch_pdl": True} if device.type == "cuda" else {}
