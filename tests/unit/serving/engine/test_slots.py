"""Slots, and the rule by which a sequence ends."""

import pytest

from serving.core.request import FinishReason
from serving.engine.ending import finish_reason
from serving.engine.slots import Slots
from tests.scheduler_factory import create_sequence


def test_each_slot_is_handed_out_once_until_it_is_given_back() -> None:
    slots = Slots(2)
    assert [slots.take(), slots.take(), slots.take()] == [0, 1, None]
    slots.give(1)
    assert (slots.num_free, slots.take()) == (1, 1)


def test_the_executor_hears_of_a_slot_that_is_given_back() -> None:
    closed: list[int] = []
    slots = Slots(2, on_give=closed.append)
    slots.take()
    assert closed == []
    slots.give(0)
    assert closed == [0]


def test_giving_a_slot_back_twice_is_our_bug() -> None:
    slots = Slots(2)
    slots.take()
    slots.give(0)
    with pytest.raises(AssertionError, match="nobody holds it"):
        slots.give(0)


@pytest.mark.parametrize(
    ("last", "num_new_tokens", "max_model_len", "reason"),
    [
        (7, 3, None, None),
        (9, 3, None, FinishReason.STOP),
        (9, 8, 3, FinishReason.STOP),
        (7, 8, None, FinishReason.LENGTH),
        (7, 3, 3, FinishReason.LENGTH),
        (7, 3, 4, None),
    ],
)
def test_a_stop_token_wins_over_a_length(
    last: int, num_new_tokens: int, max_model_len: int | None, reason: FinishReason | None
) -> None:
    sequence = create_sequence("job", [1, 2, last], max_new_tokens=8, stop_token_ids=[9])
    sequence.num_new_tokens = num_new_tokens
    assert finish_reason(sequence, max_model_len) is reason
