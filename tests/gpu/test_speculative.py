"""Drafts on a GPU: captured steps with any number of them draw what steps without draw."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.bench.workers import WorkerProcess
from serving.core.config import load_config
from serving.core.request import SamplingParams
from serving.demo.evaluate import drawn_questions, draws
from serving.engine.build import Engine, build_engine
from serving.engine.drafting import Drafting
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer
from tests.wire_client import WireClient, create_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DEMO = Path(__file__).parents[2] / "serving" / "demo" / "model"
GREEDY = SamplingParams(temperature=0.0)
NEW_TOKENS = 24
ANSWER_TOKENS = 40


def engine_on(device: str, draft_tokens: str) -> Engine:
    engine = build_engine(
        DEMO, max_num_seqs=6, num_pages=256, dtype="float32", device=device, draft_tokens=draft_tokens
    )
    engine.runner.warm_up(max_batched_tokens=0, decodes=True)
    engine.pool.poison_all()
    return engine


@pytest.fixture(scope="module")
def drafting() -> Engine:
    return engine_on("cuda", "3")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, 256) for _ in range(rng.choice([1, 5, 63, 64, 65, 128, 200]))] for _ in range(30)]


def _sampling(index: int) -> SamplingParams:
    if index % 3 == 0:
        return GREEDY
    if index % 3 == 1:
        return SamplingParams(temperature=0.8, seed=index, top_p=0.9)
    return SamplingParams(temperature=0.9, seed=index, frequency_penalty=0.5, repetition_penalty=1.1, logprobs=1)


class Turns(Drafting):
    """Another number of drafts in each step, or always the same."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(3, lambda num_rows, num_drafts: 1.0)
        self._numbers, self._next = numbers, 0

    def choose(self, num_rows: int, most: int) -> int:
        self._next += 1
        return self._numbers[self._next % len(self._numbers)]


def texts_of(
    engine: Engine, prompts: list[list[int]], numbers: list[int], *, greedy: bool, run_ahead: bool = True
) -> list[list[int]]:
    loop = loop_over(engine, Turns(numbers) if numbers else None, run_ahead=run_ahead)
    asked = [GREEDY if greedy else _sampling(i) for i in range(len(prompts))]
    return loop.generate(prompts, asked, NEW_TOKENS)


def loop_over(engine: Engine, drafting: Drafting | None, *, run_ahead: bool = True) -> Aggregated:
    return Aggregated(
        engine.runner,
        KVManager(engine.pool.num_pages, prefix_cache=False, on_free=engine.pool.poison),
        num_slots=engine.max_num_seqs,
        max_batched_tokens=256,
        max_model_len=engine.max_model_len,
        run_ahead=run_ahead,
        drafting=drafting,
    )


@pytest.fixture(scope="module")
def texts(prompts: list[list[int]]) -> dict[bool, list[list[int]]]:
    engine = engine_on("cpu", "0")
    return {greedy: texts_of(engine, prompts, [], greedy=greedy) for greedy in (True, False)}


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(
    ("numbers", "run_ahead"), [([0], True), ([1], True), ([2], False), ([3], True), ([3, 0, 1, 2, 2, 0, 3], True)]
)
def test_text_in_fp32_is_the_cpus_without_drafts(
    drafting: Engine,
    prompts: list[list[int]],
    texts: dict[bool, list[list[int]]],
    greedy: bool,
    numbers: list[int],
    run_ahead: bool,
) -> None:
    assert texts_of(drafting, prompts, numbers, greedy=greedy, run_ahead=run_ahead) == texts[greedy]


def test_captured_steps_say_what_the_same_steps_say_piece_by_piece(drafting: Engine, prompts: list[list[int]]) -> None:
    captured = texts_of(drafting, prompts, [3, 1], greedy=False)
    drafted = drafting.runner._drafted
    assert drafted is not None
    graphs, drafted._graphs = drafted._graphs, []
    try:
        assert texts_of(drafting, prompts, [3, 1], greedy=False) == captured
    finally:
        drafted._graphs = graphs


@pytest.fixture(scope="module")
def questions() -> list[list[int]]:
    """What the model was trained to answer: on noise it holds no opinion that a draft could meet."""
    tokenizer = Tokenizer.from_folder(DEMO)
    template = ChatTemplate(tokenizer, "v3")
    return [
        template.render(question.messages, tools=question.tools)
        for kind, draw in draws(tokenizer, (256,)).items()
        for question in drawn_questions(kind, draw, 6, seed=5)
    ]


def answered(engine: Engine, questions: list[list[int]]) -> tuple[list[list[int]], float]:
    """Greedy answers to their end with one draft a step, and the share of the drafts that was accepted."""
    drafting = Turns([1])
    asked = SamplingParams(temperature=0.0, stop_token_ids=list(engine.model_config.eos_token_ids))
    texts = loop_over(engine, drafting).generate(questions, asked, ANSWER_TOKENS)
    num_drafted, num_accepted = drafting.take_counts()
    assert num_drafted > 100
    return texts, num_accepted / num_drafted


def test_drafts_of_answers_are_accepted_and_bad_ones_change_no_answer(
    drafting: Engine, questions: list[list[int]]
) -> None:
    texts, share = answered(drafting, questions)
    print(f"{share:.1%} of the drafts were accepted")
    assert share > 0.9
    mtp = drafting.runner.model.mtp
    mtp.hidden_norm.neg_()  # type: ignore[union-attr]
    try:
        same_texts, bad_share = answered(drafting, questions)
    finally:
        mtp.hidden_norm.neg_()  # type: ignore[union-attr]
    print(f"{bad_share:.1%} of drafts from a state turned round")
    assert bad_share < 0.5
    assert same_texts == texts


SETTINGS = [
    "model.device=cuda",
    "model.dtype=float32",
    "prefill.max_batched_tokens=256",
    "decode.max_num_seqs=16",
    "decode.draft_tokens=2",
    "kv.prefill_pages=512",
    "kv.decode_pages=512",
]


def counted(exposition: str) -> dict[str, float]:
    """Of each metric of a worker, all labels together."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_answers_with_drafts_behind_a_hand_off_to_another_gpu_are_one_gpus_without(questions: list[list[int]]) -> None:
    config = load_config(overrides=SETTINGS)
    with ExitStack() as stack:
        prefill, decode = (
            stack.enter_context(WorkerProcess(create_spec(f"{role}-0", role, config, model_dir=DEMO), gpu=gpu))
            for gpu, role in enumerate(("prefill", "decode"))
        )
        # While the workers load.
        engine = engine_on("cuda", "0")
        asked = SamplingParams(temperature=0.0, stop_token_ids=list(engine.model_config.eos_token_ids))
        wanted = loop_over(engine, None).generate(questions, asked, ANSWER_TOKENS)
        client = WireClient(prefill.address, decode.address)
        stack.callback(client.close)
        requests = [client.submit(question, ANSWER_TOKENS, asked) for question in questions]
        texts = client.finish(requests)
        assert not any(request.failures for request in requests)
        assert texts == wanted
        told = {worker: counted(exposition) for worker, exposition in client.scrape().items()}
    assert told["prefill-0"]["baton_kv_handoff_bytes_total"] > 0
    # All but the first token of each answer, which is prefill's.
    assert told["decode-0"]["baton_tokens_total"] == sum(map(len, wanted)) - len(wanted)
    num_drafted, num_accepted = (told["decode-0"][f"baton_spec_{kind}_tokens_total"] for kind in ("draft", "accepted"))
    print(f"{num_accepted:.0f} of {num_drafted:.0f} drafts were accepted")
    assert 0 < num_accepted <= num_drafted
