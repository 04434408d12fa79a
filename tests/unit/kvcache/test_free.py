"""Which free pages are taken: neighbours where there are such, and never a page twice."""

from __future__ import annotations

import random

import pytest

from kvcache.free import FreePages
from kvcache.transfer.base import runs


def with_holes(num_pages: int, free: set[int]) -> FreePages:
    """Just `free` is free, given back in an order that is none."""
    pages = FreePages(num_pages)
    pages.take(num_pages)
    order = sorted(free)
    random.Random(1).shuffle(order)
    for page_id in order:
        pages.add(page_id)
    return pages


def test_pages_come_in_rising_order() -> None:
    assert FreePages(8).take(5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("num", "taken"), [(1, [9]), (2, [0, 1]), (3, [5, 6, 7]), (4, [12, 13, 14, 15])])
def test_the_shortest_run_that_holds_them_is_taken(num: int, taken: list[int]) -> None:
    assert with_holes(20, {0, 1, 5, 6, 7, 9, 12, 13, 14, 15, 16}).take(num) == taken


def test_without_a_run_that_long_the_longest_is_the_first_part() -> None:
    assert with_holes(20, {0, 1, 5, 6, 7, 9, 12, 13, 14, 15, 16}).take(7) == [12, 13, 14, 15, 16, 0, 1]


def test_asking_for_more_than_there_are_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="3 pages are asked for, 2 are free"):
        FreePages(2).take(3)


def longest_run(free: set[int]) -> int:
    longest = 0
    for page_id in free:
        end = page_id
        while end in free:
            end += 1
        longest = max(longest, end - page_id)
    return longest


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_taking_and_adding_loses_nothing_and_finds_a_run_that_is_there(seed: int) -> None:
    draw = random.Random(seed)
    pages, free = FreePages(40), set(range(40))
    used: list[int] = []
    for _ in range(200):
        if draw.random() < 0.5 and free:
            num = draw.randint(1, min(len(free), 9))
            could_be_one = longest_run(free) >= num
            taken = pages.take(num)
            assert set(taken) <= free
            assert len(set(taken)) == num
            assert (len(list(runs(taken, taken))) == 1) == could_be_one
            free -= set(taken)
            used += taken
        else:
            draw.shuffle(used)
            for page_id in used[: draw.randint(0, 9)]:
                pages.add(page_id)
                free.add(page_id)
            used = [page_id for page_id in used if page_id not in free]
        assert pages.page_ids() == sorted(free)
        assert len(pages) == len(free)
