"""The joint choice: who gets a job, and when nobody does."""

from __future__ import annotations

from msgspec.structs import replace

from router.policy import Placement, capacity_tokens, choose, demand, missing_role
from router.view import View
from serving.core.messages import PeerAddress, Roster, WorkerInfo, WorkerState
from serving.core.prefill_work import prefill_work


def state(
    role: str,
    *,
    waiting_work: int = 0,
    credit_pages: int = 100,
    ready: bool = True,
    pair_cost: float = 0.0,
    num_running: int = 0,
    **more: int,
) -> WorkerState:
    return WorkerState(
        role=role,
        ready=ready,
        draining=False,
        num_running=num_running,
        num_waiting=0,
        waiting_work=waiting_work,
        num_pages=more.get("num_pages", 100),
        credit_pages=credit_pages,
        page_states={},
        step_s=0.01,
        pair_cost=pair_cost,
    )


def view_of(**states: WorkerState) -> View:
    view = View()
    addresses = {name: PeerAddress(name, f"tcp://{name}", 1) for name in states}
    infos = [WorkerInfo(address=addresses[name], role=s.role, state="ready") for name, s in states.items()]
    view.apply(Roster(workers=infos), 0.0)
    for worker in view:
        worker.hear(states[worker.worker_id], 0.0)
    return view


def names(placement: Placement | None) -> tuple[str, str | None] | None:
    if placement is None:
        return None
    return placement.prefill.worker_id, placement.decode.worker_id if placement.decode else None


def test_prefill_with_the_least_work_and_decode_with_the_most_credit() -> None:
    view = view_of(
        p0=state("prefill", waiting_work=500),
        p1=state("prefill", waiting_work=20),
        d0=state("decode", credit_pages=30),
        d1=state("decode", credit_pages=80),
    )
    assert all(names(choose(view, demand(64, 10, 256), turn)) == ("p1", "d1") for turn in range(4))


def test_what_was_just_sent_counts_before_the_worker_says_so() -> None:
    view = view_of(p0=state("prefill"), d0=state("decode", credit_pages=50), d1=state("decode", credit_pages=49))
    view.get("d0").pages.spend("job", 2, 0.0)
    assert names(choose(view, demand(64, 10, 256), 0)) == ("p0", "d1")


def test_decode_weighs_requests_beside_pages() -> None:
    few_long, many_short = (
        state("decode", credit_pages=50, num_running=2),
        state("decode", credit_pages=60, num_running=20),
    )
    view = view_of(p0=state("prefill"), d0=few_long, d1=many_short)
    assert names(choose(view, demand(64, 10, 256), 0)) == ("p0", "d0"), "ten pages less, but a tenth of the rows"
    view = view_of(p0=state("prefill"), d0=replace(few_long, num_running=19), d1=many_short)
    assert names(choose(view, demand(64, 10, 256), 0)) == ("p0", "d1")
    view.get("d1").pages.spend("one", 1, 0.0)
    view.get("d1").pages.spend("other", 11, 0.0)
    assert names(choose(view, demand(64, 10, 256), 0)) == ("p0", "d0"), "what was just sent are requests too"


def test_a_prompt_costs_what_it_attends_to() -> None:
    assert prefill_work(0, 1000, 0.0) == 1000
    assert prefill_work(0, 1000, 0.01) == 1000 + 5005
    whole, parts = (
        prefill_work(0, 4096, 1e-4),
        [prefill_work(start, start + 1024, 1e-4) for start in range(0, 4096, 1024)],
    )
    assert abs(whole - sum(parts)) <= 2
    assert parts == sorted(parts)
    assert parts[-1] > parts[0] + 200


def test_one_long_prompt_weighs_more_than_two_of_half_its_length() -> None:
    view = view_of(p0=state("prefill", pair_cost=0.01), p1=state("prefill", pair_cost=0.01), d0=state("decode"))
    for worker_id, job_id, num_tokens in (("p0", "long", 2000), ("p1", "one", 1000), ("p1", "other", 1000)):
        worker = view.get(worker_id)
        assert worker is not None
        worker.work.spend(job_id, prefill_work(0, num_tokens, worker.pair_cost), 0.0)
    assert all(names(choose(view, demand(64, 10, 256), turn)) == ("p1", "d0") for turn in range(4))


def test_ties_go_round() -> None:
    view = view_of(p0=state("prefill"), p1=state("prefill"), d0=state("decode"))
    chosen = [names(choose(view, demand(64, 10, 256), turn)) for turn in range(6)]
    assert {chosen.count(("p0", "d0")), chosen.count(("p1", "d0"))} == {2, 4} or chosen.count(("p0", "d0")) == 3


def test_no_credit_means_no_room_now() -> None:
    view = view_of(p0=state("prefill"), d0=state("decode", credit_pages=2))
    assert choose(view, demand(64, 64, 256), 0) is not None
    assert choose(view, demand(64, 65, 256), 0) is None, "three pages do not fit into two"


def test_credit_covers_the_expected_answer_and_the_pool_the_longest() -> None:
    view = view_of(p0=state("prefill"), d0=state("decode", credit_pages=3, num_pages=20))
    assert choose(view, demand(64, 64 * 19, expected_new_tokens=128), 0) is not None
    assert choose(view, demand(64, 64 * 20, expected_new_tokens=128), 0) is None, "its end could never fit"


def test_one_token_needs_no_decode_worker() -> None:
    view = view_of(p0=state("prefill"), d0=state("decode", credit_pages=0))
    assert names(choose(view, demand(64, 1, 256), 0)) == ("p0", None)


def test_a_worker_of_both_roles_serves_alone_and_needs_credit() -> None:
    assert names(choose(view_of(b0=state("both")), demand(64, 10, 256), 0)) == ("b0", None)
    assert choose(view_of(b0=state("both", credit_pages=1)), demand(64, 10, 256), 0) is None


def test_who_has_just_failed_is_taken_only_when_there_is_nobody_else() -> None:
    avoid = frozenset({"p0"})
    both = view_of(p0=state("prefill"), p1=state("prefill", waiting_work=9999), d0=state("decode"))
    assert names(choose(both, demand(64, 10, 256, avoid), 0)) == ("p1", "d0")
    assert names(choose(view_of(p0=state("prefill"), d0=state("decode")), demand(64, 10, 256, avoid), 0)) == (
        "p0",
        "d0",
    )


def test_workers_that_are_not_ready_do_not_count() -> None:
    view = view_of(p0=state("prefill"), d0=state("decode", ready=False))
    assert missing_role(view) == "decode"
    assert choose(view, demand(64, 10, 256), 0) is None
    assert missing_role(view_of(d0=state("decode"))) == "prefill"
    assert missing_role(view_of(b0=state("both"))) is None


def test_the_longest_sequence_is_what_both_pools_of_a_pair_hold() -> None:
    view = view_of(p0=state("prefill", num_pages=10), d0=state("decode", num_pages=4), d1=state("decode", num_pages=7))
    assert capacity_tokens(view) == 7 * 64
    assert capacity_tokens(view_of(p0=state("prefill"))) is None
