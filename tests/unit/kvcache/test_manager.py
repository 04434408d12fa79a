"""Pages for sequences and for hand-offs, case by case."""

import pytest

from kvcache.manager import Allocation, KVManager
from kvcache.pages import PageState
from kvcache.transfer.base import runs
from serving.core.errors import StaleError

TEXT = list(range(1000, 1300))  # four full pages and 44 tokens


def create_manager(num_pages: int = 8, *, prefix_cache: bool = True) -> KVManager:
    return KVManager(num_pages, prefix_cache=prefix_cache, salt=b"salt of a test")


def acquire(manager: KVManager, token_ids: list[int]) -> Allocation:
    allocation = manager.acquire(token_ids, len(token_ids))
    assert allocation is not None
    return allocation


def cached(manager: KVManager, token_ids: list[int]) -> list[int]:
    """Leaves `token_ids` in the prefix cache."""
    page_ids = acquire(manager, token_ids).page_ids
    manager.publish(token_ids, page_ids, len(token_ids))
    manager.release(page_ids)
    return page_ids


def nonzero(manager: KVManager) -> dict[str, int]:
    manager.check()
    return {state: count for state, count in manager.counts().items() if count}


def test_a_second_request_shares_the_full_pages_of_the_first() -> None:
    manager = create_manager()
    first = acquire(manager, TEXT)
    manager.publish(TEXT, first.page_ids, len(TEXT))
    second = acquire(manager, [*TEXT[:200], 5])
    assert (first.num_cached, second.num_cached) == (0, 192)
    assert second.page_ids[:3] == first.page_ids[:3]
    assert second.page_ids[3] not in first.page_ids
    assert nonzero(manager) == {"owned": 6, "free": 2}


def test_a_page_that_is_not_complete_is_not_found() -> None:
    manager = create_manager()
    first = acquire(manager, TEXT)
    manager.publish(TEXT, first.page_ids, 127)
    assert acquire(manager, TEXT[:128]).num_cached == 64


def test_a_shared_page_is_given_back_by_the_last_who_holds_it() -> None:
    manager = create_manager()
    first = acquire(manager, TEXT[:128])
    manager.publish(TEXT[:128], first.page_ids, 128)
    second = acquire(manager, TEXT[:128])
    manager.release(first.page_ids)
    assert nonzero(manager) == {"owned": 2, "free": 6}
    manager.release(second.page_ids)
    assert nonzero(manager) == {"cached": 2, "free": 6}


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    manager = create_manager(prefix_cache=False)
    cached(manager, TEXT)
    assert nonzero(manager) == {"free": 8}
    assert acquire(manager, TEXT).num_cached == 0


def test_no_room_changes_nothing() -> None:
    manager = create_manager(4)
    cached(manager, TEXT[:128])
    before = manager.counts()
    assert manager.acquire([*TEXT[:128], *range(300)], 428) is None
    assert manager.counts() == before
    assert not manager.reserve("job", 5, TEXT[:128])
    assert manager.counts() == before
    manager.check()


def test_cached_pages_make_room_the_end_of_a_text_first() -> None:
    manager = create_manager(4)
    cached(manager, TEXT[:256])
    acquire(manager, list(range(65)))
    assert acquire(manager, TEXT[:128]).num_cached == 128
    assert nonzero(manager) == {"owned": 4}


def test_a_write_in_flight_keeps_its_pages_from_being_reused() -> None:
    manager = create_manager(2)
    first = acquire(manager, TEXT[:128])
    manager.hold(first.page_ids[:1])
    manager.release(first.page_ids)
    assert manager.acquire([], 128) is None
    manager.release(first.page_ids[:1])
    assert manager.acquire([], 128) is not None


def test_releasing_too_often_is_our_bug() -> None:
    manager = create_manager()
    page_ids = acquire(manager, TEXT).page_ids
    manager.release(page_ids)
    with pytest.raises(AssertionError, match="nobody refers to it"):
        manager.release(page_ids)


def test_a_hand_off_from_credit_to_release() -> None:
    manager = create_manager()
    assert manager.reserve("job", 6)
    assert nonzero(manager) == {"reserved": 6, "free": 2}
    binding = manager.bind("job", TEXT)
    assert binding is not None
    assert (binding.first_page, binding.held_page_ids, len(binding.page_ids)) == (0, [], 5)
    assert nonzero(manager) == {"exposed": 5, "reserved": 1, "free": 2}
    page_ids = manager.accept("job", binding.epochs)
    assert page_ids == binding.page_ids
    assert manager.grow(page_ids, job_id="job") is not None
    assert nonzero(manager) == {"owned": 6, "free": 2}
    assert manager.grow(page_ids, job_id="job") is not None
    assert nonzero(manager) == {"owned": 7, "free": 1}
    manager.release(page_ids)
    manager.cancel("job")
    assert nonzero(manager) == {"free": 8}


def num_pieces(page_ids: list[int]) -> int:
    """Descriptors of a transfer to these pages from pages that are neighbours."""
    return len(list(runs(range(len(page_ids)), page_ids)))


def test_a_hand_off_goes_to_neighbouring_pages_and_growth_takes_the_next() -> None:
    manager = create_manager()
    assert manager.reserve("job", 7)
    binding = manager.bind("job", TEXT)
    assert binding is not None
    assert num_pieces(binding.page_ids) == 1
    page_ids = manager.accept("job", binding.epochs)
    for _ in range(3):
        assert manager.grow(page_ids, job_id="job") is not None
    assert num_pieces(page_ids) == 1


def test_pages_that_came_back_in_any_order_are_handed_out_as_neighbours_again() -> None:
    manager = create_manager(30, prefix_cache=False)
    for job_id in "abcdef":
        assert manager.reserve(job_id, 5)
    for job_id in "bcde":
        assert manager.bind(job_id, TEXT) is not None
    manager.cancel("b")
    manager.closed("b")
    manager.closed("d")
    page_ids = manager.accept("c")
    manager.release(page_ids[3:])
    manager.release(page_ids[:3])
    assert nonzero(manager) == {"free": 15, "exposed": 5, "reserved": 10}
    assert num_pieces(acquire(manager, list(range(9 * 64))).page_ids) == 1
    assert num_pieces(acquire(manager, list(range(6 * 64))).page_ids) == 1


def test_growth_takes_the_credit_only_of_its_own_job() -> None:
    manager = create_manager(4)
    assert manager.reserve("job", 2)
    manager.bind("job", TEXT[:10])
    page_ids = manager.accept("job")
    assert manager.acquire([], 2 * 64) is not None
    assert manager.grow([]) is None
    assert manager.grow(page_ids, job_id="job") is not None


def test_what_decode_holds_already_is_not_exposed() -> None:
    manager = create_manager()
    cached(manager, TEXT[:128])
    assert manager.reserve("job", 6)
    binding = manager.bind("job", TEXT)
    assert binding is not None
    assert (binding.first_page, len(binding.page_ids)) == (2, 3)
    assert nonzero(manager) == {"owned": 2, "exposed": 3, "reserved": 1, "free": 2}
    assert manager.accept("job") == binding.held_page_ids + binding.page_ids


def test_a_credit_keeps_the_prefix_that_it_counts_on() -> None:
    manager = create_manager(6)
    cached(manager, TEXT[:256])
    assert manager.reserve("job", 6, TEXT)
    assert nonzero(manager) == {"owned": 4, "reserved": 2}
    binding = manager.bind("job", TEXT)
    assert binding is not None
    assert binding.first_page == 4
    assert nonzero(manager) == {"owned": 4, "exposed": 1, "reserved": 1}


def test_a_prompt_that_is_held_entirely_exposes_nothing() -> None:
    manager = create_manager()
    cached(manager, TEXT[:128])
    assert manager.reserve("job", 3, TEXT[:128])
    binding = manager.bind("job", TEXT[:128])
    assert binding is not None
    assert (binding.first_page, binding.page_ids, binding.epochs) == (2, [], [])
    assert len(manager.accept("job", [])) == 2
    assert nonzero(manager) == {"owned": 2, "reserved": 1, "free": 5}


def test_a_credit_that_was_too_small_takes_free_pages_or_finds_no_room() -> None:
    manager = create_manager(5)
    assert manager.reserve("small", 1)
    assert manager.reserve("other", 1)
    before = manager.counts()
    assert manager.bind("small", TEXT) is None
    assert manager.counts() == before
    manager.cancel("other")
    assert manager.bind("small", TEXT) is not None
    assert nonzero(manager) == {"exposed": 5}


def test_a_job_given_up_before_its_ticket_is_free_at_once_and_after_it_drains() -> None:
    manager = create_manager()
    manager.reserve("early", 2)
    assert manager.cancel("early") is False
    assert nonzero(manager) == {"free": 8}
    manager.reserve("late", 3)
    manager.bind("late", TEXT[:100])
    assert manager.cancel("late") is True
    assert manager.cancel("late") is False
    assert nonzero(manager) == {"draining": 2, "free": 6}
    manager.closed("late")
    assert nonzero(manager) == {"free": 8}


def test_a_writer_that_does_not_answer_costs_its_pages_until_it_is_proven_dead() -> None:
    manager = create_manager(2)
    manager.reserve("job", 2)
    manager.bind("job", TEXT[:128])
    manager.quarantine("job")
    assert nonzero(manager) == {"quarantined": 2}
    assert manager.cancel("job") is False
    assert not manager.reserve("next", 1)
    with pytest.raises(StaleError):
        manager.accept("job")
    manager.closed("job")
    assert nonzero(manager) == {"free": 2}


def test_a_writer_may_close_unasked() -> None:
    manager = create_manager()
    manager.reserve("job", 3)
    manager.bind("job", TEXT[:100])
    manager.closed("job")
    assert nonzero(manager) == {"free": 8}


def test_messages_about_jobs_that_are_over_are_stale() -> None:
    manager = create_manager()
    for late in (manager.closed, manager.accept):
        with pytest.raises(StaleError):
            late("never")
    manager.reserve("job", 3)
    with pytest.raises(StaleError, match="its credit already"):
        manager.reserve("job", 3)
    with pytest.raises(StaleError, match="no page that a peer may write"):
        manager.closed("job")
    with pytest.raises(StaleError, match="reserved, not exposed"):
        manager.accept("job")
    manager.bind("job", TEXT[:100])
    with pytest.raises(StaleError, match="exposed, not reserved"):
        manager.bind("job", TEXT[:100])
    manager.cancel("job")
    with pytest.raises(StaleError, match="draining, not exposed"):
        manager.accept("job")
    manager.closed("job")
    with pytest.raises(StaleError):
        manager.closed("job")
    assert nonzero(manager) == {"free": 8}


def test_a_manifest_of_an_earlier_ticket_is_stale() -> None:
    manager = create_manager(2)
    manager.reserve("first", 2)
    old = manager.bind("first", TEXT[:128])
    manager.closed("first")
    manager.reserve("second", 2)
    new = manager.bind("second", TEXT[:128])
    assert old is not None
    assert new is not None
    assert sorted(old.page_ids) == sorted(new.page_ids)
    with pytest.raises(StaleError, match="another ticket"):
        manager.accept("second", old.epochs)
    manager.accept("second", new.epochs)


def test_the_check_notices_a_page_in_two_hands() -> None:
    manager = create_manager()
    manager.reserve("first", 2)
    manager.reserve("second", 2)
    manager.check()
    manager._credits["second"].reserved[0] = manager._credits["first"].reserved[0]
    with pytest.raises(AssertionError, match="in two hands"):
        manager.check()


def test_the_check_notices_a_page_without_a_hand() -> None:
    manager = create_manager()
    acquire(manager, TEXT)
    manager._refs[0] = 0
    with pytest.raises(AssertionError, match="with 0 references"):
        manager.check()


def test_the_check_notices_content_that_outlived_its_page() -> None:
    manager = create_manager()
    page_ids = acquire(manager, TEXT[:64]).page_ids
    manager.publish(TEXT[:64], page_ids, 64)
    manager._pages.move(page_ids[0], PageState.FREE)
    manager._refs[page_ids[0]] = 0
    with pytest.raises(AssertionError, match="content is known"):
        manager.check()
