"""Micro-batches: nothing is lost, order is kept, and costs are as even as whole tokens allow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.plan import PrefillChunk
from serving.engine.split import split_chunks, split_rows


def _chunk(slot: int, num_tokens: int, start: int, sample: bool) -> PrefillChunk:
    return PrefillChunk(
        slot=slot, token_ids=list(range(num_tokens)), start=start, store_from=start, page_ids=[7], sample=sample
    )


_CHUNKS = st.lists(st.builds(_chunk, st.integers(0, 9), st.integers(1, 300), st.integers(0, 40_000), st.booleans()))


def _cost(chunk: PrefillChunk) -> float:
    """Token by token."""
    return sum(1 + (position + 0.5) / 16384 for position in range(chunk.start, chunk.start + len(chunk.token_ids)))


@given(chunks=_CHUNKS, num_parts=st.integers(1, 3))
def test_chunks_are_split_into_runs_of_equal_cost(chunks: list[PrefillChunk], num_parts: int) -> None:
    parts = split_chunks(chunks, num_parts)
    assert len(parts) == num_parts
    tokens = [
        (chunk.slot, chunk.start + i, token)
        for part in parts
        for chunk in part
        for i, token in enumerate(chunk.token_ids)
    ]
    assert tokens == [
        (chunk.slot, chunk.start + i, token) for chunk in chunks for i, token in enumerate(chunk.token_ids)
    ]
    ends = [(chunk.slot, chunk.start + len(chunk.token_ids)) for part in parts for chunk in part if chunk.sample]
    assert ends == [(chunk.slot, chunk.start + len(chunk.token_ids)) for chunk in chunks if chunk.sample]
    assert all(chunk.token_ids for part in parts for chunk in part)
    costs = [sum(map(_cost, part)) for part in parts]
    dearest_token = 1 + 40_300 / 16384
    assert max(costs) - min(costs) <= 2 * dearest_token


def test_one_long_prompt_is_split_after_its_middle_since_later_tokens_attend_to_more() -> None:
    ((first,), (second,)) = split_chunks([_chunk(3, 16384, 0, sample=True)], 2)
    # x + x^2 / 2 = 3 / 4 for x = sqrt(5 / 2) - 1 of 16,384 tokens.
    assert abs(len(first.token_ids) - 9522) <= 1
    assert (second.start, first.sample, second.sample) == (len(first.token_ids), False, True)


@given(positions=st.lists(st.integers(0, 100_000)), num_parts=st.integers(1, 3))
def test_rows_are_split_into_runs_of_equal_cost(positions: list[int], num_parts: int) -> None:
    parts = split_rows(positions, num_parts)
    assert [position for part in parts for position in positions[part]] == positions
    costs = [sum(1 + position / 16384 for position in positions[part]) for part in parts]
    assert max(costs) - min(costs) <= 2 * (1 + 100_000 / 16384)


def test_parts_without_tokens_stand_where_there_are_too_few() -> None:
    assert split_chunks([], 2) == [(), ()]
    assert [len(part) for part in split_chunks([_chunk(0, 1, 0, sample=True)], 2)] == [1, 0]
    assert [[5, 6][part] for part in split_rows([5, 6], 2)] == [[5], [6]]
    assert [[5][part] for part in split_rows([5], 2)] == [[5], []]
    assert [[][part] for part in split_rows([], 2)] == [[], []]
