"""Drafts of the embedded model's MTP layer: they decide how many tokens a step yields, and never which."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
import torch

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.request import FinishReason, SamplingParams, TokenLogprobs
from serving.demo import evaluate
from serving.demo.evaluate import MODEL_FOLDER
from serving.engine.build import Engine, build_engine
from serving.engine.drafting import Drafting
from serving.engine.plan import DecodeRow, PrefillChunk, SlotSpec, StepPlan
from serving.engine.sampler import Sampler
from serving.kernels import draft_rows
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer
from tests.engine_factory import GREEDY, create_sequence

TOKENIZER = Tokenizer.from_folder(MODEL_FOLDER)
NUM_PAGES = 40
SAMPLED = [
    msgspec.structs.replace(params, stop_token_ids=[TOKENIZER.eos_id])
    for params in (
        GREEDY,
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, seed=2),
        SamplingParams(temperature=0.0, frequency_penalty=0.6, logprobs=0),
        SamplingParams(temperature=0.9, presence_penalty=0.7, repetition_penalty=1.3, seed=3, logprobs=2),
        SamplingParams(temperature=0.7, logit_bias={5: 3.0, 300: -4.0}, seed=4, logprobs=1),
    )
]


def _prompts() -> list[list[int]]:
    """Questions that the model is certain about, and two texts of nothing, after which it is not."""
    template, kinds = ChatTemplate(TOKENIZER, "v3"), evaluate.draws(TOKENIZER, (256,))
    asked = [kinds[kind](Random(1)) for kind in ("addition", "reverse", "tool call", "greeting")]
    prompts = [template.render(question.messages, tools=question.tools) for question in asked]
    first, second = [[Random(seed).randrange(2, 250) for _ in range(60)] for seed in (1, 2)]
    return [*prompts[:2], first, prompts[2], second, prompts[3]]


PROMPTS = _prompts()


def _build(draft_tokens: str) -> Engine:
    torch.set_num_threads(1)
    options = {"max_num_seqs": 6, "num_pages": NUM_PAGES, "dtype": "float32", "device": "cpu"}
    engine = build_engine(MODEL_FOLDER, draft_tokens=draft_tokens, **options)  # type: ignore[arg-type]
    engine.pool.poison_all()
    return engine


@pytest.fixture(scope="module")
def plain() -> Engine:
    return _build("0")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return _build("3")


class _Random(Drafting):
    """From 0 to `most` drafts, drawn for each step."""

    def __init__(self, most: int, seed: int) -> None:
        super().__init__(most, lambda num_rows, num_drafts: 1.0)
        self._random = Random(seed)

    def choose(self, num_rows: int, most: int) -> int:
        return self._random.randint(0, min(self._most, max(most, 0)))


def _always(num_drafts: int) -> Drafting:
    """As many as allowed: a step costs nothing."""
    return Drafting(num_drafts, lambda num_rows, num_drafts: 1.0)


def _loop(
    engine: Engine, drafting: Drafting | None, *, num_pages: int = NUM_PAGES, run_ahead: bool = True, num_slots: int = 6
) -> Aggregated:
    manager = KVManager(num_pages, on_free=engine.pool.poison)
    return Aggregated(
        engine.runner,
        manager,
        num_slots=num_slots,
        max_batched_tokens=256,
        max_model_len=engine.max_model_len,
        run_ahead=run_ahead,
        drafting=drafting,
    )


Answer = tuple[list[int], list[TokenLogprobs], FinishReason | None]


def _answers(loop: Aggregated, *, max_new_tokens: list[int], sampling: list[SamplingParams]) -> list[Answer]:
    answers: list[Answer] = [([], [], None) for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        loop.add(create_sequence(str(i), prompt, sampling=sampling[i], max_new_tokens=max_new_tokens[i]))
    while loop.has_work:
        for event in loop.step(0.0).events:
            i = int(event.sequence.job_id)
            tokens, logprobs, finish = answers[i]
            assert finish is None, "a token after the last"
            tokens.append(event.token_id)
            if event.logprobs is not None:
                logprobs.append(event.logprobs)
            answers[i] = tokens, logprobs, event.finish
        loop.manager.check()
    counts = loop.manager.counts()
    assert counts["free"] + counts["cached"] == loop.manager.num_pages
    return answers


LENGTHS = [1, 2, 30, 3, 40, 40]


@pytest.fixture(scope="module")
def expected(plain: Engine) -> list[Answer]:
    return _answers(_loop(plain, None), max_new_tokens=LENGTHS, sampling=SAMPLED)


@pytest.mark.parametrize(
    ("drafting", "run_ahead"),
    [
        (_always(1), False),
        (_always(2), True),
        (_always(3), True),
        (_Random(3, seed=1), False),
        (_Random(3, seed=2), True),
    ],
)
def test_tokens_logprobs_and_ends_are_those_without_drafts(
    engine: Engine, expected: list[Answer], drafting: Drafting, run_ahead: bool
) -> None:
    loop = _loop(engine, drafting, run_ahead=run_ahead)
    for _ in range(1 + run_ahead):  # the second time from the prefix cache
        found = _answers(loop, max_new_tokens=LENGTHS, sampling=SAMPLED)
        for (tokens, logprobs, finish), (want_tokens, want_logprobs, want_finish) in zip(found, expected, strict=True):
            assert (tokens, finish) == (want_tokens, want_finish)
            assert len(logprobs) == len(want_logprobs)
            for one, other in zip(logprobs, want_logprobs, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
                assert one.top_ids == other.top_ids
    num_drafted, num_accepted = drafting.take_counts()
    assert 0 < num_accepted < num_drafted, "both outcomes of a draft are tested"


def test_a_draft_that_is_accepted_unseen_shows_in_the_text(
    engine: Engine, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def every_draft(tokens_BT: torch.Tensor, drafts_BK: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tokens_BT[:, 0], drafts_BK.shape[1])

    monkeypatch.setattr(draft_rows, "num_accepted", every_draft)
    found = _answers(_loop(engine, _always(3)), max_new_tokens=LENGTHS, sampling=SAMPLED)
    assert [tokens for tokens, *_ in found] != [tokens for tokens, *_ in expected]


def _acceptance(engine: Engine, num_drafts: int) -> tuple[float, list[list[int]]]:
    drafting = _always(num_drafts)
    answers = _answers(_loop(engine, drafting), max_new_tokens=[60] * 6, sampling=[SAMPLED[0]] * 6)
    num_drafted, num_accepted = drafting.take_counts()
    return num_accepted / num_drafted, [tokens for tokens, *_ in answers]


def test_most_greedy_drafts_are_accepted_and_a_damaged_layer_costs_drafts_but_no_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    share, texts = _acceptance(engine, 1)
    assert share >= 0.7
    share_of_three, same = _acceptance(engine, 3)
    assert share_of_three >= 0.3
    assert same == texts
    mtp = engine.runner.model.mtp
    assert mtp is not None
    monkeypatch.setattr(mtp, "norm", -mtp.norm)  # type: ignore[attr-defined]
    damaged_share, same = _acceptance(engine, 1)
    assert damaged_share < 0.2
    assert same == texts


@pytest.mark.parametrize("run_ahead", [False, True])
def test_pre_empted_and_aborted_texts_are_the_same_and_every_page_comes_back(
    engine: Engine, plain: Engine, run_ahead: bool
) -> None:
    params = [msgspec.structs.replace(each, stop_token_ids=[], logprobs=None) for each in SAMPLED]
    roomy = [tokens for tokens, *_ in _answers(_loop(plain, None), max_new_tokens=[50] * 6, sampling=params)]
    tight = _loop(engine, _Random(3, seed=2), num_pages=7, run_ahead=run_ahead)
    assert [tokens for tokens, *_ in _answers(tight, max_new_tokens=[50] * 6, sampling=params)] == roomy
    assert tight.num_preempted > 0
    loop, drawn = _loop(engine, _Random(3, seed=3), run_ahead=run_ahead), Random(4)
    for i, prompt in enumerate(PROMPTS):
        loop.add(create_sequence(str(i), prompt, sampling=params[i], max_new_tokens=50))
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    aborted: set[int] = set()
    while loop.has_work:
        for event in loop.step(0.0).events:
            tokens[int(event.sequence.job_id)].append(event.token_id)
        if drawn.random() < 0.2 and len(aborted) < 4:
            aborted.add(drawn.randrange(6))
            loop.abort(str(max(aborted)))
        loop.manager.check()
    assert all(roomy[i][: len(text)] == text for i, text in enumerate(tokens))
    assert sum(len(text) == 50 for text in tokens) >= 2


def _open(engine: Engine, slot: int, pages: list[int], token_ids: list[int], hidden: bytes = b"") -> None:
    spec = SlotSpec(
        sampling=GREEDY, token_ids=token_ids, num_prompt_tokens=len(PROMPTS[0]), page_ids=pages, hidden=hidden
    )
    engine.runner.open_slot(slot, spec)


def _prefill(engine: Engine, slot: int, pages: list[int], token_ids: list[int]) -> tuple[int, bytes]:
    _open(engine, slot, pages, token_ids)
    chunk = PrefillChunk(slot=slot, token_ids=token_ids, start=0, store_from=0, page_ids=pages, sample=True)
    token = engine.runner.settle(engine.runner.launch(StepPlan(chunks=(chunk,)))).tokens[0]
    return token.token_id, token.hidden


def test_drafts_after_a_hand_off_leave_the_rows_that_prefill_would_have_stored(engine: Engine) -> None:
    """Slot 0 is what a prefill worker has; slot 1 gets its pages, first token and hidden state, two steps in flight."""
    prompt, pages, others, scratch = PROMPTS[0], [1, 2, 3], [11, 12, 13], [21, 22, 23]
    engine.pool.poison_all()
    first, hidden = _prefill(engine, 0, pages, prompt)
    engine.pool.tensor[others] = engine.pool.tensor[pages]
    _open(engine, 1, others, [*prompt, first], hidden)
    runner, text, in_flight = engine.runner, [*prompt, first], []
    for number in (1, 0, 3, 2, 3, 1):
        known = len(text) - 1 if not in_flight else None
        in_flight.append(runner.launch(StepPlan(rows=(DecodeRow(slot=1, position=known),), num_drafts=number)))
        if len(in_flight) == 2:
            text += [token.token_id for token in runner.settle(in_flight.pop(0)).tokens]
    text += [token.token_id for token in runner.settle(in_flight.pop()).tokens]
    assert len(text) - len(prompt) > 7, "some drafts were accepted"

    def rows(of: list[int]) -> torch.Tensor:
        return engine.pool.tensor[of].transpose(0, 1).flatten(1, 2)[:, : len(text) - 1]

    greedy = [_prefill(engine, 2, scratch, text[:end])[0] for end in range(len(prompt), len(text))]
    assert text[len(prompt) :] == greedy
    torch.testing.assert_close(rows(others), rows(scratch), atol=1e-4, rtol=1e-4)
    _prefill(engine, 2, scratch, [*text[:-2], text[-2] ^ 1])
    assert not torch.allclose(rows(others)[-1], rows(scratch)[-1], atol=1e-2)


def test_penalties_count_accepted_tokens_only() -> None:
    params = SamplingParams(temperature=0.9, frequency_penalty=1.5, presence_penalty=0.5, seed=9, logprobs=1)
    plain = SamplingParams(temperature=0.8, seed=10)
    logits = 2.0 * torch.randn(4, 2, 4, 50, generator=torch.Generator().manual_seed(0))

    def create() -> Sampler:
        sampler = Sampler(2, 50, torch.device("cpu"))
        sampler.open(0, params, [3, 4, 5], 2)
        sampler.open(1, plain, [3, 4, 5], 2)
        return sampler

    one_by_one, drafted = create(), create()
    position = 3
    for step in logits:
        drafts, num_accepted, want = torch.zeros(2, 3, dtype=torch.int64), position % 4, []
        for t in range(num_accepted + 1):
            drawn, found = one_by_one.sample((0, 1), step[:, t].clone(), [position + t] * 2)
            assert found is not None
            want.append((drawn.tolist(), found.by_row()[0].logprob))
            if t < 3:
                drafts[:, t] = drawn if t < num_accepted else (drawn + 1) % 50
        tokens, parts = drafted.sample_drafted((0, 1), step.flatten(0, 1).clone(), torch.tensor([position] * 2), drafts)
        logprobs = {row: of for part in parts for row, of in part.by_row().items()}
        assert draft_rows.num_accepted(tokens, drafts).tolist() == [num_accepted] * 2
        got = [(tokens[:, t].tolist(), logprobs[t].logprob) for t in range(num_accepted + 1)]
        assert got == want
        position += num_accepted + 1
