"""The sampler: every option against a reference on Python floats, and the same tokens whatever the batch."""

from __future__ import annotations

import math
import random
from collections.abc import ItemsView

import pytest
import torch

from serving.core.request import SamplingParams
from serving.engine.sampler import Sampler
from serving.kernels import sampling as ops
from tests.engine_factory import penalised_reference, probabilities_reference, sample_reference

VOCAB = 50
HEAD = 64  # rows of the output head; ids from VOCAB on stand for no token
CPU = torch.device("cpu")

OPTIONS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.7, seed=1),
    "top-k": SamplingParams(temperature=1.2, top_k=5, seed=2),
    "top-k above the vocabulary": SamplingParams(temperature=1.2, top_k=5000, seed=2),
    "top-p": SamplingParams(temperature=0.9, top_p=0.6, seed=3),
    "min-p": SamplingParams(temperature=1.1, min_p=0.1, seed=4),
    "all truncations": SamplingParams(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, seed=5),
    "presence": SamplingParams(temperature=0.8, presence_penalty=1.5, seed=6),
    "frequency": SamplingParams(temperature=0.0, frequency_penalty=0.7),
    "repetition": SamplingParams(temperature=0.0, repetition_penalty=1.8),
    "bias": SamplingParams(temperature=0.8, logit_bias={7: 4.0, 8: -100.0, 60: 100.0}, seed=7),
    "bias, greedy": SamplingParams(temperature=0.0, logit_bias={11: 100.0}),
    "everything": SamplingParams(
        temperature=1.3, top_k=30, top_p=0.95, min_p=0.01, presence_penalty=0.3, frequency_penalty=0.2,
        repetition_penalty=1.1, logit_bias={3: 1.0}, seed=-8, logprobs=2,
    ),
}  # fmt: skip


def _logits(rows: int, seed: int) -> torch.Tensor:
    return 2.5 * torch.randn(rows, HEAD, generator=torch.Generator().manual_seed(seed))


def _history(seed: int) -> tuple[list[int], int]:
    """Tokens so far and how many of them are the prompt."""
    drawn = random.Random(seed)
    return [drawn.randrange(VOCAB) for _ in range(20)], drawn.randrange(1, 20)


def _create(params: list[SamplingParams]) -> Sampler:
    sampler = Sampler(len(params), VOCAB, CPU)
    for slot, param in enumerate(params):
        sampler.open(slot, param, *_history(slot))
    return sampler


def _sample(sampler: Sampler, slots: list[int], logits: torch.Tensor, positions: list[int]) -> list[int]:
    return sampler.sample(tuple(slots), logits.clone(), positions)[0].tolist()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_draws_what_the_reference_draws(name: str) -> None:
    params = OPTIONS[name]
    logits = _logits(200, seed=9)
    tokens, num_prompt = _history(0)
    drawn = [_sample(_create([params]), [0], row[None], [i])[0] for i, row in enumerate(logits)]
    rows = logits[:, :VOCAB].tolist()
    assert drawn == [sample_reference(row, params, tokens, num_prompt, i) for i, row in enumerate(rows)]
    other = SamplingParams(temperature=0.7, seed=99)
    assert drawn != [sample_reference(row, other, tokens, num_prompt, i) for i, row in enumerate(rows)]


def test_a_token_is_the_same_in_any_batch_slot_and_order() -> None:
    params = list(OPTIONS.values())
    logits, positions = _logits(len(params), seed=10), list(range(100, 100 + len(params)))
    alone = [
        _sample(_create(params), [slot], logits[slot : slot + 1], [positions[slot]])[0] for slot in range(len(params))
    ]
    for seed in range(5):
        order = random.Random(seed).sample(range(len(params)), len(params) - seed)
        together = _sample(_create(params), order, logits[order], [positions[slot] for slot in order])
        assert together == [alone[slot] for slot in order]
        shifted = _sample(_create(params), order, logits[order], [positions[slot] + 1 for slot in order])
        assert shifted != together


def test_rows_that_draw_and_rows_that_do_not_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, set[str]]] = []
    sample = ops.sample

    def noted(logits: torch.Tensor, *args: torch.Tensor, **limits: torch.Tensor | None) -> torch.Tensor:
        calls.append((len(logits), {name for name, limit in limits.items() if limit is not None}))
        return sample(logits, *args, **limits)

    monkeypatch.setattr(ops, "sample", noted)
    sampler = _create([OPTIONS[name] for name in ("greedy", "temperature", "top-k", "frequency")])
    _sample(sampler, [0, 1, 2, 3], _logits(4, 0), [5, 6, 7, 8])
    assert calls == [(4, {"top_k_B"})]
    _sample(sampler, [0, 3], _logits(2, 0), [5, 8])
    assert len(calls) == 1, "nobody draws"


def test_penalties_count_the_tokens_drawn_since_the_slot_was_opened() -> None:
    params = SamplingParams(
        temperature=0.8, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2, seed=3
    )
    tokens, num_prompt = _history(0)
    sampler = _create([params])
    for step, row in enumerate(_logits(30, seed=11)):
        token = _sample(sampler, [0], row[None], [len(tokens)])[0]
        assert token == sample_reference(row[:VOCAB].tolist(), params, tokens, num_prompt, len(tokens)), f"step {step}"
        tokens.append(token)


def test_a_resumed_sequence_goes_on_as_if_it_had_never_stopped() -> None:
    params = OPTIONS["everything"]
    logits = _logits(12, seed=12)
    tokens, num_prompt = _history(0)
    whole, resumed = _create([params]), _create([params])
    drawn = [_sample(whole, [0], row[None], [20 + i])[0] for i, row in enumerate(logits)]
    resumed.close(0)
    resumed.open(0, params, tokens + drawn[:6], num_prompt)
    assert [_sample(resumed, [0], row[None], [26 + i])[0] for i, row in enumerate(logits[6:])] == drawn[6:]


def test_a_slot_keeps_nothing_of_its_former_tenant() -> None:
    penalty = OPTIONS["frequency"]
    sampler = Sampler(6, VOCAB, CPU)
    for tenant in range(3):
        for slot in range(6):  # more than the count tables begin with
            sampler.open(slot, penalty, [1, *[tenant] * 9], 1)
        for slot in range(6):
            sampler.close(slot)
    sampler.open(2, penalty, [1], 1)
    row = torch.zeros(1, HEAD)
    row[0, :3] = torch.tensor([3.0, 2.5, 2.0])
    assert _sample(sampler, [2], row, [1]) == [0]


def test_ids_above_the_tokenizers_size_are_never_drawn() -> None:
    logits = _logits(1, seed=13)
    logits[:, VOCAB:] = 1000.0
    for params in OPTIONS.values():
        assert _sample(_create([params]), [0], logits, [5])[0] < VOCAB


def test_damaged_logits_still_give_an_id_that_exists() -> None:
    for params in OPTIONS.values():
        assert 0 <= _sample(_create([params]), [0], torch.full((1, HEAD), float("nan")), [5])[0] < VOCAB


def test_prompt_ids_above_the_tokenizers_size_and_a_minute_temperature_do_no_harm() -> None:
    sampler = Sampler(1, VOCAB, CPU)
    sampler.open(0, SamplingParams(temperature=1e-300, repetition_penalty=1.1, seed=1), [3, 60, 63, 4, 61], 3)
    logits = _logits(1, seed=15)
    logits[0, 17] = 40.0
    assert _sample(sampler, [0], logits, [5]) == [17]


def test_logprobs_alone_without_alternatives() -> None:
    _, logprobs = _create([SamplingParams(temperature=0.0, logprobs=0)]).sample((0,), _logits(1, seed=16), [3])
    assert logprobs is not None
    assert logprobs.by_row()[0].top_ids == []
    assert logprobs.by_row()[0].logprob < 0


def test_logprobs_are_taken_after_penalties_and_before_temperature_and_truncation() -> None:
    wanted = SamplingParams(temperature=0.5, top_k=2, repetition_penalty=1.5, logit_bias={4: 1.0}, seed=1, logprobs=3)
    none = SamplingParams(temperature=0.0, logprobs=0)
    sampler = _create([OPTIONS["greedy"], wanted, none])
    logits = _logits(3, seed=14)
    token_ids, logprobs = sampler.sample((0, 1, 2), logits.clone(), [20, 20, 20])
    assert logprobs is not None
    by_row = logprobs.by_row()
    assert sorted(by_row) == [1, 2]
    penalised = penalised_reference(logits[1, :VOCAB].tolist(), wanted, *_history(1))
    values = [math.log(p) for p in probabilities_reference(penalised, SamplingParams())]
    best = sorted(range(VOCAB), key=lambda token: -values[token])[:3]
    assert by_row[1].top_ids == best
    assert by_row[1].top_logprobs == pytest.approx([values[token] for token in best], abs=1e-5)
    assert by_row[1].logprob == pytest.approx(values[token_ids[1]], abs=1e-5)
    assert by_row[2].top_ids == []
    raw = [math.log(p) for p in probabilities_reference(logits[1, :VOCAB].tolist(), SamplingParams())]
    assert by_row[1].logprob != pytest.approx(raw[token_ids[1]], abs=1e-5)


def test_a_slot_that_is_not_open_cannot_be_sampled() -> None:
    sampler = _create([OPTIONS["greedy"]])
    sampler.close(0)
    with pytest.raises(AssertionError, match="not open"):
        _sample(sampler, [0], _logits(1, seed=0), [1])


class _CountedBias(dict[int, float]):
    """Knows how often it was read as a whole."""

    num_reads = 0

    def items(self) -> ItemsView[int, float]:
        self.num_reads += 1
        return super().items()


def test_who_joins_or_leaves_a_batch_costs_nothing_of_the_biases_of_others() -> None:
    bias = _CountedBias(dict.fromkeys(range(20), 50.0))
    greedy = SamplingParams(temperature=0.0)
    params = [SamplingParams(temperature=0.0, logit_bias=bias), greedy, SamplingParams(logit_bias={5: 1e4})]
    sampler = _create(params)
    for slots in ([0], [0, 1], [1, 0, 2], [2, 0]):
        token_ids = _sample(sampler, slots, torch.zeros(len(slots), HEAD), [9] * len(slots))
        drawn = dict(zip(slots, token_ids, strict=True))
        assert drawn[0] in range(20)
        assert drawn.get(2, 5) == 5
    assert bias.num_reads == 1
