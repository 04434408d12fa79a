"""`baton bench make-checkpoint`: a model of a named shape with random weights, written where it is used.

Drawn on the GPU where there is one. Random weights are of use only if their gate spreads tokens over the experts as a
trained one does, so the command says how it does: every MoE layer's gate sees random tokens' embeddings behind the layer's
norm. That is about what they see in a prompt too: all that the blocks before a layer add stays smaller than the embedding.
`baton bench numerics` says how prompts spread.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from serving.bench.report import provenance, write_report
from serving.bench.shapes import SHAPES, checkpoint_bytes, write_checkpoint
from serving.core.errors import ConfigError
from serving.kernels.norm_rope import rms_norm
from serving.kernels.topk import gate_topk
from serving.model.config import ModelConfig
from serving.model.progress import ConsoleProgress

# Tokens the gates are shown.
_NUM_TOKENS = 8192
# Headers, config.json and the index.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How one layer's gate spreads tokens. `entropy`: of the experts' shares, 1 is even; `max_over_mean`: load of the fullest."""

    layer: int
    entropy: float
    max_over_mean: float


class GateSpread:
    """Sees the weights go by in the order of the model, and keeps what the gates need of them."""

    def __init__(self, config: ModelConfig, seed: int, num_tokens: int = _NUM_TOKENS) -> None:
        self.layers: list[Spread] = []
        self._config = config
        generator = torch.Generator().manual_seed(seed)
        self._token_ids = torch.randint(config.vocab_size, (num_tokens,), generator=generator)
        self._x_TD = self._normed_TD = self._logits_TE = torch.empty(0)

    def see(self, name: str, weight: Tensor) -> None:
        """Weights in fp32, embedding first, a layer's norm before its gate, the gate's matrix before its bias."""
        if name.endswith("embed_tokens.weight"):
            self._x_TD = weight[self._token_ids.to(weight.device)]
        elif name.endswith("post_attention_layernorm.weight"):
            self._normed_TD = rms_norm(self._x_TD, weight, self._config.rms_norm_eps)
        elif name.endswith("mlp.gate.weight"):
            self._logits_TE = self._normed_TD @ weight.t()
        elif name.endswith("e_score_correction_bias"):
            self.layers.append(self._spread(int(name.split(".")[2]), weight))

    def _spread(self, layer: int, bias_E: Tensor) -> Spread:
        config = self._config
        experts_TK, _ = gate_topk(
            self._logits_TE,
            bias_E,
            num_groups=config.num_groups,
            num_groups_kept=config.num_groups_kept,
            top_k=config.num_experts_per_token,
            renormalise=config.norm_topk_prob,
            scaling=config.routed_scaling_factor,
        )
        shares_E = torch.bincount(experts_TK.flatten(), minlength=len(bias_E)).double() / experts_TK.numel()
        entropy = -torch.special.xlogy(shares_E, shares_E).sum().item() / math.log(len(bias_E))
        return Spread(layer=layer, entropy=entropy, max_over_mean=shares_E.max().item() * len(bias_E))


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --report, progress on standard error."""
    options = _parse(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_folder(options.out, checkpoint_bytes(options.shape))
    report = provenance(["baton", "bench", "make-checkpoint", *argv])
    gates = GateSpread(ModelConfig.from_dict(SHAPES[options.shape]), options.seed)
    begin = time.perf_counter()
    num_parameters = write_checkpoint(
        options.out,
        options.shape,
        options.seed,
        device=device,
        progress=ConsoleProgress(sys.stderr, f"writing {options.shape}"),
        see=gates.see,
    )
    seconds = time.perf_counter() - begin
    report |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "model": {"name": options.shape, "num_parameters": num_parameters, "config": SHAPES[options.shape]},
        "seed": options.seed,
        "bytes": checkpoint_bytes(options.shape),
        "seconds": seconds,
        "bytes_per_s": checkpoint_bytes(options.shape) / seconds,
        "gate": {"tokens": _NUM_TOKENS, "layers": [asdict(spread) for spread in gates.layers]},
    }
    print(_summary(options.out, seconds, gates.layers), file=sys.stderr)
    write_report(report, options.report)
    return 0


def _summary(folder: Path, seconds: float, layers: Sequence[Spread]) -> str:
    entropy = min(spread.entropy for spread in layers)
    fullest = max(spread.max_over_mean for spread in layers)
    return (
        f"{folder}: {seconds:.1f} s; gates spread {_NUM_TOKENS} random tokens over the experts with {entropy:.4f} of the largest entropy "
        f"or more, the fullest expert has {fullest:.2f} times the mean"
    )


def _check_folder(folder: Path, num_bytes: int) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is not a folder; name a new one")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder} is not empty; name a new or an empty folder, or empty this one")
    exists = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free_bytes = shutil.disk_usage(exists).free
    if free_bytes < num_bytes + _SPARE_BYTES:
        raise ConfigError(
            f"--out {folder}: the weights take {num_bytes / 1e9:.1f} GB, the disk has {free_bytes / 1e9:.1f} GB free; "
            "make room there or name a folder on another disk"
        )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="baton bench make-checkpoint",
        description="A model with random weights in the published format, in the folder --out.",
    )
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), required=True, help="lite: 31 GB, bf16; lite-fp8: 16 GB; slice: 50 GB, FP8"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes on the same kind of device (0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or an empty folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="draw there; the GPU if there is one")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the JSON here instead of standard output")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; leave it out")
    return options
