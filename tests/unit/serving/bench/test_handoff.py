"""What a hand-off costs, from the times of tokens."""

from __future__ import annotations

import pytest

from serving.bench.handoff import APART, TOGETHER, Limit, limits, single_of, streams_of
from serving.bench.workers import Answer, Client, Route
from serving.core.errors import BatonError, ConfigError
from serving.core.messages import JobFailed, JobTokens, PeerAddress, TokenBatch
from serving.mailbox import Received


def answer(asked_s: float, *times_s: float, stages: dict[str, float] | None = None) -> Answer:
    return Answer(asked_s, len(times_s), list(range(len(times_s))), list(times_s), stages or {})


def stream(begin_s: float, step_s: float, num_tokens: int) -> Answer:
    return answer(begin_s, *(begin_s + step_s * (i + 1) for i in range(num_tokens)))


def test_first_token_gap_and_step_are_told_apart() -> None:
    slow = answer(1.0, 1.5, 2.5, 2.6, 2.7, stages={"prefill": 0.4})
    single = single_of(APART, 100, [slow, answer(0.0, 0.1, 0.3, 0.4, 0.5, stages={"prefill": 0.2}), slow])
    assert (single.ttft_s, single.gap_s, single.tpot_s) == pytest.approx((0.5, 1.0, 0.1))
    assert single.stages_s == {"prefill": 0.4}
    assert single.raw_s[1] == pytest.approx((0.1, 0.2, 0.1))


def test_only_tokens_that_came_under_load_count() -> None:
    uneven = answer(0.0, 5.0, 9.0, 9.1, 9.2, 9.3, 9.4)
    figures = streams_of(APART, [uneven], [answer(0.0, 1.0, 3.0)], 2, loaded=True)
    assert figures.tpot_p99_s == figures.tpot_p50_s == pytest.approx(0.1)
    assert figures.step_p99_s == pytest.approx(0.1)
    assert (figures.num_prefills, figures.prefill_ttft_p50_s, figures.prefill_gap_p50_s) == (1, 1.0, 2.0)
    with pytest.raises(ConfigError, match="--stream-tokens"):
        streams_of(APART, [uneven], [], 4, loaded=False)
    with pytest.raises(ConfigError, match="--stream-tokens"):
        streams_of(APART, [uneven], [], 2, loaded=True)


def test_the_limits_are_differences_to_one_worker_and_ratios_to_an_unloaded_one() -> None:
    singles = [
        single_of(APART, 100, [answer(0.0, 0.0445, 0.0545, 0.0575, 0.0605)]),
        single_of(TOGETHER, 100, [answer(0.0, 0.043, 0.046, 0.049, 0.052)]),
    ]
    streams = [
        streams_of(name, [stream(0.0, step_s, 20)], [answer(0.0, 1.0, 2.0)] * loaded, 2, loaded=loaded)
        for name, loaded, step_s in (
            (APART, False, 0.0100),
            (APART, True, 0.0105),
            (TOGETHER, False, 0.0100),
            (TOGETHER, True, 0.0500),
        )
    ]
    ttft, gap, apart, together = limits(singles, streams)
    assert (ttft.figure, gap.figure) == pytest.approx((1.5, 7.0))
    assert (apart.figure, together.figure) == pytest.approx((1.05, 5.0))
    assert [exceeds(limit) for limit in (ttft, gap, apart, together)] == [False, True, False, False]


def exceeds(limit: Limit) -> bool:
    return limit.figure > limit.gate


@pytest.fixture
def client() -> Client:
    client = Client(b"s" * 32, [])
    yield client
    client.close()


ROUTE = Route(
    prefill=PeerAddress("prefill-0", "tcp://127.0.0.1:9", 1), decode=PeerAddress("decode-0", "tcp://127.0.0.1:9", 1)
)


def tokens(sender: str, *token_ids: int) -> Received:
    return Received(sender, 1, TokenBatch(jobs=[JobTokens(job_id="bench.1", token_ids=list(token_ids))]))


def test_the_first_token_is_prefills_whichever_socket_is_quicker(client: Client) -> None:
    asked = client.ask(ROUTE, [1, 2, 3], 4)
    for when_s, event in enumerate([tokens("decode-0", 8), tokens("prefill-0", 7), tokens("decode-0", 9)]):
        client._take(event, float(when_s))
    assert asked.token_ids == [7, 8, 9]
    assert not asked.done
    client._take(tokens("decode-0", 10), 3.0)
    assert asked.done


def test_a_job_that_fails_ends_the_measurement(client: Client) -> None:
    client.ask(ROUTE, [1, 2, 3], 4)
    failed = Received(
        "prefill-0", 1, JobFailed(job_id="bench.1", reason="no NVLink here", retryable=False, overloaded=False)
    )
    with pytest.raises(BatonError, match="no NVLink here"):
        client._take(failed, 0.0)
    with pytest.raises(BatonError, match="no answer within"):
        client.wait(lambda: False, 0.01)
