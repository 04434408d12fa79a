"""A prefill worker whose decode worker is scripted: what it writes, what it says, and how it lets go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcache.pool import KVPool
from kvcache.transfer.base import Completed
from kvcache.transfer.local import LocalFabric
from kvcache.transfer.manifest import decode_notice
from prefill.worker import PrefillWorker
from serving.core.messages import (
    Abort,
    Attach,
    Drain,
    JobFailed,
    KVBind,
    KVClose,
    KVClosed,
    KVReady,
    KVRefused,
    KVTicket,
    MetricsQuery,
    MetricsReply,
    PrefillJob,
    TokenBatch,
    WorkerState,
)
from serving.engine.build import Engine
from serving.engine.plan import Launched, StepResult
from tests.engine_factory import create_engine
from tests.wire_client import WrappedSource, create_config, create_manager, create_spec
from tests.worker_stage import Stage, job_fields

PROMPT = list(range(2, 122)) + list(range(2, 82))  # 200 tokens: three full pages and a part


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    torch.set_num_threads(1)
    return create_engine(tmp_path_factory.mktemp("model") / "tiny", num_pages=16)


class SlowSource(WrappedSource):
    """Its writes complete only while `open` is set."""

    open = True

    def poll(self) -> list[Completed]:
        return super().poll() if self.open else []


class PrefillStage(Stage[PrefillWorker]):
    """With a scripted decode worker that has a pool of its own."""

    def __init__(self, engine: Engine, stack: ExitStack, **options: Any) -> None:
        config = create_config(**options)
        fabric = LocalFabric()
        self.engine = engine
        self.source = SlowSource(fabric.source(engine.pool))
        worker = PrefillWorker(
            create_spec("prefill-0", "prefill", config),
            engine=engine,
            manager=create_manager(engine, config),
            source=self.source,
            run_ahead=False,
        )
        self.pool = KVPool(engine.layout, 8, torch.float32)
        self.target = fabric.target("decode", self.pool)
        super().__init__(worker, stack)
        self.decode = self.peer("decode-0")

    def submit(self, job_id: str = "j", **fields: Any) -> None:
        fields = {"decode": self.decode.address, **fields}
        self.router.say(PrefillJob(job_id=job_id, **job_fields(PROMPT, **fields)))

    def grant(self, job_id: str = "j", **fields: Any) -> None:
        """The ticket: four pages, none of them held already."""
        defaults: dict[str, Any] = {
            "first_page": 0,
            "page_ids": [5, 4, 2, 3],
            "epochs": [1, 1, 2, 3],
            "agents": [self.target.agent],
        }
        self.decode.say(KVTicket(job_id=job_id, **(defaults | fields)), to="prefill-0")


Make = Callable[..., PrefillStage]


@pytest.fixture
def stage(engine: Engine) -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda **options: PrefillStage(engine, stack, **options)


def test_every_valid_row_is_written_and_announced_and_the_pages_are_then_cached(stage: Make) -> None:
    s = stage(max_batched_tokens=64)
    s.submit()
    assert s.decode.hear(KVBind).identity == s.engine.identity
    s.grant()
    first = s.router.hear(TokenBatch)
    ready = s.decode.hear(KVReady)
    notices = [decode_notice(data) for data in s.target.notifications()]
    assert len(notices) == ready.num_writes
    assert sum(notice.num_bytes for notice in notices) == ready.num_bytes == 4 * s.engine.layout.page_bytes
    assert [epoch for notice in notices for epoch in notice.epochs] == ready.epochs == [1, 1, 2, 3]
    assert (ready.num_tokens, ready.first_token) == (200, first.jobs[0].token_ids[0])
    assert set(first.stages["j"]) == {"prefill_queue", "prefill"}
    rows = s.pool.tensor[[5, 4, 2, 3]].transpose(1, 2).flatten(0, 1)[:200]
    assert not rows.isnan().any()  # the pool was NaN wherever nobody had computed
    s.wait(lambda: s.used() == 0)
    assert s.worker.pages()["cached"] == 3


@pytest.mark.parametrize(("max_batched_tokens", "num_chunks"), [(64, 13), (1024, 1)])
def test_pages_go_while_later_chunks_are_computed(
    stage: Make, monkeypatch: pytest.MonkeyPatch, max_batched_tokens: int, num_chunks: int
) -> None:
    s = stage(max_batched_tokens=max_batched_tokens)
    order: list[str] = []
    written = threading.Event()
    settle, write = s.engine.runner.settle, s.source.write

    def settled(launched: Launched) -> StepResult:
        # Chunks of a model this small are over before the ticket comes.
        written.wait(0.2)
        order.append("settled")
        return settle(launched)

    def noted(*arguments: Any) -> int:
        order.append("written")
        written.set()
        return write(*arguments)

    monkeypatch.setattr(s.engine.runner, "settle", settled)
    monkeypatch.setattr(s.source, "write", noted)
    s.submit(token_ids=PROMPT * 4, num_prompt_tokens=len(PROMPT) * 4)
    s.decode.hear(KVBind)
    num_pages = 13
    s.grant(page_ids=[0] * num_pages, epochs=[1] * num_pages)
    ready = s.decode.hear(KVReady)
    s.wait(lambda: s.used() == 0)
    assert order.count("settled") == num_chunks
    assert order.count("written") == ready.num_writes
    # The last chunk has settled before its pages can go.
    assert order[-1] == "written"
    before_the_last = order[: len(order) - 1 - order[::-1].index("settled")]
    assert ("written" in before_the_last) == (num_chunks > 1)


def test_the_first_token_does_not_wait_for_the_ticket(stage: Make) -> None:
    s = stage()
    s.submit()
    s.router.hear(TokenBatch)
    assert s.decode.hears_no(KVReady, 0.2)
    s.grant()
    s.decode.hear(KVReady)


def test_pages_that_decode_holds_are_not_sent(stage: Make) -> None:
    s = stage()
    s.submit()
    s.decode.hear(KVBind)
    s.grant(first_page=3, page_ids=[6], epochs=[1])
    assert s.decode.hear(KVReady).num_bytes == s.engine.layout.page_bytes
    s.wait(lambda: s.used() == 0)
    num_rows = s.worker.metric("baton_kv_handoff_bytes_total", kind="latent") / s.engine.layout.latent_bytes(1)
    assert num_rows == 200 - 3 * 64


def test_a_request_that_ends_with_its_first_token_is_not_handed_off(stage: Make) -> None:
    s = stage()
    s.submit(max_new_tokens=1)
    assert s.router.hear(TokenBatch).jobs[0].finish == "length"
    s.decode.hear(KVClosed, job_id="j")
    s.grant()  # on its way when the job ended
    assert s.decode.hears_no(KVReady, 0.2)
    assert s.target.notifications() == []
    s.wait(lambda: s.used() == 0)


def test_an_aborted_job_says_closed_only_when_nothing_is_in_flight(stage: Make) -> None:
    s = stage()
    s.source.open = False
    s.submit()
    s.decode.hear(KVBind)
    s.grant()
    s.decode.hear(KVReady)
    s.router.say(Abort(job_id="j"))
    assert s.decode.hears_no(KVClosed, 0.3)
    assert s.used() == 4, "pages that a write still reads were given back"
    s.source.open = True
    s.decode.hear(KVClosed, job_id="j")
    s.wait(lambda: s.used() == 0)


def test_a_close_for_a_job_that_is_over_or_never_was_is_answered_at_once(stage: Make) -> None:
    s = stage()
    s.submit()
    s.decode.hear(KVBind)
    s.grant()
    s.decode.hear(KVReady)
    s.wait(lambda: s.used() == 0)
    for job_id in ("j", "never"):
        s.decode.say(KVClose(job_id=job_id), to="prefill-0")
        s.decode.hear(KVClosed, job_id=job_id)


@pytest.mark.parametrize("answer", ["refused", "closed", "never came", "misfit"])
def test_a_decode_worker_that_does_not_want_the_job_ends_it_and_the_router_hears_it_once(
    stage: Make, answer: str
) -> None:
    s = stage()
    s.submit()
    s.decode.hear(KVBind)
    if answer == "closed":
        s.decode.say(KVClose(job_id="j"), to="prefill-0")
    elif answer == "misfit":
        s.grant(page_ids=[1], epochs=[1])
    else:
        told = answer == "refused"
        s.decode.say(KVRefused(job_id="j", reason=answer, router_told=told), to="prefill-0")
    s.decode.hear(KVClosed, job_id="j")
    s.wait(lambda: s.used() == 0)
    if answer in ("refused", "closed"):  # the decode worker has told the router
        assert s.router.hears_no(JobFailed, 0.1)
    else:
        assert s.router.hear(JobFailed, job_id="j").retryable == (answer == "never came")


def test_a_stuck_write_fails_the_job_and_keeps_its_pages_until_it_is_over(stage: Make) -> None:
    s = stage(progress_timeout_s=0.3)
    s.source.open = False
    s.submit()
    s.decode.hear(KVBind)
    s.grant()
    assert "nothing moved" in s.router.hear(JobFailed, job_id="j").reason
    assert s.used() == 4
    assert s.decode.hears_no(KVClosed, 0.2)
    s.source.open = True
    s.decode.hear(KVClosed)
    s.wait(lambda: s.used() == 0)


def test_a_ticket_that_is_lost_fails_the_job_and_gives_its_pages_back(stage: Make) -> None:
    s = stage(progress_timeout_s=0.3)
    s.submit()
    s.decode.hear(KVBind)
    failed = s.router.hear(JobFailed, job_id="j")
    assert failed.retryable
    assert "no ticket came" in failed.reason
    s.decode.hear(KVClosed, job_id="j")
    s.wait(lambda: s.used() == 0)


def test_an_agent_that_cannot_be_written_fails_the_job(stage: Make) -> None:
    s = stage()
    s.submit()
    s.decode.hear(KVBind)
    s.grant(agents=[b"nobody"])
    assert "nobody" in s.router.hear(JobFailed, job_id="j").reason
    s.wait(lambda: s.used() == 0)


def test_a_decode_worker_that_falls_silent_fails_its_jobs(stage: Make) -> None:
    s = stage()
    s.submit()
    s.decode.hear(KVBind)
    s.decode.close()
    failed = s.router.hear(JobFailed, 4.0, job_id="j")
    assert failed.retryable
    assert "silent" in failed.reason
    s.wait(lambda: s.used() == 0)


def test_a_restarted_decode_worker_ends_the_jobs_of_its_old_life_and_none_of_its_new_one(
    stage: Make,
) -> None:
    s = stage()
    s.submit("old")
    s.decode.hear(KVBind)
    again = s.peer("decode-0", incarnation=2)
    s.submit("new", decode=again.address)
    again.hear(KVBind, job_id="new")
    assert "restarted" in s.router.hear(JobFailed, job_id="old").reason
    ticket = KVTicket(job_id="new", first_page=0, page_ids=[0, 1, 2, 3], epochs=[1, 1, 1, 1], agents=[s.target.agent])
    again.say(ticket, to="prefill-0")
    again.hear(KVReady, job_id="new")
    s.wait(lambda: s.used() == 0)
    assert s.router.hears_no(JobFailed, 0.1)


def test_a_router_that_falls_silent_takes_its_jobs_with_it(stage: Make) -> None:
    s = stage()
    s.submit()
    s.decode.hear(KVBind)
    s.router.close()
    s.decode.hear(KVClosed, 4.0, job_id="j")
    s.wait(lambda: s.used() == 0)


def test_a_prompt_that_is_late_is_dropped_and_named(stage: Make) -> None:
    s = stage()
    s.submit(budget_s=-0.1)
    failed = s.router.hear(JobFailed, job_id="j")
    assert failed.overloaded
    assert not failed.retryable
    assert "time budget" in failed.reason
    assert s.decode.hears_no(KVBind, 0.1)


def test_a_prompt_that_never_fits_and_a_token_that_does_not_exist_are_refused(stage: Make) -> None:
    s = stage()
    for job_id, fields in {
        "long": {"token_ids": PROMPT * 6},
        "odd": {"token_ids": [5, 128], "num_prompt_tokens": 2},
    }.items():
        s.submit(job_id, **fields)
        failed = s.router.hear(JobFailed, job_id=job_id)
        assert not failed.retryable
        assert not failed.overloaded
    s.submit()
    s.router.hear(TokenBatch)


def test_a_text_longer_than_the_model_allows_is_refused_and_the_worker_goes_on(tmp_path: Path) -> None:
    with ExitStack() as stack:
        s = PrefillStage(create_engine(tmp_path, num_pages=16, max_position_embeddings=100), stack)
        s.submit("long", decode=None)
        failed = s.router.hear(JobFailed, job_id="long")
        assert not failed.retryable
        assert "max_model_len" in failed.reason
        s.submit("short", token_ids=PROMPT[:100], num_prompt_tokens=100, decode=None)
        s.router.hear(TokenBatch)


def test_an_answer_of_one_token_needs_no_decode_worker(stage: Make) -> None:
    s = stage()
    s.submit(decode=None)
    assert len(s.router.hear(TokenBatch).jobs[0].token_ids) == 1
    s.wait(lambda: s.used() == 0)


def test_the_first_token_says_how_much_of_the_prompt_was_cached(stage: Make) -> None:
    s = stage()
    for wanted in (0, 192):
        s.submit(f"after-{wanted}", decode=None)
        assert s.router.hear(TokenBatch).jobs[0].num_cached_tokens == wanted


def test_messages_that_make_no_sense_here_are_counted_and_change_nothing(stage: Make) -> None:
    s = stage()
    s.submit()
    s.submit()  # twice the same id
    s.router.say(KVBind(job_id="j", identity=""))
    s.decode.hear(KVBind)
    s.router.say(KVClose(job_id="j"))  # of somebody else's hand-off
    s.grant()
    s.grant()  # a second ticket
    s.wait(lambda: s.worker.metric("baton_kv_stale_total") == 2)
    s.wait(lambda: s.worker.metric("baton_frames_refused_total") == 2)
    s.decode.hear(KVReady)
    assert s.router.hears_no(JobFailed, 0.1)


def test_state_metrics_and_drain(stage: Make) -> None:
    s = stage()
    s.router.say(Attach())
    state = s.router.hear(WorkerState)
    assert (state.role, state.ready, state.credit_pages) == ("prefill", True, 16)
    s.submit()
    s.decode.hear(KVBind)
    s.router.say(MetricsQuery(query_id=3))
    text = s.router.hear(MetricsReply, query_id=3).exposition
    assert 'baton_kv_pages{state="owned",worker="prefill-0"} 4.0' in text
    assert 'baton_requests_running{role="prefill",worker="prefill-0"} 1.0' in text
    s.router.say(Drain())
    s.submit("new")
    assert s.router.hear(JobFailed, job_id="new").retryable
    s.grant()
    s.decode.hear(KVReady)
    s.running.join(5.0)
