"""Mode both behind a socket: the text of the loop itself, aborts, refusals, drain."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.aggregated_worker import AggregatedWorker
from serving.core.messages import (
    DecodeJob,
    Drain,
    JobFailed,
    KVBind,
    KVRefused,
    PeerAddress,
    PrefillJob,
    TokenBatch,
)
from serving.core.request import FinishReason
from serving.engine.build import Engine
from serving.engine.plan import Launched, StepResult
from serving.engine.unit import Lockstep
from serving.parallel.bell import TcpBell
from serving.parallel.collectives import SingleRank
from tests.engine_factory import GREEDY, create_engine, create_loop, random_prompts
from tests.scripted_peer import ScriptedPeer
from tests.wire_client import Running, WireClient, create_config, create_spec
from tests.worker_stage import num_used

LENGTHS = [1, 30, 64, 65, 130, 200, 10, 63]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    torch.set_num_threads(1)
    return create_engine(tmp_path_factory.mktemp("model") / "tiny", num_pages=64)


Serving = tuple[AggregatedWorker, Running, WireClient]


@pytest.fixture(params=["settled", "run-ahead", "in-a-unit"])
def serving(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Serving]:
    if request.param == "in-a-unit":
        alone = SingleRank()
        engine = replace(engine, lockstep=Lockstep(alone, alone, TcpBell(alone, host="127.0.0.1", deadline_s=5.0)))
    run_ahead = request.param != "settled"
    worker = AggregatedWorker(create_spec("both-0", "both", create_config()), engine=engine, run_ahead=run_ahead)
    running = Running(worker)
    client = WireClient(worker.address, None)
    yield worker, running, client
    client.close()
    running.close()


def test_drafts_are_counted_apart_from_what_is_sent_and_change_no_text(engine: Engine, tmp_path: Path) -> None:
    drafting = create_engine(tmp_path / "tiny", num_pages=64, draft_tokens="2")
    drafting.runner.step_s = lambda num_rows, num_drafts: 1.0  # type: ignore[method-assign]
    prompts = random_prompts(LENGTHS, 1)
    wanted = create_loop(engine, prefix_cache=False).generate(prompts, GREEDY, 30)
    worker = AggregatedWorker(create_spec("both-0", "both", create_config()), engine=drafting, run_ahead=True)
    running = Running(worker)
    client = WireClient(worker.address, None)
    assert client.finish([client.submit(prompt, 30) for prompt in prompts]) == wanted
    assert worker.metric("baton_spec_draft_tokens_total") > worker.metric("baton_spec_accepted_tokens_total")
    assert worker.metric("baton_tokens_total", phase="decode") == len(prompts) * 29
    client.close()
    running.close()


def test_the_text_is_that_of_the_loop_and_survives_aborts(engine: Engine, serving: Serving) -> None:
    worker, _, client = serving
    prompts = random_prompts(LENGTHS, 1)
    engine.pool.poison_all()
    wanted = create_loop(engine, prefix_cache=False).generate(prompts, GREEDY, 10)
    doomed = [client.submit(prompt, 200) for prompt in prompts]
    requests = [client.submit(prompt, 10) for prompt in prompts]
    client.pump()
    for request in doomed:
        client.abort(request)
    assert client.finish(requests) == wanted
    assert {request.finish for request in requests} == {FinishReason.LENGTH}
    assert all(set(request.stages) == {"prefill_queue", "prefill", "first_step"} for request in requests)
    client.wait(lambda: num_used(worker) == 0, 2.0)


def test_it_takes_no_hand_off_and_no_nonsense_and_goes_on(engine: Engine, serving: Serving) -> None:
    worker, _, client = serving
    peer = ScriptedPeer("prefill-9", worker.address)
    peer.say(KVBind(job_id="j", identity=engine.identity))
    peer.hear(KVRefused, job_id="j")
    peer.say(DecodeJob(job_id="j", token_ids=[5], num_prompt_tokens=1, sampling=GREEDY, max_new_tokens=2, budget_s=1.0))
    peer.close()
    refused = [client.submit([128]), client.submit([5] * 64 * 65)]
    client.wait(lambda: all(request.failures for request in refused))
    far = PeerAddress("decode-0", "tcp://127.0.0.1:1", 1)
    job = PrefillJob(
        job_id="k", token_ids=[5], num_prompt_tokens=1, sampling=GREEDY, max_new_tokens=2, budget_s=1.0, decode=far
    )
    client.mailbox.post("both-0", job)
    assert len(client.finish([client.submit([5, 6], 3)])[0]) == 3
    assert worker.metric("baton_frames_refused_total") == 1


def test_first_tokens_name_their_cached_prefix_and_late_jobs_the_overload(serving: Serving) -> None:
    worker, _, _ = serving
    router = ScriptedPeer("router-9", worker.address)
    prompt = random_prompts([200], 7)[0]

    def submit(job_id: str, budget_s: float = 60.0) -> None:
        job = PrefillJob(
            job_id=job_id,
            token_ids=prompt,
            num_prompt_tokens=200,
            sampling=GREEDY,
            max_new_tokens=3,
            budget_s=budget_s,
            decode=None,
        )
        router.say(job)

    for wanted in (0, 192):
        submit(f"after-{wanted}")
        assert [router.hear(TokenBatch).jobs[0].num_cached_tokens for _ in range(3)] == [wanted, 0, 0]
    submit("late", budget_s=-1.0)
    assert router.hear(JobFailed, job_id="late").overloaded
    router.close()


def test_every_step_that_is_waited_for_is_announced_and_counted_once(
    engine: Engine, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, _, client = serving
    announced: list[float] = []
    waited: list[float] = []
    progress, settle = worker._mailbox.progress, engine.runner.settle

    def watched(step_budget_s: float) -> None:
        announced.append(step_budget_s)
        progress(step_budget_s)

    def settled(launched: Launched) -> StepResult:
        waited.append(announced[-1])
        time.sleep(0.02)
        return settle(launched)

    monkeypatch.setattr(worker._mailbox, "progress", watched)
    monkeypatch.setattr(engine.runner, "settle", settled)
    begin_s = time.monotonic()
    client.finish([client.submit([5, 6, 7], 6)])
    client.wait(lambda: num_used(worker) == 0, 2.0)
    took_s = time.monotonic() - begin_s
    assert len(waited) == 6
    assert min(waited) > 0.0
    assert announced[-1] == 0.0
    assert worker.metric("baton_step_seconds_count") == 6
    assert worker.metric("baton_step_seconds_sum") < took_s


def test_its_metrics_mean_what_those_of_two_workers_mean(serving: Serving) -> None:
    worker, _, client = serving
    prompt = random_prompts([130], 8)[0]
    client.finish([client.submit(prompt, 4)])
    client.finish([client.submit(prompt, 4)])  # two pages of it are cached; the last token of them is computed again
    client.wait(lambda: num_used(worker) == 0, 2.0)
    assert worker.metric("baton_prefix_hit_tokens_total") == 128
    assert worker.metric("baton_tokens_total", phase="prefill") == 130 + 3
    assert worker.metric("baton_tokens_total", phase="decode") == 2 * 3


def test_it_drains(serving: Serving) -> None:
    _, running, client = serving
    request = client.submit([5, 6, 7], 20)
    client.mailbox.post("both-0", Drain())
    late = client.submit([5, 6, 7], 20)
    client.finish([request])
    client.wait(lambda: bool(late.failures))
    running.join(5.0)
