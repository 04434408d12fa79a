"""Where a latent row lies in the KV pool, and what is in it.

Pool: `[num_pages + 1, num_layers, 64, row]`, the last page scratch. A row of a bf16, fp32 or fp64 pool is
`[c_t (C) ; k^R_t (R)]` in the pool's dtype, rope pairs interleaved as in the checkpoint.

`row_ids` (page * 64 + offset) name a token's place in a page, in every layer. `slots` are the same places counted in
rows of one layer's view of the pool: pages lie `stride(0)` elements apart, so both are int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAGE_TOKENS = 64


def layer_rows(kv_pool: Tensor, layer: int) -> Tensor:
    """All rows of one layer as a view `[N, row]` that slots index; pages of other layers lie between them."""
    width = kv_pool.shape[3]
    assert kv_pool.stride()[2:] == (width, 1), "rows of a page and layer must be contiguous"
    page_stride = kv_pool.stride(0) // width
    num_rows = (kv_pool.shape[0] - 1) * page_stride + PAGE_TOKENS
    offset = kv_pool.storage_offset() + layer * kv_pool.stride(1)
    return torch.as_strided(kv_pool, (num_rows, width), (width, 1), offset)


def slots(kv_pool: Tensor, row_ids: Tensor) -> Tensor:
    """int64 slots of `row_ids`, same shape, for `layer_rows` of any layer."""
    rows_between_pages = kv_pool.stride(0) // kv_pool.shape[3] - PAGE_TOKENS
    return torch.add(row_ids, row_ids // PAGE_TOKENS, alpha=rows_between_pages)


def context_slots(kv_pool: Tensor, page_ids: Tensor, start: int, end: int) -> Tensor:
    """Slots `[end - start]` of positions `[start, end)` of a sequence; pages it does not need are not looked at."""
    positions = torch.arange(start, end, device=page_ids.device)
    pages = page_ids[: (end - 1) // PAGE_TOKENS + 1].to(torch.int64)
    return slots(kv_pool, pages[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS)


def packed_context_slots(kv_pool: Tensor, page_table_NP: Tensor, starts: Tensor, size: int) -> Tensor:
    """Slots `[size]` of what is cached of N sequences, one after the other: of sequence n positions `[0, starts[n + 1] - starts[n])`.

    `starts`: int32 [M + 1], M >= N, the first 0; those past the Nth have nothing. Slots from the last border on are scratch. The host
    reads nothing back, and the page table is read at pages that a sequence has, and at the last column.
    """
    at = torch.arange(size, dtype=starts.dtype, device=starts.device)
    seq = torch.searchsorted(starts[1:], at, right=True).clamp_(max=page_table_NP.shape[0] - 1)
    positions = (at - starts[seq]).to(torch.int64)
    pages = page_table_NP[seq, (positions // PAGE_TOKENS).clamp_(max=page_table_NP.shape[1] - 1)].to(torch.int64)
    row_ids = pages * PAGE_TOKENS + positions % PAGE_TOKENS
    return slots(kv_pool, row_ids.masked_fill_(at >= starts[-1], (kv_pool.shape[0] - 1) * PAGE_TOKENS))


def fp8_row_bytes(latent: int, rope: int) -> int:
    """Bytes of an FP8 row: C e4m3 latents, an fp32 scale for each 128 of them, R rope values in bf16 (656 as published)."""
    return latent + latent // 128 * 4 + rope * 2


def pack_fp8_rows(rows_TW: Tensor, latent: int) -> Tensor:
    """Rows `[T, C + R]` of any float dtype as FP8 rows, uint8 `[T, fp8_row_bytes]`.

    Scale = the largest magnitude of 128 latents / 448, so that it is e4m3's largest; 1 for all-zero groups.
    """
    assert latent % 128 == 0, "FP8 rows hold latents in groups of 128"
    groups_TG = rows_TW[:, :latent].float().unflatten(1, (-1, 128))
    scales_TG = groups_TG.abs().amax(dim=-1) / torch.finfo(torch.float8_e4m3fn).max
    scales_TG = torch.where(scales_TG > 0, scales_TG, 1.0)
    latents = (groups_TG / scales_TG[..., None]).flatten(1).to(torch.float8_e4m3fn)
    parts = latents, scales_TG, rows_TW[:, latent:].to(torch.bfloat16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack_fp8_rows(rows: Tensor, latent: int) -> Tensor:
    """FP8 rows, uint8 `[..., fp8_row_bytes]`, as fp32 `[..., C + R]`."""
    scales_at, rope_at = latent, latent + latent // 128 * 4
    latents = rows[..., :scales_at].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 128))
    scales = rows[..., scales_at:rope_at].contiguous().view(torch.float32)
    rope = rows[..., rope_at:].contiguous().view(torch.bfloat16).float()
    return torch.cat([(latents * scales[..., None]).flatten(-2), rope], dim=-1)
