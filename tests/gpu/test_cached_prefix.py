"""A cached prefix that is expanded in pieces: the logits of one piece, and memory that does not grow with the prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.kernels.rows import PAGE_TOKENS, context_slots
from serving.model import deepseek_v3
from serving.model.batch import PrefillBatch, SeqChunk
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.weights import load_weights
from tests.fp8_model import WIDE
from tests.model_factory import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DENSE = {**WIDE, "num_hidden_layers": 2, "first_k_dense_replace": 2, "num_nextn_predict_layers": 0}
PIECE = 300
# Cached tokens and new ones of each sequence.
CHUNKS = [(1000, 77), (0, 5), (130, 64)]
BOUND_BYTES = 512 << 20
LONG = 16_384


def model_of(folder: Path, dtype: torch.dtype, device: str, **overrides: Any) -> DeepseekV3:
    if not (folder / "config.json").exists():
        make_checkpoint(folder, 5, storage="bf16", **(DENSE | overrides))
    return load_weights(folder, ModelConfig.from_folder(folder), dtype, device)


def cached(model: DeepseekV3, lens: list[tuple[int, int]]) -> tuple[PrefillBatch, Tensor]:
    """Chunks behind prefixes on pages in any order, and the pool that holds these."""
    torch.manual_seed(0)
    device = model.embed.device
    counts = [-(-(before + new) // PAGE_TOKENS) for before, new in lens]
    pages = torch.randperm(sum(counts), device=device).split(counts)
    shape = sum(counts) + 1, model.config.num_kv_layers, PAGE_TOKENS, model.config.latent_width
    pool = torch.randn(shape, device=device).to(model.dtype)
    positions = [torch.arange(before, before + new, device=device) for before, new in lens]
    row_ids = [of[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS for of, at in zip(pages, positions, strict=True)]
    starts = [sum(new for _, new in lens[:i]) for i in range(len(lens) + 1)]
    batch = PrefillBatch(
        token_ids_T=torch.randint(2, model.config.vocab_size, (starts[-1],), device=device),
        positions_T=torch.cat(positions),
        row_ids_T=torch.cat(row_ids),
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
        seqs=tuple(
            SeqChunk(offset=start, num_tokens=new, context_len=before, page_ids=of)
            for (before, new), of, start in zip(lens, pages, starts, strict=False)
        ),
    )
    return batch, pool


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_pieces_give_the_logits_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    model = model_of(tmp_path, dtype, "cuda")
    for block in model.blocks:
        # A mean over a thousand random values is small beside what it is added to.
        assert isinstance(block.attention.out, Tensor)
        block.attention.out.mul_(16)
    batch, pool = cached(model, CHUNKS)
    spans: list[tuple[int, int]] = []
    missing: list[int] = []

    def noted(kv_pool: Tensor, page_ids: Tensor, start: int, end: int) -> Tensor:
        spans.append((start, end))
        # In place of a piece that is left out the first one is seen again.
        shift = start if start in missing else 0
        return context_slots(kv_pool, page_ids, start - shift, end - shift)

    monkeypatch.setattr(deepseek_v3, "context_slots", noted)

    def logits() -> Tensor:
        spans.clear()
        return model.logits(model.prefill(batch, pool.clone()))

    want = logits()
    assert spans == [(0, 1000), (0, 130)] * 2
    bytes_of_a_token = deepseek_v3._EXPANDED_PREFIX_BYTES // model.blocks[0].attention._prefix_piece
    monkeypatch.setattr(deepseek_v3, "_EXPANDED_PREFIX_BYTES", PIECE * bytes_of_a_token)
    got = logits()
    assert len(spans) >= 2 * 4
    assert spans[: len(spans) // 2] == spans[len(spans) // 2 :]
    assert error(got, want) < tolerance
    missing.append(spans[1][0])
    assert missing[0] > 0
    assert error(logits(), want) > 10 * tolerance


def test_a_long_prefix_takes_no_more_memory_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As many heads as published, each as wide: a cached token is 64 KB of keys and values.
    heads = {"num_attention_heads": 128, "num_key_value_heads": 128}
    model = model_of(tmp_path, torch.bfloat16, "cuda", num_hidden_layers=1, first_k_dense_replace=1, **heads)
    batch, pool = cached(model, [(LONG, 64)])

    def peak() -> int:
        for _ in range(2):
            # The first run's has the libraries' memory in it.
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.prefill(batch, pool)
        return torch.cuda.max_memory_allocated() - before

    bounded = peak()
    print(f"{bounded >> 20} MB beside a prefix of {LONG} tokens")
    assert bounded < BOUND_BYTES
    monkeypatch.setattr(deepseek_v3, "_EXPANDED_PREFIX_BYTES", 8 * deepseek_v3._EXPANDED_PREFIX_BYTES)
    assert peak() > 2 * BOUND_BYTES
