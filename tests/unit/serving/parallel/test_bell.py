"""The bell of a unit's processes, each played by a thread: numbered rings, strangers, and ranks that end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

from serving.parallel.bell import TcpBell, _Kind
from serving.parallel.collectives import Done, Handle, RanksMissing, SingleRank

DEADLINE_S = 10.0
RANKS = (4, 5, 6)


@dataclass
class _Room:
    """Where the threads exchange what rank 0 broadcasts."""

    filled: threading.Event = field(default_factory=threading.Event)
    invitation: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass(frozen=True, kw_only=True)
class _World(SingleRank):
    """A group as the bell needs it."""

    room: _Room
    index: int

    def broadcast(self, tensor: Tensor, src: int) -> Handle:
        if self.index == src:
            self.room.invitation = tensor.clone()
            self.room.filled.set()
        assert self.room.filled.wait(DEADLINE_S)
        tensor.copy_(self.room.invitation)
        return Done()


def _join(room: _Room, index: int, deadline_s: float) -> TcpBell:
    world = _World(ranks=RANKS, room=room, index=index)
    object.__setattr__(world, "rank", index)
    return TcpBell(world, host="127.0.0.1", deadline_s=deadline_s)


def _join_all(room: _Room, indices: Sequence[int], deadline_s: float = DEADLINE_S) -> list[TcpBell]:
    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(lambda index: _join(room, index, deadline_s), indices))


@pytest.fixture
def bells() -> Iterator[list[TcpBell]]:
    with ExitStack() as stack:
        made = _join_all(_Room(), range(3))
        for bell in made:
            stack.callback(bell.close)
        yield made


@pytest.mark.parametrize("ringer", range(3))
def test_a_ring_is_heard_by_all_and_ends_waits_for_it_and_those_before(bells: list[TcpBell], ringer: int) -> None:
    assert not any(bell.wait(0, 0.0) for bell in bells)
    bells[ringer].ring(5)
    for bell in bells:
        assert bell.wait(5, DEADLINE_S)
        assert bell.wait(4, 0.0)
        assert not bell.wait(6, 0.02)


def test_who_waits_for_something_else_is_told(bells: list[TcpBell]) -> None:
    told = threading.Event()
    bells[2].tell(told.set)
    bells[1].ring(0)
    assert told.wait(DEADLINE_S)


@pytest.mark.parametrize("gone", range(3))
def test_a_rank_that_ends_is_named_in_every_wait(bells: list[TcpBell], gone: int) -> None:
    bells[gone].close()
    for index, bell in enumerate(bells):
        if index != gone:
            with pytest.raises(RanksMissing) as missing:
                bell.wait(0, DEADLINE_S)
            assert missing.value.ranks == (RANKS[gone],)


@pytest.mark.parametrize("who", range(3))
def test_who_is_behind_is_named_to_all_when_somebody_gives_up(bells: list[TcpBell], who: int) -> None:
    for index, steps in enumerate([5, 4, 6]):
        for _ in range(steps):
            bells[index].advance()
    for bell in bells:
        bell.check()
    assert missing_of(bells[who].give_up) == {RANKS[1]}
    assert [missing_of(partial(bell.wait, 0, DEADLINE_S)) for bell in bells] == [{RANKS[1]}] * 3


@pytest.mark.parametrize("who", range(3))
def test_of_ranks_that_are_equally_far_the_others_are_named(bells: list[TcpBell], who: int) -> None:
    assert missing_of(bells[who].give_up) == set(RANKS) - {RANKS[who]}


def test_who_did_not_come_is_told_from_who_waits_for_them(bells: list[TcpBell]) -> None:
    """Rank 0 is in the next round: the other two have not come, one of them for the other's sake."""
    for bell in bells[:2]:
        bell.advance()
    assert missing_of(partial(bells[0].give_up, RANKS[1:])) == {RANKS[2]}
    assert missing_of(partial(bells[1].wait, 0, DEADLINE_S)) == {RANKS[2]}


@pytest.mark.parametrize("silent", [0, 2])
def test_who_does_not_answer_is_named(bells: list[TcpBell], silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although nobody is behind."""
    monkeypatch.setattr(bells[silent], "_hear", lambda *_, **__: None)
    assert missing_of(bells[1].give_up) == {RANKS[silent]}


@pytest.mark.parametrize("how", ["ended", "behind"])
def test_rank_0_ends_a_wait_of_its_own_when_the_others_have_been_told(
    bells: list[TcpBell], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it may end first, and they would take it for the one that is missing."""
    say = bells[0]._say

    def slowly(kind: _Kind, numbers: list[int], *, to: Iterable[int]) -> None:
        time.sleep(0.1)
        say(kind, numbers, to=to)

    monkeypatch.setattr(bells[0], "_say", slowly)
    if how == "ended":
        bells[2].close()
        waits = partial(bells[0].wait, 0, DEADLINE_S)
    else:
        for bell in bells[:2]:
            bell.advance()
        waits = bells[0].give_up
    assert missing_of(waits) == {RANKS[2]}
    bells[0].close()
    assert missing_of(partial(bells[1].wait, 0, DEADLINE_S)) == {RANKS[2]}


def test_of_two_news_at_once_all_hear_the_same(bells: list[TcpBell], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 ends while rank 0 tells the others, from another thread, that rank 1 is behind."""
    say = bells[0]._say

    def slowly(kind: _Kind, numbers: list[int], *, to: Iterable[int]) -> None:
        say(kind, numbers, to=to)
        if kind is _Kind.BEHIND:
            bells[2].close()
            time.sleep(0.2)

    monkeypatch.setattr(bells[0], "_say", slowly)
    for bell in bells[::2]:
        bell.advance()
    assert missing_of(bells[0].give_up) == {RANKS[1]}
    assert missing_of(partial(bells[1].wait, 0, DEADLINE_S)) == {RANKS[1]}


def missing_of(call: Callable[[], object]) -> set[int]:
    with pytest.raises(RanksMissing) as missing:
        call()
    return set(missing.value.ranks)


def test_a_rank_that_does_not_join_is_named_and_a_stranger_is_not_admitted() -> None:
    room = _Room()

    def knock() -> None:
        assert room.filled.wait(DEADLINE_S)
        text = bytes(room.invitation.tolist())[16:].rstrip(b"\0").decode()
        with socket.create_connection(("127.0.0.1", int(text.split()[0]))) as stranger:
            stranger.sendall(bytes(24))
            assert stranger.recv(1) == b""

    with ThreadPoolExecutor(2) as pool:
        knocking, joining = pool.submit(knock), pool.submit(_join, room, 1, DEADLINE_S)
        with pytest.raises(RanksMissing) as missing:
            _join(room, 0, 0.5)
        knocking.result()
        joining.result().close()
    assert missing.value.ranks == (RANKS[2],)


def test_a_stranger_that_says_nothing_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.parallel.bell._HELLO_S", 0.2)
    room, here = _Room(), threading.Event()

    def stay() -> None:
        assert room.filled.wait(DEADLINE_S)
        text = bytes(room.invitation.tolist())[16:].rstrip(b"\0").decode()
        with socket.create_connection(("127.0.0.1", int(text.split()[0]))) as stranger:
            here.set()
            assert stranger.recv(1) == b""

    def come(index: int) -> TcpBell:
        assert here.wait(DEADLINE_S)
        return _join(room, index, DEADLINE_S)

    with ThreadPoolExecutor(3) as pool:
        staying, *coming = pool.submit(stay), *(pool.submit(come, index) for index in (1, 2))
        begin_s = time.monotonic()
        bells = [_join(room, 0, DEADLINE_S), *(each.result() for each in coming)]
        assert time.monotonic() - begin_s < DEADLINE_S / 2
        staying.result()
    for each in bells:
        each.close()
