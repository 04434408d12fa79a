"""States and epochs."""

import itertools

import pytest

from kvcache.pages import LEGAL_MOVES, Pages, PageState

WAY = {
    PageState.CACHED: [PageState.OWNED, PageState.CACHED],
    PageState.RESERVED: [PageState.RESERVED],
    PageState.EXPOSED: [PageState.RESERVED, PageState.EXPOSED],
    PageState.FILLED: [PageState.RESERVED, PageState.EXPOSED, PageState.FILLED],
    PageState.OWNED: [PageState.OWNED],
    PageState.DRAINING: [PageState.RESERVED, PageState.EXPOSED, PageState.DRAINING],
    PageState.QUARANTINED: [PageState.RESERVED, PageState.EXPOSED, PageState.DRAINING, PageState.QUARANTINED],
}


def one_page(pages: Pages, state: PageState) -> int:
    (page_id,) = pages.take(1, state)
    return page_id


def page_in(state: PageState) -> tuple[Pages, int]:
    pages = Pages(3)
    page_id = one_page(pages, WAY[state][0])
    for step in WAY[state][1:]:
        pages.move(page_id, step)
    return pages, page_id


@pytest.mark.parametrize(("before", "after"), list(itertools.product(WAY, PageState)))
def test_a_page_moves_along_the_diagram_and_nowhere_else(before: PageState, after: PageState) -> None:
    pages, page_id = page_in(before)
    if after in LEGAL_MOVES[before]:
        pages.move(page_id, after)
        assert pages.state(page_id) is after
        pages.check()
    else:
        with pytest.raises(AssertionError, match="cannot go from"):
            pages.move(page_id, after)


def test_what_a_peer_may_still_write_is_freed_only_through_its_closing() -> None:
    writable = {PageState.EXPOSED, PageState.DRAINING, PageState.QUARANTINED}
    assert {state for state in writable if PageState.FREE in LEGAL_MOVES[state]} == {
        PageState.DRAINING,
        PageState.QUARANTINED,
    }
    assert all(PageState.CACHED not in LEGAL_MOVES[state] for state in writable)


def test_the_epoch_rises_with_every_use() -> None:
    pages = Pages(1)
    epochs = []
    for state in (PageState.OWNED, PageState.RESERVED, PageState.OWNED):
        epochs.append(pages.epoch(one_page(pages, state)))
        pages.move(0, PageState.FREE)
    assert epochs == sorted(set(epochs))


def test_low_pages_are_used_first() -> None:
    pages = Pages(5)
    assert [one_page(pages, PageState.OWNED) for _ in range(3)] == [0, 1, 2]
    pages.move(1, PageState.FREE)
    assert one_page(pages, PageState.OWNED) == 1


def test_a_lost_page_is_noticed() -> None:
    pages = Pages(3)
    pages.take(1, PageState.OWNED)
    pages.check()
    pages._states[2] = PageState.DRAINING
    with pytest.raises(AssertionError, match="counts drifted"):
        pages.check()


def test_a_page_that_is_free_twice_is_noticed() -> None:
    pages = Pages(3)
    pages.take(1, PageState.OWNED)
    pages._free.add(0)
    with pytest.raises(AssertionError, match="free list"):
        pages.check()
