"""DeepSeek-V3 in reading order: embed, blocks of MLA and MLP or MoE, final norm, head (report section 2.1).

MLA stands here in both its forms, equal up to rounding: *expanded* for prefill, where keys and values of every head are
made from the latents, and *absorbed* for decode, where W_uk moves into the query and W_uv into the output, so that all
heads attend over one latent row a token. Only [c_t ; k^R_t] is cached.

Shape suffixes: T tokens, B decode rows, D hidden, H heads, Q query width a head (nope + rope), C latent, R rope,
V value width a head, W = C + R, N any number of rows. Weights are filled by `weights`; which tensor of a checkpoint goes
where is the table in `names`. Of a unit of many ranks this is one rank's part: what that is, and its collectives, stands in
`parallel`; there x of a block is the rank's share of the tokens, and H its own heads. A forward pass is a generator, so that
two micro-batches can take turns (`microbatches`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels import mla
from serving.kernels.attention import attend_varlen, attend_varlen_quantised, has_kernel, merge_into
from serving.kernels.gemm import linear, linear_by_head
from serving.kernels.kv_store import absorb_and_store, norm_rope_store
from serving.kernels.norm_rope import (
    add_rms_norm,
    inverse_frequencies,
    rms_norm,
    rms_norm_quantise,
    rotations,
    yarn_inverse_frequencies,
)
from serving.kernels.packed import pack
from serving.kernels.quant import Fp8Weight, QuantisedRows
from serving.kernels.rows import context_slots, layer_rows, slots, unpack_fp8_rows
from serving.model.batch import DecodeBatch, PrefillBatch
from serving.model.config import ModelConfig
from serving.model.expert_slots import ModelExpertSlots
from serving.model.experts import Mlp, Moe
from serving.model.kernels import OURS, KernelChoices
from serving.model.microbatches import Pass, Sent, run
from serving.model.mtp import Mtp
from serving.model.parallel import (
    SINGLE,
    Parallel,
    gather,
    gather_columns,
    local_ids,
    new_embedding,
    own_share,
    scatter_sum,
    vocabulary_rows,
)
from serving.model.routing import Routing
from serving.model.timeline import Timeline
from serving.model.weight import Weight, keeps_fp8, new_weight
from serving.parallel.collectives import Collectives

Activations = Tensor | QuantisedRows
Half = Generator[Sent | None, Any, tuple[Tensor, Tensor]]
"""A part of a pass that returns what a half of a block adds, and the sum before it."""

# Norms on the latents have an epsilon of their own in the published code; config.json has no field for it.
_LATENT_NORM_EPS = 1e-6
# Expanded keys and values of a cached prefix that exist at once; on a CPU as few as cost it a tenth of its rate at most.
_EXPANDED_PREFIX_BYTES = 512 << 20
_EXPANDED_PREFIX_BYTES_CPU = 2 << 20


class Rope:
    """Rotary angles of the model: position -> the complex factor of each pair, [T, R/2]."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        yarn = config.yarn
        self.magnitude = torch.full((1,), yarn.attention_factor if yarn else 1.0, device=device)
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

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fp8: bool = False,
        kernels: KernelChoices = OURS,
        tp: Collectives = SINGLE.tp,
    ) -> None:
        self.config = config
        self.layer = layer
        self.tp = tp
        self.num_heads = config.num_heads // tp.world_size
        heads, hidden, latent = self.num_heads, config.hidden_size, config.kv_lora_rank
        # Query first, latent below it: one product reads the hidden state for both.
        self.query_rows = config.q_lora_rank or heads * config.qk_head_dim
        kind: dict[str, Any] = {"dtype": dtype, "device": device, "fp8": fp8, "library": kernels.linear_fp8}
        self.qkv_a = new_weight(self.query_rows + config.latent_width, hidden, **kind)
        self.kv_norm = torch.empty(latent, dtype=dtype, device=device)
        self.q_norm: Tensor | None = None
        self.q_b: Weight | None = None
        if config.q_lora_rank:
            self.q_norm = torch.empty(config.q_lora_rank, dtype=dtype, device=device)
            self.q_b = new_weight(heads * config.qk_head_dim, config.q_lora_rank, **kind)
        # As the file has it, W_uk and W_uv of a head one below the other; on a CPU `pack` parts them and lets it go.
        per_head = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b: Tensor | None = torch.empty(heads * per_head, latent, dtype=dtype, device=device)
        self.w_uk_HNC = self.kv_b.view(heads, per_head, latent)[:, : config.qk_nope_head_dim]
        self.w_uv_HVC = self.kv_b.view(heads, per_head, latent)[:, config.qk_nope_head_dim :]
        self.out = new_weight(hidden, heads * config.v_head_dim, **kind)

    def pack(self) -> None:
        """Once loaded: into the layout that the products read fastest."""
        if isinstance(self.qkv_a, Tensor) and isinstance(self.out, Tensor):
            self.qkv_a, self.out = pack(self.qkv_a), pack(self.out)
        if isinstance(self.q_b, Tensor):
            self.q_b = pack(self.q_b)
        if self.kv_norm.device.type == "cpu":
            # bf16 multiplies strided heads at an eighth of the rate.
            self.w_uk_HNC, self.w_uv_HVC, self.kv_b = self.w_uk_HNC.contiguous(), self.w_uv_HVC.contiguous(), None

    def prefill(
        self, x_TD: Activations, rope_T: Tensor, slots_T: Tensor, batch: PrefillBatch, kv_pool: Tensor
    ) -> Tensor:
        """Expanded form; a sequence sees its own chunk and, in pieces, what is cached before it."""
        q_THQ, latent_TW = self._query_and_latent(x_TD, len(slots_T))
        kept_TW = norm_rope_store(
            latent_TW,
            self.kv_norm,
            _LATENT_NORM_EPS,
            rope_T,
            kv_pool,
            self.layer,
            slots_T,
            q_rope_THR=q_THQ[:, :, self.config.qk_nope_head_dim :],
            keep=True,
        )
        assert kept_TW is not None
        scale, starts = self.config.softmax_scale, batch.starts
        own_keys = self._expand(kept_TW)
        has_context = batch.context is not None or any(seq.context_len for seq in batch.seqs)
        if isinstance(self.out, Fp8Weight) and not has_context:
            rows = attend_varlen_quantised(q_THQ, *own_keys, starts, starts, scale=scale, causal=True)
            return scatter_sum(self.tp, linear(rows, self.out))
        out_THV, lse_TH = attend_varlen(q_THQ, *own_keys, starts, starts, scale=scale, causal=True)
        for own, found, *ends in self._context_pieces(batch, kv_pool):
            keys = self._expand(self._cached(kv_pool, found, q_THQ.dtype))
            before = attend_varlen(q_THQ[own], *keys, *ends, scale=scale, causal=False)
            merge_into(out_THV[own], lse_TH[own], *before)
        return scatter_sum(self.tp, linear(out_THV.flatten(1), self.out))

    def _context_pieces(self, batch: PrefillBatch, kv_pool: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Of what is cached as much as may be expanded at once: the queries that see some of it, its slots, and the borders of both."""
        most, starts = self._prefix_piece, batch.starts
        if batch.context is not None:
            for first in range(0, len(batch.context.slots_C), most):
                found = batch.context.slots_C[first : first + most]
                yield slice(None), found, starts, (batch.context.starts - first).clamp_(0, len(found))
        for index, seq in enumerate(batch.seqs):
            own = slice(seq.offset, seq.offset + seq.num_tokens)
            for start in range(0, seq.context_len, most):
                end = min(start + most, seq.context_len)
                whole = torch.arange(0, end - start + 1, end - start, dtype=torch.int32, device=starts.device)
                found = context_slots(kv_pool, seq.page_ids, start, end)
                yield own, found, starts[index : index + 2] - starts[index], whole

    def decode(
        self, x_BD: Activations, rope_B: Tensor, slots_B: Tensor, plan: mla.Plan, kv_pool: Tensor, num_tokens: int = 1
    ) -> Pass:
        """Absorbed form over the cached rows, this token's own among them. `num_tokens` rows of x are of one sequence."""
        latent = self.config.kv_lora_rank
        q_BHW = self._absorbed_query(x_BD, rope_B, slots_B, kv_pool)
        yield None
        q = q_BHW if num_tokens == 1 else q_BHW.unflatten(0, (-1, num_tokens))
        out, _ = mla.decode_latent(q, kv_pool, self.layer, plan, latent=latent, scale=self.config.softmax_scale)
        out_BHC = out if num_tokens == 1 else out.flatten(0, 1)
        if not kv_pool.is_cuda:
            out_HBV = torch.bmm(out_BHC.transpose(0, 1), self.w_uv_HVC.transpose(1, 2))
            return scatter_sum(self.tp, linear(out_HBV.transpose(0, 1).flatten(1), self.out))
        rows = linear_by_head(out_BHC, self.w_uv_HVC, quantise=isinstance(self.out, Fp8Weight))
        return scatter_sum(self.tp, linear(rows, self.out))

    def store(self, x_TD: Activations, rope_T: Tensor, slots_T: Tensor, kv_pool: Tensor) -> None:
        """Only the latent rows of these tokens, nothing attended."""
        latent_TW = gather(self.tp, linear(x_TD, self.qkv_a)[:, self.query_rows :], len(slots_T))
        norm_rope_store(latent_TW, self.kv_norm, _LATENT_NORM_EPS, rope_T, kv_pool, self.layer, slots_T)

    def _absorbed_query(self, x_BD: Activations, rope_B: Tensor, slots_B: Tensor, kv_pool: Tensor) -> Tensor:
        """[W_uk^T q_nope ; q_rope], [B, H, W]; the latent rows are stored."""
        q_BHQ, latent_BW = self._query_and_latent(x_BD, len(slots_B))
        return absorb_and_store(
            q_BHQ, self.w_uk_HNC, latent_BW, self.kv_norm, _LATENT_NORM_EPS, rope_B, kv_pool, self.layer, slots_B
        )

    def _query_and_latent(self, x_TD: Activations, num_tokens: int) -> tuple[Tensor, Tensor]:
        """q [T, H, Q] with its rope part unturned, the latents [T, W] before their norm."""
        both = self._for_all(x_TD, num_tokens)
        q_TX = both[:, : self.query_rows]
        if self.q_b is not None and self.q_norm is not None:
            q_TX = linear(_norm_for(self.q_b, q_TX, self.q_norm, _LATENT_NORM_EPS), self.q_b)
        return q_TX.unflatten(1, (self.num_heads, self.config.qk_head_dim)), both[:, self.query_rows :]

    @property
    def gathers_input(self) -> bool:
        """Whether `prefill` and `decode` pass x on to the TP group, which FP8 rows are not made for."""
        return self.tp.world_size > 1 and self.q_b is None

    def _for_all(self, x_TD: Activations, num_tokens: int) -> Tensor:
        """The share's product with `qkv_a`, of all tokens of the group; what is narrower travels."""
        if self.gathers_input:
            assert isinstance(x_TD, Tensor)
            return linear(gather(self.tp, x_TD, num_tokens), self.qkv_a)
        return gather(self.tp, linear(x_TD, self.qkv_a), num_tokens)

    def _cached(self, kv_pool: Tensor, slots_S: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [S, W] of the pool, dequantised."""
        rows = layer_rows(kv_pool, self.layer)[slots_S]
        return (unpack_fp8_rows(rows, self.config.kv_lora_rank) if rows.dtype == torch.uint8 else rows).to(dtype)

    def _expand(self, latent_SW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From rows [S, W]: keys of every head [S, H, N] and the rope part they share [S, R], values [S, H, V]."""
        heads, latent = self.num_heads, self.config.kv_lora_rank
        c_SC, rope_SR = latent_SW[:, :latent], latent_SW[:, latent:]
        if self.kv_b is not None:
            both_SHX = linear(c_SC, self.kv_b).unflatten(1, (heads, -1))
            nope = self.config.qk_nope_head_dim
            return both_SHX[:, :, :nope], rope_SR, both_SHX[:, :, nope:]
        k_SHN = linear(c_SC, self.w_uk_HNC.flatten(0, 1)).unflatten(1, (heads, -1))
        v_SHV = linear(c_SC, self.w_uv_HVC.flatten(0, 1)).unflatten(1, (heads, -1))
        return k_SHN, rope_SR, v_SHV

    @property
    def _prefix_piece(self) -> int:
        config = self.config
        # Both products, the keys, and keys and values once more as the attention kernel pads them.
        width = config.qk_nope_head_dim + config.v_head_dim + 3 * max(config.qk_head_dim, config.v_head_dim)
        num_bytes = _EXPANDED_PREFIX_BYTES_CPU if self.kv_norm.device.type == "cpu" else _EXPANDED_PREFIX_BYTES
        return max(64, num_bytes // (self.num_heads * width * self.kv_norm.element_size()))


class Block:
    """x + attention(norm x), then x + feed-forward(norm x).

    What a half adds travels beside the sum before it, because the addition is one with the norm that follows.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        dense: bool,
        kernels: KernelChoices = OURS,
        parallel: Parallel = SINGLE,
        routing: Routing | None = None,
    ) -> None:
        fp8 = keeps_fp8(config, dtype, device, parallel.tp.world_size)
        self.eps = config.rms_norm_eps
        self.attention_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.attention = Attention(config, layer, dtype, device, fp8=fp8, kernels=kernels, tp=parallel.tp)
        self.mlp_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.mlp: Mlp | Moe
        if dense:
            self.mlp = Mlp(config.hidden_size, config.intermediate_size, dtype, device, fp8=fp8, kernels=kernels)
        else:
            moe_layer = layer - config.num_dense_layers
            self.mlp = Moe(
                config, dtype, device, fp8=fp8, kernels=kernels, parallel=parallel, layer=moe_layer, routing=routing
            )

    def prefill(
        self, x_TD: Tensor, sum_TD: Tensor | None, rope_T: Tensor, slots_T: Tensor, batch: PrefillBatch, kv_pool: Tensor
    ) -> Half:
        x, sum_TD = self._attention_input(x_TD, sum_TD)
        attended_TD = self.attention.prefill(x, rope_T, slots_T, batch, kv_pool)
        return (yield from self._feed_forward(attended_TD, sum_TD))

    def decode(
        self,
        x_BD: Tensor,
        sum_BD: Tensor | None,
        rope_B: Tensor,
        slots_B: Tensor,
        plan: mla.Plan,
        kv_pool: Tensor,
        num_tokens: int = 1,
        nobody_B: Tensor | None = None,
    ) -> Half:
        x, sum_BD = self._attention_input(x_BD, sum_BD)
        attended_BD = yield from self.attention.decode(x, rope_B, slots_B, plan, kv_pool, num_tokens)
        return (yield from self._feed_forward(attended_BD, sum_BD, nobody_B))

    def store(self, x_TD: Tensor, rope_T: Tensor, slots_T: Tensor, kv_pool: Tensor) -> None:
        """Only this layer's latent rows of these inputs."""
        self.attention.store(self._attention_input(x_TD, None)[0], rope_T, slots_T, kv_pool)

    def _attention_input(self, x_TD: Tensor, sum_TD: Tensor | None) -> tuple[Activations, Tensor]:
        if isinstance(self.attention.qkv_a, Fp8Weight) and not self.attention.gathers_input:
            rows, _, new_sum_TD = rms_norm_quantise(x_TD, self.attention_norm, self.eps, residual_TD=sum_TD)
            return rows, x_TD if new_sum_TD is None else new_sum_TD
        return _add_norm(x_TD, sum_TD, self.attention_norm, self.eps)

    def _feed_forward(self, x_TD: Tensor, sum_TD: Tensor, nobody_T: Tensor | None = None) -> Half:
        if not isinstance(self.attention.qkv_a, Fp8Weight):
            normed_TD, sum_TD = add_rms_norm(x_TD, sum_TD, self.mlp_norm, self.eps)
            if isinstance(self.mlp, Moe):
                return (yield from self.mlp.forward(normed_TD, nobody_T=nobody_T)), sum_TD
            return self.mlp.forward(normed_TD), sum_TD
        routes = isinstance(self.mlp, Moe)
        parts = rms_norm_quantise(x_TD, self.mlp_norm, self.eps, residual_TD=sum_TD, keep=routes)
        rows, kept_TD, new_sum_TD = parts
        assert new_sum_TD is not None
        if isinstance(self.mlp, Moe):
            assert kept_TD is not None
            return (yield from self.mlp.forward(kept_TD, rows, nobody_T)), new_sum_TD
        return self.mlp.forward(rows), new_sum_TD


def _add_norm(x_TD: Tensor, sum_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum); before the first block there is nothing to add to."""
    return (rms_norm(x_TD, weight_D, eps), x_TD) if sum_TD is None else add_rms_norm(x_TD, sum_TD, weight_D, eps)


def _norm_for(product: Weight, x_TD: Tensor, weight_D: Tensor, eps: float) -> Activations:
    """The norm of x as `product` takes it."""
    if isinstance(product, Fp8Weight):
        return rms_norm_quantise(x_TD, weight_D, eps)[0]
    return rms_norm(x_TD, weight_D, eps)


class Head:
    """The output head, the main model's and the MTP layer's."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, tp: Collectives = SINGLE.tp
    ) -> None:
        self.tp = tp
        self.vocab_size = config.vocab_size
        rows = vocabulary_rows(config.vocab_size, tp.world_size)
        self.weight = torch.empty(rows, config.hidden_size, dtype=dtype, device=device)
        # Rows past the vocabulary stay as they are.
        self.weight[max(0, config.vocab_size - tp.rank * rows) :] = 0

    def pack(self) -> None:
        """Once loaded: into the layout that the product reads fastest."""
        self.weight = pack(self.weight)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, vocab_size], fp32, or fp64 of an fp64 model; on a GPU as computed: who wants the best one alone needs no more."""
        logits_NV = gather_columns(self.tp, linear(hidden_ND, self.weight))
        if logits_NV.shape[1] > self.vocab_size:
            logits_NV = logits_NV[:, : self.vocab_size].contiguous()
        return logits_NV if logits_NV.is_cuda or logits_NV.dtype == torch.float64 else logits_NV.to(torch.float32)


class DeepseekV3:
    """One rank's part of the model, of a single rank the whole. Weights are uninitialised until `weights.load_weights` filled them.

    `kv_pool`: [num_pages + 1, config.num_kv_layers, 64, config.latent_width], the last page scratch.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        kernels: KernelChoices = OURS,
        parallel: Parallel = SINGLE,
    ) -> None:
        """Raises ConfigError where the model does not divide as `parallel` asks."""
        parallel.check(config)
        device = torch.device(device)
        self.config = config
        self.parallel = parallel
        self.kernels = kernels
        self.dtype = dtype
        self.embed = new_embedding(config, parallel.tp, dtype, device)
        self.routing = Routing(config, parallel, device) if parallel.experts is not None else None
        of_rank: dict[str, Any] = {"kernels": kernels, "parallel": parallel, "routing": self.routing}
        self.blocks = [
            Block(config, layer, dtype, device, dense=layer < config.num_dense_layers, **of_rank)
            for layer in range(config.num_layers)
        ]
        self.norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.head = Head(config, dtype, device, parallel.tp)
        self.rope = Rope(config, device)
        self.mtp: Mtp | None = None
        if config.num_mtp_layers:
            block = Block(config, config.num_layers, dtype, device, dense=False, **of_rank)
            self.mtp = Mtp(config, block, self.embed, self.head, self.rope, parallel.tp)

    @property
    def expert_slots(self) -> ModelExpertSlots:
        """This rank's experts, for whoever moves them; `routing` is to be told afterwards."""
        blocks = [*self.blocks, *([] if self.mtp is None else [self.mtp.block])]
        return ModelExpertSlots([block.mlp for block in blocks if isinstance(block.mlp, Moe)])

    @property
    def captures_prefill(self) -> bool:
        """Whether `prefill` of batches without `seqs` reads nothing back, on a GPU."""
        config = self.config
        return self.routing is None and has_kernel(
            config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, self.dtype
        )

    def fixed_rows(self, num_rows: int) -> AbstractContextManager[None]:
        """Inside, `decode` of micro-batches of up to so many rows of a DP group can be captured."""
        if self.routing is None:
            return nullcontext()
        return self.routing.fixed(-(-num_rows // self.parallel.tp.world_size))

    def stop_compiling(self) -> None:
        """Steps of every size that is warmed up have run."""
        self.kernels.stop_compiling()

    @torch.inference_mode()
    def prefill(self, batch: PrefillBatch, kv_pool: Tensor) -> Tensor:
        """Store the latents of the batch and return hidden states [T, D] after the final norm."""
        return self.prefill_each([batch], kv_pool)[0]

    @torch.inference_mode()
    def prefill_each(
        self, batches: Sequence[PrefillBatch], kv_pool: Tensor, *, timeline: Timeline | None = None
    ) -> list[Tensor]:
        """`prefill` of one micro-batch, or of two that take turns; a later one may go on where an earlier one ends."""
        passes = [self._prefill(batch, kv_pool) for batch in batches]
        return run(passes, free_sms=self.parallel.free_sms, timeline=timeline)

    @torch.inference_mode()
    def decode(self, batch: DecodeBatch, kv_pool: Tensor) -> Tensor:
        """Store the latents of the tokens, return their hidden states [B, D] (or [B * T, D]) after the final norm."""
        return self.decode_each([batch], kv_pool)[0]

    @torch.inference_mode()
    def decode_each(
        self, batches: Sequence[DecodeBatch], kv_pool: Tensor, *, timeline: Timeline | None = None
    ) -> list[Tensor]:
        """`decode` of one micro-batch, or of two that take turns."""
        passes = [self._decode(batch, kv_pool) for batch in batches]
        return run(passes, ahead=1, free_sms=self.parallel.free_sms, timeline=timeline)

    def _prefill(self, batch: PrefillBatch, kv_pool: Tensor) -> Pass:
        rope_T = self.rope.at(batch.positions_T)
        slots_T = slots(kv_pool, batch.row_ids_T)
        ids_T = local_ids(self.parallel.tp, batch.token_ids_T, self.embed)
        x_TD, sum_TD = scatter_sum(self.parallel.tp, F.embedding(ids_T, self.embed)), None
        for block in self.blocks:
            x_TD, sum_TD = yield from block.prefill(x_TD, sum_TD, rope_T, slots_T, batch, kv_pool)
        return self._final_norm(x_TD, sum_TD, len(slots_T))

    def _decode(self, batch: DecodeBatch, kv_pool: Tensor) -> Pass:
        num_tokens = batch.num_tokens
        last_rows_B = batch.row_ids_B[num_tokens - 1 :: num_tokens]
        config = self.config
        num_columns = config.num_heads // self.parallel.tp.world_size * num_tokens
        plan = mla.plan_decode(
            kv_pool,
            last_rows_B,
            batch.page_table_BP,
            batch.context_lens_B,
            num_tokens=num_tokens,
            num_blocks=mla.num_column_blocks(
                kv_pool, num_columns, latent=config.kv_lora_rank, rope=config.qk_rope_head_dim
            ),
            flash_mla=self.kernels.mla_decode,
        )
        rope_B = self.rope.at(batch.positions_B)
        slots_B = slots(kv_pool, batch.row_ids_B)
        ids_B = local_ids(self.parallel.tp, batch.token_ids_B, self.embed)
        x_BD, sum_BD = scatter_sum(self.parallel.tp, self.embed[ids_B]), None
        nobody_B = None
        if self.routing is not None:
            # What fills up a captured step is nobody's, and would be work for experts elsewhere.
            nobody_B = own_share(self.parallel.tp, batch.row_ids_B >= (kv_pool.shape[0] - 1) * kv_pool.shape[2])
        for block in self.blocks:
            x_BD, sum_BD = yield from block.decode(x_BD, sum_BD, rope_B, slots_B, plan, kv_pool, num_tokens, nobody_B)
        return self._final_norm(x_BD, sum_BD, len(slots_B))

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """`Head.logits`, [N, vocab_size]; ids past the tokenizer's are the sampler's to mask."""
        return self.head.logits(hidden_ND)

    def _final_norm(self, x_TD: Tensor, sum_TD: Tensor | None, num_tokens: int) -> Tensor:
        """Of this rank's share; [num_tokens, D] of the group."""
        return gather(self.parallel.tp, _add_norm(x_TD, sum_TD, self.norm, self.config.rms_norm_eps)[0], num_tokens)
