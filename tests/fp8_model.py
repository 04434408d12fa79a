"""A small FP8 checkpoint without routing (every expert is chosen, so that rounding cannot send a token elsewhere), and its logits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kvcache.layout import PAGE_TOKENS
from serving.model.batch import PrefillBatch, SeqChunk
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.weights import load_weights
from tests.model_factory import make_checkpoint

NUM_TOKENS = 100
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
}


def load_wide(folder: Path, dtype: torch.dtype, device: str) -> DeepseekV3:
    if not (folder / "config.json").exists():
        make_checkpoint(folder, 3, storage="fp8", **WIDE)
    return load_weights(folder, ModelConfig.from_folder(folder), dtype, device)


def logits_of(model: DeepseekV3) -> Tensor:
    """fp32 [NUM_TOKENS, V] on the CPU, of one prompt prefilled in one piece."""
    config, device = model.config, model.embed.device
    num_pages = -(-NUM_TOKENS // PAGE_TOKENS)
    shape = num_pages + 1, config.num_kv_layers, PAGE_TOKENS, config.latent_width
    ids = torch.randint(2, config.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(NUM_TOKENS, device=device)
    pages = torch.arange(num_pages, device=device)
    batch = PrefillBatch(
        token_ids_T=ids.to(device),
        positions_T=positions,
        row_ids_T=positions,
        starts=torch.tensor([0, NUM_TOKENS], dtype=torch.int32, device=device),
        seqs=(SeqChunk(offset=0, num_tokens=NUM_TOKENS, context_len=0, page_ids=pages),),
    )
    return model.logits(model.prefill(batch, torch.zeros(shape, dtype=model.dtype, device=device))).cpu()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
