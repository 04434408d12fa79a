"""What a case of `baton bench kernels` is made of.

A case is a function of the stage and of sizes that returns a `Work`. Inputs differ from set to set, weights too: in a model
the next call reads other memory.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kvcache.layout import PageLayout
from kvcache.pool import KVPool
from serving.kernels.quant import BLOCK, Fp8Weight, QuantisedRows, quantise_block_fp8, quantise_rows_fp8
from serving.kernels.rows import fp8_row_bytes, pack_fp8_rows

Bound = Literal["copy", "bf16", "fp8"]
Call = Callable[[int], Any]
"""Runs with the inputs of one set; returns what `Work.read` reads, None where peers compute something else."""

# Of DeepSeek-V3: widths, layers with the MTP layer's.
LATENT, ROPE, NOPE, VALUE, HIDDEN = 512, 64, 128, 128, 7168
PLANES = 62
EPS = 1e-6
SOFTMAX_SCALE = (NOPE + ROPE) ** -0.5

# All sets together, against an L2 of 50 MB.
_FRESH_BYTES = 256 << 20
_POOL_BYTES = 64_000_000_000


def plain(output: Tensor | QuantisedRows | None) -> Tensor | None:
    """Quantised rows in fp32, all else as it is."""
    return output.dequantise(torch.float32) if isinstance(output, QuantisedRows) else output


@dataclass(frozen=True, kw_only=True)
class Work:
    """A case, prepared. `amount`: what one call moves (bytes, `bound` copy) or computes (flops) at the least. `captured`: as a
    CUDA graph, so that no launch is counted which the engine does not pay. `read`: of what a call returned the numbers that peers
    must agree on; not timed."""

    own: Call
    num_sets: int
    amount: float
    bound: Bound
    peers: Mapping[str, Call] = field(default_factory=dict)
    captured: bool = True
    read: Callable[[Any], Tensor | None] = plain


Case = Callable[[], Work]


class Stage:
    """The device, a generator on it, and one KV pool at a time of `pool_bytes`: two would not fit."""

    def __init__(self, device: torch.device, *, pool_bytes: int = _POOL_BYTES, planes: int = PLANES) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._pool_bytes = pool_bytes
        self._planes = planes
        self._pool: KVPool | None = None

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def permutation(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self._generator, device=self.device)

    def rows(self, num_rows: int, width: int) -> QuantisedRows:
        return quantise_rows_fp8(self.randn(num_rows, width))

    def weight(self, *shape: int) -> Fp8Weight:
        """[N, K] or [E, N, K], values as a model's, of standard deviation K^-0.5."""
        pairs = []
        for _ in range(math.prod(shape[:-2])):
            drawn = self.randn(*shape[-2:], dtype=torch.float32)
            pairs.append(quantise_block_fp8(drawn.mul_(shape[-1] ** -0.5), (BLOCK, BLOCK)))
        quantised, scales = (
            torch.stack(parts).view(*shape[:-2], *parts[0].shape) for parts in zip(*pairs, strict=True)
        )
        return Fp8Weight(quantised=quantised, scales=scales)

    def pool(self, *, fp8: bool) -> KVPool:
        """Every row of the layers of `layer` holds random values; the last pool is dropped if it was of the other kind."""
        dtype = torch.uint8 if fp8 else torch.bfloat16
        if self._pool is None or self._pool.tensor.dtype != dtype:
            self._pool = None
            self._pool = self._new_pool(fp8_row_bytes(LATENT, ROPE) if fp8 else LATENT + ROPE, dtype)
        return self._pool

    def layer(self, index: int) -> int:
        """The layer that set `index` uses: four of them, far apart."""
        return index % 4 * self._planes // 4

    def _new_pool(self, row_width: int, dtype: torch.dtype) -> KVPool:
        layout = PageLayout(
            num_layers=self._planes, num_mtp_layers=0, row_width=row_width, element_bytes=dtype.itemsize
        )
        pool = KVPool(layout, -(-self._pool_bytes // layout.page_bytes), dtype, self.device)
        for index in range(4):
            for pages in pool.tensor[:, self.layer(index)].split(2048):
                drawn = self.randn(*pages.shape[:2], LATENT + ROPE)
                pages.copy_(
                    drawn if dtype != torch.uint8 else pack_fp8_rows(drawn.flatten(0, 1), LATENT).view(pages.shape)
                )
        return pool


def sets_for(num_bytes: int) -> int:
    return min(max(2, -(-_FRESH_BYTES // num_bytes)), 32)


def product_work(
    own: Call, peers: dict[str, Call], num_sets: int, flops: float, weight_bytes: float | None, rate: Any
) -> Work:
    """Bound by the bytes of weights where those are given, else by the matrix units."""
    if weight_bytes is not None:
        return Work(own=own, peers=peers, num_sets=num_sets, amount=weight_bytes, bound="copy")
    return Work(own=own, peers=peers, num_sets=num_sets, amount=flops, bound=rate)


def peer_library(module: str) -> Any:
    """The library, None where it is not installed. What else its import raises, every use of it raises: that peer's own error."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    except Exception as error:
        return _Broken(error)


def vllm_ops(namespace: str) -> Any:
    """`torch.ops._C` or `torch.ops._moe_C` with vLLM's compiled operations, as `peer_library`."""
    library = peer_library(f"vllm.{namespace}_stable_libtorch")
    return library if library is None or isinstance(library, _Broken) else getattr(torch.ops, namespace)


class _Broken:
    """In the place of a library whose import raised."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error
