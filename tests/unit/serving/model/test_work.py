"""What prefill costs, against the published sizes."""

from __future__ import annotations

from dataclasses import replace

from serving.model.published import DEEPSEEK_V3
from serving.model.work import pair_cost


def test_v3s_products_are_its_active_parameters() -> None:
    """37 B are active for a token (DeepSeek-V3 report, section 1), 1.9 B of them in the vocabulary's two tables."""
    pairs = 61 * 128 * (128 + 64 + 128)
    assert 34.5e9 < pairs / pair_cost(DEEPSEEK_V3) < 36.5e9


def test_more_experts_a_token_make_attention_cheaper_beside_them() -> None:
    wide = replace(DEEPSEEK_V3, num_experts_per_token=16)
    assert pair_cost(wide) < 0.7 * pair_cost(DEEPSEEK_V3)


def test_half_the_heads_attend_for_less() -> None:
    narrow = replace(DEEPSEEK_V3, num_heads=64)
    assert 0.5 * pair_cost(DEEPSEEK_V3) < pair_cost(narrow) < 0.65 * pair_cost(DEEPSEEK_V3)
