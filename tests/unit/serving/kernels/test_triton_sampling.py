"""Argmax and draw over segments of a row in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from serving.kernels.sampling import argmax_reference, sample_reference

pytest.importorskip("triton", reason="Triton is not installed")
from serving.kernels.triton import sampling as device

VOCAB = 900


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them in a row, the second not full."""
    for name in ("_SEGMENT", "_SEARCH_SEGMENT", "_SEARCH_CHUNK"):
        monkeypatch.setattr(device, name, 512)


def logits_of(rows: int, seed: int = 0) -> Tensor:
    """Wider than the vocabulary, and best where nobody may draw."""
    logits = 3 * torch.randn(rows, VOCAB + 50, generator=torch.Generator().manual_seed(seed))
    logits[:, VOCAB:] = 100.0
    return logits[:, :VOCAB]


def test_argmax_is_the_lowest_id_of_the_largest() -> None:
    logits = logits_of(4)
    logits[1, [30, 700, 899]] = 50.0
    logits[2] = -math.inf
    logits[3, 600] = math.nan
    assert device.argmax(logits).tolist() == argmax_reference(logits).tolist()
    rounded = logits.bfloat16()
    assert device.argmax(rounded).tolist() == argmax_reference(rounded).tolist()
    logits[0] = -torch.arange(VOCAB, dtype=torch.float32)
    assert device.argmax(logits)[:3].tolist() == [0, 30, 0]


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1}])
def test_draws_are_those_of_the_reference(cut: dict[str, float]) -> None:
    rows = 8
    logits = logits_of(rows)
    logits[5, :600] = -math.inf
    # Ties at the limit stay, in whatever segment they lie.
    logits[6] = logits[6].round()
    temperatures = torch.linspace(0.2, 1.5, rows, dtype=torch.float64)
    temperatures[3] = 0.0
    temperatures[7] = 1e-9
    seeds = torch.arange(rows) * 1_000_003 - 5
    limits: dict[str, Tensor] = {
        f"{name}_B": torch.full((rows,), value, dtype=torch.int64 if name == "top_k" else torch.float64)
        for name, value in cut.items()
    }
    if "top_k" in cut:
        limits["top_k_B"][1:3] = torch.tensor([1, VOCAB])
    if "top_p" in cut:
        limits["top_p_B"][4:6] = torch.tensor([0.0, 1.0])
    positions = torch.arange(rows) * 17
    got = device.sample(logits, temperatures, seeds, positions, **limits)
    want = sample_reference(logits, temperatures, seeds, positions, **limits)
    assert got.tolist() == want.tolist()
    assert got[[3, 7]].tolist() == logits[[3, 7]].argmax(-1).tolist()
    assert got[5] >= 600
    assert sample_reference(logits, temperatures, seeds, positions + 1, **limits).tolist() != want.tolist()


def test_a_row_keeps_its_own_limits_beside_rows_with_others() -> None:
    """Each of top-k and top-p is asked for by another row."""
    logits = logits_of(3)
    temperatures, seeds = torch.full((3,), 1.5, dtype=torch.float64), torch.arange(3)
    top_k, top_p = torch.tensor([3, VOCAB, VOCAB]), torch.tensor([1.0, 0.3, 1.0], dtype=torch.float64)
    drawn: list[list[int]] = []
    for position in range(40):
        positions = torch.full((3,), position)
        drawn.append(device.sample(logits, temperatures, seeds, positions, top_k_B=top_k, top_p_B=top_p).tolist())
        want = sample_reference(logits, temperatures, seeds, positions, top_k_B=top_k, top_p_B=top_p)
        assert drawn[-1] == want.tolist()
    kept, _, every = (set(row) for row in zip(*drawn, strict=True))
    assert kept == set(logits[0].topk(3).indices.tolist())
    assert len(every) > 20


def test_damaged_logits_draw_an_id_that_exists() -> None:
    logits = logits_of(1)
    logits[0, 77] = math.nan
    one = torch.ones(1, dtype=torch.int64)
    assert 0 <= int(device.sample(logits, one.double(), one, one)) < VOCAB
