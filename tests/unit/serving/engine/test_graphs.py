"""Which sizes are captured. Capture and replay need a GPU: tests/gpu/test_engine.py."""

from __future__ import annotations

import pytest

from serving.engine.graphs import decode_sizes, prefill_sizes


@pytest.mark.parametrize("most", [1, 2, 3, 16, 64, 100, 256, 1000])
def test_a_captured_decode_step_has_few_rows_of_nobody(most: int) -> None:
    sizes = decode_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        wasted = next(size for size in sizes if size >= rows) - rows
        assert wasted <= max(1, 0.25 * rows)
    assert len(sizes) <= 8 + 8 * most.bit_length()


@pytest.mark.parametrize("most", [64, 100, 2048, 4096])
def test_a_captured_prefill_step_has_few_tokens_of_nobody(most: int) -> None:
    sizes = prefill_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for tokens in range(1, most + 1):
        wasted = next(size for size in sizes if size >= tokens) - tokens
        assert wasted < max(64, 0.126 * tokens + 1)


def test_behind_a_context_fewer_sizes_are_captured() -> None:
    assert prefill_sizes(1024, an_octave=2) == [64, 128, 192, 256, 384, 512, 768, 1024]
    assert set(prefill_sizes(4096, an_octave=2)) < set(prefill_sizes(4096))
