from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.text import markers as m
from serving.text.detokenizer import Detokenizer, StopMatcher
from serving.text.tokenizer import Tokenizer

TEXTS = st.lists(
    st.sampled_from(["🤷🏽‍♀️", "👩‍👩‍👧", "深度求索", "e\u0301", "ñ", "\u200d", "\ufffd", "plain ", "\n", "🇩🇪", "한국"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    max_size=12,
).map("".join)


def single_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """Id of the token of each single byte."""
    return {tokenizer.token_bytes(i)[0]: i for i in range(1000) if len(tokenizer.token_bytes(i)) == 1}


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in itertools.pairwise(places)]


@settings(deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60), max_size=10))
def test_any_split_of_a_texts_tokens_gives_the_text(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.push(ids) for ids in split(tokenizer.encode_text(text), cuts)]
    assert "".join(parts) == text
    assert detokenizer.flush() == ""


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 128_900), max_size=40), cuts=st.lists(st.integers(0, 60), max_size=10))
def test_any_split_of_any_tokens_gives_what_decoding_the_whole_gives(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.push(part) for part in split(ids, cuts)] + [detokenizer.flush()]
    assert "".join(parts) == tokenizer.decode(ids)


@settings(deadline=None)
@given(data=st.binary(max_size=24))
def test_any_bytes_come_out_as_python_decodes_them_and_never_early(tokenizer: Tokenizer, data: bytes) -> None:
    ids = single_bytes(tokenizer)
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for n, byte in enumerate(data):
        shown += detokenizer.push([ids[byte]])
        assert data.decode(errors="replace").startswith(shown)
        for ending in (b"", b"a", b"\x80\x80\x80"):
            assert (data[: n + 1] + ending).decode(errors="replace").startswith(shown)
    assert shown + detokenizer.flush() == data.decode(errors="replace")


def test_a_character_of_four_bytes_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = single_bytes(tokenizer)
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([ids[byte]]) for byte in "🤖".encode()] == ["", "", "", "🤖"]
    assert "".join(tokenizer.decode([ids[byte]]) for byte in "🤖".encode()) == "\ufffd" * 4


def test_a_broken_character_is_replaced_once_a_following_byte_proves_it(tokenizer: Tokenizer) -> None:
    ids = single_bytes(tokenizer)
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([ids[0xE6], ids[0xB7]]) == ""
    assert detokenizer.push([ids[ord("a")]]) == "\ufffda"
    assert detokenizer.push([ids[0xE6]]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push([ids[0xB1]]) == "\ufffd"


def test_special_tokens_are_left_out_unless_wanted(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_text("end"), tokenizer.eos_id, tokenizer.control_id(m.THINK)]
    assert Detokenizer(tokenizer).push(ids) == "end<think>"
    assert Detokenizer(tokenizer, skip_special=False).push(ids) == f"end{m.EOS}<think>"


# -- stop strings -----------------------------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the text in front of the stop string that ends first; of two that end together, the longer."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            hit = max(ending, key=len)
            return text[: end - len(hit)], hit
    return text, None


LETTERS = st.text("ab", max_size=30) | st.text("ab\n深", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6) | st.text("ab\n深", min_size=1, max_size=5), max_size=4)


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_stops_are_found_wherever_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    shown = "".join(matcher.push(text[a:b]) for a, b in itertools.pairwise(places)) + matcher.flush()
    assert (shown, matcher.hit) == first_stop(text, stops)


@given(text=LETTERS, stops=STOPS)
def test_nothing_is_held_back_that_could_not_begin_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for n, char in enumerate(text):
        shown += matcher.push(char)
        if matcher.hit is None:
            held = text[len(shown) : n + 1]
            assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


@given(text=LETTERS, stops=STOPS)
def test_include_shows_the_stop_itself(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops, include=True)
    shown = matcher.push(text) + matcher.flush()
    before, hit = first_stop(text, stops)
    assert shown == before + (hit or "")


def test_a_stop_that_begins_inside_a_failed_match_is_found() -> None:
    for stop, text in (("aab", "aaab"), ("abac", "ababac"), ("abcabd", "abcabcabd")):
        matcher = StopMatcher([stop])
        assert matcher.push(text) == text.removesuffix(stop)
        assert matcher.hit == stop


def test_a_stop_that_spans_tokens_is_not_shown_in_part() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert [matcher.push(part) for part in ("Hello", "\n", "Us", "er", ":", " more")] == ["Hello", "", "", "", "", ""]
    assert matcher.hit == "\nUser:"
    assert matcher.flush() == ""


def test_what_turns_out_to_be_no_stop_is_shown_late_but_whole() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert [matcher.push(part) for part in ("\nUse", "ful", "\nUs")] == ["", "\nUseful", ""]
    assert matcher.flush() == "\nUs"
    assert matcher.hit is None


def test_without_stops_text_passes_through() -> None:
    assert StopMatcher([]).push("anything") == "anything"


def test_an_empty_stop_string_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        StopMatcher(["a", ""])
