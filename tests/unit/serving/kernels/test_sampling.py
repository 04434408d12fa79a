"""Each sampling operation against a second implementation on Python floats, and the drawn distribution against softmax."""

from __future__ import annotations

import math

import pytest
import torch

from serving.core.request import SamplingParams
from serving.kernels import sampling
from tests.engine_factory import penalised_reference, probabilities_reference, uniform_reference

INF = float("inf")


def _logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _chi_square(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Statistic over cells that expect at least 5, as a distance in standard deviations from its mean."""
    expected = probabilities * observed.sum()
    big = expected >= 5
    statistic = ((observed[big] - expected[big]) ** 2 / expected[big]).sum().item()
    degrees = int(big.sum()) - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_the_random_number_is_splitmix64_of_seed_and_position(seed: int) -> None:
    positions = [0, 1, 2, 63, 64, 2**20, 2**31]
    drawn = sampling.uniforms(torch.full((len(positions),), seed), torch.tensor(positions))
    assert drawn.tolist() == [uniform_reference(seed, position) for position in positions]


def test_the_random_numbers_of_one_stream_and_of_neighbouring_seeds_are_uniform() -> None:
    count = torch.arange(50_000)
    even = torch.full((100,), 0.01, dtype=torch.float64)
    for seeds, positions in ((torch.full_like(count, 7), count), (count, torch.full_like(count, 7)), (count, -count)):
        cells = (sampling.uniforms(seeds, positions) * 100).long().bincount(minlength=100).double()
        assert abs(_chi_square(cells, even)) < 5
    skewed = even * torch.linspace(0.9, 1.1, 100, dtype=torch.float64)
    assert _chi_square(cells, skewed) > 5


def test_tokens_are_drawn_as_often_as_softmax_says() -> None:
    logits = _logits(1, 40)
    num_draws = 40_000
    uniforms = sampling.uniforms(torch.full((num_draws,), 11), torch.arange(num_draws))
    drawn = sampling.draw(logits.expand(num_draws, -1), uniforms).bincount(minlength=40).double()
    assert abs(_chi_square(drawn, logits[0].softmax(-1))) < 5
    assert _chi_square(drawn, (logits[0] * 1.1).softmax(-1)) > 5


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-INF, 0.0, -INF, -INF, 1.0, -INF]], dtype=torch.float64)
    edges = torch.tensor([0.0, 2.0**-48, 0.25, 0.5, 1 - 2.0**-48], dtype=torch.float64)
    drawn = sampling.draw(logits.expand(len(edges), -1), edges).tolist()
    assert set(drawn) == {1, 4}
    assert drawn[0] == 1
    assert drawn[-1] == 4


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (5, 1.0), (40, 1.0), (40, 0.0), (40, 0.5), (40, 0.999), (7, 0.8)]
)
def test_top_k_and_top_p_keep_what_the_reference_keeps(top_k: int, top_p: float) -> None:
    logits = _logits(6, 40)
    kept = sampling.keep_top(logits, torch.full((6,), top_k), torch.full((6,), top_p, dtype=torch.float64))
    for row, kept_row in zip(logits.tolist(), kept.softmax(-1).tolist(), strict=True):
        params = SamplingParams(top_k=top_k, top_p=top_p)
        assert kept_row == pytest.approx(probabilities_reference(row, params), abs=1e-12)


def test_tokens_that_tie_with_the_last_one_kept_stay() -> None:
    logits = torch.tensor([[1.0, 0.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    kept = sampling.keep_top(logits, torch.tensor([2]), torch.tensor([1.0], dtype=torch.float64))
    assert (kept > -INF).tolist() == [[True, False, True, True, False]]


@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.5, 1.0])
def test_min_p_keeps_what_the_reference_keeps(min_p: float) -> None:
    logits = _logits(6, 40)
    kept = sampling.keep_likely(logits, torch.full((6,), min_p, dtype=torch.float64)).softmax(-1)
    for row, kept_row in zip(logits.tolist(), kept.tolist(), strict=True):
        assert kept_row == pytest.approx(probabilities_reference(row, SamplingParams(min_p=min_p)), abs=1e-12)


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"), [(1.3, 0, 0), (0.7, 0, 0), (1, 0.4, 0), (1, 0, 0.9), (1.2, -0.5, 2)]
)
def test_penalties_equal_the_reference(repetition: float, frequency: float, presence: float) -> None:
    params = SamplingParams(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    prompt, output = [3, 5, 5, 9], [5, 7, 7, 7]
    logits = _logits(1, 12)
    counts = torch.tensor([output]).new_tensor([[output.count(token) for token in range(12)]])
    seen = torch.tensor([[token in prompt + output for token in range(12)]])
    parameters = (torch.tensor([value], dtype=torch.float64) for value in (repetition, frequency, presence))
    penalised = sampling.penalise(logits, counts, seen, *parameters)[0].tolist()
    assert penalised == pytest.approx(penalised_reference(logits[0].tolist(), params, prompt + output, len(prompt)))
    assert penalised != pytest.approx(penalised_reference(logits[0].tolist(), params, prompt, len(prompt)))


def test_logprobs_are_those_of_softmax_best_first() -> None:
    logits = _logits(2, 12)
    chosen, top_ids, top = sampling.token_logprobs(logits, torch.tensor([4, 0]), 3)
    for row, token in enumerate((4, 0)):
        values = [math.log(p) for p in probabilities_reference(logits[row].tolist(), SamplingParams())]
        best = sorted(range(12), key=lambda i: -values[i])[:3]
        assert chosen[row].item() == pytest.approx(values[token])
        assert top_ids[row].tolist() == best
        assert top[row].tolist() == pytest.approx([values[i] for i in best])
