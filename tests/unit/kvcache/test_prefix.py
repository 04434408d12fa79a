"""Lookups by content."""

from kvcache.prefix import PrefixIndex

TEXT = list(range(1000, 1300))


def create_index() -> PrefixIndex:
    return PrefixIndex(b"salt of a test")


def test_the_longest_prefix_of_whole_pages_is_found() -> None:
    index = create_index()
    index.add(TEXT, [7, 8, 9], 3)
    assert index.find(TEXT) == [7, 8, 9]
    assert index.find(TEXT[:191]) == [7, 8]
    assert index.find(TEXT[:63]) == []
    assert index.find([*TEXT[:100], 5, *TEXT[101:]]) == [7]


def test_a_page_is_its_whole_past_not_only_its_own_tokens() -> None:
    index = create_index()
    index.add(TEXT, [7, 8], 2)
    assert index.find(TEXT[64:128]) == []
    assert index.find([5, *TEXT[1:]]) == []


def test_publishing_again_changes_nothing_and_later_pages_chain_on() -> None:
    index = create_index()
    index.add(TEXT, [7], 1)
    index.add(TEXT, [7, 8, 9], 3)
    index.add(TEXT, [7, 8, 9], 2)
    assert index.find(TEXT) == [7, 8, 9]
    index.check()


def test_of_two_equal_pages_the_first_is_found_until_it_is_forgotten() -> None:
    index = create_index()
    index.add(TEXT, [7, 8], 2)
    index.add(TEXT, [1, 2, 3], 3)
    assert index.find(TEXT) == [7, 8, 3]
    assert not index.published(1)
    index.forget(8)
    assert index.find(TEXT) == [7]
    index.check()


def test_the_least_recently_used_page_is_evicted_first() -> None:
    index = create_index()
    index.add(TEXT, [7, 8, 9], 3)
    for page_id in (9, 8, 7):
        index.idle(page_id)
    index.wake(9)
    index.idle(9)
    assert [index.evict() for _ in range(3)] == [8, 7, 9]
    assert index.find(TEXT) == []


def test_two_processes_do_not_share_digests() -> None:
    first, second = PrefixIndex(b"one"), PrefixIndex(b"two")
    first.add(TEXT, [0], 1)
    second.add(TEXT, [0], 1)
    assert first._digest_of != second._digest_of
