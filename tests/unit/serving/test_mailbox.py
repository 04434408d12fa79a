"""The I/O thread: messages between two mailboxes over real sockets, deaths noticed, strangers refused, no CPU when idle."""

from __future__ import annotations

import itertools
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import zmq

from serving.core.errors import StartupError
from serving.core.messages import Abort, Attach, Heartbeat, PeerAddress
from serving.mailbox import PAUSE_S, PEER_TIMEOUT_S, Driven, Mailbox, PeerGone, Received
from serving.metrics import Metrics
from serving.wire import Codec

SECRET = b"s" * 16
Event = Received | PeerGone | Driven[int]
Make = Callable[..., Mailbox[int]]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def build(name: str, incarnation: int = 1, *, metrics: Metrics | None = None, **more: object) -> Mailbox[int]:
            box: Mailbox[int] = Mailbox(
                worker_id=name,
                incarnation=incarnation,
                host="127.0.0.1",
                secret=SECRET,
                metrics=metrics or Metrics("worker", worker=name),
                **({"heartbeat_s": 0.05, "peer_timeout_s": 1.0} | more),  # type: ignore[arg-type]
            )
            stack.callback(box.close)
            box.start()
            return box

        yield build


def wait_for(box: Mailbox[int], wanted: Callable[[Event], bool], timeout_s: float = 5.0) -> list[Event]:
    """Everything up to and including the first event that is wanted."""
    seen: list[Event] = []
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        for event in box.get(0.1):
            seen.append(event)
            if wanted(event):
                return seen
    raise AssertionError(f"not seen within {timeout_s} s; seen: {seen}")


def is_abort(event: Event) -> bool:
    return isinstance(event, Received) and isinstance(event.message, Abort)


def is_gone(event: Event) -> bool:
    return isinstance(event, PeerGone)


def test_messages_arrive_in_order_and_answers_go_back_over_the_same_socket(make: Make) -> None:
    prefill, decode = make("prefill-0"), make("decode-0")
    prefill.connect(decode.address)
    for number in range(50):
        prefill.post("decode-0", Abort(job_id=str(number)))
    seen = wait_for(decode, lambda event: is_abort(event) and event.message == Abort(job_id="49"))
    assert [event.message.job_id for event in seen if is_abort(event)] == [str(number) for number in range(50)]
    assert {event.sender for event in seen if isinstance(event, Received)} == {"prefill-0"}
    decode.post("prefill-0", Abort(job_id="back"))
    assert wait_for(prefill, is_abort)[-1] == Received("decode-0", 1, Abort(job_id="back"))


def test_a_peer_that_falls_silent_is_reported_once_and_not_as_proven_dead(make: Make) -> None:
    prefill, decode = make("prefill-0"), make("decode-0")
    prefill.connect(decode.address)
    prefill.post("decode-0", Abort(job_id="x"))
    wait_for(decode, is_abort)
    time.sleep(1.4)  # heartbeats keep both alive without a word from the step loops
    assert decode.get(0) == []
    assert prefill.get(0) == []
    prefill.close()
    started_s = time.monotonic()
    gone = wait_for(decode, is_gone)[-1]
    assert isinstance(gone, PeerGone)
    assert not gone.proven
    assert (gone.peer, gone.incarnation) == ("prefill-0", 1)
    assert 0.4 < time.monotonic() - started_s < 2.0
    assert decode.get(0.3) == []


def test_silence_is_noticed_at_its_own_time_and_not_with_the_next_heartbeat(make: Make) -> None:
    prefill, decode = (make(name, heartbeat_s=0.9) for name in ("prefill-0", "decode-0"))
    prefill.connect(decode.address)
    prefill.post("decode-0", Abort(job_id="x"))
    wait_for(decode, is_abort)
    prefill.close()
    started_s = time.monotonic()
    wait_for(decode, is_gone)
    assert 0.9 < time.monotonic() - started_s < 1.4


def test_a_new_incarnation_proves_the_end_of_the_old_one_and_the_old_one_is_refused_from_then_on(make: Make) -> None:
    metrics = Metrics("worker", worker="decode-0")
    decode = make("decode-0", metrics=metrics)
    first = make("prefill-0", 1)
    first.connect(decode.address)
    first.post("decode-0", Abort(job_id="old"))
    wait_for(decode, is_abort)
    second = make("prefill-0", 2)
    second.connect(decode.address)
    second.post("decode-0", Abort(job_id="new"))
    seen = wait_for(decode, is_abort)
    assert seen == [
        PeerGone("prefill-0", 1, True, "prefill-0 was restarted"),
        Received("prefill-0", 2, Abort(job_id="new")),
    ]
    stale_before = metrics.value("baton_kv_stale_total")
    first.post("decode-0", Abort(job_id="ghost"))
    time.sleep(0.3)
    assert not any(is_abort(event) for event in decode.get(0))
    assert metrics.value("baton_kv_stale_total") > stale_before


def test_an_endpoint_that_never_answers_is_reported(make: Make) -> None:
    prefill = make("prefill-0")
    prefill.connect(PeerAddress("decode-9", "tcp://127.0.0.1:1", 4))
    gone = wait_for(prefill, is_gone)[-1]
    assert isinstance(gone, PeerGone)
    assert (gone.peer, gone.incarnation, gone.proven) == ("decode-9", 4, False)


def test_forged_frames_are_counted_and_the_mailbox_goes_on(make: Make) -> None:
    metrics = Metrics("worker", worker="decode-0")
    decode = make("decode-0", metrics=metrics)
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(decode.address.endpoint)
    forger = Codec(b"wrong", "router-0", 1)
    for _ in range(3):
        stranger.send(forger.encode(Attach()))
    stranger.send_multipart([b"three", b"parts", b"of junk"])
    friend = Codec(SECRET, "router-0", 1)
    stranger.send(friend.encode(Abort(job_id="real")))
    assert wait_for(decode, is_abort) == [Received("router-0", 1, Abort(job_id="real"))]
    assert metrics.value("baton_frames_refused_total") == 4
    context.destroy(linger=0)


def test_a_driver_is_polled_only_while_it_is_busy(make: Make) -> None:
    driver = CountingDriver()
    box = make("decode-0", driver=driver)
    time.sleep(0.2)
    assert driver.num_polls == 0
    box.call(lambda: driver.open(3))
    assert wait_for(box, lambda event: event == Driven(0))[-1] == Driven(0)
    polls = driver.num_polls
    time.sleep(0.2)
    assert driver.num_polls == polls == 3


def test_a_flood_of_a_stranger_starves_neither_transfers_nor_commands(make: Make) -> None:
    metrics, driver, held = Metrics("worker", worker="decode-0"), CountingDriver(), threading.Event()
    decode = make("decode-0", metrics=metrics, driver=driver)
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(decode.address.endpoint)
    decode.call(held.wait)
    for _ in range(900):
        stranger.send(b"junk that nobody has signed")
    time.sleep(0.3)  # all of it waits in our socket now
    refused: list[float] = []
    driver.on_poll = lambda: refused.append(metrics.value("baton_frames_refused_total"))
    decode.call(lambda: driver.open(50))
    held.set()
    wait_for(decode, lambda event: event == Driven(0))
    refused = [0.0, *refused]
    assert all(after - before <= 64 for before, after in itertools.pairwise(refused))
    assert refused[-1] == 900, "what was left came in later turns"
    context.destroy(linger=0)


def test_a_driver_in_a_hurry_is_polled_more_often_than_zeromq_could_wait(make: Make) -> None:
    driver = CountingDriver()
    box = make("decode-0", driver=driver)

    def polls_a_second(pause_s: float) -> float:
        driver.pause_s = pause_s
        box.call(lambda: driver.open(1_000_000))
        before, begin_s = driver.num_polls, time.monotonic()
        time.sleep(0.1)
        return (driver.num_polls - before) / (time.monotonic() - begin_s)

    assert polls_a_second(PAUSE_S) <= 1.05 / PAUSE_S
    assert max(polls_a_second(5e-5) for _ in range(5)) > 1.2 / PAUSE_S


class CountingDriver:
    def __init__(self) -> None:
        self.num_polls = 0
        self.pause_s = PAUSE_S
        self._left = 0
        self.on_poll: Callable[[], object] = lambda: None

    def open(self, polls: int) -> None:
        self._left = polls

    @property
    def busy(self) -> bool:
        return self._left > 0

    def poll(self) -> list[int]:
        self.on_poll()
        self.num_polls += 1
        self._left -= 1
        return [self._left]

    def close(self) -> None:
        self._left = 0


def test_the_default_is_that_a_silent_peer_is_dead_after_two_seconds() -> None:
    assert PEER_TIMEOUT_S == 2.0


def test_two_attached_mailboxes_use_next_to_no_cpu(make: Make) -> None:
    prefill, decode = make("prefill-0"), make("decode-0")
    prefill.connect(decode.address)
    time.sleep(0.5)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(1.5)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used_s < 0.045, f"{used_s:.3f} s of CPU in 1.5 s"


def test_a_heartbeat_is_answered_at_once_when_ours_would_be_due_soon(make: Make) -> None:
    """One wake-up for both; but nobody is answered faster than the period asks for."""
    decode = make("decode-0", heartbeat_s=1.0, peer_timeout_s=5.0)
    context = zmq.Context()
    peer, codec = context.socket(zmq.DEALER), Codec(SECRET, "router-0", 1)
    peer.connect(decode.address.endpoint)
    beat = codec.encode(Heartbeat(progress=0))

    def answered_within(timeout_s: float) -> bool:
        peer.send(beat)
        answered = bool(peer.poll(timeout_s * 1000))
        if answered:
            peer.recv()
        return answered

    assert answered_within(0.5), "a new peer hears of us at once"
    time.sleep(0.2)
    assert not answered_within(0.2)
    time.sleep(0.45)
    assert answered_within(0.15), "0.85 s of a period of 1 s have passed"
    context.destroy(linger=0)


def test_a_host_that_is_not_ours_is_a_startup_error() -> None:
    with pytest.raises(StartupError, match="address of this machine"):
        Mailbox(
            worker_id="w",
            incarnation=1,
            host="198.51.100.1",
            secret=SECRET,
            heartbeat_s=0.5,
            metrics=Metrics("worker", worker="w"),
        )
