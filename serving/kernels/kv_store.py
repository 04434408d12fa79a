"""Writes latent rows into the KV pool. Which row is whose is the page manager's business."""

from __future__ import annotations

from torch import Tensor

from serving.kernels.rows import layer_rows


def store_rows(kv_pool: Tensor, layer: int, slots_T: Tensor, rows_TW: Tensor) -> None:
    """Write `rows_TW` (any float dtype) to the slots of one layer, in place. Equal slots (scratch): any one of them wins."""
    layer_rows(kv_pool, layer).index_copy_(0, slots_T, rows_TW.to(kv_pool.dtype))
