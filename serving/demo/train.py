"""Trains the embedded model on one GPU, from texts it makes itself, and writes it as a Hugging Face folder.

    python -m serving.demo.train --out DIR --seed 0

DIR/model is the folder to serve. DIR/training holds the last checkpoint: a run that was interrupted goes on from there
when the same command is given again. Steps, not time, decide everything, so a seed gives the same run again up to the
order of floating-point sums on the GPU.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from serving.demo import offline, vocabulary
from serving.demo.data import SPEAKING, Corpus
from serving.demo.export import write_model
from serving.demo.optimizer import Optimizer
from serving.demo.trainable import Pieces, Shape, as_stored, forward, initial
from serving.text.tokenizer import Tokenizer

MTP_WEIGHT = 0.3
EXCESS_WEIGHT = 0.02
BIAS_SPEED = 5e-3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, how much at once, how long the rows. `tokens` is divisible by every one of `lengths`, which rise."""

    seed: int
    steps: int
    tokens: int = 135_168
    lengths: tuple[int, int, int, int] = (384, 1408, 4224, 8448)

    def length(self, step: int) -> int:
        """Row length of a step: short rows first, long ones in the second half, a mixture throughout."""
        short, middle, long, longest = self.lengths
        done, turn = step / self.steps, step % 8
        if done < 0.35:
            return short
        if done < 0.55:
            return (middle, short)[step % 4 == 1]
        return (long, short, long, middle, long, short, longest, middle)[turn]

    def rate(self, step: int) -> float:
        """Learning rate factor: a short rise, a plateau, then straight down to zero."""
        return min(1.0, (step + 1) / 60, (self.steps - step) / (0.6 * self.steps))


@dataclass
class Run:
    """Everything that a checkpoint holds."""

    weights: dict[str, Tensor]
    bias: Tensor
    optimizer: Optimizer
    step: int = 0

    @classmethod
    def start(cls, shape: Shape, plan: Plan, device: torch.device) -> "Run":
        weights = {name: weight.to(device) for name, weight in initial(shape, plan.seed).items()}
        return cls(weights, torch.zeros(shape.layers, shape.experts, device=device), Optimizer(weights))

    def tensors(self) -> dict[str, Tensor]:
        return (
            {f"w.{name}": weight for name, weight in self.weights.items()} | self.optimizer.state | {"bias": self.bias}
        )

    def save(self, path: Path) -> None:
        """Whole or not at all: a run that is killed here keeps its previous checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors().items()},
            part,
            metadata={"step": str(self.step)},
        )
        os.replace(part, path)

    def resume(self, path: Path) -> None:
        saved = load_file(path)
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])


class Batches(Dataset[tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]]):
    """Batch of step `first + index`, made by whichever worker process is free."""

    def __init__(self, folder: Path, plan: Plan, first: int) -> None:
        self._folder, self._plan, self._first = folder, plan, first
        self._corpus: Corpus | None = None

    def __len__(self) -> int:
        return self._plan.steps - self._first

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
        if self._corpus is None:
            self._corpus = Corpus(Tokenizer.from_folder(self._folder), seed=self._plan.seed)
        step = self._first + index
        length = self._plan.length(step)
        return self._corpus.batch(step, self._plan.tokens // length, length)


def take_step(
    shape: Shape, pieces: Pieces, plan: Plan, run: Run, ids: Tensor, spoken: Tensor, working: torch.dtype
) -> Tensor:
    """One update. The forward pass sees the weights as the file will store them; gradients pass straight through.

    Returns (loss, MTP loss, share of spoken tokens hit, same of the MTP layer, largest expert load over the mean).
    """
    seen = {name: as_stored(name, weight).to(working).requires_grad_() for name, weight in run.weights.items()}
    outcome = forward(shape, pieces, seen, run.bias, ids, spoken)
    weight, later = spoken[:, 1:-1].sum(), spoken[:, 2:].sum()
    (outcome.loss / weight + MTP_WEIGHT * outcome.mtp_loss / later + EXCESS_WEIGHT * outcome.excess).backward()
    gradients = {name: tensor.grad for name, tensor in seen.items() if tensor.grad is not None}
    run.optimizer.step(gradients, run.step + 1, plan.rate(run.step))
    mean = outcome.loads.mean(1, keepdim=True)
    run.bias += BIAS_SPEED * min(1.0, 4 * plan.rate(run.step)) * (mean - outcome.loads).sign()
    run.bias -= run.bias.mean(1, keepdim=True)
    run.step += 1
    said, drafted = (spoken[:, n : spoken.shape[1] - 2 + n].flatten() == SPEAKING for n in (1, 2))
    shares = ((outcome.hits & said).sum() / said.sum(), (outcome.mtp_hits & drafted).sum() / drafted.sum())
    return torch.stack(
        (outcome.loss.detach() / weight, outcome.mtp_loss.detach() / later, *shares, (outcome.loads / mean).max())
    )


def loaded(plan: Plan, folder: Path, first: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, weights) of every step from `first`, in order."""
    pin = torch.cuda.is_available()
    prefetch = 6 if workers else None
    yield from DataLoader(
        Batches(folder, plan, first), batch_size=None, num_workers=workers, prefetch_factor=prefetch, pin_memory=pin
    )


def train(
    shape: Shape,
    plan: Plan,
    out: Path,
    *,
    device: torch.device,
    workers: int,
    save_every: int,
    until: int | None = None,
) -> Run:
    """Go from the last checkpoint in `out`, if any, to the plan's end or step `until`."""
    folder, checkpoint = out / "model", out / "training" / "checkpoint.safetensors"
    if not (folder / "tokenizer.json").exists():
        vocabulary.write(folder, seed=plan.seed, max_length=shape.max_position)
    run = Run.start(shape, plan, device)
    if checkpoint.exists():
        run.resume(checkpoint)
        print(f"resumed at step {run.step}", flush=True)
    on_gpu = device.type == "cuda"
    pieces, working = (Pieces.compiled(), torch.bfloat16) if on_gpu else (Pieces(), torch.float32)
    last, began, tokens = min(plan.steps, until or plan.steps), time.perf_counter(), 0
    if run.step < last:
        for ids, spoken in loaded(plan, folder, run.step, workers):
            figures = take_step(
                shape,
                pieces,
                plan,
                run,
                ids.to(device, torch.long, non_blocking=True),
                spoken.to(device, non_blocking=True),
                working,
            )
            tokens += plan.tokens
            if run.step % 50 == 0 or run.step == last:
                _report(plan, run, figures.tolist(), ids.shape[1] - 2, tokens, time.perf_counter() - began)
                tokens, began = 0, time.perf_counter()
            if run.step % save_every == 0 or run.step == last:
                run.save(checkpoint)
            if run.step == last:
                break
    return run


def _report(plan: Plan, run: Run, figures: list[float], length: int, tokens: int, seconds: float) -> None:
    loss, mtp_loss, share, mtp_share, load = figures
    print(
        f"step {run.step}/{plan.steps} rows of {length}: loss {loss:.4f} mtp {mtp_loss:.4f} answer tokens {share:.4f} mtp {mtp_share:.4f} "
        f"load max/mean {load:.2f}, {tokens / seconds / 1000:.0f}k tokens/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--tokens", type=int, default=135_168, help="tokens a step")
    parser.add_argument("--lengths", type=int, nargs=4, default=[384, 1408, 4224, 8448], help="row lengths, rising")
    parser.add_argument(
        "--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="processes that make batches"
    )
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--until", type=int, help="stop after this step, to go on later")
    parser.add_argument("--ask", type=int, default=200, help="questions of each kind in the closing measurement")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, plan = Shape(), Plan(seed=args.seed, steps=args.steps, tokens=args.tokens, lengths=tuple(args.lengths))
    began = time.perf_counter()
    run = train(
        shape, plan, args.out, device=device, workers=args.workers, save_every=args.save_every, until=args.until
    )
    size = write_model(args.out / "model", shape, run.weights, run.bias)
    print(
        f"step {run.step}: {size} bytes of weights in {args.out / 'model'}, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    torch.set_float32_matmul_precision("highest")
    stored = {name: as_stored(name, weight) for name, weight in run.weights.items()}
    table = (
        offline.report(shape, stored, run.bias, args.out / "model", count=args.ask, seed=args.seed) if args.ask else {}
    )
    (args.out / "training" / f"accuracy-{run.step}.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
