"""The embedded model in a form that trains fast on one GPU: every expert for every token, layers stacked, tokens flat.

The arithmetic is DeepSeek-V3's (report sections 2.1 and 2.2). It is written a second time, beside `serving.model`,
because training wants what serving does not: weights of one kind stacked over layers, so that quantiser and optimizer
take few launches, and pieces that see T = rows x length tokens, so that one compilation serves every row length. Only
attention knows rows.

Letters: T tokens, D hidden, H heads, N nope, R rope, V value, C latent, Q query rank, E experts, I intermediate, L layers.
Weights of layers come as [L, out, in] or [L, E, out, in]; the MTP layer is the last of L.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0
EPS = 1e-6
ROUTER_RANGE = 3.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the embedded model; the defaults are what is shipped."""

    vocab: int = 1024
    hidden: int = 256
    layers: int = 8
    heads: int = 8
    nope: int = 32
    rope: int = 32
    value: int = 64
    latent: int = 128
    query: int = 128
    dense: int = 512
    experts: int = 16
    groups: int = 4
    kept_groups: int = 2
    top_k: int = 4
    intermediate: int = 64
    scaling: float = 2.5
    theta: float = 10000.0
    max_position: int = 8192
    original_position: int = 2048
    factor: float = 4.0

    def config(self) -> dict[str, object]:
        """The content of `config.json`, with the field names of the published one."""
        yarn = {
            "type": "yarn", "factor": self.factor, "original_max_position_embeddings": self.original_position,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        }  # fmt: skip
        fp8 = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
        return {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
            "vocab_size": self.vocab, "hidden_size": self.hidden, "num_hidden_layers": self.layers, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "intermediate_size": self.dense, "hidden_act": "silu",
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "attention_bias": False, "attention_dropout": 0.0,
            "q_lora_rank": self.query, "kv_lora_rank": self.latent, "qk_nope_head_dim": self.nope, "qk_rope_head_dim": self.rope,
            "v_head_dim": self.value, "n_routed_experts": self.experts, "n_shared_experts": 1, "moe_intermediate_size": self.intermediate,
            "num_experts_per_tok": self.top_k, "n_group": self.groups, "topk_group": self.kept_groups, "topk_method": "noaux_tc",
            "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": self.scaling,
            "rms_norm_eps": EPS, "rope_theta": self.theta, "rope_scaling": yarn, "max_position_embeddings": self.max_position,
            "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "use_cache": True, "initializer_range": 0.02,
            "torch_dtype": "bfloat16", "quantization_config": fp8,
        }  # fmt: skip


def initial(shape: Shape, seed: int) -> dict[str, Tensor]:
    """fp32 weights of a new model. Projections back into the residual stream start at zero, the rest at 1/sqrt(in)."""
    made = torch.Generator().manual_seed(seed)
    s, every, sparse = shape, shape.layers + 1, shape.layers
    matrix = lambda *size: torch.randn(*size, generator=made) / math.sqrt(size[-1])  # noqa: E731
    return {
        "embed": torch.randn(s.vocab, s.hidden, generator=made) * 0.3,
        "head": torch.randn(s.vocab, s.hidden, generator=made) * 0.01,
        "norm": torch.ones(s.hidden),
        "input_norm": torch.ones(every, s.hidden),
        "q_a": matrix(every, s.query, s.hidden),
        "q_a_norm": torch.ones(every, s.query),
        "q_b": matrix(every, s.heads * (s.nope + s.rope), s.query),
        "kv_a": matrix(every, s.latent + s.rope, s.hidden),
        "kv_a_norm": torch.ones(every, s.latent),
        "kv_b": matrix(every, s.heads * (s.nope + s.value), s.latent),
        "o": torch.zeros(every, s.hidden, s.heads * s.value),
        "post_norm": torch.ones(every, s.hidden),
        "dense_gate": matrix(1, s.dense, s.hidden),
        "dense_up": matrix(1, s.dense, s.hidden),
        "dense_down": torch.zeros(1, s.hidden, s.dense),
        "router": matrix(sparse, s.experts, s.hidden),
        "shared_gate": matrix(sparse, s.intermediate, s.hidden),
        "shared_up": matrix(sparse, s.intermediate, s.hidden),
        "shared_down": torch.zeros(sparse, s.hidden, s.intermediate),
        "expert_gate": matrix(sparse, s.experts, s.intermediate, s.hidden),
        "expert_up": matrix(sparse, s.experts, s.intermediate, s.hidden),
        "expert_down": torch.zeros(sparse, s.experts, s.hidden, s.intermediate),
        "mtp_embed_norm": torch.ones(s.hidden),
        "mtp_hidden_norm": torch.ones(s.hidden),
        "mtp_project": matrix(1, s.hidden, 2 * s.hidden),
        "mtp_norm": torch.ones(s.hidden),
    }


QUANTISED = frozenset({
    "q_a", "q_b", "kv_a", "kv_b", "o", "dense_gate", "dense_up", "dense_down", "shared_gate", "shared_up", "shared_down",
    "expert_gate", "expert_up", "expert_down", "mtp_project",
})  # fmt: skip


def block_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [..., out, in] fp32 as (e4m3 [..., out, in], fp32 scale [..., ceil(out/128), ceil(in/128)]), the published format:
    weight ~ e4m3 * scale of its block. Scale is the block's largest magnitude / 448."""
    out, width = weight.shape[-2:]
    padded = F.pad(weight, (0, -width % BLOCK, 0, -out % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., out blocks, 128, in blocks, 128]
    scale = blocks.abs().amax((-3, -1)).clamp_min(1e-12) / FP8_MAX
    quantised = (blocks / scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)[..., :out, :width]
    return quantised.to(torch.float8_e4m3fn), scale


def dequantise(quantised: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `block_scales`, fp32."""
    out, width = quantised.shape[-2:]
    spread = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :out, :width]
    return quantised.float() * spread


def as_stored(name: str, weight: Tensor) -> Tensor:
    """fp32 values that the checkpoint file will hold for `weight`: FP8 blocks or bf16."""
    return dequantise(*block_scales(weight)) if name in QUANTISED else weight.bfloat16().float()


def yarn_angles(shape: Shape, positions: Tensor) -> Tensor:
    """Rotation angles [T, R/2] at `positions` [T]; YaRN (Peng et al. 2023) as the published model code applies it."""
    half = torch.arange(0, shape.rope, 2, dtype=torch.float32, device=positions.device) / shape.rope
    plain = shape.theta**-half

    def turning(count: int) -> float:
        """The dimension that turns `count` times within the original length."""
        wavelength = shape.original_position / (count * 2 * math.pi)
        return shape.rope * math.log(wavelength) / (2 * math.log(shape.theta))

    low, high = max(math.floor(turning(32)), 0), min(math.ceil(turning(1)), shape.rope - 1)
    ramp = ((torch.arange(shape.rope // 2, device=positions.device) - low) / max(high - low, 0.001)).clamp(0, 1)
    return positions.float()[:, None] * (plain / shape.factor * ramp + plain * (1 - ramp))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [T, H, R]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def project_attention(
    shape: Shape, x: Tensor, cos: Tensor, sin: Tensor, w: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, H, N + R] of x [T, D]; values are padded with zeros to the width of the keys."""
    s, num_tokens = shape, x.shape[0]
    h = rms_norm(x, w["input_norm"])
    q = F.linear(rms_norm(F.linear(h, w["q_a"]), w["q_a_norm"]), w["q_b"]).view(num_tokens, s.heads, -1)
    latent, k_rope = F.linear(h, w["kv_a"]).split((s.latent, s.rope), -1)
    kv = F.linear(rms_norm(latent, w["kv_a_norm"]), w["kv_b"]).view(num_tokens, s.heads, -1)
    k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, s.heads, -1)
    q = torch.cat((q[..., : s.nope], rotate(q[..., s.nope :], cos, sin)), -1)
    k = torch.cat((kv[..., : s.nope], k_rope), -1)
    return q, k, F.pad(kv[..., s.nope :], (0, s.nope + s.rope - s.value))


def attend(shape: Shape, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Causal attention within rows of `length` tokens: [T, H, N + R] to [T, H, N + R], softmax scale with YaRN's mscale squared."""
    mscale = 0.1 * math.log(shape.factor) + 1.0
    scale = (shape.nope + shape.rope) ** -0.5 * mscale * mscale
    q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).flatten(0, 1)


def leave_attention(shape: Shape, x: Tensor, attended: Tensor, w: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Residual stream after the attention block, and its norm, the input of the feed-forward block; both [T, D]."""
    x = x + F.linear(attended[..., : shape.value].flatten(1), w["o"])
    return x, rms_norm(x, w["post_norm"])


def finish_dense(shape: Shape, x: Tensor, attended: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    x, h = leave_attention(shape, x, attended, w)
    return x + F.linear(F.silu(F.linear(h, w["dense_gate"])) * F.linear(h, w["dense_up"]), w["dense_down"])


def routing_weights(shape: Shape, logits: Tensor, bias: Tensor) -> Tensor:
    """Weight of each expert for each token, [T, E] fp32, zero for those not chosen (report equations 12 to 16)."""
    s, scores = shape, logits.sigmoid()
    biased = scores.detach() + bias
    grouped = biased.unflatten(-1, (s.groups, -1))
    group_scores = (grouped * (_rank(grouped) < 2)).sum(-1)
    biased = biased.masked_fill(
        (_rank(group_scores) >= s.kept_groups).repeat_interleave(s.experts // s.groups, -1), -math.inf
    )
    chosen = scores * (_rank(biased) < s.top_k)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * s.scaling


def _rank(x: Tensor) -> Tensor:
    """How many entries of the last axis are larger than each; without a sort, so that it fuses."""
    return (x[..., None, :] > x[..., :, None]).sum(-1)


def finish_sparse(
    shape: Shape, x: Tensor, attended: Tensor, bias: Tensor, w: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual stream [T, D] after the layer, how many tokens chose each expert [E], and how far router logits went beyond
    ROUTER_RANGE: saturated scores tie, and then two correct programs choose different experts."""
    x, h = leave_attention(shape, x, attended, w)
    logits = F.linear(h.float(), w["router"].float())
    weights, excess = routing_weights(shape, logits, bias), (logits.abs() - ROUTER_RANGE).clamp_min(0).square().mean()
    gate, up = (
        F.linear(h, w[name].flatten(0, 1)).unflatten(-1, (shape.experts, -1)) for name in ("expert_gate", "expert_up")
    )
    hidden = F.silu(gate) * up * weights[..., None].to(h.dtype)
    routed = hidden.flatten(1) @ w["expert_down"].transpose(1, 2).flatten(0, 1)
    shared = F.linear(F.silu(F.linear(h, w["shared_gate"])) * F.linear(h, w["shared_up"]), w["shared_down"])
    return x + routed + shared, (weights > 0).float().sum(0), excess


def enter_mtp(shape: Shape, hidden: Tensor, following: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Input [T, D] of the MTP block: `hidden` is the main model's state after its final norm, `following` the next token's embedding."""
    both = torch.cat((rms_norm(following, w["mtp_embed_norm"]), rms_norm(hidden, w["mtp_hidden_norm"])), -1)
    return F.linear(both, w["mtp_project"][0])


def score(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross entropies at x [T, D], and which targets [T] are the likeliest token."""
    logits = F.linear(rms_norm(x, norm), head).float()
    losses = torch.logsumexp(logits, -1) - logits.gather(1, targets[:, None])[:, 0]
    return (losses * weights).sum(), logits.argmax(-1) == targets


@dataclass(frozen=True)
class Pieces:
    """The functions above as a run uses them: plain, or each compiled once."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor]] = project_attention
    dense: Callable[..., Tensor] = finish_dense
    sparse: Callable[..., tuple[Tensor, Tensor, Tensor]] = finish_sparse
    mtp: Callable[..., Tensor] = enter_mtp
    score: Callable[..., tuple[Tensor, Tensor]] = score

    @classmethod
    def compiled(cls) -> "Pieces":
        quick = partial(torch.compile, dynamic=False)
        return cls(quick(project_attention), quick(finish_dense), quick(finish_sparse), quick(enter_mtp), quick(score))


ATTENTION = ("input_norm", "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b")
LEAVE = ("o", "post_norm")
DENSE = ("dense_gate", "dense_up", "dense_down")
SPARSE = ("router", "shared_gate", "shared_up", "shared_down", "expert_gate", "expert_up", "expert_down")
MTP = ("mtp_embed_norm", "mtp_hidden_norm", "mtp_project")


@dataclass(frozen=True)
class Outcome:
    """Of one forward pass over [rows, length] tokens: weighted loss sums, hits per token [T] of both heads, expert loads [L, E],
    router excess summed over layers."""

    loss: Tensor
    mtp_loss: Tensor
    hits: Tensor
    mtp_hits: Tensor
    loads: Tensor
    excess: Tensor


def forward(
    shape: Shape, pieces: Pieces, weights: Mapping[str, Tensor], bias: Tensor, ids: Tensor, token_weights: Tensor
) -> Outcome:
    """`ids` and `token_weights` are [rows, length + 2]: token i predicts i + 1, the MTP layer at i predicts i + 2.

    `bias` [L, E] corrects the routers of the sparse layers, the MTP layer's last.
    """
    rows, length = ids.shape[0], ids.shape[1] - 2
    stacked = {name: weights[name].unbind(0) for name in (*ATTENTION, *LEAVE, *DENSE, *SPARSE)}
    layer = lambda names, index: {name: stacked[name][index] for name in names}  # noqa: E731
    angles = yarn_angles(shape, torch.arange(length, device=ids.device)).repeat(rows, 1)
    cos, sin, loads, excesses = angles.cos(), angles.sin(), list[Tensor](), list[Tensor]()

    def block(x: Tensor, index: int) -> Tensor:
        attended = attend(shape, *pieces.project(shape, x, cos, sin, layer(ATTENTION, index)), length)
        if index == 0:
            return pieces.dense(shape, x, attended, layer(LEAVE, 0) | layer(DENSE, 0))
        x, load, excess = pieces.sparse(
            shape, x, attended, bias[index - 1], layer(LEAVE, index) | layer(SPARSE, index - 1)
        )
        loads.append(load)
        excesses.append(excess)
        return x

    tokens, following, after = (ids[:, n : n + length].flatten() for n in range(3))
    token_weights = token_weights.to(weights["embed"].device)
    x = F.embedding(tokens, weights["embed"])
    for index in range(shape.layers):
        x = block(x, index)
    loss, hits = pieces.score(
        x, weights["norm"], weights["head"], following, token_weights[:, 1 : length + 1].flatten()
    )
    hidden = rms_norm(x, weights["norm"])
    x = pieces.mtp(shape, hidden, F.embedding(following, weights["embed"]), {name: weights[name] for name in MTP})
    x = block(x, shape.layers)
    mtp_loss, mtp_hits = pieces.score(
        x, weights["mtp_norm"], weights["head"], after, token_weights[:, 2 : length + 2].flatten()
    )
    return Outcome(loss, mtp_loss, hits, mtp_hits, torch.stack(loads), torch.stack(excesses).sum())
