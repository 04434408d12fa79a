"""Frames: what was said comes back, and nothing that a stranger sends is believed or does harm."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.errors import PeerError
from serving.core.messages import (
    Abort,
    AnyMessage,
    DecodeJob,
    Heartbeat,
    JobTokens,
    KVReady,
    KVTicket,
    PeerAddress,
    PrefillJob,
    Roster,
    TokenBatch,
    WorkerInfo,
)
from serving.core.request import FinishReason, SamplingParams, TokenLogprobs
from serving.wire import MAX_FRAME_BYTES, Codec

SECRET = b"a secret of the cluster"


def codec(secret: bytes = SECRET, *, max_bytes: int = 1 << 20) -> Codec:
    return Codec(secret, "prefill-0", 3, max_bytes=max_bytes)


ADDRESS = PeerAddress("decode-0", "tcp://127.0.0.1:5", 7)
MESSAGES: tuple[AnyMessage, ...] = (
    Heartbeat(progress=4, step_budget_s=0.25),
    PrefillJob(
        job_id="j",
        token_ids=[1, 2, 3],
        num_prompt_tokens=2,
        sampling=SamplingParams(temperature=0.5, logit_bias={3: -1.0}, logprobs=2, stop_token_ids=[9]),
        max_new_tokens=5,
        budget_s=1.5,
        decode=ADDRESS,
    ),
    DecodeJob(
        job_id="j", token_ids=[1], num_prompt_tokens=1, sampling=SamplingParams(), max_new_tokens=1, budget_s=2.0
    ),
    KVTicket(job_id="j", first_page=2, page_ids=[4, 5], epochs=[1, 9], agents=[b"\x00\xff"]),
    KVReady(
        job_id="j",
        epochs=[1, 9],
        num_tokens=130,
        num_writes=2,
        num_bytes=1 << 40,
        checksums={0: 2**32 - 1},
        first_token=17,
        hidden=b"\x01\x02",
    ),
    TokenBatch(
        jobs=[
            JobTokens(job_id="j", token_ids=[7], logprobs=[TokenLogprobs(-0.5, [7], [-0.5])], finish=FinishReason.STOP)
        ],
        stages={"j": {"first_step": 0.01}},
    ),
    Roster(workers=[WorkerInfo(address=ADDRESS, role="decode", state="ready")]),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_with_its_sender_and_incarnation(message: AnyMessage) -> None:
    envelope = codec().decode(codec().encode(message))
    assert (envelope.sender, envelope.incarnation, envelope.message) == ("prefill-0", 3, message)


NUM_TOKENS = 160_000
NUM_PAGES = NUM_TOKENS // 64
LONGEST: tuple[AnyMessage, ...] = (
    PrefillJob(
        job_id="j",
        token_ids=[129_000] * NUM_TOKENS,
        num_prompt_tokens=NUM_TOKENS,
        sampling=SamplingParams(
            logit_bias=dict.fromkeys(range(1 << 16, (1 << 16) + 1024), 0.1), stop_token_ids=[129_000] * 1024
        ),
        max_new_tokens=5,
        budget_s=1.5,
        decode=ADDRESS,
    ),
    KVTicket(
        job_id="j",
        first_page=0,
        page_ids=[1 << 20] * NUM_PAGES,
        epochs=[1 << 40] * NUM_PAGES,
        agents=[bytes(1 << 16)] * 8,
    ),
    KVReady(
        job_id="j",
        epochs=[1 << 40] * NUM_PAGES,
        num_tokens=NUM_TOKENS,
        num_writes=NUM_PAGES,
        num_bytes=1 << 40,
        checksums=dict.fromkeys(range(NUM_PAGES), 2**32 - 1),
        first_token=1,
        hidden=bytes(4 * 7168),
    ),
    TokenBatch(
        jobs=[
            JobTokens(job_id="j" * 16, token_ids=[1 << 16], logprobs=[TokenLogprobs(-0.5, [1 << 16] * 20, [-0.5] * 20)])
        ]
        * 1024
    ),
)


@pytest.mark.parametrize("message", LONGEST, ids=lambda message: type(message).__name__)
def test_the_longest_messages_fit_into_a_frame_many_times(message: AnyMessage) -> None:
    assert len(codec().encode(message)) < MAX_FRAME_BYTES / 8


def test_a_frame_of_another_secret_is_refused() -> None:
    with pytest.raises(PeerError, match="not authentic"):
        codec().decode(codec(b"another secret").encode(Abort(job_id="j")))


def test_one_flipped_bit_anywhere_is_refused() -> None:
    frame = codec().encode(Abort(job_id="j"))
    for position in range(len(frame)):
        broken = bytearray(frame)
        broken[position] ^= 1
        with pytest.raises(PeerError):
            codec().decode(bytes(broken))


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    frame = codec().encode(Abort(job_id="j" * 1000))
    with pytest.raises(PeerError, match="limit is 100"):
        codec(max_bytes=100).decode(frame)


def test_an_authentic_frame_of_no_known_message_is_refused() -> None:
    sealed = codec()
    payload = b"\x93\xa1a\x01\x81\xa4type\xa7Unknown"
    frame = sealed._digest(payload) + payload
    with pytest.raises(PeerError, match="not a known message"):
        sealed.decode(frame)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_whatever_raise_anything_but_a_peer_error(junk: bytes) -> None:
    sealed = codec()
    for frame in (junk, sealed._digest(junk) + junk):
        with pytest.raises(PeerError):
            sealed.decode(frame)
