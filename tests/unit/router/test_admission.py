"""The queue in front of the workers, with a room that counts pages."""

from __future__ import annotations

import pytest

from router.admission import Admission
from serving.core.errors import Overloaded


class Room:
    def __init__(self, pages: int) -> None:
        self.pages = pages

    def place(self, item: tuple[str, int]) -> str | None:
        if item[1] > self.pages:
            return None
        self.pages -= item[1]
        return item[0]


def queue(max_waiting: int = 10, queue_timeout_s: float = 5.0) -> Admission[tuple[str, int]]:
    return Admission(max_waiting=max_waiting, queue_timeout_s=queue_timeout_s)


def test_first_come_first_served_and_nobody_overtakes_a_big_one() -> None:
    admission, room = queue(), Room(3)
    for item in (("a", 2), ("big", 5), ("small", 1)):
        admission.enter(item, 0.0)
    assert [name for _, name in admission.admit(room.place, 0.0)] == ["a"]
    room.pages = 6
    assert [name for _, name in admission.admit(room.place, 1.0)] == ["big", "small"]


def test_those_who_come_back_go_first() -> None:
    admission, room = queue(), Room(1)
    admission.enter(("new", 1), 0.0)
    admission.enter(("resumed", 1), 1.0, resumed=True)
    assert [name for _, name in admission.admit(room.place, 1.0)] == ["resumed"]


def test_a_full_queue_refuses_with_a_guess_that_grows_with_it() -> None:
    admission, room = queue(max_waiting=2), Room(0)
    for n in range(2):
        admission.enter((f"{n}", 1), 0.0)
        admission.check(0.0)
    admission.enter(("too many", 1), 0.0)
    with pytest.raises(Overloaded) as refused:
        admission.check(0.0)
    assert refused.value.retry_after_s == 5.0, "nothing has been admitted yet: the time-out is all that is known"
    admission.leave(("too many", 1))
    for at_s in (10.0, 20.0):
        room.pages = 1
        admission.admit(room.place, at_s)
        admission.enter((f"at {at_s}", 1), at_s)
    short = admission.retry_after_s(20.0)
    for n in range(20):
        admission.enter((f"more {n}", 1), 20.0)
    assert 1.0 <= short < admission.retry_after_s(20.0)


def test_waiting_ends_after_the_timeout() -> None:
    admission = queue(queue_timeout_s=5.0)
    admission.enter(("a", 1), 0.0)
    admission.enter(("b", 1), 3.0)
    assert admission.expired(4.9) == []
    assert admission.expired(5.0) == [("a", 1)]
    assert len(admission) == 1


def test_who_leaves_is_not_admitted() -> None:
    admission = queue()
    admission.enter(("a", 1), 0.0)
    admission.enter(("b", 1), 0.0)
    admission.leave(("a", 1))
    admission.leave(("never came", 1))
    assert [name for _, name in admission.admit(Room(9).place, 0.0)] == ["b"]
