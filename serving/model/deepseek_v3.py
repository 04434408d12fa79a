"""DeepSeek-V3 in reading order: embed, blocks of MLA and MLP or MoE, final norm, head (report section 2.1).

MLA stands here in both its forms, equal up to rounding: *expanded* for prefill, where keys and values of every head are
made from the latents, and *absorbed* for decode, where W_uk moves into the query and W_uv into the output, so that all
heads attend over one latent row a token. Only [c_t ; k^R_t] is cached.

Shape suffixes: T tokens, B decode rows, D hidden, H heads, Q query width a head (nope + rope), C latent, R rope,
V value width a head, W = C + R, N any number of rows. One rank, no collectives. Weights are filled by `weights`; which
tensor of a checkpoint goes where is the table in `names`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels import mla
from serving.kernels.gemm import linear
from serving.kernels.packed import pack
from serving.kernels.kv_store import store_rows
from serving.kernels.norm_rope import inverse_frequencies, rms_norm, rope_, rotations, yarn_inverse_frequencies
from serving.kernels.rows import context_slots, layer_rows, slots
from serving.model.batch import DecodeBatch, PrefillBatch, SeqChunk
from serving.model.config import ModelConfig
from serving.model.experts import Mlp, Moe
from serving.model.mtp import Mtp

# Norms on the latents have an epsilon of their own in the published code; config.json has no field for it.
_LATENT_NORM_EPS = 1e-6
# Expanded keys and values of a cached prefix that exist at once; on a CPU about what its cache holds, and as fast as more.
_EXPANDED_PREFIX_BYTES = 512 << 20
_EXPANDED_PREFIX_BYTES_CPU = 8 << 20


class Rope:
    """Rotary angles of the model: position -> the complex factor of each pair, [T, R/2]."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        yarn = config.yarn
        self.magnitude = yarn.attention_factor if yarn else 1.0
        if yarn is None:
            freqs = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta)
        else:
            freqs = yarn_inverse_frequencies(
                config.qk_rope_head_dim,
                config.rope_theta,
                factor=yarn.factor,
                original_max_positions=yarn.original_max_positions,
                beta_fast=yarn.beta_fast,
                beta_slow=yarn.beta_slow,
            )
        self.inverse_freqs = freqs.to(device)

    def at(self, positions_T: Tensor) -> Tensor:
        return rotations(positions_T, self.inverse_freqs, self.magnitude)


class Attention:
    """Multi-head latent attention of one layer; `layer` is its place in a KV page."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.layer = layer
        heads, hidden, latent = config.num_heads, config.hidden_size, config.kv_lora_rank
        # Query first, latent below it: one product reads the hidden state for both.
        self.query_rows = config.q_lora_rank or heads * config.qk_head_dim
        self.qkv_a = torch.empty(self.query_rows + config.latent_width, hidden, dtype=dtype, device=device)
        self.kv_norm = torch.empty(latent, dtype=dtype, device=device)
        self.q_norm: Tensor | None = None
        self.q_b: Tensor | None = None
        if config.q_lora_rank:
            self.q_norm = torch.empty(config.q_lora_rank, dtype=dtype, device=device)
            self.q_b = torch.empty(heads * config.qk_head_dim, config.q_lora_rank, dtype=dtype, device=device)
        # As the file has it, W_uk and W_uv of a head one below the other; `pack` parts them and lets it go.
        per_head = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b: Tensor | None = torch.empty(heads * per_head, latent, dtype=dtype, device=device)
        self.w_uk_HNC = self.kv_b.view(heads, per_head, latent)[:, : config.qk_nope_head_dim]
        self.w_uv_HVC = self.kv_b.view(heads, per_head, latent)[:, config.qk_nope_head_dim :]
        self.out = torch.empty(hidden, heads * config.v_head_dim, dtype=dtype, device=device)

    def pack(self) -> None:
        """Once loaded: into the layout that the products read fastest."""
        self.qkv_a, self.out = pack(self.qkv_a), pack(self.out)
        if self.q_b is not None:
            self.q_b = pack(self.q_b)
        # bf16 on CPU multiplies strided heads at an eighth of the rate.
        self.w_uk_HNC, self.w_uv_HVC, self.kv_b = self.w_uk_HNC.contiguous(), self.w_uv_HVC.contiguous(), None

    def prefill(
        self, x_TD: Tensor, rope_T: Tensor, slots_T: Tensor, seqs: tuple[SeqChunk, ...], kv_pool: Tensor
    ) -> Tensor:
        """Expanded form; each sequence is attended by itself, the products run over all tokens."""
        q_THQ, latent_TW = self._query_and_latent(x_TD, rope_T)
        store_rows(kv_pool, self.layer, slots_T, latent_TW)
        k_THQ, v_THV = self._expand(latent_TW)
        outs = []
        for seq in seqs:
            own = slice(seq.offset, seq.offset + seq.num_tokens)
            q = q_THQ[own]
            out, lse = mla.attend(q, k_THQ[own], v_THV[own], scale=self.config.softmax_scale, causal=True)
            for start in range(0, seq.context_len, self._prefix_piece):
                end = min(start + self._prefix_piece, seq.context_len)
                found = context_slots(kv_pool, seq.page_ids, start, end)
                k, v = self._expand(layer_rows(kv_pool, self.layer)[found].to(q.dtype))
                before = mla.attend(q, k, v, scale=self.config.softmax_scale, causal=False)
                out, lse = mla.merge(out, lse, *before)
            outs.append(out)
        return linear(torch.cat(outs).flatten(1), self.out)

    def decode(
        self, x_BD: Tensor, rope_B: Tensor, slots_B: Tensor, plan: tuple[mla.DecodeGroup, ...], kv_pool: Tensor
    ) -> Tensor:
        """Absorbed form over the cached rows, this token's own among them."""
        q_BHQ, latent_BW = self._query_and_latent(x_BD, rope_B)
        store_rows(kv_pool, self.layer, slots_B, latent_BW)
        nope, latent = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        q_HBC = torch.bmm(q_BHQ[:, :, :nope].transpose(0, 1), self.w_uk_HNC)
        q_BHW = torch.cat([q_HBC.transpose(0, 1), q_BHQ[:, :, nope:]], dim=-1)
        out_BHC, _ = mla.decode_latent(q_BHW, kv_pool, self.layer, plan, latent=latent, scale=self.config.softmax_scale)
        out_HBV = torch.bmm(out_BHC.transpose(0, 1), self.w_uv_HVC.transpose(1, 2))
        return linear(out_HBV.transpose(0, 1).flatten(1), self.out)

    def store(self, x_TD: Tensor, rope_T: Tensor, slots_T: Tensor, kv_pool: Tensor) -> None:
        """Only the latent rows of these tokens, nothing attended."""
        latent_TW = self._latent(linear(x_TD, self.qkv_a)[:, self.query_rows :], rope_T)
        store_rows(kv_pool, self.layer, slots_T, latent_TW)

    def _query_and_latent(self, x_TD: Tensor, rope_T: Tensor) -> tuple[Tensor, Tensor]:
        """q [T, H, Q] with its rope part turned, and the row to cache [T, W]."""
        both = linear(x_TD, self.qkv_a)
        q_TX = both[:, : self.query_rows]
        if self.q_b is not None and self.q_norm is not None:
            q_TX = linear(rms_norm(q_TX, self.q_norm, _LATENT_NORM_EPS), self.q_b)
        q_THQ = q_TX.unflatten(1, (self.config.num_heads, self.config.qk_head_dim))
        rope_(q_THQ[:, :, self.config.qk_nope_head_dim :], rope_T)
        return q_THQ, self._latent(both[:, self.query_rows :], rope_T)

    def _latent(self, kv_TW: Tensor, rope_T: Tensor) -> Tensor:
        latent = self.config.kv_lora_rank
        c_TC = rms_norm(kv_TW[:, :latent], self.kv_norm, _LATENT_NORM_EPS)
        return torch.cat([c_TC, rope_(kv_TW[:, latent:], rope_T)], dim=-1)

    def _expand(self, latent_SW: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [S, H, Q] and values [S, H, V] of every head from rows [S, W]."""
        heads, latent = self.config.num_heads, self.config.kv_lora_rank
        c_SC, rope_SR = latent_SW[:, :latent], latent_SW[:, latent:]
        k_SHN = linear(c_SC, self.w_uk_HNC.flatten(0, 1)).unflatten(1, (heads, -1))
        v_SHV = linear(c_SC, self.w_uv_HVC.flatten(0, 1)).unflatten(1, (heads, -1))
        return torch.cat([k_SHN, rope_SR[:, None].expand(-1, heads, -1)], dim=-1), v_SHV

    @property
    def _prefix_piece(self) -> int:
        config = self.config
        # Both products, the keys, and keys and values once more as the attention kernel pads them.
        width = config.qk_nope_head_dim + config.v_head_dim + 3 * max(config.qk_head_dim, config.v_head_dim)
        num_bytes = _EXPANDED_PREFIX_BYTES_CPU if self.out.device.type == "cpu" else _EXPANDED_PREFIX_BYTES
        return max(64, num_bytes // (config.num_heads * width * self.out.element_size()))


class Block:
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(
        self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device, *, dense: bool
    ) -> None:
        self.eps = config.rms_norm_eps
        self.attention_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.attention = Attention(config, layer, dtype, device)
        self.mlp_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.mlp: Mlp | Moe = (
            Mlp(config.hidden_size, config.intermediate_size, dtype, device) if dense else Moe(config, dtype, device)
        )

    def prefill(
        self, x_TD: Tensor, rope_T: Tensor, slots_T: Tensor, seqs: tuple[SeqChunk, ...], kv_pool: Tensor
    ) -> Tensor:
        normed = rms_norm(x_TD, self.attention_norm, self.eps)
        x_TD = x_TD + self.attention.prefill(normed, rope_T, slots_T, seqs, kv_pool)
        return self._feed_forward(x_TD)

    def decode(
        self, x_BD: Tensor, rope_B: Tensor, slots_B: Tensor, plan: tuple[mla.DecodeGroup, ...], kv_pool: Tensor
    ) -> Tensor:
        normed = rms_norm(x_BD, self.attention_norm, self.eps)
        x_BD = x_BD + self.attention.decode(normed, rope_B, slots_B, plan, kv_pool)
        return self._feed_forward(x_BD)

    def store(self, x_TD: Tensor, rope_T: Tensor, slots_T: Tensor, kv_pool: Tensor) -> None:
        """Only this layer's latent rows of these inputs."""
        self.attention.store(rms_norm(x_TD, self.attention_norm, self.eps), rope_T, slots_T, kv_pool)

    def _feed_forward(self, x_TD: Tensor) -> Tensor:
        return self.mlp.forward(rms_norm(x_TD, self.mlp_norm, self.eps)).add_(x_TD)


class Head:
    """The output head, the main model's and the MTP layer's."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)

    def pack(self) -> None:
        """Once loaded: into the layout that the product reads fastest."""
        self.weight = pack(self.weight)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 [N, vocab_size]; fp64 of an fp64 model."""
        logits_NV = linear(hidden_ND, self.weight)
        return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.to(torch.float32)


class DeepseekV3:
    """The whole model on one device. Weights are uninitialised until `weights.load_weights` filled them.

    `kv_pool`: [num_pages + 1, config.num_kv_layers, 64, config.latent_width], the last page scratch.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self.config = config
        self.dtype = dtype
        self.embed = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.blocks = [
            Block(config, layer, dtype, device, dense=layer < config.num_dense_layers)
            for layer in range(config.num_layers)
        ]
        self.norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.head = Head(config, dtype, device)
        self.rope = Rope(config, device)
        self.mtp: Mtp | None = None
        if config.num_mtp_layers:
            block = Block(config, config.num_layers, dtype, device, dense=False)
            self.mtp = Mtp(config, block, self.embed, self.head, self.rope)

    @torch.inference_mode()
    def prefill(self, batch: PrefillBatch, kv_pool: Tensor) -> Tensor:
        """Store the latents of the batch and return hidden states [T, D] after the final norm."""
        rope_T = self.rope.at(batch.positions_T)
        slots_T = slots(kv_pool, batch.row_ids_T)
        x_TD = F.embedding(batch.token_ids_T, self.embed)
        for block in self.blocks:
            x_TD = block.prefill(x_TD, rope_T, slots_T, batch.seqs, kv_pool)
        return rms_norm(x_TD, self.norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def decode(self, batch: DecodeBatch, kv_pool: Tensor) -> Tensor:
        """One token a sequence: store its latents, return hidden states [B, D] after the final norm."""
        plan = mla.plan_decode(kv_pool, batch.row_ids_B, batch.page_table_BP, batch.context_lens_B)
        rope_B = self.rope.at(batch.positions_B)
        slots_B = slots(kv_pool, batch.row_ids_B)
        x_BD = F.embedding(batch.token_ids_B, self.embed)
        for block in self.blocks:
            x_BD = block.decode(x_BD, rope_B, slots_B, plan, kv_pool)
        return rms_norm(x_BD, self.norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 (fp64 for an fp64 model) [N, vocab_size]; ids past the tokenizer's are the sampler's to mask."""
        return self.head.logits(hidden_ND)
