"""Sampling on the device: one token a row, whatever rows stand beside it, and nothing read back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from serving.core.request import SamplingParams
from serving.engine.sampler import Sampler
from serving.kernels import sampling as ops
from serving.kernels.sampling import argmax, argmax_reference, sample, sample_reference
from tests.gpu.graphs import replayed

pytestmark = pytest.mark.gpu

VOCAB, ROWS = 129280, 24


def logits_of() -> Tensor:
    """Wider than the vocabulary, and best where nobody may draw."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(ROWS, VOCAB + 64, device="cuda")
    logits[:, VOCAB:] = 100.0
    return logits[:, :VOCAB]


def test_argmax_is_the_lowest_id_of_the_largest() -> None:
    logits = logits_of()
    logits[1, [7, 3000, 100000]] = 50.0
    logits[2] = -math.inf
    logits[3, 500] = math.nan
    got, again = argmax(logits), replayed(lambda: argmax(logits))
    assert got[1:4].tolist() == [7, 0, 500]
    assert torch.equal(got.cpu(), argmax_reference(logits.cpu()))
    assert torch.equal(again, got)
    logits[4, 9] = 60.0
    assert argmax(logits)[4] == 9


@pytest.mark.parametrize(
    "cut", [{}, {"min_p": 0.05}, {"top_k": 40}, {"top_p": 0.95}, {"top_k": 1000, "top_p": 0.9, "min_p": 0.001}]
)
def test_draws_are_those_of_the_reference_alone_and_in_a_batch(cut: dict[str, float]) -> None:
    logits = logits_of()
    temperatures = torch.linspace(0.3, 1.4, ROWS, device="cuda", dtype=torch.float64)
    temperatures[6] = 0.0
    seeds = torch.arange(ROWS, device="cuda") * 7919 - 3
    limits = {
        f"{name}_B": torch.full((ROWS,), value, device="cuda", dtype=torch.int64 if name == "top_k" else torch.float64)
        for name, value in cut.items()
    }
    torch.cuda.set_sync_debug_mode("error")
    moved = 0
    for step in range(20):
        positions = torch.arange(ROWS, device="cuda") * 31 + step
        got = sample(logits, temperatures, seeds, positions, **limits)
        torch.cuda.set_sync_debug_mode("default")
        assert got.tolist() == sample_reference(logits, temperatures, seeds, positions, **limits).tolist()
        moved += int((sample(logits, temperatures, seeds, positions + 1, **limits) != got).sum())
    assert moved > 20
    again = replayed(lambda: sample(logits, temperatures, seeds, positions, **limits))
    assert torch.equal(again, got)
    alone = [
        sample(logits[i : i + 1], temperatures[i : i + 1], seeds[i : i + 1], positions[i : i + 1],
               **{name: limit[i : i + 1] for name, limit in limits.items()})
        for i in range(ROWS)
    ]  # fmt: skip
    assert torch.equal(torch.cat(alone), got)


ASKED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.2, top_k=5, seed=2),
    SamplingParams(temperature=0.9, top_p=0.6, seed=3),
    SamplingParams(temperature=1.1, min_p=0.1, seed=4),
    SamplingParams(temperature=1.3, top_k=30, top_p=0.95, min_p=0.01, frequency_penalty=0.2, repetition_penalty=1.1, seed=-8),
    SamplingParams(temperature=0.8, logit_bias={7: 4.0, 8: -100.0}, seed=7),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_any_options_is_one_call_and_gives_a_cpus_tokens(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    sample_op = ops.sample

    def noted(logits_BV: Tensor, *args: Tensor, **limits: Tensor | None) -> Tensor:
        drawn.append(len(logits_BV))
        return sample_op(logits_BV, *args, **limits)

    monkeypatch.setattr(ops, "sample", noted)
    slots = tuple(range(len(ASKED)))

    def texts(device: str, first: int = 0) -> list[list[int]]:
        sampler = Sampler(len(ASKED), 1000, torch.device(device))
        for slot, asked in enumerate(ASKED):
            sampler.open(slot, asked, [1, 2, 3], 3)
        logits = 2 * torch.randn(30, len(ASKED), 1024, generator=torch.Generator().manual_seed(0))
        steps = [each.to(dtype).to(device) for each in logits]
        return [sampler.sample(slots, step, [first + i] * len(slots))[0].tolist() for i, step in enumerate(steps)]

    got = texts("cuda")
    assert drawn == [len(ASKED)] * 30
    assert got == texts("cpu")
    others = [
        sum(a != b for a, b in zip(*row, strict=True))
        for row in zip(zip(*got, strict=True), zip(*texts("cuda", 50), strict=True), strict=True)
    ]
    assert others[0] == 0, "the greedy row knows no position"
    assert min(others[1:]) > 5
