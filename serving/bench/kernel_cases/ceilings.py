"""What this machine does at best, as cases."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from serving.bench.kernel_cases.stage import Case, Stage, Work


def ceilings(stage: Stage) -> dict[str, Case]:
    """What this machine does at best, as cases: a copy of 4 GB, and the library's matrix products."""
    return {
        "ceiling/copy": partial(device_copy, stage, 4 << 30),
        "ceiling/bf16": partial(_matmul_bf16, stage, 8192),
        "ceiling/fp8": partial(_matmul_fp8, stage, 8192),
    }


def device_copy(stage: Stage, num_bytes: int) -> Work:
    source = stage.randint(256, num_bytes // 8)
    target = torch.empty_like(source)

    def own(i: int) -> None:
        target.copy_(source)

    # In a graph a copy runs at two thirds of its rate (H200, CUDA 13.0).
    return Work(own=own, num_sets=1, amount=2.0 * num_bytes, bound="copy", captured=False)


def _matmul_bf16(stage: Stage, size: int) -> Work:
    x = [stage.randn(size, size) for _ in range(3)]
    return Work(own=lambda i: x[i] @ x[i - 1].t(), num_sets=3, amount=2.0 * size**3, bound="bf16")


def _matmul_fp8(stage: Stage, size: int) -> Work:
    x = [stage.randn(size, size).to(torch.float8_e4m3fn) for _ in range(3)]
    one = torch.ones((), device=stage.device)

    def own(i: int) -> Tensor:
        return torch._scaled_mm(x[i], x[i - 1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return Work(own=own, num_sets=3, amount=2.0 * size**3, bound="fp8")
