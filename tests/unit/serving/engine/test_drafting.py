"""How many drafts a step makes: by what it costs and by what was accepted of late."""

from __future__ import annotations

from serving.engine.drafting import Drafting


def _as_on_a_gpu(num_rows: int, num_drafts: int) -> float:
    """A draft costs a fifth of a step; from 64 tokens on, tokens cost as well."""
    return (1.0 + 0.2 * num_drafts) * max(1.0, num_rows * (num_drafts + 1) / 64)


def test_accepted_drafts_are_made_and_refused_ones_given_up() -> None:
    drafting = Drafting(3, _as_on_a_gpu)
    for _ in range(100):
        drafting.settled(3, [3, 3])
    assert drafting.choose(2, 3) == 3
    for _ in range(100):
        drafting.settled(3, [1, 1])
    assert drafting.choose(2, 3) == 1
    for _ in range(100):
        drafting.settled(1, [0, 0])
    assert drafting.choose(2, 3) == 0


def test_what_did_not_pay_is_tried_again_later() -> None:
    drafting = Drafting(2, _as_on_a_gpu)
    for _ in range(50):
        drafting.settled(2, [0])
    assert drafting.choose(1, 2) == 0
    num_steps = 0
    while drafting.choose(1, 2) == 0:
        drafting.settled(0, [0])
        num_steps += 1
    assert 20 < num_steps < 1000


def test_fewer_are_made_where_many_rows_make_tokens_dear() -> None:
    drafting = Drafting(3, _as_on_a_gpu)
    for _ in range(100):
        drafting.settled(3, [3])
    chosen = [drafting.choose(num_rows, 3) for num_rows in (1, 16, 40, 64)]
    assert chosen[0] == 3
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] == 0


def test_nothing_is_drafted_past_the_end_of_every_text() -> None:
    drafting = Drafting(3, _as_on_a_gpu)
    assert [drafting.choose(1, most) for most in (-1, 0, 1, 2)] == [0, 0, 1, 2]


def test_what_is_counted_is_taken_once() -> None:
    drafting = Drafting(3, _as_on_a_gpu)
    drafting.settled(2, [0, 2, 1])
    drafting.settled(0, [0])
    assert drafting.take_counts() == (6, 3)
    assert drafting.take_counts() == (0, 0)
