"""Small tensors between host and device without waiting: up from pinned memory, down into pinned memory. On a CPU there is nothing to move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def ids(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 on `device`."""
    # NumPy reads lists four times as fast.
    return to_device(torch.from_numpy(np.array(values, dtype=np.int64)), device)


def reals(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return to_device(torch.tensor(values, dtype=dtype), device)


def to_host(tensor: Tensor) -> Tensor:
    """A copy that is complete once the stream has come so far; on a CPU the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor, there once the stream has come so far; on a CPU the tensor itself."""
    if device.type == "cpu" or not tensor.numel():
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy(pinned, tensor)
    # torch keeps the pinned block until the copy has run, so nobody has to hold it here.
    return pinned.to(device, non_blocking=True)


def copy(into: Tensor, tensor: Tensor) -> None:
    """Of host tensors of one shape and dtype, `into` contiguous, by this thread. torch has several share what is longer than 32,768 numbers,
    and to wake them takes milliseconds where one is done in a tenth of one."""
    _bytes(into)[:] = _bytes(tensor)


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()
