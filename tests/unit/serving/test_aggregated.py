"""Mode `both` against transformers.generate, and the same text whatever the batch, the chunks, the cache and the pre-emptions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from serving.aggregated import Aggregated
from serving.core.errors import PagesExhausted
from serving.core.request import FinishReason, SamplingParams
from serving.engine.build import Engine
from tests.engine_factory import GREEDY, create_engine, create_loop, create_sequence, random_prompts

NUM_NEW = 10
# From one token to five pages, around each page border, and some that share whole pages with others.
LENGTHS = [
    1,
    2,
    3,
    7,
    15,
    31,
    62,
    63,
    64,
    65,
    66,
    90,
    126,
    127,
    128,
    129,
    160,
    191,
    192,
    193,
    220,
    255,
    256,
    257,
    300,
    320,
]


def _prompts() -> list[list[int]]:
    prompts = random_prompts(LENGTHS, seed=1)
    longest, tails = prompts[-1], random_prompts([1, 5, 40, 64], seed=2)
    shared = [longest[:64] + tails[0], longest[:128] + tails[1], longest[:192], longest[:256] + tails[2]]
    return [*prompts, *shared, longest, longest[:128] + tails[3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    torch.set_num_threads(1)
    return create_engine(folder, num_pages=96, max_num_seqs=32)


@pytest.fixture(scope="module")
def expected(engine: Engine, folder: Path) -> list[list[int]]:
    """Greedy answers of transformers to `_prompts()`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in _prompts():
        token_ids = torch.tensor([prompt])
        mask = torch.ones_like(token_ids)
        out = model.generate(token_ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("max_batched_tokens", [100, 4096])
def test_32_concurrent_greedy_texts_equal_transformers(
    engine: Engine, expected: list[list[int]], run_ahead: bool, max_batched_tokens: int
) -> None:
    loop = create_loop(engine, run_ahead=run_ahead, max_batched_tokens=max_batched_tokens)
    assert loop.generate(_prompts(), GREEDY, NUM_NEW) == expected
    # Again, now with every full page of every prompt in the prefix cache.
    assert loop.generate(_prompts(), GREEDY, NUM_NEW) == expected
    loop.manager.check()
    assert set(loop.manager.counts()) >= {"free", "cached"}
    assert sum(loop.manager.counts()[state] for state in ("free", "cached")) == loop.manager.num_pages


def test_a_cached_latent_that_is_perturbed_changes_a_text(engine: Engine, expected: list[list[int]]) -> None:
    loop = create_loop(engine)
    assert loop.generate(_prompts(), GREEDY, NUM_NEW) == expected
    longest = _prompts()[LENGTHS.index(320)]
    found = loop.manager.acquire(longest, len(longest))
    assert found is not None
    assert found.num_cached == 320
    loop.manager.release(found.page_ids)
    engine.pool.tensor[found.page_ids[0], 0, 0] += 30.0
    assert loop.generate(_prompts(), GREEDY, NUM_NEW) != expected


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_pre_empted_text_goes_on_as_if_nothing_had_happened(engine: Engine, run_ahead: bool) -> None:
    prompts = random_prompts([60, 62, 100, 120, 5, 126], seed=3)
    sampling = [SamplingParams(temperature=1.0, frequency_penalty=0.4, seed=i) if i % 2 else GREEDY for i in range(6)]
    roomy = create_loop(engine, run_ahead=run_ahead).generate(prompts, sampling, 80)
    tight = create_loop(engine, run_ahead=run_ahead, num_pages=10, prefix_cache=False)
    assert tight.generate(prompts, sampling, 80) == roomy
    assert tight.num_preempted > 0
    tight.manager.check()
    assert tight.manager.counts()["free"] == 10


def test_a_drawn_text_depends_on_its_seed_and_on_nothing_else(engine: Engine) -> None:
    prompts = random_prompts([5, 64, 70, 130, 200, 33, 90, 1], seed=4)
    sampling = [SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=i) for i in range(8)]
    together = create_loop(engine).generate(prompts, sampling, 20)
    alone = [
        create_loop(engine, max_batched_tokens=64, run_ahead=False).generate([prompt], params, 20)[0]
        for prompt, params in zip(prompts, sampling, strict=True)
    ]
    assert together == alone
    order = random.Random(0).sample(range(8), 8)
    shuffled = create_loop(engine, num_slots=3).generate([prompts[i] for i in order], [sampling[i] for i in order], 20)
    assert shuffled == [together[i] for i in order]
    reseeded = [SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=i + 1) for i in range(8)]
    assert create_loop(engine).generate(prompts, reseeded, 20) != together


def test_a_prompt_and_its_own_answer_resumed_give_the_rest_of_the_text(engine: Engine) -> None:
    prompt = random_prompts([100], seed=6)[0]
    params = SamplingParams(temperature=1.1, presence_penalty=0.5, repetition_penalty=1.2, seed=8)
    whole = create_loop(engine).generate([prompt], params, 60)[0]
    for cut in (1, 27, 28, 29, 59):
        loop = create_loop(engine)
        loop.add(
            create_sequence("r", prompt + whole[:cut], num_prompt_tokens=100, sampling=params, max_new_tokens=60 - cut)
        )
        assert _drain(loop)["r"] == whole[cut:]


def _drain(loop: Aggregated, *, now_s: float = 0.0) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while loop.has_work:
        for event in loop.step(now_s).events:
            tokens.setdefault(event.sequence.job_id, []).append(event.token_id)
    return tokens


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_stop_token_or_the_length_ends_a_text_and_is_its_last_token(engine: Engine, run_ahead: bool) -> None:
    prompts = random_prompts([20, 70, 64], seed=7)
    whole = create_loop(engine).generate(prompts, GREEDY, 30)
    stop = whole[0][11]
    params = msgspec.structs.replace(GREEDY, stop_token_ids=[stop])
    loop = create_loop(engine, run_ahead=run_ahead)
    for i, prompt in enumerate(prompts):
        loop.add(create_sequence(str(i), prompt, sampling=params if i == 0 else GREEDY, max_new_tokens=(30, 30, 1)[i]))
    finishes, tokens = {}, {}
    while loop.has_work:
        for event in loop.step(0.0).events:
            tokens.setdefault(event.sequence.job_id, []).append(event.token_id)
            if event.finish is not None:
                finishes[event.sequence.job_id] = event.finish
    assert finishes == {"0": FinishReason.STOP, "1": FinishReason.LENGTH, "2": FinishReason.LENGTH}
    assert tokens["0"] == whole[0][: whole[0].index(stop) + 1]
    assert tokens["1"] == whole[1]
    assert tokens["2"] == whole[2][:1]


@pytest.mark.parametrize("run_ahead", [False, True])
def test_aborts_at_any_step_leave_the_others_text_and_every_page(
    engine: Engine, expected: list[list[int]], run_ahead: bool
) -> None:
    drawn = random.Random(9)
    loop = create_loop(engine, run_ahead=run_ahead, max_batched_tokens=100, num_slots=10)
    prompts = _prompts()
    aborted = set(drawn.sample(range(len(prompts)), 16))
    for i, prompt in enumerate(prompts):
        loop.add(create_sequence(str(i), prompt, max_new_tokens=NUM_NEW))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    pending = sorted(aborted)
    while loop.has_work:
        for event in loop.step(0.0).events:
            tokens[event.sequence.job_id].append(event.token_id)
        if pending and drawn.random() < 0.7:
            loop.abort(str(pending.pop()))
        loop.manager.check()
    for i, answer in enumerate(expected):
        if i in aborted:
            assert tokens[str(i)] == answer[: len(tokens[str(i)])]
        else:
            assert tokens[str(i)] == answer
    assert loop.abort("0") is None
    assert sum(loop.manager.counts()[state] for state in ("free", "cached")) == loop.manager.num_pages


def test_a_sequence_past_its_deadline_before_it_starts_is_dropped_and_named(engine: Engine) -> None:
    loop = create_loop(engine)
    loop.add(create_sequence("late", [5, 6, 7], deadline_s=1.0))
    loop.add(create_sequence("fine", [5, 6, 7], deadline_s=9.0))
    stepped = loop.step(2.0)
    assert [sequence.job_id for sequence in stepped.late] == ["late"]
    assert list(_drain(loop, now_s=20.0)) == ["fine"], "a deadline is one of starting, not of ending"


def test_what_can_never_be_finished_is_refused_at_once(engine: Engine) -> None:
    loop = create_loop(engine, num_pages=3)
    with pytest.raises(PagesExhausted, match="the pool has 3"):
        loop.add(create_sequence("a", random_prompts([150], seed=0)[0], max_new_tokens=100))
    with pytest.raises(PagesExhausted, match="max_model_len"):
        create_loop(engine, max_model_len=100).add(create_sequence("c", random_prompts([101], seed=0)[0]))
    loop.add(create_sequence("b", random_prompts([150], seed=0)[0], max_new_tokens=43))
    assert len(_drain(loop)["b"]) == 43


def test_an_idle_loop_has_no_work_and_a_step_of_it_does_nothing(engine: Engine) -> None:
    loop = create_loop(engine)
    assert not loop.has_work
    assert loop.step(0.0).events == ()
