"""The MTP layer equals its formula, written here a second time in the plainest form, for any way of storing its rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serving.model.config import ModelConfig
from serving.model.weights import load_weights
from tests.model_factory import TINY, make_checkpoint
from tests.unit.serving.model.paged import Paged

TOLERANCE = 1e-4
NUM_TOKENS = 90


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def turn(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate pairs (2i, 2i+1) by position * theta^(-2i/R), no YaRN."""
    out = x.clone()
    for i in range(x.shape[-1] // 2):
        angle = (positions * theta ** (-2 * i / x.shape[-1])).view(-1, *[1] * (x.dim() - 2))
        even, odd = x[..., 2 * i], x[..., 2 * i + 1]
        out[..., 2 * i] = even * angle.cos() - odd * angle.sin()
        out[..., 2 * i + 1] = even * angle.sin() + odd * angle.cos()
    return out


def mlp(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    gate, up = x @ w[name + "gate_proj.weight"].T, x @ w[name + "up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ w[name + "down_proj.weight"].T


def moe(x: Tensor, w: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    out = mlp(x, w, "mlp.shared_experts.")
    scores = torch.sigmoid(x @ w["mlp.gate.weight"].T)
    biased = scores + w["mlp.gate.e_score_correction_bias"]
    per_group = config["n_routed_experts"] // config["n_group"]
    for t in range(x.shape[0]):
        groups = biased[t].view(config["n_group"], per_group)
        ranking = [float(group.sort(descending=True).values[:2].sum()) for group in groups]
        kept = sorted(range(len(ranking)), key=ranking.__getitem__, reverse=True)[: config["topk_group"]]
        allowed = [g * per_group + i for g in kept for i in range(per_group)]
        chosen = sorted(allowed, key=lambda e: float(biased[t, e]), reverse=True)[: config["num_experts_per_tok"]]
        total = sum(scores[t, e] for e in chosen)
        for e in chosen:
            weight = scores[t, e] / total * config["routed_scaling_factor"]
            out[t] += weight * mlp(x[t], w, f"mlp.experts.{e}.")
    return out


def formula(hidden: Tensor, tokens: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Draft logits [n, V] from h_0..h_{n-1} and t_1..t_n; row i attends over pairs 0..i."""
    prefix = f"model.layers.{config['num_hidden_layers']}."
    w = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent, v_dim, theta = config["kv_lora_rank"], config["v_head_dim"], config["rope_theta"]
    positions = torch.arange(len(tokens), dtype=torch.float32)

    embedded = norm(weights["model.embed_tokens.weight"][tokens], w["enorm.weight"])
    x = torch.cat([embedded, norm(hidden, w["hnorm.weight"])], dim=-1) @ w["eh_proj.weight"].T

    y = norm(x, w["input_layernorm.weight"])
    q = norm(y @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"])
    q = (q @ w["self_attn.q_b_proj.weight"].T).view(-1, heads, nope + rope)
    kv = y @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    c, k_rope = norm(kv[:, :latent], w["self_attn.kv_a_layernorm.weight"]), turn(kv[:, latent:], positions, theta)
    expanded = (c @ w["self_attn.kv_b_proj.weight"].T).view(-1, heads, nope + v_dim)
    q_rope = turn(q[..., nope:], positions, theta)
    scores = torch.einsum("thn,shn->hts", q[..., :nope], expanded[..., :nope])
    scores = (scores + torch.einsum("thr,sr->hts", q_rope, k_rope)) / math.sqrt(nope + rope)
    scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
    attended = torch.einsum("hts,shv->thv", scores.softmax(-1), expanded[..., nope:]).flatten(1)
    x = x + attended @ w["self_attn.o_proj.weight"].T

    x = x + moe(norm(x, w["post_attention_layernorm.weight"]), w, config)
    return norm(x, w["shared_head.norm.weight"]) @ weights["lm_head.weight"].T


class Case:
    """A text run through the main model, and the pieces that the MTP layer takes."""

    def __init__(self, folder: Path) -> None:
        self.weights = make_checkpoint(folder, seed=11, rope_scaling=None)
        self.config = {**TINY, "rope_scaling": None}
        model = load_weights(folder, ModelConfig.from_folder(folder), torch.float32)
        assert model.mtp is not None
        self.mtp = model.mtp
        self.run = Paged(model)
        self.tokens = torch.randint(0, 128, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
        self.run.prefill({"a": self.tokens.tolist()})
        self.hidden = self.run.hidden["a"][0]
        self.want = formula(self.hidden[:-1], self.tokens[1:], self.weights, self.config)

    def store(self, start: int, end: int) -> None:
        """Rows of pairs [start, end), each in the slot of its token."""
        self.mtp.store_rows(
            self.hidden[start:end],
            self.tokens[start + 1 : end + 1],
            torch.arange(start, end),
            self.run.rows("a", start + 1, end + 1),
            self.run.pool,
        )

    def draft(self, start: int, end: int) -> Tensor:
        """Logits of pairs [start, end), as one batch."""
        count = end - start
        return self.mtp.draft(
            self.hidden[start:end],
            self.tokens[start + 1 : end + 1],
            torch.arange(start, end),
            self.run.rows("a", start + 1, end + 1),
            torch.tensor([self.run.page_ids["a"]] * count),
            torch.arange(start + 2, end + 2),
            self.run.pool,
        )


def gap(got: Tensor, want: Tensor) -> float:
    difference = (got - want).abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


def test_drafts_equal_the_formula_step_by_step(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.store(0, 70)
    got = torch.cat([case.draft(i, i + 1) for i in range(70, NUM_TOKENS - 1)])
    assert gap(got, case.want[70:]) < TOLERANCE


def test_all_drafts_of_a_text_are_one_batch_once_its_rows_are_stored(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.store(0, 40)
    case.store(40, NUM_TOKENS - 1)
    assert gap(case.draft(0, NUM_TOKENS - 1), case.want) < TOLERANCE
    # Slot 0 was never written: it is poison, and no draft saw it.
    first = int(case.run.rows("a", 0, 1))
    assert case.run.pool[first // 64, -1, first % 64].isnan().all()


def test_a_wrong_row_hidden_state_or_token_shows(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.store(0, NUM_TOKENS - 1)
    last = NUM_TOKENS - 2
    row = int(case.run.rows("a", 30, 31))
    kept = case.run.pool[row // 64, -1, row % 64].clone()
    case.run.pool[row // 64, -1, row % 64] += 1.0
    assert gap(case.draft(last, last + 1), case.want[last:]) > TOLERANCE
    case.run.pool[row // 64, -1, row % 64] = kept
    assert gap(case.draft(last, last + 1), case.want[last:]) < TOLERANCE
    assert (
        gap(formula(case.hidden[1:], case.tokens[1:], case.weights, case.config)[last:], case.want[last:]) > TOLERANCE
    )
