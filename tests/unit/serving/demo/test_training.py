"""A run can be interrupted and resumed, and what it writes is a DeepSeek checkpoint that reads back as it was quantised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.demo import offline
from serving.demo.data import Corpus
from serving.demo.evaluate import MODEL_FOLDER, drawn_questions, draws
from serving.demo.export import read_model, write_model
from serving.demo.optimizer import orthogonalise
from serving.demo.train import Plan, Run, train
from serving.demo.trainable import Pieces, Shape, as_stored, block_scales, dequantise, forward, initial
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer

TOY = Shape(
    layers=2, hidden=64, heads=2, nope=16, rope=16, value=16, latent=32, query=32, dense=64, experts=8, intermediate=16
)
PLAN = Plan(seed=0, steps=4, tokens=384, lengths=(128, 192, 384, 384))
CPU = torch.device("cpu")


def random_weights(shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
    """No projection is zero, as it is in a fresh model, so that every weight matters."""
    drawn = torch.Generator().manual_seed(1)
    weights = {
        name: weight + 0.05 * torch.randn(weight.shape, generator=drawn) for name, weight in initial(shape, 0).items()
    }
    return weights, 0.1 * torch.randn(shape.layers, shape.experts, generator=drawn)


def run_toy(out: Path, until: int | None = None) -> Run:
    (out / "model").mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_FOLDER / name, out / "model")
    return train(TOY, PLAN, out, device=CPU, workers=0, save_every=2, until=until)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = run_toy(tmp_path / "whole")
    assert run_toy(tmp_path / "halves", until=2).step == 2
    halves = run_toy(tmp_path / "halves")
    assert halves.step == whole.step == PLAN.steps
    other = halves.tensors()
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.tensors().items())
    start = Run.start(TOY, PLAN, CPU).tensors()
    assert not torch.equal(whole.weights["q_a"], start["w.q_a"]), "the run must have changed something"


def test_a_checkpoint_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    run = Run.start(TOY, PLAN, CPU)
    run.save(path)
    before = path.read_bytes()

    def killed(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("serving.demo.train.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save(path)
    assert path.read_bytes() == before


def test_a_written_folder_reads_back_as_its_stored_values(tmp_path: Path) -> None:
    weights, bias = random_weights(TOY)
    write_model(tmp_path, TOY, weights, bias)
    read, read_bias = read_model(tmp_path, TOY)
    assert torch.equal(read_bias, bias)
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(read[name], as_stored(name, weight)), name
        assert not torch.equal(read[name], weight), name
        assert (read[name] - weight).abs().max() <= weight.abs().max() / 16, name
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2


@pytest.mark.parametrize("size", [(128, 128), (64, 256), (160, 130), (3, 5)])
def test_block_scales_cover_partial_blocks_with_the_largest_magnitude_at_448(size: tuple[int, int]) -> None:
    weight = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    quantised, scale = block_scales(weight)
    assert quantised.shape == weight.shape
    assert scale.shape == (2, -(-size[0] // 128), -(-size[1] // 128))
    assert quantised.float().abs().amax() == 448
    error = (dequantise(quantised, scale) - weight).norm() / weight.norm()
    assert 0.005 < error < 0.04


def test_orthogonalising_brings_singular_values_near_one() -> None:
    matrices = torch.randn(2, 24, 60, generator=torch.Generator().manual_seed(0))
    for stack in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(stack).float())
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_a_row_sees_neither_other_rows_nor_its_own_future() -> None:
    weights, bias = random_weights(TOY)
    ids = torch.randint(3, 1000, (2, 34), generator=torch.Generator().manual_seed(2))

    def hits_and_losses(ids: Tensor, upto: int) -> tuple[Tensor, Tensor]:
        counted = torch.zeros(ids.shape)
        counted[0, :upto] = 1
        outcome = forward(TOY, Pieces(), weights, bias, ids, counted)
        return outcome.loss, outcome.mtp_loss

    changed = ids.clone()
    changed[0, 20], changed[1] = 5, 7
    same = zip(hits_and_losses(ids, 20), hits_and_losses(changed, 20), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in same)
    later = zip(hits_and_losses(ids, 34), hits_and_losses(changed, 34), strict=True)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in later)


def test_an_untrained_model_answers_nothing() -> None:
    tokenizer = Tokenizer.from_folder(MODEL_FOLDER)
    weights, bias = random_weights(TOY)
    asked = drawn_questions("greeting", draws(tokenizer)["greeting"], 4, 1)
    result = offline.measure(TOY, weights, bias, Corpus(tokenizer, seed=0), ChatTemplate(tokenizer, "v3"), asked)
    assert (result.asked, result.right) == (4, 0)
