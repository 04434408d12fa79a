"""Drafts of an FP8 model with an MTP layer: captured steps with drafts say of each position what single steps say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.core.config import KernelsTable
from serving.core.request import SamplingParams
from serving.engine.build import Engine, build_engine
from serving.engine.plan import DecodeRow, PrefillChunk, SlotSpec, StepPlan
from serving.kernels.quant import Fp8Weight
from serving.kernels.rows import PAGE_TOKENS
from serving.model.batch import DecodeBatch
from serving.model.deepseek_v3 import DeepseekV3
from tests.fp8_model import WIDE
from tests.model_factory import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

GREEDY = SamplingParams(temperature=0.0)
# Drafts end on both sides of a page's border.
LENGTHS = [5, 61, 62, 63, 130]
NUM_DRAFTS, NUM_STEPS, NUM_PAGES = 2, 4, 4
# A value between two of e4m3 goes to either of them for one rounding of bf16, layer after layer.
ROUNDING = 0.1


def engine_on(folder: Path, device: str) -> Engine:
    make_checkpoint(folder, 3, storage="fp8", **WIDE)
    engine = build_engine(
        folder,
        max_num_seqs=len(LENGTHS),
        num_pages=NUM_PAGES * len(LENGTHS),
        dtype="bfloat16",
        device=device,
        draft_tokens=str(NUM_DRAFTS),
        kernels=KernelsTable(linear_fp8="baton"),
    )
    model = engine.runner.model
    assert isinstance(model, DeepseekV3)
    assert isinstance(model.blocks[0].attention.out, Fp8Weight)
    assert model.mtp is not None
    assert isinstance(model.mtp.block.attention.out, Fp8Weight)
    engine.runner.warm_up(max_batched_tokens=512, decodes=True)
    engine.pool.poison_all()
    return engine


def pages_of(slot: int) -> list[int]:
    return list(range(NUM_PAGES * slot, NUM_PAGES * (slot + 1)))


def prefill(engine: Engine) -> None:
    draw = torch.Generator().manual_seed(1)
    chunks = []
    for slot, length in enumerate(LENGTHS):
        ids = torch.randint(2, engine.model_config.vocab_size, (length,), generator=draw).tolist()
        spec = SlotSpec(sampling=GREEDY, token_ids=ids, num_prompt_tokens=length, page_ids=pages_of(slot))
        engine.runner.open_slot(slot, spec)
        chunks.append(
            PrefillChunk(slot=slot, token_ids=ids, start=0, store_from=0, page_ids=pages_of(slot), sample=True)
        )
    engine.runner.settle(engine.runner.launch(StepPlan(chunks=tuple(chunks))))


def single_steps(model: DeepseekV3, kv_pool: Tensor, tokens_BT: Tensor, positions_B: Tensor) -> Tensor:
    """Logits [B, T, V] of one step a token."""
    table = torch.tensor([pages_of(slot) for slot in range(len(LENGTHS))], device=kv_pool.device)
    logits = []
    for t in range(tokens_BT.shape[1]):
        at = positions_B + t
        page_B = table.gather(1, at[:, None] // PAGE_TOKENS)[:, 0]
        batch = DecodeBatch(
            token_ids_B=tokens_BT[:, t].contiguous(),
            positions_B=at,
            row_ids_B=page_B * PAGE_TOKENS + at % PAGE_TOKENS,
            page_table_BP=table,
            context_lens_B=at + 1,
        )
        logits.append(model.logits(model.decode(batch, kv_pool)).float())
    return torch.stack(logits, dim=1)


def drafted_and_single(engine: Engine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a few steps in a row: logits with drafts, tokens drawn, logits of single steps, and these of drafts of neighbours."""
    runner, model = engine.runner, engine.runner.model
    assert isinstance(model, DeepseekV3)
    assert runner._drafted is not None
    prefill(engine)
    found: list[tuple[Tensor, ...]] = []
    for step in range(NUM_STEPS):
        before, token_B = engine.pool.tensor.clone(), runner._last_token_S[: len(LENGTHS)].clone()
        rows = [DecodeRow(slot=slot, position=None if step else length) for slot, length in enumerate(LENGTHS)]
        with torch.inference_mode():
            drafted = runner._drafted._run(rows, NUM_DRAFTS)
        num_rows = len(LENGTHS)
        drafts_BK, positions_B = drafted.drafts_BK[:num_rows].clone(), drafted.positions_B[:num_rows].clone()
        logits_BTV = drafted.logits_NV.unflatten(0, (-1, NUM_DRAFTS + 1))[:num_rows].float()
        tokens_BT = torch.cat((token_B[:, None], drafts_BK), dim=1)
        others_BT = torch.cat((token_B[:, None], (drafts_BK + 1) % engine.model_config.vocab_size), dim=1)
        found.append(
            (
                logits_BTV,
                drafted.outcome_BX[:num_rows, :-1].clone(),
                single_steps(model, before.clone(), tokens_BT, positions_B),
                single_steps(model, before, others_BT, positions_B),
            )
        )
    logits, drawn, single, others = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, drawn, single, others


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


def test_drafts_change_nothing_but_roundings(tmp_path: Path) -> None:
    logits, drawn, single, others = drafted_and_single(engine_on(tmp_path, "cuda"))
    off = [error(logits[:, t], single[:, t]) for t in range(NUM_DRAFTS + 1)]
    print(f"logits with drafts are {[round(each, 4) for each in off]} off single steps'")
    assert all(each < ROUNDING for each in off)
    # Another draft is seen at its own position and at those behind it.
    assert all(error(logits[:, t], others[:, t]) > 3 * ROUNDING for t in range(1, NUM_DRAFTS + 1))
    # Where the best token leads by more than the roundings, it is the one that is drawn.
    best_two = single.topk(2, dim=-1).values
    sure = best_two[..., 0] - best_two[..., 1] > 2 * (logits - single).abs().amax(-1)
    assert sure.sum() > sure.numel() // 4
    assert torch.equal(drawn[sure], single.argmax(-1)[sure])
    assert not torch.equal(drawn[sure], others.argmax(-1)[sure])
