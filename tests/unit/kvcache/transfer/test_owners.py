"""Which rank brings which page to whom."""

from hypothesis import given
from hypothesis import strategies as st

from kvcache.transfer.owners import Stripe, owner_of, stripes


@given(
    pages=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=40),
    source_tp=st.sampled_from([1, 2, 4, 8]),
    target_tp=st.sampled_from([1, 2, 4, 8]),
)
def test_every_page_goes_once_from_its_owner_to_its_owner(
    pages: list[tuple[int, int]], source_tp: int, target_tp: int
) -> None:
    sources, targets = [source for source, _ in pages], [target for _, target in pages]
    found = stripes(sources, targets, source_tp=source_tp, target_tp=target_tp)
    assert sorted(index for stripe in found for index in stripe.indices) == list(range(len(pages)))
    assert len({(stripe.source, stripe.target) for stripe in found}) == len(found)
    for stripe in found:
        assert stripe.indices == sorted(stripe.indices)
        assert {owner_of(sources[index], source_tp) for index in stripe.indices} == {stripe.source}
        assert {owner_of(targets[index], target_tp) for index in stripe.indices} == {stripe.target}


def test_neighbours_are_shared_out_evenly() -> None:
    assert stripes([4, 5, 6, 7], [0, 1, 2, 3], source_tp=2, target_tp=2) == [Stripe(0, 0, [0, 2]), Stripe(1, 1, [1, 3])]
    assert [len(stripe.indices) for stripe in stripes(range(64), range(64), source_tp=4, target_tp=1)] == [16] * 4
