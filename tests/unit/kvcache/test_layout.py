"""The bytes of a page."""

import pytest

from kvcache.layout import PAGE_TOKENS, PageLayout, num_pages_for

V3 = PageLayout(num_layers=61, num_mtp_layers=0, row_width=576, element_bytes=2)
SMALL = PageLayout(num_layers=8, num_mtp_layers=1, row_width=80, element_bytes=4)


def test_a_page_of_deepseek_v3_in_bfloat16_has_four_and_a_half_megabytes() -> None:
    assert V3.page_bytes == 61 * 64 * 576 * 2 == 4_497_408


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (4096, 64)])
def test_a_page_is_begun_for_each_64_tokens(num_tokens: int, num_pages: int) -> None:
    assert num_pages_for(num_tokens) == SMALL.num_pages_for(num_tokens) == num_pages


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 300])
def test_latents_mtp_rows_and_padding_are_the_whole_pages(num_tokens: int) -> None:
    assert SMALL.latent_bytes(num_tokens) == num_tokens * 8 * 80 * 4
    assert SMALL.mtp_bytes(num_tokens) == num_tokens * 80 * 4
    padding_rows = num_pages_for(num_tokens) * PAGE_TOKENS - num_tokens
    assert SMALL.padding_bytes(num_tokens) == padding_rows * 9 * 80 * 4


def test_layouts_that_differ_in_anything_have_another_identity() -> None:
    others = [
        PageLayout(num_layers=7, num_mtp_layers=1, row_width=80, element_bytes=4),
        PageLayout(num_layers=8, num_mtp_layers=0, row_width=80, element_bytes=4),
        PageLayout(num_layers=8, num_mtp_layers=1, row_width=81, element_bytes=4),
        PageLayout(num_layers=8, num_mtp_layers=1, row_width=80, element_bytes=2),
    ]
    assert len({SMALL.identity, *(other.identity for other in others)}) == 5
    assert SMALL.identity == PageLayout(num_layers=8, num_mtp_layers=1, row_width=80, element_bytes=4).identity
