"""Attention of MLA: over expanded heads for prefill, over cached latents for decode.

Both return the output and the log-sum-exp of the scores, so that parts of one context can be attended apart and merged.
Rows that a sequence does not own are never read, whatever an unused page-table entry holds: a free page may be NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.rows import PAGE_TOKENS, layer_rows, slots, unpack_fp8_rows

if TYPE_CHECKING:
    from serving.kernels.libraries import FlashMla
    from serving.kernels.triton.mla_decode import Cut

# Latents gathered for one group of a decode batch; bounds the copy, not the context.
_GATHER_BYTES = 128 << 20


def attend(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of T queries over S keys of one sequence: out [T, H, V], lse [T, H] (natural log, scale included).

    `causal` needs T == S: query t sees keys [0, t]. No [T, S] matrix is ever whole in memory.
    """
    assert not causal or q_THQ.shape[0] == k_SHQ.shape[0], "the causal part is the chunk itself"
    if q_THQ.device.type != "cpu":
        return attend_reference(q_THQ, k_SHQ, v_SHV, scale=scale, causal=causal)
    width, v_width = max(q_THQ.shape[-1], v_SHV.shape[-1]), v_SHV.shape[-1]
    # The fused CPU kernel wants one width for q, k and v: zeros change neither scores nor the kept part of the output.
    padded = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q_THQ, k_SHQ, v_SHV))
    q, k, v = (x.transpose(0, 1)[None] for x in padded)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out[0].transpose(0, 1)[..., :v_width], lse[0].transpose(0, 1)


def attend_reference(
    q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, *, scale: float, causal: bool, piece: int = 256
) -> tuple[Tensor, Tensor]:
    """`attend` in plain products, `piece` queries at a time."""
    outs, lses = [], []
    for start in range(0, q_THQ.shape[0], piece):
        q = q_THQ[start : start + piece]
        scores_HTS = torch.einsum("thq,shq->hts", q, k_SHQ) * scale
        if causal:
            seen = torch.ones(scores_HTS.shape[1:], dtype=torch.bool, device=q.device).tril(start)
            scores_HTS = scores_HTS.masked_fill(~seen, float("-inf"))
        outs.append(torch.einsum("hts,shv->thv", scores_HTS.softmax(dim=-1), v_SHV))
        lses.append(scores_HTS.logsumexp(dim=-1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeGroup:
    """Sequences of similar length, attended together.

    `members`: int64 [G], sequences of the batch, None for all of it in order. `slots_GS`: int64, the slot of each
    position; positions a sequence has not reached repeat its current slot. `bias_GTS`, of its T tokens: 0 where
    attended, -inf elsewhere, None where every position counts.
    """

    members: Tensor | None
    slots_GS: Tensor
    bias_GTS: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class PagedPlan:
    """What every layer of a decode step reads on a GPU: sizes depend on the batch's alone, values are made by the device.

    `page_table_BP`, `context_lens_B`: int32. Positions `[first, context_len)` are attended. `cut`: which pages each of
    the device's processors attends, or which of `num_groups` where each is to attend them for several blocks of heads.
    """

    page_table_BP: Tensor
    context_lens_B: Tensor
    first: int
    cut: Cut
    num_groups: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class FlashMlaPlan:
    """The same where FlashMLA attends, all positions `[0, context_len)`; `schedule` is the step's."""

    page_table_BP: Tensor
    context_lens_B: Tensor
    library: FlashMla
    schedule: Any


Plan = tuple[DecodeGroup, ...] | PagedPlan | FlashMlaPlan


def plan_decode(
    kv_pool: Tensor,
    row_ids_B: Tensor,
    page_table_BP: Tensor,
    context_lens_B: Tensor,
    *,
    first: int = 0,
    num_tokens: int = 1,
    num_blocks: int | None = None,
    flash_mla: FlashMla | None = None,
) -> Plan:
    """What every layer of a decode step reads; made once a step. Positions `[first, context_len)` are attended.

    `num_tokens`: the T last tokens of each sequence are queries. On a GPU nothing is read back, so a plan may be made
    inside a captured graph, and every row is found through the page table. On CPU every length is above
    `first + T - 1`, lengths are read to cut the batch (a group's shortest is at least half its longest, its copy
    bounded), and a sequence's last row is `row_ids_B`. `num_blocks`: what `num_column_blocks` says of the queries, if known: the
    pages are then cut for as many passes over them. `flash_mla` attends in place of our kernel, from position 0 and
    lengths from T on.
    """
    if flash_mla is not None:
        assert first == 0, "FlashMLA attends from the first row"
        return FlashMlaPlan(
            page_table_BP=page_table_BP.to(torch.int32),
            context_lens_B=context_lens_B.to(torch.int32),
            library=flash_mla,
            schedule=flash_mla.new_schedule(),
        )
    if kv_pool.device.type == "cuda":
        from serving.kernels.triton.mla_decode import cut_pages

        lens_B = context_lens_B.to(torch.int32)
        num_processors = torch.cuda.get_device_properties(kv_pool.device).multi_processor_count
        num_groups = max(num_processors // num_blocks, 1) if num_blocks else None
        return PagedPlan(
            page_table_BP=page_table_BP.to(torch.int32),
            context_lens_B=lens_B,
            first=first,
            cut=cut_pages(lens_B, num_groups or num_processors),
            num_groups=num_groups,
        )
    return _plan_groups(kv_pool, row_ids_B, page_table_BP, context_lens_B, first, num_tokens)


def num_column_blocks(kv_pool: Tensor, num_columns: int, *, latent: int, rope: int) -> int | None:
    """In how many passes over its pages a GPU attends for `num_columns` queries of a sequence, heads times tokens; None on CPU."""
    if kv_pool.device.type != "cuda":
        return None
    from serving.kernels.triton.mla_decode import config_for

    return -(-num_columns // config_for(num_columns, kv_pool.dtype, latent, rope).columns)


def _plan_groups(
    kv_pool: Tensor,
    row_ids_B: Tensor,
    page_table_BP: Tensor,
    context_lens_B: Tensor,
    first: int,
    num_tokens: int,
) -> tuple[DecodeGroup, ...]:
    lens = context_lens_B.tolist()
    order = sorted(range(len(lens)), key=lens.__getitem__, reverse=True)
    row_bytes = kv_pool.shape[3] * kv_pool.element_size()
    cuts: list[list[int]] = []
    for index in order:
        longest = lens[cuts[-1][0]] if cuts else 0
        fits = cuts and 2 * lens[index] >= longest and (len(cuts[-1]) + 1) * longest * row_bytes <= _GATHER_BYTES
        if fits:
            cuts[-1].append(index)
        else:
            cuts.append([index])
    if len(cuts) == 1:
        return (_plan_group(kv_pool, row_ids_B, page_table_BP, context_lens_B, None, first, num_tokens, lens),)
    groups = []
    for cut in cuts:
        members = torch.tensor(sorted(cut), device=row_ids_B.device)
        parts = row_ids_B[members], page_table_BP[members], context_lens_B[members]
        groups.append(_plan_group(kv_pool, *parts, members, first, num_tokens, [lens[index] for index in sorted(cut)]))
    return tuple(groups)


def _plan_group(
    kv_pool: Tensor,
    row_ids_G: Tensor,
    page_table_GP: Tensor,
    context_lens_G: Tensor,
    members: Tensor | None,
    first: int,
    num_tokens: int,
    lens: list[int],
) -> DecodeGroup:
    longest = max(lens)
    num_pages = -(-longest // PAGE_TOKENS)
    positions_S = torch.arange(first, longest, device=row_ids_G.device)
    pages_GP = page_table_GP[:, :num_pages].to(torch.int64)
    rows_GS = pages_GP.repeat_interleave(PAGE_TOKENS, dim=1)[:, first:longest] * PAGE_TOKENS + positions_S % PAGE_TOKENS
    rows_GS = torch.where(positions_S < context_lens_G[:, None] - 1, rows_GS, row_ids_G[:, None])
    bias = None
    if num_tokens > 1 or min(lens) < longest:
        before_T = torch.arange(num_tokens - 1, -1, -1, device=row_ids_G.device)
        unseen_GTS = positions_S >= (context_lens_G[:, None] - before_T)[:, :, None]
        bias = torch.zeros(unseen_GTS.shape, dtype=kv_pool.dtype).masked_fill_(unseen_GTS, float("-inf"))
    return DecodeGroup(members=members, slots_GS=slots(kv_pool, rows_GS), bias_GTS=bias)


def decode_latent(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    plan: Plan,
    *,
    latent: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention over cached rows of `layer`: out `[..., C]` in q's dtype, lse (natural log).

    `q` `[B, H, W]` is [W_uk^T q_nope ; q_rope], as wide as a row; the first C = `latent` values of a row are also its
    value; out `[B, H, C]`, lse `[B, H]`. `q` may hold the T <= 4 last tokens of each sequence, `[B, T, H, W]`: token t
    sees the first context_len - (T - 1) + t rows; out `[B, T, H, C]`, lse `[B, T, H]`. On a GPU lse is fp32 and the
    pool may hold FP8 rows, which FlashMLA does not read.
    """
    if isinstance(plan, FlashMlaPlan):
        out, lse = plan.library.decode(
            q if q.dim() == 4 else q[:, None], kv_pool[:, layer], plan.page_table_BP, plan.context_lens_B, plan.schedule,
            latent=latent, scale=scale,
        )  # fmt: skip
        return (out, lse) if q.dim() == 4 else (out[:, 0], lse[:, 0])
    if isinstance(plan, PagedPlan):
        from serving.kernels.triton.mla_decode import decode_paged

        q_BTHW = q if q.dim() == 4 else q[:, None]
        out, lse = decode_paged(
            q_BTHW.contiguous(), kv_pool[:, layer], plan.page_table_BP, plan.context_lens_B, plan.cut,
            first=plan.first, latent=latent, scale=scale, num_groups=plan.num_groups,
        )  # fmt: skip
        return out.view(*q.shape[:-1], latent), lse.view(q.shape[:-1])
    rows_NW = layer_rows(kv_pool, layer)
    if len(plan) == 1 and plan[0].members is None:
        return _decode_group(q, rows_NW, plan[0], latent, scale)
    out = q.new_empty(*q.shape[:-1], latent)
    lse = q.new_empty(q.shape[:-1])
    for group in plan:
        assert group.members is not None
        parts = _decode_group(q[group.members], rows_NW, group, latent, scale)
        out[group.members], lse[group.members] = parts
    return out, lse


def decode_latent_reference(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    page_table_BP: Tensor,
    context_lens_B: Tensor,
    *,
    first: int = 0,
    latent: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`decode_latent` by plain products in fp32, one sequence at a time; from what a plan is made of, so that it shares no plan's mistake."""
    q_BTHW = q if q.dim() == 4 else q[:, None]
    num_tokens = q_BTHW.shape[1]
    outs, lses = [], []
    for q_THW, pages, length in zip(q_BTHW.float(), page_table_BP.tolist(), context_lens_B.tolist(), strict=True):
        rows_SW = kv_pool[pages[: -(-length // PAGE_TOKENS)], layer].flatten(0, 1)[first:length]
        rows_SW = unpack_fp8_rows(rows_SW, latent) if rows_SW.dtype == torch.uint8 else rows_SW.float()
        scores_THS = torch.einsum("thw,sw->ths", q_THW, rows_SW) * scale
        ends_T = torch.arange(length - num_tokens + 1, length + 1, device=q_THW.device)
        seen_TS = torch.arange(first, length, device=q_THW.device) < ends_T[:, None]
        scores_THS = scores_THS.masked_fill(~seen_TS[:, None], float("-inf"))
        outs.append(torch.einsum("ths,sc->thc", scores_THS.softmax(dim=-1).nan_to_num(), rows_SW[:, :latent]))
        lses.append(scores_THS.logsumexp(dim=-1))
    return torch.stack(outs).to(q.dtype).view(*q.shape[:-1], latent), torch.stack(lses).view(q.shape[:-1])


def _decode_group(q: Tensor, rows_NW: Tensor, group: DecodeGroup, latent: int, scale: float) -> tuple[Tensor, Tensor]:
    """`q` [G, H, W] or [G, T, H, W]; X is H or all heads of the T tokens."""
    size, longest = group.slots_GS.shape
    q_GXW = q.reshape(size, -1, q.shape[-1])
    keys_GSW = rows_NW.index_select(0, group.slots_GS.view(-1)).view(size, longest, -1).to(q.dtype)
    scores_GXS = torch.bmm(q_GXW, keys_GSW.transpose(1, 2)).mul_(scale)
    if group.bias_GTS is not None:
        scores_GXS.view(size, group.bias_GTS.shape[1], -1, longest).add_(group.bias_GTS[:, :, None])
    shares_GXS = scores_GXS.softmax(dim=-1)
    # The largest share is exp(largest score - lse): cheaper on CPU than a second pass of exponentials.
    lse_GX = scores_GXS.amax(dim=-1) - shares_GXS.amax(dim=-1).log()
    out_GXC = torch.bmm(shares_GXS, keys_GSW[:, :, :latent])
    return out_GXC.view(*q.shape[:-1], latent), lse_GX.view(q.shape[:-1])
