"""A model filled with random weights where it lies: no folder, no copy, gigabytes a second on a GPU.

Each tensor of a checkpoint is drawn from a seed of its own, made from the run's seed and the tensor's name. So ranks that hold the same
expert hold the same bytes, and those of a TP group hold parts of the same matrices, whatever else each of them holds. Scaled as
`serving.bench.shapes` says; rounded, and quantised in blocks, as a published folder of the model would have been.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from serving.bench.shapes import SPREADING, Scales, random_weight, residual_scale
from serving.kernels.quant import dequantise_block_fp8, quantise_block_fp8
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.names import Target, name_tables


@torch.inference_mode()
def fill_random(model: DeepseekV3, seed: int) -> None:
    """Every weight that this rank keeps, drawn on its device; devices of one kind draw the same. Once, instead of `load_weights`.

    A weight is drawn whole before its part is kept: the largest takes 4 bytes a value for a moment, and as much again to quantise.
    """
    for pack, targets in name_tables(model):
        while targets:
            name = next(iter(targets))
            # The views die before the part takes its final layout.
            target = targets.pop(name)
            if target.repeats is None and target.into.numel():
                fill_weight(model, name, target, seed)
        if pack is not None:
            pack()


def fill_weight(model: DeepseekV3, name: str, target: Target, seed: int) -> None:
    """One tensor of the checkpoint, or this rank's part of it."""
    scales = Scales(gate_bias=SPREADING, residual=residual_scale(model.config.num_layers))
    generator = torch.Generator(target.into.device).manual_seed(_seed_of(seed, name))
    _store(model, target, random_weight(name, torch.Size(target.shape), generator, scales))


def _seed_of(seed: int, name: str) -> int:
    """Unlike those of its neighbours."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


def _store(model: DeepseekV3, target: Target, drawn: Tensor) -> None:
    """`drawn`: fp32, the whole tensor."""
    block = model.config.weight_block_size
    if not (target.quantised and block):
        # The bias that is added to the gate's scores is published in fp32, all else in the model's dtype.
        stored = drawn if drawn.dim() == 1 and target.into.dtype == torch.float32 else drawn.to(model.dtype)
        target.into.copy_(_part(stored, target, (1, 1)))
        return
    quantised, scales = quantise_block_fp8(drawn, block)
    if target.scales is None:
        target.into.copy_(_part(dequantise_block_fp8(quantised, scales, block, target.into.dtype), target, (1, 1)))
    else:
        target.into.copy_(_part(quantised, target, (1, 1)))
        target.scales.copy_(_part(scales, target, block))


def _part(whole: Tensor, target: Target, block: tuple[int, int]) -> Tensor:
    """What this rank keeps of a tensor of values, or of one of scales: a value stands for a block then."""
    if whole.dim() == 1:
        return whole
    (top, left), (num_rows, num_columns) = target.at, target.into.shape
    rows = slice(top // block[0], -(-(top + num_rows) // block[0]))
    return whole[rows, left // block[1] : -(-(left + num_columns) // block[1])]
