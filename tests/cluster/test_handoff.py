"""Two workers, real sockets, real transfers, one process: the text is that of one worker, and no page is ever lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from kvcache.layout import PAGE_TOKENS
from kvcache.transfer.base import PageSource
from serving.engine.build import Engine
from serving.engine.plan import Launched, StepResult
from serving.metrics import merge
from serving.worker import Worker
from tests.engine_factory import create_engine, create_loop, random_prompts
from tests.wire_client import GREEDY, Request, WorkerPair, WrappedSource, create_config

# Lengths around the page borders, up to five pages.
LENGTHS = [1, 2, 3, 17, 63, 64, 65, 100, 127, 128, 129, 191, 192, 193, 256, 257, 300, 319, 320, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model") / "tiny"


@pytest.fixture(scope="module")
def engines(folder: Path) -> tuple[Engine, Engine]:
    torch.set_num_threads(1)
    return create_engine(folder, num_pages=256), create_engine(folder, num_pages=256)


@pytest.fixture(scope="module")
def transformers_texts(engines: tuple[Engine, Engine], folder: Path) -> list[list[int]]:
    """Greedy answers of transformers to `mixed_prompts(3)`, twelve tokens each; the engines have written the folder."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in mixed_prompts(3):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.fixture
def pair(engines: tuple[Engine, Engine]) -> Iterator[Callable[..., WorkerPair]]:
    made: list[WorkerPair] = []

    def start(**options: object) -> WorkerPair:
        made.append(WorkerPair(*engines, **options))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for workers in made:
        workers.close()


def expected(engine: Engine, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """What one worker answers, without a cache and without a hand-off."""
    return create_loop(engine, prefix_cache=False).generate(prompts, GREEDY, max_new_tokens)


def mixed_prompts(seed: int) -> list[list[int]]:
    """32 prompts: all lengths, and twelve that share beginnings with one of them."""
    prompts = random_prompts(LENGTHS, seed)
    long = prompts[LENGTHS.index(320)]
    tails = random_prompts([1, 5, 40, 64, 65, 90], seed + 1)
    return prompts + [long[:128] + tail for tail in tails] + [long[:cut] for cut in (64, 128, 129, 200, 256, 320)]


@pytest.mark.parametrize(("backend", "run_ahead"), [("nixl", False), ("nixl", True), ("local", False)])
def test_the_text_of_two_workers_is_that_of_one_and_of_transformers(
    engines: tuple[Engine, Engine],
    transformers_texts: list[list[int]],
    pair: Callable[..., WorkerPair],
    backend: str,
    run_ahead: bool,
) -> None:
    prompts = mixed_prompts(3)
    assert len(prompts) == 32
    wanted = expected(engines[0], prompts, 12)
    assert wanted == transformers_texts
    workers = pair(backend=backend, run_ahead=run_ahead)
    client = workers.client
    first = client.finish([client.submit(prompt, 12) for prompt in prompts])
    assert first == wanted
    again = client.finish([client.submit(prompt, 12) for prompt in reversed(prompts)])  # prefix hits on both sides
    assert again[::-1] == wanted
    assert workers.prefill.metric("baton_prefix_hit_tokens_total") > 0
    assert workers.decode.metric("baton_prefix_hit_tokens_total") > 0
    client.wait(workers.is_quiet, 2.0)


class PerturbingSource(WrappedSource):
    """Changes one latent of the first page of its first write, after the sums were taken."""

    def __init__(self, source: PageSource, engine: Engine) -> None:
        super().__init__(source)
        self._engine = engine
        self.num_left = 1

    def write(
        self, peer: str, source_page_ids: Sequence[int], target_page_ids: Sequence[int], notification: bytes
    ) -> int:
        if self.num_left:
            self.num_left -= 1
            self._engine.pool.tensor[source_page_ids[0], 1, 3, :8] += 2.0
        return super().write(peer, source_page_ids, target_page_ids, notification)


@pytest.mark.parametrize("checksum", ["off", "all"])
def test_one_perturbed_latent_changes_the_text_unless_checksums_refuse_it(
    engines: tuple[Engine, Engine], pair: Callable[..., WorkerPair], checksum: str
) -> None:
    prompts = random_prompts([100], 11)
    wanted = expected(engines[0], prompts, 24)
    workers = pair(
        config=create_config(checksum=checksum), wrap_source=lambda source: PerturbingSource(source, engines[0])
    )
    request = workers.client.submit(prompts[0], 24)
    answer = workers.client.finish([request])[0]
    if checksum == "off":
        assert request.finish is not None
        assert answer[0] == wanted[0][0]  # the first token was drawn before the hand-off
        assert answer != wanted[0]
    else:
        assert request.finish is None
        assert any("ManifestError" in reason and "checksum" in reason for reason in request.failures)
        assert workers.decode.metric("baton_kv_handoff_failures_total", reason="manifest") == 1
    workers.client.wait(workers.is_quiet, 2.0)


def test_the_byte_counters_are_exact_over_mixed_requests(
    engines: tuple[Engine, Engine], pair: Callable[..., WorkerPair]
) -> None:
    workers = pair()
    layout = engines[0].layout
    draw = random.Random(5)
    prompts: list[list[int]] = []
    for fresh in random_prompts([draw.choice(LENGTHS) for _ in range(100)], 21):
        shared = draw.choice(prompts) if prompts and draw.random() < 0.5 else []
        prompts.append((shared[: draw.randrange(len(shared) + 1)] + fresh)[:320])
    seen: set[tuple[int, ...]] = set()  # beginnings of whole pages that decode has computed or received
    num_latents = num_padding_rows = 0
    for prompt in prompts:
        num_held = 0
        while num_held + PAGE_TOKENS <= len(prompt) and tuple(prompt[: num_held + PAGE_TOKENS]) in seen:
            num_held += PAGE_TOKENS
        answer = workers.client.finish([workers.client.submit(prompt, 3)])[0]
        num_sent = len(prompt) - num_held
        num_latents += num_sent
        num_padding_rows += -num_sent % PAGE_TOKENS
        computed = prompt + answer[:-1]
        seen |= {tuple(computed[:end]) for end in range(PAGE_TOKENS, len(computed) + 1, PAGE_TOKENS)}
        workers.client.wait(workers.is_quiet)

    def counted(kind: str) -> float:
        return workers.prefill.metric("baton_kv_handoff_bytes_total", kind=kind)

    assert num_latents < sum(map(len, prompts)), "no prompt had a prefix hit: the test would not see it counted"
    assert counted("latent") == num_latents * layout.num_layers * layout.row_width * layout.element_bytes
    assert counted("mtp") == num_latents * layout.num_mtp_layers * layout.row_width * layout.element_bytes
    assert counted("padding") == num_padding_rows * layout.num_planes * layout.row_width * layout.element_bytes
    assert counted("manifest") > 100 * 64
    scraped = {
        sample.labels["worker"]: sample.value
        for family in text_string_to_metric_families(merge(workers.client.scrape().values()))
        for sample in family.samples
        if sample.name == "baton_kv_handoff_bytes_total" and sample.labels["kind"] == "latent"
    }
    assert scraped == {"prefill-0": counted("latent")}


def test_two_hundred_aborts_at_random_moments_leave_no_page_behind(
    engines: tuple[Engine, Engine], pair: Callable[..., WorkerPair]
) -> None:
    workers, draw = pair(config=create_config(max_batched_tokens=64)), random.Random(9)
    client = workers.client
    prompts = random_prompts([draw.choice(LENGTHS) for _ in range(200)], 31)
    states: set[str] = set()
    open_requests: list[tuple[float, Request]] = []
    for prompt in prompts:
        open_requests.append((time.monotonic() + draw.random() * 0.25, client.submit(prompt, 200)))
        client.pump(draw.random() * 0.01)
        states |= {state for state, count in workers.decode.pages().items() if count}
        for due_s, request in list(open_requests):
            if due_s <= time.monotonic() or len(open_requests) > 24:
                client.abort(request)
                open_requests.remove((due_s, request))
    for _, request in open_requests:
        client.abort(request)
    client.wait(workers.is_quiet, 2.0)
    assert {"reserved", "exposed", "owned"} <= states, f"only {states} were seen: the aborts came too late or too early"
    prompts = mixed_prompts(seed=41)[:8]
    assert client.finish([client.submit(prompt, 8) for prompt in prompts]) == expected(engines[0], prompts, 8)


def test_a_decode_pool_that_is_too_small_pre_empts_and_the_text_goes_on(
    engines: tuple[Engine, Engine], pair: Callable[..., WorkerPair]
) -> None:
    prompts = random_prompts([60, 61, 62, 63, 64, 120], 51)
    wanted = expected(engines[0], prompts, 80)
    config = create_config(expected_new_tokens=1)
    workers = pair(config=config, num_decode_pages=9)
    requests = [workers.client.submit(prompt, 80) for prompt in prompts]
    assert workers.client.finish(requests) == wanted
    assert sum(request.num_preempted for request in requests) > 0
    assert all(not request.failures for request in requests)
    workers.client.wait(workers.is_quiet, 2.0)


@pytest.fixture(scope="module")
def drafting(engines: tuple[Engine, Engine], folder: Path) -> Engine:
    """A decode engine that drafts; steps cost it nothing, so that it always does."""
    engine = create_engine(folder, num_pages=256, draft_tokens="3")
    engine.runner.step_s = lambda num_rows, num_drafts: 1.0  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("run_ahead", [False, True])
def test_with_drafts_the_text_is_the_same_through_hand_offs_and_pre_emptions(
    engines: tuple[Engine, Engine], drafting: Engine, run_ahead: bool
) -> None:
    prompts = random_prompts([1, 60, 61, 62, 63, 64, 65, 120], 51)
    wanted = expected(engines[0], prompts, 80)
    config = create_config(expected_new_tokens=1)
    workers = WorkerPair(engines[0], drafting, config=config, num_decode_pages=9, run_ahead=run_ahead)
    try:
        requests = [workers.client.submit(prompt, 80) for prompt in prompts]
        assert workers.client.finish(requests) == wanted
        assert sum(request.num_preempted for request in requests) > 0
        num_drafted = workers.decode.metric("baton_spec_draft_tokens_total")
        num_accepted = workers.decode.metric("baton_spec_accepted_tokens_total")
        assert 0 < num_accepted < num_drafted
        # Prefill sends one token a life, or none where a pre-emption came before it.
        num_lives = sum(1 + request.num_preempted for request in requests)
        num_first = 80 * len(prompts) - workers.decode.metric("baton_tokens_total", phase="decode")
        assert len(prompts) <= num_first <= num_lives
        assert all("first_step" in request.stages for request in requests)
        workers.client.wait(workers.is_quiet, 2.0)
    finally:
        workers.close()


def test_steps_of_both_workers_are_announced_until_the_last_has_ended(
    engines: tuple[Engine, Engine], pair: Callable[..., WorkerPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = pair(run_ahead=True, config=create_config(max_batched_tokens=64))
    waited: dict[str, list[float]] = {"prefill": [], "decode": []}

    def watch(role: str, worker: Worker[Any, Any], engine: Engine) -> None:
        settle = engine.runner.settle

        def settled(launched: Launched) -> StepResult:
            waited[role].append(worker._mailbox._step_budget_s)
            return settle(launched)

        monkeypatch.setattr(engine.runner, "settle", settled)

    watch("prefill", workers.prefill, engines[0])
    watch("decode", workers.decode, engines[1])
    workers.client.finish([workers.client.submit(random_prompts([130], 61)[0], 6)])
    workers.client.wait(workers.is_quiet, 2.0)
    assert (len(waited["prefill"]), len(waited["decode"])) == (3, 5)
    assert min(waited["prefill"] + waited["decode"]) > 0.0
    assert workers.prefill._mailbox._step_budget_s == workers.decode._mailbox._step_budget_s == 0.0


def test_the_stages_of_the_gap_are_reported_once_a_request(pair: Callable[..., WorkerPair]) -> None:
    workers = pair()
    request = workers.client.submit(random_prompts([130], 61)[0], 6)
    workers.client.finish([request])
    assert set(request.stages) == {"prefill_queue", "prefill", "transfer_exposed", "decode_join", "first_step"}
    assert all(0 <= seconds < 10 for seconds in request.stages.values())


def test_an_idle_pair_uses_next_to_no_cpu(pair: Callable[..., WorkerPair]) -> None:
    workers = pair()
    workers.client.finish([workers.client.submit([5, 6, 7], 4)])
    time.sleep(0.5)
    before_s = time.process_time()
    time.sleep(3.0)
    used_s = time.process_time() - before_s
    assert used_s < 0.06, f"{used_s:.3f} s of CPU in 3 s for two workers and a router"
