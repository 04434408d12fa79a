"""How much a model computes, from sizes alone."""

from __future__ import annotations

from serving.model.config import ModelConfig


def pair_cost(config: ModelConfig) -> float:
    """FLOPs of one token that attends to one other, in all layers, over those of all products of a token in prefill: 7.0e-5 for V3, whose
    attention costs as much as all else from 28,600 tokens on."""
    heads, hidden = config.num_heads, config.hidden_size
    pair = config.num_layers * heads * (config.qk_head_dim + config.v_head_dim)
    query = heads * config.qk_head_dim
    ranks = config.latent_width + (config.q_lora_rank or 0)
    attention = hidden * ranks + (config.q_lora_rank or hidden) * query
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * hidden
    routed = config.num_experts_per_token * config.moe_intermediate_size
    moe = 3 * hidden * (routed + config.shared_intermediate_size) + hidden * config.num_routed_experts
    dense = 3 * hidden * config.intermediate_size
    token = config.num_layers * attention + config.num_moe_layers * moe + config.num_dense_layers * dense
    return pair / token
