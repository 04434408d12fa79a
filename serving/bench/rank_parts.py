"""The parts of a step of one rank: what each computes and moves at the least, and a call of each alone.

A part's bound is the larger of its products at the ceiling of their kind and its bytes at that of a copy. In the sum stand products,
attention, and what travels between ranks (read here, written here). Norms and quantisation pass over the activations once more; they
are measured but are not in the sum, nor are copies that sort rows by expert or rank.

Legend: T tokens of the TP group, S of them this rank's share, D hidden, H heads, C latent, R rope, N any width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.layout import PAGE_TOKENS
from serving.bench.kernel_cases.stage import Bound
from serving.kernels import mla
from serving.kernels.attention import attend_varlen
from serving.kernels.gemm import linear, linear_by_head, per_head
from serving.kernels.norm_rope import rms_norm, rms_norm_quantise
from serving.kernels.quant import Fp8Weight, QuantisedRows, quantise_rows_fp8
from serving.model.deepseek_v3 import Attention, DeepseekV3
from serving.model.experts import Mlp, Moe
from serving.model.parallel import Parallel, gather, local_ids, scatter_sum, shares
from serving.model.weight import Weight
from serving.parallel.dispatch import Arrived, Dispatch, Returning, Sending
from serving.parallel.hops import X, members_wanted, payloads_of

Role = Literal["prefill", "decode"]
_EPS = 1e-6
# Sets of weights that a part of many tokens goes through: what is beyond is activations.
_PREFILL_SETS = 4


@dataclass(frozen=True, kw_only=True)
class Part:
    """`call`: of one of `num_sets` layers. `layers`: how many of a step have it. `flops` of products of kind `bound`, and bytes, of one."""

    name: str
    layers: int
    call: Callable[[int], object]
    num_sets: int
    num_bytes: float
    flops: float = 0.0
    bound: Bound = "fp8"
    in_sum: bool = True

    def least_s(self, ceiling: Mapping[Bound, float]) -> float:
        """Of one layer."""
        return max(self.flops / ceiling[self.bound], self.num_bytes / ceiling["copy"])


@dataclass(frozen=True, kw_only=True)
class Step:
    """`num_seqs` sequences of the TP group, each of `context` tokens: prompts of that length, or one token behind as many."""

    role: Role
    num_seqs: int
    context: int

    @property
    def num_tokens(self) -> int:
        """Of the TP group."""
        return self.num_seqs * (self.context if self.role == "prefill" else 1)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What comes to this rank's experts in a layer: rows, and pairs of a row and an expert. `sent`: copies of rows that leave for experts."""

    sent: float
    rows: float
    pairs: float


class Parts:
    """Of one rank's model and pool. Activations are random; routing is what the gates make of them. `load`: of the step, which the least that
    experts cost is for."""

    def __init__(
        self, model: DeepseekV3, kv_pool: Tensor, step: Step, arrived_bytes: Counter[tuple[str, str]], load: Load
    ) -> None:
        self._model, self._config, self._kv_pool, self._step = model, model.config, kv_pool, step
        self._arrived_bytes = arrived_bytes
        self._device = kv_pool.device
        self._some = torch.Generator(self._device).manual_seed(0)
        self._T = step.num_tokens
        self._S = shares(self._T, model.parallel.tp.world_size)[model.parallel.tp.rank]
        most = _PREFILL_SETS if step.role == "prefill" else len(model.blocks)
        self._blocks = model.blocks[-most:]
        self._moes = [block.mlp for block in self._blocks if isinstance(block.mlp, Moe)]
        self._load = load

    @property
    def share(self) -> int:
        """Tokens of this rank."""
        return self._S

    @property
    def balanced_pairs(self) -> int:
        """Pairs of a row and an expert that a rank gets if all get as many."""
        return self._S * (self._config.num_experts_per_token + self._model.parallel.shared_is_routed)

    def __iter__(self) -> Iterator[Part]:
        """Each is to be run before the next is made: together they would not fit."""
        yield from self._once()
        yield from self._attention()
        yield self._norms()
        dense = [block.mlp for block in self._model.blocks if isinstance(block.mlp, Mlp)]
        if dense:
            yield self._mlp("dense MLP", dense, len(dense))
        if not self._moes:
            return
        num_layers = len(self._model.blocks) - len(dense)
        yield self._gate(num_layers)
        with self._as_captured():
            yield from self._experts(num_layers)
        shared = [moe.shared for moe in self._moes if moe.shared is not None]
        if shared:
            yield self._mlp("shared expert", shared, num_layers)

    def _once(self) -> Iterator[Part]:
        model, tp = self._model, self._model.parallel.tp
        ids_T = torch.randint(
            len(model.embed) - 1, (self._T,), generator=self._some, device=self._device, dtype=torch.int64
        )
        row = model.embed[0].nbytes

        def embedding(_: int) -> Tensor:
            return scatter_sum(tp, F.embedding(local_ids(tp, ids_T, model.embed), model.embed))

        # Looked up, and the sum of as many rows as there are ranks.
        arriving = self._S * tp.world_size if tp.world_size > 1 else 0
        yield Part(
            name="embedding", layers=1, call=embedding, num_sets=1, num_bytes=row * (self._T + arriving + self._S)
        )
        hidden_ND = self._randn(self._step.num_seqs, self._config.hidden_size)
        head = model.head.weight
        yield Part(
            name="head",
            layers=1,
            call=lambda _: model.logits(hidden_ND),
            num_sets=1,
            num_bytes=head.nbytes + hidden_ND.nbytes,
            flops=2.0 * head.numel() * len(hidden_ND),
            bound="bf16",
        )

    def _attention(self) -> Iterator[Part]:
        tp, layers = self._model.parallel.tp, len(self._model.blocks)
        attentions = [block.attention for block in self._blocks]
        first = attentions[0]
        x_S = _rows_for(first.qkv_a, self._randn(self._S, self._config.hidden_size))
        yield self._product("W_qkv_a", [each.qkv_a for each in attentions], x_S, layers)
        both_SN = self._randn(self._S, first.qkv_a.shape[0])
        if tp.world_size > 1:
            yield Part(
                name="all-gather",
                layers=layers,
                call=lambda _: gather(tp, both_SN, self._T),
                num_sets=1,
                num_bytes=2 * self._T * both_SN[0].nbytes,
            )
        if first.q_b is not None:
            q_TN = self._randn(self._T, first.query_rows)
            weights = [each.q_b for each in attentions if each.q_b is not None]
            norms = [each.q_norm for each in attentions if each.q_norm is not None]

            def q_b(index: int) -> Tensor:
                weight = weights[index]
                if isinstance(weight, Fp8Weight):
                    return linear(rms_norm_quantise(q_TN, norms[index], _EPS)[0], weight)
                return linear(rms_norm(q_TN, norms[index], _EPS), weight)

            yield self._weighed("norm, W_q_b", layers, q_b, [[weight] for weight in weights], self._T)
        yield from (
            self._prefill(attentions, layers) if self._step.role == "prefill" else self._decode(attentions, layers)
        )
        out_TN = self._randn(self._T, first.out.shape[1])
        # The decode kernels before it quantise what they write.
        rows_T = _rows_for(first.out, out_TN) if self._step.role == "decode" else out_TN
        yield self._product("W_o", [each.out for each in attentions], rows_T, layers)
        del out_TN, rows_T
        if tp.world_size > 1:
            sums_TD = self._randn(self._T, self._config.hidden_size)
            yield Part(
                name="reduce-scatter",
                layers=layers,
                call=lambda _: scatter_sum(tp, sums_TD),
                num_sets=1,
                num_bytes=sums_TD.nbytes + self._S * sums_TD[0].nbytes,
            )

    def _prefill(self, attentions: list[Attention], layers: int) -> Iterator[Part]:
        config, heads, step = self._config, attentions[0].num_heads, self._step
        nope, latent = config.qk_nope_head_dim, config.kv_lora_rank
        c_TC = self._randn(self._T, latent)
        kv_b = [each.kv_b for each in attentions if each.kv_b is not None]
        if kv_b:
            yield self._product("W_kv_b", [*kv_b], c_TC, layers)
        keys_THN = self._randn(self._T, heads, nope + config.v_head_dim)
        q_THN = self._randn(self._T, heads, config.qk_head_dim)
        rope_TR = self._randn(self._T, config.qk_rope_head_dim)
        ends = torch.arange(0, self._T + 1, step.context, dtype=torch.int32, device=self._device)

        def attend(_: int) -> Tensor:
            keys = keys_THN[:, :, :nope], rope_TR, keys_THN[:, :, nope:]
            return attend_varlen(q_THN, *keys, ends, ends, scale=config.softmax_scale, causal=True)[0]

        seen = step.num_seqs * step.context * (step.context + 1) / 2
        yield Part(
            name="attention",
            layers=layers,
            call=attend,
            num_sets=1,
            num_bytes=q_THN.nbytes + keys_THN.nbytes + rope_TR.nbytes + self._T * heads * config.v_head_dim * 2,
            flops=2.0 * heads * seen * (config.qk_head_dim + config.v_head_dim),
            bound="bf16",
        )

    def _decode(self, attentions: list[Attention], layers: int) -> Iterator[Part]:
        config, heads, step, pool = self._config, attentions[0].num_heads, self._step, self._kv_pool
        nope, latent = config.qk_nope_head_dim, config.kv_lora_rank
        q_BHN = self._randn(self._T, heads, config.qk_head_dim)
        q_BHW = self._randn(self._T, heads, config.latent_width)
        out_BHC = self._randn(self._T, heads, latent)

        def absorb(index: int) -> Tensor | QuantisedRows:
            each = attentions[index]
            per_head(q_BHN[:, :, :nope], each.w_uk_HNC, q_BHW[:, :, :latent])
            return linear_by_head(out_BHC, each.w_uv_HVC, quantise=isinstance(each.out, Fp8Weight))

        weight = attentions[0].w_uk_HNC.nbytes + attentions[0].w_uv_HVC.nbytes
        yield Part(
            name="W_uk, W_uv",
            layers=layers,
            call=absorb,
            num_sets=len(attentions),
            num_bytes=weight + q_BHN.nbytes + q_BHW.nbytes + 2 * out_BHC.nbytes,
            flops=2.0 * self._T * heads * latent * (nope + config.v_head_dim),
            bound="bf16",
        )
        num_pages = -(-step.context // PAGE_TOKENS)
        pages = torch.randperm(len(pool) - 1, generator=self._some, device=self._device)[: self._T * num_pages]
        table_BP = pages.view(self._T, num_pages).to(torch.int32 if pool.is_cuda else torch.int64)
        lens_B = torch.full((self._T,), step.context, dtype=torch.int32, device=self._device)
        last_B = table_BP[:, -1].long() * PAGE_TOKENS + (step.context - 1) % PAGE_TOKENS
        blocks = mla.num_column_blocks(pool, heads, latent=latent, rope=config.qk_rope_head_dim)
        plan = mla.plan_decode(pool, last_B, table_BP, lens_B, num_blocks=blocks)

        def attend(index: int) -> Tensor:
            layer = attentions[index].layer
            return mla.decode_latent(q_BHW, pool, layer, plan, latent=latent, scale=config.softmax_scale)[0]

        yield Part(
            name="attention",
            layers=layers,
            call=attend,
            num_sets=len(attentions),
            num_bytes=self._T * step.context * pool[0, 0, 0].nbytes + q_BHW.nbytes + out_BHC.nbytes,
            flops=2.0 * self._T * heads * step.context * (config.latent_width + latent),
            bound="bf16",
        )

    def _norms(self) -> Part:
        """The two of a layer, with what is added before them; quantised where weights are FP8."""
        config = self._config
        x_SD, sum_SD = self._randn(self._S, config.hidden_size), self._randn(self._S, config.hidden_size)
        blocks, fp8 = self._blocks, isinstance(self._blocks[0].attention.qkv_a, Fp8Weight)

        def norms(index: int) -> None:
            for weight, keep in ((blocks[index].attention_norm, not fp8), (blocks[index].mlp_norm, True)):
                rms_norm_quantise(x_SD, weight, _EPS, residual_TD=sum_SD, keep=keep)

        passes = 2 * (2 + 1) * x_SD.nbytes + x_SD.nbytes + 2 * x_SD.numel()
        return Part(
            name="norms",
            layers=len(self._model.blocks),
            call=norms,
            num_sets=len(blocks),
            num_bytes=passes,
            in_sum=False,
        )

    def _gate(self, layers: int) -> Part:
        moes, x_SD = self._moes, self._randn(self._S, self._config.hidden_size)
        gate = moes[0].gate
        return Part(
            name="gate",
            layers=layers,
            call=lambda index: moes[index].choose(x_SD)[1],
            num_sets=len(moes),
            num_bytes=gate.nbytes + x_SD.nbytes,
            flops=2.0 * gate.numel() * self._S,
            bound="bf16",
        )

    def _experts(self, layers: int) -> Iterator[Part]:
        """Dispatch and combine, and the experts on what a dispatch brings."""
        model, moes, decodes = self._model, self._moes, self._step.role == "decode"
        routing, placement = model.routing, model.parallel.placement
        assert routing is not None
        assert placement is not None
        x_SD = self._randn(self._S, self._config.hidden_size)
        rows = _rows_for(moes[0].gate_up, x_SD)
        chosen = [moe.choose(x_SD) for moe in moes]
        before = self._travelled()
        sending = routing.send(moes[0].layer, rows, *chosen[0])
        arrived = _kept(sending.wait())
        num_rows = len(payloads_of(arrived.x_RD)[0])
        y_RD = torch.zeros(num_rows, self._config.hidden_size, dtype=model.dtype, device=self._device)
        routing.give_back(sending, y_RD).wait()
        travelled = self._travelled() - before
        here_RK = arrived.slots_RK >= 0
        num_used = int(arrived.slots_RK[here_RK].unique().numel())
        row = sum(payload[0].nbytes for payload in payloads_of(rows))
        result = self._config.hidden_size * model.dtype.itemsize
        if decodes:
            # What is sent to nobody need not travel.
            picks = chosen[0][0].shape[1] + model.parallel.shared_is_routed
            travelled = round(self._load.sent * (row + 8 * picks + result))

        def there_and_back(index: int) -> Tensor:
            sending = routing.send(moes[index].layer, rows, *chosen[index])
            sending.wait()
            return routing.give_back(sending, y_RD).wait()

        num_sets = len(moes) if decodes else 1
        yield Part(
            name="dispatch, combine", layers=layers, call=there_and_back, num_sets=num_sets, num_bytes=2 * travelled
        )
        one = moes[0].expert(0)
        yield Part(
            name="experts",
            layers=layers,
            call=lambda index: moes[index].compute(arrived),
            num_sets=len(moes),
            num_bytes=_nbytes(one) * num_used + self._load.rows * (row + result),
            flops=2.0 * self._load.pairs * 3 * self._config.moe_intermediate_size * self._config.hidden_size,
            bound=_kind(one),
        )

    def _mlp(self, name: str, mlps: Sequence[Mlp], layers: int) -> Part:
        x_S = _rows_for(mlps[0].gate_up, self._randn(self._S, self._config.hidden_size))
        both = [[mlp.gate_up, mlp.down] for mlp in mlps]
        return self._weighed(name, layers, lambda index: mlps[index].forward(x_S), both, self._S)

    def _product(self, name: str, weights: Sequence[Weight], x_TN: Tensor | QuantisedRows, layers: int) -> Part:
        num_rows = len(x_TN.values if isinstance(x_TN, QuantisedRows) else x_TN)
        call = partial(_multiply, x_TN, weights)
        return self._weighed(name, layers, call, [[weight] for weight in weights], num_rows)

    def _weighed(
        self, name: str, layers: int, call: Callable[[int], object], weights: Sequence[list[Weight]], num_rows: int
    ) -> Part:
        """Products of `num_rows` rows; what goes in and comes out counts at a value's size in the weights and in the model."""
        one = weights[0]
        values = sum(
            weight.shape[0] * self._model.dtype.itemsize + weight.shape[1] * _itemsize(weight) for weight in one
        )
        return Part(
            name=name,
            layers=layers,
            call=call,
            num_sets=len(weights),
            num_bytes=_nbytes(one) + num_rows * values,
            flops=2.0 * num_rows * sum(weight.shape[0] * weight.shape[1] for weight in one),
            bound=_kind(one),
        )

    def _as_captured(self) -> AbstractContextManager[None]:
        """The dispatch that the step has."""
        if self._step.role == "prefill" or self._device.type == "cpu":
            return nullcontext()
        return self._model.fixed_rows(self._T)

    def _travelled(self) -> int:
        return sum(number for (_, operation), number in self._arrived_bytes.items() if operation == "all_to_all")

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._some, device=self._device, dtype=self._model.dtype)


class Watched:
    """A dispatch that notes what leaves, and what comes here if all ranks of the group send what this one does."""

    def __init__(self, dispatch: Dispatch, parallel: Parallel) -> None:
        assert parallel.placement is not None
        self._dispatch = dispatch
        self._placement = parallel.placement
        self._ep_rank = parallel.ep_rank
        self._seen: list[Tensor] = []

    def send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Sending[X]:
        ranks_TK = torch.where(slots_TK >= 0, slots_TK // self._placement.slots_per_gpu, -1)
        here_TK = ranks_TK == self._ep_rank
        sent = members_wanted(ranks_TK, self._placement.num_gpus).sum()
        self._seen.append(torch.stack([sent, here_TK.any(1).sum(), here_TK.sum()]))
        return self._dispatch.send(x, slots_TK, weights_TK)

    def give_back(self, sending: Sending[X], y_RD: Tensor, added_TD: Tensor | None = None) -> Returning:
        return self._dispatch.give_back(sending, y_RD, added_TD)

    def loads(self) -> list[Load]:
        """Of each exchange."""
        number = self._placement.num_gpus
        return [
            Load(sent=sent, rows=number * rows, pairs=number * pairs)
            for sent, rows, pairs in torch.stack(self._seen).tolist()
        ]


def _kept(arrived: Arrived[Tensor | QuantisedRows]) -> Arrived[Tensor | QuantisedRows]:
    """What the next exchange does not write over; FP8 rows as their layout asks."""
    x = arrived.x_RD
    kept = (
        QuantisedRows(values=x.values.clone(), scales=x.scales.clone()) if isinstance(x, QuantisedRows) else x.clone()
    )
    return replace(arrived, x_RD=kept, slots_RK=arrived.slots_RK.clone(), weights_RK=arrived.weights_RK.clone())


def _multiply(x_TN: Tensor | QuantisedRows, weights: Sequence[Weight], index: int) -> Tensor:
    return linear(x_TN, weights[index])


def _rows_for(weight: Weight | list[Tensor], x_TN: Tensor) -> Tensor | QuantisedRows:
    """As the model passes it to a product with `weight`."""
    return quantise_rows_fp8(x_TN) if isinstance(weight, Fp8Weight) else x_TN


def _nbytes(weights: Sequence[Weight]) -> int:
    return sum(
        weight.quantised.nbytes + weight.scales.nbytes
        if isinstance(weight, Fp8Weight)
        else weight.numel() * weight.itemsize
        for weight in weights
    )


def _itemsize(weight: Weight) -> int:
    return 1 if isinstance(weight, Fp8Weight) else weight.itemsize


def _kind(weights: Sequence[Weight]) -> Bound:
    return "fp8" if isinstance(weights[0], Fp8Weight) else "bf16"
