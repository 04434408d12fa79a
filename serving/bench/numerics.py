"""`baton bench numerics`: how far FP8 activations take a model's logits from those of the same weights in bf16.

    FP8 model -> its weights dequantised, in bf16: the reference -> in fp32: what bf16 itself is held against
    random prompts prefilled in one batch, then tokens decoded one by one, the same for all -> logits of every position

The weights of all three are the checkpoint's, so what counts is what the engine does to them: activations in e4m3, one scale a
row and 128 columns. Each pair is compared twice. With their own experts: where two experts' scores lie closer than rounding,
the two models take different ones and compute different functions from there on, bf16 beside fp32 as well; this is what the
gate is held against. With the same experts: the one compared takes those that the reference took, weighted by its own scores,
so only arithmetic differs. The control leaves out one block's feed-forward, and must be several times as far away as that.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.layout import PAGE_TOKENS
from serving.bench.options import count, counts
from serving.bench.report import provenance, write_report
from serving.bench.shapes import random_prompts
from serving.core.config import KernelsTable
from serving.core.errors import ConfigError
from serving.kernels.packed import packing
from serving.kernels.quant import BLOCK, Fp8Weight, dequantise_block_fp8
from serving.model.batch import DecodeBatch, PrefillBatch, SeqChunk
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import Attention, Block, DeepseekV3, Head
from serving.model.experts import Mlp, Moe
from serving.model.kernels import choose_kernels
from serving.model.progress import ConsoleProgress
from serving.model.weight import keeps_fp8
from serving.model.weights import load_weights

GATE = 0.999
"""Least mean cosine, each with its own experts."""
CONTROL_FARTHER = 4
"""How many times as far from 1 as FP8 with the same experts a model that is wrong by one feed-forward must be; what can't tell it holds nothing."""
_OWN, _SAME, _CONTROL = "fp8, own experts", "fp8, same experts", "control"
# Rows of logits that are compared in fp64 at a time.
_PIECE = 256


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Cosines of two models' logits, position by position, and the share of positions whose likeliest token is the same."""

    what: str
    part: str
    positions: int
    mean: float
    least: float
    same_likeliest: float


@dataclass(frozen=True, kw_only=True)
class Choices:
    """One MoE layer over all positions: load of the reference's fullest expert, and shares of positions where one expert or more differs."""

    layer: int
    max_over_mean: float
    fp8_parted: float
    bf16_parted: float


@dataclass(frozen=True, kw_only=True)
class Said:
    """Logits fp32 [positions, V] of prefill and of decode, and of each MoE layer the experts [positions, K], sorted."""

    prefill: Tensor
    decode: Tensor
    experts: list[Tensor]


class _Routed(Moe):
    """A gate that notes what it chooses, or takes what it is told. One tensor [T, K] a call."""

    noted: list[Tensor]
    told: Iterator[Tensor] | None

    @classmethod
    def of(cls, moe: Moe, told: Iterator[Tensor] | None) -> _Routed:
        """Over the same weights."""
        routed = cls.__new__(cls)
        vars(routed).update(vars(moe), noted=[], told=told)
        return routed

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        if self.told is None:
            experts_TK, weights_TK = super().choose(x_TD)
        else:
            experts_TK = next(self.told)
            weights_TK = self._gate_logits(x_TD).sigmoid().gather(1, experts_TK)
            if self.config.norm_topk_prob:
                weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
            weights_TK = weights_TK * self.config.routed_scaling_factor
        self.noted.append(experts_TK)
        return experts_TK, weights_TK


def say(
    model: DeepseekV3, prompts: Sequence[Sequence[int]], num_decoded: int, told: list[Tensor] | None = None
) -> Said:
    """Prefill all but the last `num_decoded` tokens of each prompt in one batch, then decode those, a step a token.

    `told`: a `Said.experts` to follow instead of the gates.
    """
    counts = [len(prompt) - num_decoded for prompt in prompts]
    sizes = [sum(counts)] + [len(prompts)] * num_decoded
    model = copy.copy(model)
    model.blocks = [copy.copy(block) for block in model.blocks]
    routed: list[_Routed] = []
    for block in model.blocks:
        if isinstance(block.mlp, Moe):
            steps = iter(told[len(routed)].split(sizes)) if told is not None else None
            block.mlp = _Routed.of(block.mlp, steps)
            routed.append(block.mlp)
    prefill, decode = _logits(model, prompts, counts)
    return Said(prefill=prefill, decode=decode, experts=[torch.cat(moe.noted).sort(dim=1)[0] for moe in routed])


def _logits(model: DeepseekV3, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first `counts` tokens of each prompt are prefilled."""
    config, device = model.config, model.embed.device
    num_pages = -(-max(map(len, prompts)) // PAGE_TOKENS)
    table_BP = torch.arange(len(prompts) * num_pages, device=device).view(-1, num_pages)
    shape = table_BP.numel() + 1, config.num_kv_layers, PAGE_TOKENS, config.latent_width
    pool = torch.zeros(shape, dtype=model.dtype, device=device)
    first_row_B = table_BP[:, 0] * PAGE_TOKENS
    starts = torch.tensor([0, *counts]).cumsum(0)
    positions_T = torch.cat([torch.arange(num_tokens, device=device) for num_tokens in counts])
    batch = PrefillBatch(
        token_ids_T=torch.tensor([t for prompt, n in zip(prompts, counts, strict=True) for t in prompt[:n]]).to(device),
        positions_T=positions_T,
        row_ids_T=positions_T + first_row_B.repeat_interleave(torch.tensor(counts, device=device)),
        starts=starts.to(device, torch.int32),
        seqs=tuple(
            SeqChunk(offset=int(starts[i]), num_tokens=n, context_len=0, page_ids=table_BP[i])
            for i, n in enumerate(counts)
        ),
    )
    prefill_TV = model.logits(model.prefill(batch, pool))
    position_B = torch.tensor(counts, device=device)
    decoded = []
    for step in range(len(prompts[0]) - counts[0]):
        ids = [prompt[n + step] for prompt, n in zip(prompts, counts, strict=True)]
        next_batch = DecodeBatch(
            token_ids_B=torch.tensor(ids, device=device),
            positions_B=position_B + step,
            row_ids_B=first_row_B + position_B + step,
            page_table_BP=table_BP,
            context_lens_B=position_B + step + 1,
        )
        decoded.append(model.logits(model.decode(next_batch, pool)))
    return prefill_TV, torch.cat(decoded)


def widened(model: DeepseekV3, dtype: torch.dtype) -> DeepseekV3:
    """The same model with every weight in `dtype`, bf16 or fp32; what is in it already is shared."""
    wide: DeepseekV3 = _widened(model, dtype)
    wide.dtype = dtype
    return wide


def _widened(part: Any, dtype: torch.dtype) -> Any:
    if isinstance(part, Fp8Weight):
        return _dequantised(part, dtype)
    if isinstance(part, Tensor):
        return part.to(dtype) if part.dtype == torch.bfloat16 else part
    if isinstance(part, list):
        return [_widened(each, dtype) for each in part]
    if not isinstance(part, DeepseekV3 | Block | Attention | Mlp | Moe | Head):
        return part
    twin = copy.copy(part)
    for name, value in vars(part).items():
        setattr(twin, name, _widened(value, dtype))
    return twin


def _dequantised(weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """[N, K] or [E, N, K]."""
    if weight.quantised.dim() == 2:
        return dequantise_block_fp8(weight.quantised, weight.scales, (BLOCK, BLOCK), dtype)
    wide = torch.empty(weight.shape, dtype=dtype, device=weight.quantised.device)
    for into, quantised, scales in zip(wide, weight.quantised, weight.scales, strict=True):
        into.copy_(dequantise_block_fp8(quantised, scales, (BLOCK, BLOCK), dtype))
    return wide


def without_feed_forward(model: DeepseekV3, layer: int) -> DeepseekV3:
    """The FP8 model with one block whose feed-forward adds nothing."""
    less = copy.copy(model)
    less.blocks = list(model.blocks)
    less.blocks[layer] = block = copy.copy(model.blocks[layer])
    block.mlp = copy.copy(block.mlp)
    block.mlp.down = _zeroed(block.mlp.down)
    if isinstance(block.mlp, Moe):
        assert block.mlp.shared is not None, "a single rank"
        block.mlp.shared = copy.copy(block.mlp.shared)
        block.mlp.shared.down = _zeroed(block.mlp.shared.down)
    return less


def _zeroed(weight: Any) -> Fp8Weight:
    assert isinstance(weight, Fp8Weight)
    return replace(weight, scales=torch.zeros_like(weight.scales))


def agreements(what: str, said: Said, reference: Said) -> list[Agreement]:
    pairs = {"prefill": (said.prefill, reference.prefill), "decode": (said.decode, reference.decode)}
    return [_agreement(what, part, *pair) for part, pair in pairs.items()]


def _agreement(what: str, part: str, said_NV: Tensor, reference_NV: Tensor) -> Agreement:
    pieces = zip(said_NV.split(_PIECE), reference_NV.split(_PIECE), strict=True)
    cosine_N = torch.cat([F.cosine_similarity(a.double(), b.double(), dim=1) for a, b in pieces])
    same_N = said_NV.argmax(dim=1) == reference_NV.argmax(dim=1)
    return Agreement(
        what=what,
        part=part,
        positions=len(cosine_N),
        mean=cosine_N.mean().item(),
        least=cosine_N.min().item(),
        same_likeliest=same_N.double().mean().item(),
    )


def compare(
    model: DeepseekV3, prompts: Sequence[Sequence[int]], num_decoded: int
) -> tuple[list[Agreement], list[Choices]]:
    """Everything that the command reports of an FP8 model."""
    middle = len(model.blocks) // 2
    bf16 = widened(model, torch.bfloat16)
    reference = say(bf16, prompts, num_decoded)
    own = say(model, prompts, num_decoded)
    found = agreements(_OWN, own, reference)
    found += agreements(_SAME, say(model, prompts, num_decoded, reference.experts), reference)
    exact = say(widened(model, torch.float32), prompts, num_decoded)
    found += agreements("bf16 to fp32, same experts", say(bf16, prompts, num_decoded, exact.experts), exact)
    found += agreements("bf16 to fp32, own experts", reference, exact)
    silent = without_feed_forward(model, middle)
    found += agreements(_CONTROL, say(silent, prompts, num_decoded, reference.experts), reference)
    first = model.config.num_dense_layers
    layers = zip(own.experts, reference.experts, exact.experts, strict=True)
    choices = [
        Choices(
            layer=first + index,
            max_over_mean=torch.bincount(b.flatten()).max().item() * model.config.num_routed_experts / b.numel(),
            fp8_parted=_parted(a, b),
            bf16_parted=_parted(b, c),
        )
        for index, (a, b, c) in enumerate(layers)
    ]
    return found, choices


def holds(found: Sequence[Agreement]) -> bool:
    """In prefill and in decode."""

    def means(what: str) -> list[float]:
        return [each.mean for each in found if each.what == what]

    nearest = (1 - mean for mean in means(_CONTROL))
    return min(means(_OWN)) >= GATE and min(nearest) >= CONTROL_FARTHER * (1 - min(means(_SAME)))


def _parted(experts_TK: Tensor, others_TK: Tensor) -> float:
    return (experts_TK != others_TK).any(dim=1).double().mean().item()


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: gate or control missed."""
    options = _parse(argv)
    device = torch.device(options.device)
    config = ModelConfig.from_folder(options.model)
    if not keeps_fp8(config, torch.bfloat16, device):
        raise ConfigError(
            f"{options.model}: its weights do not stay FP8 on {device.type}; this needs a GPU and a model with scales of 128x128, "
            "for one: baton bench make-checkpoint --shape lite-fp8"
        )
    report = provenance(["baton", "bench", "numerics", *argv])
    kernels = choose_kernels(KernelsTable(), config, torch.bfloat16, device)
    with packing(False):
        model = load_weights(
            options.model,
            config,
            torch.bfloat16,
            device,
            kernels=kernels,
            progress=ConsoleProgress(sys.stderr, "loading"),
        )
    lengths = [length + options.decode for length in options.lengths]
    prompts = [random_prompts(1, n, config.vocab_size, options.seed + i)[0] for i, n in enumerate(lengths)]
    found, choices = compare(model, prompts, options.decode)
    for each in found:
        print(
            f"{each.what:<28}{each.part:<9}cosine mean {each.mean:.5f}, least {each.least:.5f}; "
            f"likeliest token the same {each.same_likeliest:.1%} of {each.positions}",
            file=sys.stderr,
        )
    passed = holds(found)
    report |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "kernel_choices": kernels.names(),
        "model": str(options.model),
        "prompt_tokens": options.lengths,
        "decoded_tokens": options.decode,
        "seed": options.seed,
        "agreements": [asdict(each) for each in found],
        "experts": [asdict(each) for each in choices],
        "gate": {"own_experts": GATE, "control_farther": CONTROL_FARTHER},
        "passed": passed,
    }
    write_report(report, options.out)
    return 0 if passed else 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="baton bench numerics",
        description="Logits of an FP8 model beside those of its weights in bf16, by cosine.",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a folder with FP8 weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=counts, default=[256, 512, 768, 1024], help="tokens prefilled of each prompt")
    parser.add_argument("--decode", type=count, default=32, help="tokens decoded after each prompt (32)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here instead of standard output")
    return parser.parse_args(argv)
