"""A decode worker whose prefill worker is scripted: tickets, manifests, closes, and peers that are wrong, late or dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from decode.worker import DecodeWorker
from kvcache.pool import KVPool
from kvcache.transfer.local import LocalFabric
from kvcache.transfer.manifest import WriteNotice, encode_notice, page_checksums, rows_of_page
from serving.core.messages import (
    Abort,
    Attach,
    DecodeJob,
    Drain,
    JobFailed,
    KVBind,
    KVClose,
    KVClosed,
    KVReady,
    KVRefused,
    KVTicket,
    PeerAddress,
    Preempted,
    PrefillJob,
    Roster,
    TokenBatch,
    WorkerInfo,
    WorkerState,
)
from serving.core.request import SamplingParams
from serving.engine.build import Engine
from tests.engine_factory import GREEDY, create_engine
from tests.wire_client import create_config, create_manager, create_spec
from tests.worker_stage import Stage, job_fields

PROMPT = list(range(2, 102))  # two pages, the second partly used


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    torch.set_num_threads(1)
    return create_engine(tmp_path_factory.mktemp("model") / "tiny", num_pages=16)


class DecodeStage(Stage[DecodeWorker]):
    """With what a scripted prefill worker needs."""

    def __init__(self, engine: Engine, stack: ExitStack, **options: Any) -> None:
        config = create_config(**options)
        fabric = LocalFabric()
        worker = DecodeWorker(
            create_spec("decode-0", "decode", config),
            engine=engine,
            manager=create_manager(engine, config),
            target=fabric.target("decode", engine.pool),
            run_ahead=False,
        )
        super().__init__(worker, stack)
        self.engine = engine
        self.prefill = self.peer("prefill-0", worker.address)
        self.pool = KVPool(engine.layout, 4, torch.float32)
        self.pool.tensor.normal_(generator=torch.Generator().manual_seed(1))
        self.source = fabric.source(self.pool)

    def job(self, job_id: str = "j", **fields: Any) -> DecodeJob:
        return DecodeJob(job_id=job_id, **job_fields(PROMPT, **fields))

    def ticket(self, job_id: str = "j") -> KVTicket:
        """Up to the point where the pages are exposed."""
        self.router.say(self.job(job_id))
        self.prefill.say(KVBind(job_id=job_id, identity=self.engine.identity))
        return self.prefill.hear(KVTicket, job_id=job_id)

    def write(self, ticket: KVTicket, **fields: Any) -> None:
        """Both pages in one write, announced as `fields` say."""
        notice: dict[str, Any] = {
            "job_id": ticket.job_id,
            "number": 0,
            "pages": [0, 1],
            "epochs": ticket.epochs,
            "num_bytes": 2 * self.engine.layout.page_bytes,
        }
        peer = self.source.connect(ticket.agents[0])
        self.source.write(peer, [0, 1], ticket.page_ids, encode_notice(WriteNotice(**(notice | fields))))
        self.source.poll()

    def ready(self, ticket: KVTicket, **fields: Any) -> KVReady:
        defaults: dict[str, Any] = {
            "job_id": ticket.job_id,
            "epochs": ticket.epochs,
            "num_tokens": len(PROMPT),
            "num_writes": 1,
            "num_bytes": 2 * self.engine.layout.page_bytes,
            "checksums": page_checksums(self.pool, {i: (i, rows_of_page(i, len(PROMPT))) for i in (0, 1)}),
            "first_token": 7,
            "hidden": bytes(4 * self.engine.model_config.hidden_size),
        }
        return KVReady(**(defaults | fields))


Make = Callable[..., DecodeStage]


@pytest.fixture
def stage(engine: Engine) -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda **options: DecodeStage(engine, stack, **options)


def test_a_job_goes_from_credit_to_ticket_to_tokens_and_its_pages_become_free(stage: Make) -> None:
    s = stage()
    ticket = s.ticket()
    assert ticket.first_page == 0
    assert len(ticket.page_ids) == len(ticket.epochs) == 2
    assert s.worker.pages()["exposed"] == 2
    s.write(ticket)
    s.prefill.say(s.ready(ticket))
    tokens = [news for _ in range(3) for news in s.router.hear(TokenBatch).jobs]
    assert [len(news.token_ids) for news in tokens] == [1, 1, 1]
    assert [news.finish for news in tokens] == [None, None, "length"]
    s.wait(lambda: s.used() == 0)


def test_the_manifest_may_come_before_the_bytes(stage: Make) -> None:
    s = stage()
    ticket = s.ticket()
    s.prefill.say(s.ready(ticket))
    assert s.router.hears_no(TokenBatch, 0.2)
    s.write(ticket)
    s.router.hear(TokenBatch)


def test_a_bind_that_comes_before_its_job_waits_for_it(stage: Make) -> None:
    s = stage()
    s.prefill.say(KVBind(job_id="j", identity=s.engine.identity))
    assert s.prefill.hears_no(KVRefused, 0.3)
    s.router.say(s.job())
    s.prefill.hear(KVTicket)


def test_a_bind_whose_job_never_comes_is_refused(stage: Make) -> None:
    s = stage()
    s.prefill.say(KVBind(job_id="nobody", identity=s.engine.identity))
    refused = s.prefill.hear(KVRefused, job_id="nobody")
    assert "never came" in refused.reason
    assert not refused.router_told


def test_a_peer_of_another_model_gets_no_page(stage: Make) -> None:
    s = stage()
    s.router.say(s.job())
    s.prefill.say(KVBind(job_id="j", identity="another"))
    assert "differ" in s.prefill.hear(KVRefused).reason
    assert s.router.hear(JobFailed, job_id="j").retryable
    s.wait(lambda: s.used() == 0)


WRONG = {
    "tokens": {"num_tokens": 99},
    "bytes": {"num_bytes": 1},
    "checksum": {"checksums": {0: 1, 1: 2}},
    "missing checksum": {"checksums": {}},
    "first token": {"first_token": 128},
    "hidden": {"hidden": b"xy"},
    "epochs": {"epochs": [8, 8]},
    "none of the writes": {"num_writes": 0},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_manifest_that_is_wrong_ends_the_job_and_the_pages_wait_for_the_writers_word(stage: Make, wrong: str) -> None:
    s = stage(checksum="all")
    ticket = s.ticket()
    s.write(ticket)
    s.wait(lambda: s.worker.metric("baton_kv_stale_total") == 0)
    s.prefill.say(s.ready(ticket, **WRONG[wrong]))
    failed = s.router.hear(JobFailed, job_id="j")
    assert failed.retryable
    assert "Error" in failed.reason
    s.prefill.hear(KVClose, job_id="j")
    assert s.worker.pages()["draining"] == 2
    s.prefill.say(KVClosed(job_id="j"))
    s.wait(lambda: s.used() == 0)
    assert s.worker.metric("baton_kv_handoff_failures_total", reason="manifest") == 1


def test_a_write_of_an_earlier_epoch_is_counted_and_does_not_count(stage: Make) -> None:
    s = stage()
    ticket = s.ticket()
    s.write(ticket, epochs=[epoch - 1 for epoch in ticket.epochs])
    s.prefill.say(s.ready(ticket))
    s.wait(lambda: s.worker.metric("baton_kv_stale_total") == 1)
    assert s.router.hears_no(TokenBatch, 0.2)
    s.write(ticket)
    s.router.hear(TokenBatch)


def test_an_announcement_that_is_no_announcement_is_refused(stage: Make) -> None:
    s = stage()
    ticket = s.ticket()
    s.source.write(s.source.connect(ticket.agents[0]), [0], [ticket.page_ids[0]], b"junk")
    s.wait(lambda: s.worker.metric("baton_frames_refused_total") == 1)


def test_a_message_of_an_earlier_life_of_the_writer_is_refused_and_counted(stage: Make) -> None:
    s = stage()
    old = s.peer("prefill-1", s.worker.address, incarnation=4)
    old.say(KVBind(job_id="other", identity=s.engine.identity))
    time.sleep(0.2)
    new = s.peer("prefill-1", s.worker.address, incarnation=5)
    s.router.say(s.job())
    new.say(KVBind(job_id="j", identity=s.engine.identity))
    ticket = new.hear(KVTicket)
    before = s.worker.metric("baton_kv_stale_total")
    old.say(s.ready(ticket))
    s.write(ticket)
    s.wait(lambda: s.worker.metric("baton_kv_stale_total") > before)
    assert s.router.hears_no(TokenBatch, 0.2)
    new.say(s.ready(ticket))
    s.router.hear(TokenBatch)


def test_a_manifest_of_somebody_else_is_refused(stage: Make) -> None:
    s = stage()
    ticket = s.ticket()
    s.write(ticket)
    s.peer("prefill-9", s.worker.address).say(s.ready(ticket))
    s.wait(lambda: s.worker.metric("baton_kv_stale_total") == 1)
    assert s.router.hears_no(TokenBatch, 0.1)


def test_an_aborted_job_asks_again_until_the_writer_says_closed(stage: Make) -> None:
    s = stage()
    s.ticket()
    s.router.say(Abort(job_id="j"))
    s.prefill.hear(KVClose)
    s.prefill.hear(KVClose, 3.0)
    assert s.worker.pages()["draining"] == 2
    s.prefill.say(KVClosed(job_id="j"))
    s.wait(lambda: s.used() == 0)
    assert s.router.hears_no(JobFailed, 0.1)


def test_a_writer_that_gives_up_unasked_frees_the_pages_and_the_router_knows_from_it(
    stage: Make,
) -> None:
    s = stage()
    s.ticket()
    s.prefill.say(KVClosed(job_id="j"))
    s.wait(lambda: s.used() == 0)
    assert s.router.hears_no(JobFailed, 0.1)


def test_a_silent_writer_quarantines_its_pages_and_only_proof_frees_them(stage: Make) -> None:
    s = stage()
    s.ticket()
    s.prefill.close()
    assert s.router.hear(JobFailed, 4.0, job_id="j").retryable
    s.wait(lambda: s.worker.pages()["quarantined"] == 2)
    address = PeerAddress("prefill-0", "tcp://127.0.0.1:1", 1)
    s.router.say(Roster(workers=[WorkerInfo(address=address, role="prefill", state="ready")]))
    time.sleep(0.2)
    assert s.worker.pages()["quarantined"] == 2
    s.router.say(Roster(workers=[WorkerInfo(address=address, role="prefill", state="dead")]))
    s.wait(lambda: s.used() == 0)


def test_a_leader_is_gone_for_its_pages_when_every_rank_of_its_unit_is(stage: Make) -> None:
    s = stage()
    s.ticket()
    s.prefill.close()
    s.wait(lambda: s.worker.pages()["quarantined"] == 2, 4.0)

    def say(follower: str) -> None:
        states = {"prefill-0": "dead", "prefill-0.1": follower}
        workers = [
            WorkerInfo(address=PeerAddress(name, "", 1), role="prefill", state=state, unit="prefill-0")
            for name, state in states.items()
        ]
        s.router.say(Roster(workers=workers))

    say("draining")
    time.sleep(0.2)
    assert s.worker.pages()["quarantined"] == 2, "the other rank may still write"
    say("dead")
    s.wait(lambda: s.used() == 0)


def test_a_hand_off_that_does_not_move_fails_and_its_pages_drain(stage: Make) -> None:
    s = stage(progress_timeout_s=0.3)
    ticket = s.ticket()
    s.prefill.say(s.ready(ticket))
    assert "no latents came" in s.router.hear(JobFailed).reason
    s.prefill.hear(KVClose)
    assert s.worker.pages()["draining"] == 2


def test_a_job_without_room_waits_and_is_sent_back_when_prefill_already_asks(stage: Make) -> None:
    s = stage(expected_new_tokens=256)
    for number in range(3):
        s.router.say(s.job(f"holder-{number}", max_new_tokens=200))  # five pages of sixteen each
    s.router.say(s.job("late", max_new_tokens=200))
    s.prefill.say(KVBind(job_id="late", identity=s.engine.identity))
    assert s.router.hears_no(Preempted, 0.5)
    s.router.hear(Preempted, 4.0, job_id="late")
    assert s.worker.metric("baton_preemptions_total") == 1
    refused = s.prefill.hear(KVRefused, job_id="late")
    assert "no room" in refused.reason
    assert refused.router_told
    s.router.say(s.job("later", max_new_tokens=200))
    s.router.say(Abort(job_id="holder-1"))
    s.prefill.say(KVBind(job_id="later", identity=s.engine.identity))
    s.prefill.hear(KVTicket, job_id="later")


def test_a_running_text_takes_pages_that_are_promised_and_not_yet_bound(
    stage: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.reporter.STATE_INTERVAL_S", 0.0)  # no report is due that would wake the worker
    s = stage(expected_new_tokens=1, prefix_cache=False)
    s.router.say(s.job(max_new_tokens=40))  # 100 + 40 tokens: a third page
    for number in range(7):
        s.router.say(s.job(f"waiting-{number}"))
    s.wait(lambda: s.worker.pages()["reserved"] == 16)
    s.prefill.say(KVBind(job_id="j", identity=s.engine.identity))
    ticket = s.prefill.hear(KVTicket, job_id="j")
    s.write(ticket)
    s.prefill.say(s.ready(ticket))
    tokens = [s.router.hear(TokenBatch).jobs[0] for _ in range(39)]
    assert tokens[-1].finish == "length"


NONSENSE = {
    "no tokens": {"token_ids": []},
    "unknown token": {"token_ids": [128], "num_prompt_tokens": 1},
    "prompt longer than itself": {"num_prompt_tokens": 101},
    "nothing to do": {"max_new_tokens": 0},
    "infinite temperature": {"sampling": SamplingParams(temperature=float("inf"))},
    "bias on no token": {"sampling": SamplingParams(logit_bias={-1: 1.0})},
    "larger than the pool": {"max_new_tokens": 100_000, "token_ids": PROMPT * 11},
}


def test_nonsense_of_an_authentic_router_fails_its_job_and_nothing_else(stage: Make) -> None:
    s = stage()
    for name, fields in NONSENSE.items():
        s.router.say(s.job(name, **fields))
        assert not s.router.hear(JobFailed, job_id=name).retryable
    prefill_job = PrefillJob(
        job_id="x", token_ids=[5], num_prompt_tokens=1, sampling=GREEDY, max_new_tokens=1, budget_s=1.0, decode=None
    )
    s.router.say(prefill_job)
    s.wait(lambda: s.worker.metric("baton_frames_refused_total") == 1)
    s.router.say(s.job())
    s.router.say(s.job())  # twice the same id
    s.wait(lambda: s.worker.metric("baton_kv_stale_total") == 1)
    ticket = s.ticket("after")
    s.write(ticket)
    s.prefill.say(s.ready(ticket))
    s.router.hear(TokenBatch)


def test_the_state_comes_at_once_and_then_when_it_changes(stage: Make) -> None:
    s = stage()
    s.router.say(Attach())
    first = s.router.hear(WorkerState)
    assert (first.role, first.ready, first.num_pages, first.credit_pages) == ("decode", True, 16, 16)
    assert sum(first.page_states.values()) == 16
    s.router.say(s.job(max_new_tokens=200))
    assert s.router.hear(WorkerState, num_waiting=1).credit_pages == 11
    assert s.router.hears_no(WorkerState, 0.5)


def test_a_draining_worker_ends_what_it_has_takes_nothing_new_and_returns(stage: Make) -> None:
    s = stage()
    ticket = s.ticket()
    s.router.say(Drain())
    s.router.say(s.job("new"))
    assert s.router.hear(JobFailed, job_id="new").retryable
    s.write(ticket)
    s.prefill.say(s.ready(ticket))
    for _ in range(3):
        s.router.hear(TokenBatch)
    s.running.join(5.0)


def test_a_bug_of_our_own_fails_every_job_loudly_and_stops_the_worker(
    stage: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stage()
    s.router.say(s.job("waiting"))
    ticket = s.ticket()

    def broken(plan: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(s.engine.runner, "launch", broken)
    s.write(ticket)
    s.prefill.say(s.ready(ticket))
    assert {s.router.hear(JobFailed).job_id for _ in range(2)} == {"j", "waiting"}
    with pytest.raises(AssertionError, match="a bug"):
        s.running.join(5.0)
