"""The engine on a GPU: captured steps say what the CPU says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from decode.scheduler import TokenEvent
from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.request import SamplingParams, Sequence
from serving.engine import chunks as chunks_module
from serving.engine.build import Engine, build_engine
from serving.engine.graphs import StepGraphs
from serving.engine.plan import DecodeRow, PrefillChunk, SlotSpec, StepPlan
from serving.engine.runner import Runner
from tests.gpu.asked import ALL_AT_ONCE, ASKED, GREEDY
from tests.gpu.texts import DEMO, TIE, partings, trained_questions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

NEW_TOKENS = 24
ANSWER_TOKENS = 40


def engine_on(device: str, dtype: str = "float32", draft_tokens: str = "0") -> Engine:
    # More threads of a CPU than small products have work for only wait for each other.
    engine = build_engine(
        DEMO,
        max_num_seqs=16,
        num_pages=512,
        dtype=dtype,
        device=device,
        draft_tokens=draft_tokens,
        num_threads=4,
    )
    engine.runner.warm_up(max_batched_tokens=256, decodes=True)
    engine.pool.poison_all()
    return engine


def loop_over(
    engine: Engine, *, max_batched_tokens: int = 256, run_ahead: bool = True, prefix_cache: bool = False
) -> Aggregated:
    return Aggregated(
        engine.runner,
        KVManager(engine.pool.num_pages, prefix_cache=prefix_cache, on_free=engine.pool.poison),
        num_slots=engine.max_num_seqs,
        max_batched_tokens=max_batched_tokens,
        max_model_len=engine.max_model_len,
        run_ahead=run_ahead,
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    lengths = [1, 5, 63, 64, 65, 128, 200, 300, 700]
    return [[rng.randrange(2, 256) for _ in range(rng.choice(lengths))] for _ in range(200)]


@pytest.fixture(scope="module")
def texts(prompts: list[list[int]]) -> list[list[int]]:
    return loop_over(engine_on("cpu")).generate(prompts, GREEDY, NEW_TOKENS)


@pytest.fixture(scope="module")
def questions() -> list[list[int]]:
    return trained_questions(25)


def written(engine: Engine, prompts: list[list[int]]) -> list[list[TokenEvent]]:
    """Greedy texts to their end, each token with the logarithms of the 20 likeliest."""
    loop = loop_over(engine)
    for i, prompt in enumerate(prompts):
        loop.add(
            Sequence(
                job_id=str(i),
                token_ids=list(prompt),
                num_prompt_tokens=len(prompt),
                sampling=SamplingParams(
                    temperature=0.0, logprobs=20, stop_token_ids=list(engine.model_config.eos_token_ids)
                ),
                max_new_tokens=ANSWER_TOKENS,
                deadline_s=float("inf"),
            )
        )
    texts: list[list[TokenEvent]] = [[] for _ in prompts]
    while loop.has_work:
        for event in loop.step(0.0).events:
            texts[int(event.sequence.job_id)].append(event)
    return texts


@pytest.mark.parametrize(("max_batched_tokens", "run_ahead"), [(256, True), (64, False), (4096, True)])
def test_greedy_text_in_fp32_is_the_cpus(
    prompts: list[list[int]], texts: list[list[int]], max_batched_tokens: int, run_ahead: bool
) -> None:
    loop = loop_over(engine_on("cuda"), max_batched_tokens=max_batched_tokens, run_ahead=run_ahead)
    assert loop.generate(prompts, GREEDY, NEW_TOKENS) == texts


def test_greedy_answers_in_fp32_are_the_cpus(questions: list[list[int]]) -> None:
    """Of the questions whose answers in bf16 part at ties alone."""

    def answers(engine: Engine) -> list[list[int]]:
        return [[token.token_id for token in text] for text in written(engine, questions)]

    engine = engine_on("cuda")
    theirs = answers(engine_on("cpu"))
    assert answers(engine) == theirs
    # Trained answers stand more than noise does: nothing less than this shows in all of them.
    engine.runner.model.blocks[3].attention.kv_norm.neg_()  # type: ignore[attr-defined]
    assert all(mine != other for mine, other in zip(answers(engine), theirs, strict=True))


CAPACITIES = (512, 2048)


def behind_prefixes(engine: Engine, max_batched_tokens: int) -> list[list[int]]:
    """Texts of prompts whose first tokens are found, of none to nearly all, and of long ones that go in chunks."""
    rng = random.Random(4)
    common = [rng.randrange(2, 256) for _ in range(1500)]
    found = [0, 64, 65, 128, 500, 640, 1100, 1472]
    tails = [[rng.randrange(2, 256) for _ in range(rng.randrange(1, 150))] for _ in range(60)]
    loop = loop_over(engine, max_batched_tokens=max_batched_tokens, prefix_cache=True)
    texts = loop.generate([common], GREEDY, 2)
    # One after the other and then many at once.
    for i, tail in enumerate(tails[:8]):
        texts += loop.generate([common[: found[i]] + tail], GREEDY, NEW_TOKENS)
    texts += loop.generate([common[: rng.choice(found)] + tail for tail in tails[8:]], GREEDY, NEW_TOKENS)
    return texts


@pytest.fixture(scope="module")
def texts_behind_prefixes() -> list[list[int]]:
    return behind_prefixes(engine_on("cpu"), 256)


@pytest.fixture
def few_cached_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than these are within a short test's reach."""
    monkeypatch.setattr(chunks_module, "_CAPTURED_CONTEXTS", dict.fromkeys(CAPACITIES, 512))


@pytest.mark.usefixtures("few_cached_rows")
@pytest.mark.parametrize("max_batched_tokens", [64, 256])
def test_captured_steps_behind_a_context_say_what_their_parts_do(
    monkeypatch: pytest.MonkeyPatch, texts_behind_prefixes: list[list[int]], max_batched_tokens: int
) -> None:
    engine = engine_on("cuda")
    chunks, replayed, launched = engine.runner._chunks, Counter[int](), Counter[bool]()
    assert list(chunks._graphs) == [0, *CAPACITIES]
    for capacity, graphs in chunks._graphs.items():
        assert graphs.captured_for(max_batched_tokens) is not None

        def counted(size: int, values: list[int], capacity: int = capacity, run: Any = graphs.run) -> Any:
            replayed[capacity] += 1
            return run(size, values)

        monkeypatch.setattr(graphs, "run", counted)
    launch = chunks._launch

    def noted(packed: Any, of_step: tuple[PrefillChunk, ...]) -> Any:
        launched[sum(chunk.start for chunk in of_step) > CAPACITIES[-1] or len(of_step) > 16] += 1
        return launch(packed, of_step)

    monkeypatch.setattr(chunks, "_launch", noted)
    assert behind_prefixes(engine, max_batched_tokens) == texts_behind_prefixes
    assert all(replayed[capacity] for capacity in (0, *CAPACITIES)), replayed
    assert launched[True], "nothing had more cached than a captured step holds"
    assert not launched[False], "a step that is captured was launched piece by piece"
    replayed.clear()
    engine.pool.poison_all()
    monkeypatch.setattr(chunks, "_graphs", {0: chunks._graphs[0]})
    assert behind_prefixes(engine, max_batched_tokens) == texts_behind_prefixes
    assert set(replayed) == {0}


@pytest.mark.usefixtures("few_cached_rows")
def test_a_wrong_row_of_a_captured_context_shows(
    monkeypatch: pytest.MonkeyPatch, texts_behind_prefixes: list[list[int]]
) -> None:
    right = chunks_module.packed_context_slots

    def wrong(kv_pool: torch.Tensor, page_table_NP: torch.Tensor, starts: torch.Tensor, size: int) -> torch.Tensor:
        slots_C = right(kv_pool, page_table_NP, starts, size)
        slots_C[8:56].copy_(slots_C[:1].expand(48))
        return slots_C

    monkeypatch.setattr(chunks_module, "packed_context_slots", wrong)
    assert behind_prefixes(engine_on("cuda"), 256) != texts_behind_prefixes


def test_a_latent_that_is_off_shows(prompts: list[list[int]], texts: list[list[int]]) -> None:
    engine = engine_on("cuda")
    engine.runner.model.blocks[3].attention.kv_norm[5] *= 1.5  # type: ignore[attr-defined]
    assert loop_over(engine).generate(prompts, GREEDY, NEW_TOKENS) != texts


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, torch raises where it would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_sequence_joins_without_waiting_for_the_step_in_flight() -> None:
    runner = engine_on("cuda").runner
    hidden_D = torch.randn(runner._hidden_SD.shape[1])
    biased = SamplingParams(temperature=0.0, logit_bias={7: -3.0, 11: 2.0})
    penalised = SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.1, logit_bias={7: -3.0}, seed=3
    )
    plain = SlotSpec(sampling=GREEDY, token_ids=[5, 9, 9], num_prompt_tokens=2, page_ids=[3])
    specs = [replace(plain, sampling=sampling) for sampling in (GREEDY, biased, penalised, penalised)]
    specs.append(replace(specs[-1], hidden=hidden_D.numpy().tobytes()))
    with no_synchronisation():
        for slot, spec in enumerate(specs):
            runner.open_slot(slot, spec)
        with pytest.raises(RuntimeError, match="synchroniz"):
            runner._last_token_S[0] = 9
    assert torch.equal(runner._hidden_SD[len(specs) - 1].cpu(), hidden_D)
    assert not runner._hidden_SD[0].any()


# A token less than a page: the second row that follows is the first of the next one.
PROMPT = [2 + 7 * i % 250 for i in range(63)]
FIRST_PART = 32
# The middle one is greedy: what is asked for concerns some rows of a batch.
SLOTS = (0, 1, 2)


def chunks(start: int, end: int, slots: tuple[int, ...] = SLOTS) -> tuple[PrefillChunk, ...]:
    return tuple(
        PrefillChunk(
            slot=slot,
            token_ids=PROMPT[start:end],
            start=start,
            store_from=start,
            page_ids=[8 * slot],
            sample=end == len(PROMPT),
        )
        for slot in slots
    )


def rows(num_before: int, *, drafting: bool, slots: tuple[int, ...] = SLOTS) -> tuple[DecodeRow, ...]:
    """After so many rows of the same slots; the first brings a page, and with drafts the device alone knows where later ones are."""
    return tuple(
        DecodeRow(
            slot=slot,
            position=None if drafting and num_before else len(PROMPT) + num_before,
            new_page_id=None if num_before else 8 * slot + 1,
        )
        for slot in slots
    )


def steps_of(kind: str, num_drafts: int) -> tuple[list[StepPlan], list[StepPlan]]:
    """Steps that bring the slots to where `kind` begins, and one or two of that kind."""
    drafting = num_drafts > 0
    whole = StepPlan(chunks=chunks(0, len(PROMPT)))
    if kind == "a captured prefill":
        return [], [whole]
    if kind == "a prefill behind a cached part":
        return [StepPlan(chunks=chunks(0, FIRST_PART))], [StepPlan(chunks=chunks(FIRST_PART, len(PROMPT)))]
    if kind == "decode":
        return [whole], [StepPlan(rows=rows(i, drafting=drafting), num_drafts=num_drafts) for i in range(2)]
    assert kind == "decode beside a prefill"
    early, late = SLOTS[:2], SLOTS[2:]
    before = StepPlan(chunks=(*chunks(0, len(PROMPT), early), *chunks(0, FIRST_PART, late)))
    beside = StepPlan(
        chunks=chunks(FIRST_PART, len(PROMPT), late),
        rows=rows(0, drafting=drafting, slots=early),
        num_drafts=num_drafts,
    )
    joined = (*rows(1, drafting=drafting, slots=early), *rows(0, drafting=drafting, slots=late))
    return [before], [beside, StepPlan(rows=joined, num_drafts=num_drafts)]


def began(runner: Runner, asked: SamplingParams, before: list[StepPlan]) -> None:
    """The slots are opened and these steps settled."""
    # A step that raised half way was never settled.
    runner._num_in_flight = 0
    for slot in SLOTS:
        sampling = GREEDY if slot == 1 else asked
        spec = SlotSpec(sampling=sampling, token_ids=PROMPT, num_prompt_tokens=len(PROMPT), page_ids=[8 * slot])
        runner.open_slot(slot, spec)
    for plan in before:
        runner.settle(runner.launch(plan))


@pytest.fixture(scope="module", params=["0", "2"])
def stepping(request: pytest.FixtureRequest) -> Engine:
    return engine_on("cuda", "bfloat16", draft_tokens=request.param)


@pytest.mark.parametrize("asked", [*ASKED.values(), ALL_AT_ONCE], ids=[*ASKED, "all at once"])
@pytest.mark.parametrize(
    ("kind", "behind", "num_replays"),
    [
        ("a captured prefill", "captured", 1),
        ("a prefill behind a cached part", "captured", 1),
        ("a prefill behind a cached part", "in pieces", 0),
        ("decode", "captured", 2),
        ("decode beside a prefill", "captured", 3),
        ("decode beside a prefill", "in pieces", 2),
    ],
)
def test_a_step_waits_for_nothing(
    stepping: Engine, kind: str, behind: str, num_replays: int, asked: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = stepping.runner
    if behind == "in pieces":
        monkeypatch.setattr(runner._chunks, "_graphs", {0: runner._chunks._graphs[0]})
    before, steps = steps_of(kind, stepping.draft_tokens)
    # Kernels are loaded and libraries take their memory at the first call.
    began(runner, asked, [*before, *steps])
    replays: list[int] = []
    run = StepGraphs.run

    def noted(graphs: StepGraphs, size: int, values: list[int]) -> tuple[torch.Tensor, ...]:
        replays.append(size)
        return run(graphs, size, values)

    began(runner, asked, before)
    monkeypatch.setattr(StepGraphs, "run", noted)
    with no_synchronisation():
        in_flight = [runner.launch(plan) for plan in steps]
        with pytest.raises(RuntimeError, match="synchroniz"):
            runner._last_token_S[0] = 9
    assert len(replays) == num_replays
    for step, plan in zip(in_flight, steps, strict=True):
        tokens = runner.settle(step).tokens
        assert {token.slot for token in tokens} == {each.slot for each in (*plan.chunks, *plan.rows)}
        assert all((token.logprobs is not None) == (asked.logprobs is not None and token.slot != 1) for token in tokens)


def test_greedy_answers_in_bf16_part_from_the_cpus_only_at_ties(questions: list[list[int]]) -> None:
    theirs = written(engine_on("cpu", "bfloat16"), questions)
    engine = engine_on("cuda", "bfloat16")
    parted = partings(written(engine, questions), theirs)
    print(f"bf16: {len(parted)} of {len(questions)} answers part, at gaps of {[round(gap, 4) for gap in parted]}")
    assert all(gap <= TIE for gap in parted)
    engine.runner.model.blocks[3].attention.kv_norm.neg_()  # type: ignore[attr-defined]
    assert any(gap > TIE for gap in partings(written(engine, questions), theirs))


def test_drawn_text_does_not_depend_on_the_batch(prompts: list[list[int]]) -> None:
    engine = engine_on("cuda")

    def asked(first_seed: int) -> list[SamplingParams]:
        return [
            SamplingParams(temperature=0.8, seed=first_seed + i, top_p=0.9) if i % 3 else GREEDY
            for i in range(len(prompts))
        ]

    together = loop_over(engine).generate(prompts, asked(0), 12)
    alone = [
        loop_over(engine).generate([prompt], [one], 12)[0] for prompt, one in zip(prompts[:20], asked(0), strict=False)
    ]
    assert alone == together[:20]
    others = loop_over(engine).generate(prompts[:20], asked(len(prompts))[:20], 12)
    # The greedy ones ask no random number.
    assert [text != other for text, other in zip(alone, others, strict=True)] == [i % 3 > 0 for i in range(20)]
