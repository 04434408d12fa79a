from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.text import markers as m
from serving.text.messages import AssistantMessage, ToolCall, UserMessage
from serving.text.parsers import OutputDelta, OutputParser, merge, new_call_id
from serving.text.template import ChatTemplate, Style
from serving.text.tokenizer import Tokenizer
from serving.text.tool_calls import ToolCallDelta

CLOCK = ToolCall("clock", "{}", "call_0")
SEARCH = ToolCall("search", '{"query": "Zürich 天气", "code": "```\\n"}', "call_1")


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """A piece that names a control token is that token, every other one is text."""
    ids: list[int] = []
    for piece in pieces:
        ids += [tokenizer.control_id(piece)] if tokenizer.has_control(piece) else tokenizer.encode_text(piece)
    return ids


def parser_of(tokenizer: Tokenizer, style: Style = "v3", **options: Any) -> OutputParser:
    numbers = itertools.count()
    return OutputParser(tokenizer, style, new_call_id=lambda: f"call_{next(numbers)}", **options)


def whole(parser: OutputParser, ids: list[int], cuts: list[int] | None = None) -> AssistantMessage:
    """Push everything in one piece, or cut at `cuts`, and merge."""
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts or [])})
    deltas = [parser.push(ids[a:b]) for a, b in itertools.pairwise(places)]
    return merge([*deltas, parser.flush()])


def v3_call(name: str, arguments: str) -> list[str]:
    return [m.CALL_BEGIN, "function", m.SEP, f"{name}\n```json\n{arguments}\n```", m.CALL_END]


def v31_call(name: str, arguments: str) -> list[str]:
    return [m.CALL_BEGIN, name, m.SEP, arguments, m.CALL_END]


# -- reasoning --------------------------------------------------------------------------------------------------------


def test_an_answer_whose_prompt_opened_the_thought_begins_with_reasoning(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "17+25 is 42.\n", m.END_THINK, "\n\n42", m.EOS)
    assert whole(parser_of(tokenizer, in_reasoning=True), ids) == AssistantMessage("42", reasoning="17+25 is 42.\n")
    unsplit = whole(parser_of(tokenizer, in_reasoning=False), ids)
    assert unsplit == AssistantMessage("17+25 is 42.\n</think>\n\n42")


def test_a_model_that_opens_the_thought_itself_is_understood(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, m.THINK, "\nhm", m.END_THINK, "\n\nYes.")
    assert whole(parser_of(tokenizer), ids) == AssistantMessage("Yes.", reasoning="hm")


def test_line_breaks_at_the_start_go_even_when_they_come_one_by_one(tokenizer: Tokenizer) -> None:
    (newline,) = tokenizer.encode_text("\n")
    end, text = tokenizer.control_id(m.END_THINK), tokenizer.encode_text("a\n\nb")
    ids = [newline, newline, *text, end, newline, newline, newline, *text]
    answer = whole(parser_of(tokenizer, in_reasoning=True), ids, list(range(len(ids))))
    assert answer == AssistantMessage("a\n\nb", reasoning="a\n\nb")


def test_an_answer_cut_off_while_thinking_has_no_content(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, m.THINK, "still thinking")
    assert whole(parser_of(tokenizer), ids) == AssistantMessage("", reasoning="still thinking")


def test_a_marker_spelt_in_ordinary_tokens_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text("<think>no</think>")
    assert whole(parser_of(tokenizer), ids) == AssistantMessage("<think>no</think>")
    control = ids_of(tokenizer, m.THINK, "no", m.END_THINK)
    assert whole(parser_of(tokenizer), control) == AssistantMessage("", reasoning="no")


def test_a_think_marker_after_content_is_text(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "The token ", m.THINK, " opens, ", m.END_THINK, " closes.")
    assert whole(parser_of(tokenizer), ids) == AssistantMessage("The token <think> opens, </think> closes.")


# -- tool calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["v3", "r1", "v3.1"])
def test_what_the_template_renders_the_parser_reads_back(tokenizer: Tokenizer, style: Style) -> None:
    answer = AssistantMessage("Let me look.", (CLOCK, SEARCH))
    prompt = ChatTemplate(tokenizer, style).render([UserMessage("?"), answer], add_generation_prompt=False)
    written = prompt[prompt.index(tokenizer.control_id(m.ASSISTANT)) + 1 :]
    assert whole(parser_of(tokenizer, style, tools=True), written) == answer


def test_v3_calls_as_the_model_writes_them(tokenizer: Tokenizer) -> None:
    pieces = [m.CALLS_BEGIN, *v3_call("clock", "{}"), "\n", *v3_call("search", SEARCH.arguments), m.CALLS_END, m.EOS]
    parser = parser_of(tokenizer, tools=True)
    assert whole(parser, ids_of(tokenizer, "I look.", *pieces)) == AssistantMessage("I look.", (CLOCK, SEARCH))
    assert parser.num_tool_calls == 2


def test_v31_calls_as_the_model_writes_them_after_a_thought(tokenizer: Tokenizer) -> None:
    pieces = [m.CALLS_BEGIN, *v31_call("clock", "{}"), *v31_call("search", SEARCH.arguments), m.CALLS_END, m.EOS]
    parser = parser_of(tokenizer, "v3.1", tools=True, in_reasoning=True)
    ids = ids_of(tokenizer, "hm", m.END_THINK, *pieces)
    assert whole(parser, ids) == AssistantMessage("", (CLOCK, SEARCH), reasoning="hm")


def test_the_formats_are_not_mistaken_for_each_other(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, m.CALLS_BEGIN, *v31_call("clock", "{}"), m.CALLS_END)
    assert whole(parser_of(tokenizer, "v3", tools=True), ids).tool_calls != (CLOCK,)
    assert whole(parser_of(tokenizer, "v3.1", tools=True), ids).tool_calls == (CLOCK,)


def test_a_call_streams_its_name_first_and_its_arguments_as_they_come(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, m.CALLS_BEGIN, *v3_call("search", '{"query": "a longer question"}'), m.CALLS_END)
    parser = parser_of(tokenizer, tools=True)
    news = [delta for token in ids for delta in parser.push([token]).tool_calls]
    assert news[0] == ToolCallDelta(0, "call_0", "search", "")
    assert all((delta.index, delta.id, delta.name) == (0, None, None) and delta.arguments for delta in news[1:])
    assert len(news) > 4
    assert "".join(delta.arguments for delta in news) == '{"query": "a longer question"}'
    assert not parser.flush()


@pytest.mark.parametrize(
    "arguments",
    ['{"a": ', "not json at all", '{"a": 1}\n```\nand more', "``", '{"a": "\n```"}', "", "{}\n\n"],
)
@pytest.mark.parametrize("style", ["v3", "v3.1"])
def test_broken_arguments_are_passed_on_as_written(tokenizer: Tokenizer, style: Style, arguments: str) -> None:
    call = v3_call if style == "v3" else v31_call
    ids = ids_of(tokenizer, m.CALLS_BEGIN, *call("f", arguments), m.CALLS_END)
    one_piece = whole(parser_of(tokenizer, style, tools=True), ids)
    one_by_one = whole(parser_of(tokenizer, style, tools=True), ids, list(range(len(ids))))
    assert one_piece.tool_calls == one_by_one.tool_calls == (ToolCall("f", arguments, "call_0"),)


@pytest.mark.parametrize(
    ("pieces", "call"),
    [
        ([m.CALL_BEGIN, "function", m.SEP, 'f\n{"a": 1}', m.CALL_END], ToolCall("f", '{"a": 1}', "call_0")),
        ([m.CALL_BEGIN, "function", m.SEP, "f\n```\n{}\n```", m.CALL_END], ToolCall("f", "{}", "call_0")),
        ([m.CALL_BEGIN, "function", m.SEP, "f\n```json\n{}\n```\n", m.CALL_END], ToolCall("f", "{}", "call_0")),
        (
            [m.CALL_BEGIN, "function", m.SEP, 'f\n```json{"a": 1}```', m.CALL_END],
            ToolCall("f", 'json{"a": 1}', "call_0"),
        ),
        ([m.CALL_BEGIN, "function", m.SEP, "f", m.CALL_END], ToolCall("f", "", "call_0")),
        ([m.CALL_BEGIN, "function", m.SEP, " f \n```json\n{}\n```", m.CALL_END], ToolCall("f", "{}", "call_0")),
        ([m.CALL_BEGIN, "f\n```json\n{}\n```", m.CALL_END], ToolCall("f", "{}", "call_0")),
        (
            [m.CALL_BEGIN, "function", m.SEP, 'f\n```json\n{"a": ', m.SEP, "}\n```"],
            ToolCall("f", f'{{"a": {m.SEP}}}', "call_0"),
        ),
        ([m.CALL_BEGIN, "function", m.SEP, 'f\n```json\n{"cut'], ToolCall("f", '{"cut', "call_0")),
    ],
)
def test_a_sloppy_v3_call_is_still_a_call(tokenizer: Tokenizer, pieces: list[str], call: ToolCall) -> None:
    ids = ids_of(tokenizer, m.CALLS_BEGIN, *pieces)
    assert whole(parser_of(tokenizer, tools=True), ids).tool_calls == (call,)
    assert whole(parser_of(tokenizer, tools=True), ids, list(range(len(ids)))).tool_calls == (call,)


def test_a_call_without_anything_in_it_is_none(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, m.CALLS_BEGIN, m.CALL_BEGIN, m.CALL_END, m.CALLS_END)
    assert whole(parser_of(tokenizer, tools=True), ids) == AssistantMessage()


def test_a_call_that_is_not_closed_ends_where_the_next_begins(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, m.CALLS_BEGIN, *v3_call("clock", "{}")[:-1], *v3_call("search", SEARCH.arguments), "x")
    assert whole(parser_of(tokenizer, tools=True), ids).tool_calls == (CLOCK, SEARCH)


def test_content_may_follow_tool_calls(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, m.CALLS_BEGIN, *v3_call("clock", "{}"), m.CALLS_END, "\nDone.")
    assert whole(parser_of(tokenizer, tools=True), ids) == AssistantMessage("Done.", (CLOCK,))


def test_without_tools_the_tool_markers_are_text(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, m.CALLS_BEGIN, *v3_call("clock", "{}"), m.CALLS_END)
    answer = whole(parser_of(tokenizer), ids)
    assert answer.tool_calls == ()
    assert answer.content == tokenizer.decode(ids)
    assert whole(parser_of(tokenizer, tools=True), ids).tool_calls == (CLOCK,)


# -- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["v3", "v3.1"])
def test_a_stop_string_ends_the_content_and_everything_behind_it(tokenizer: Tokenizer, style: Style) -> None:
    parser = parser_of(tokenizer, style, tools=True, stops=["END"])
    ids = ids_of(tokenizer, "One E", "ND two", m.CALLS_BEGIN, *v3_call("clock", "{}"), m.CALLS_END, "three")
    assert whole(parser, ids) == AssistantMessage("One ")
    assert parser.stop_hit == "END"
    kept = parser_of(tokenizer, stops=["END"], include_stop=True)
    assert whole(kept, ids_of(tokenizer, "One END two")).content == "One END"


def test_a_stop_string_in_the_thought_or_the_arguments_stops_nothing(tokenizer: Tokenizer) -> None:
    parser = parser_of(tokenizer, tools=True, stops=["STOP"])
    ids = ids_of(
        tokenizer,
        m.THINK,
        "STOP",
        m.END_THINK,
        "ok ST",
        m.CALLS_BEGIN,
        *v3_call("f", '{"a": "STOP"}'),
        m.CALLS_END,
        "OP",
    )
    calls = (ToolCall("f", '{"a": "STOP"}', "call_0"),)
    assert whole(parser, ids) == AssistantMessage("ok STOP", calls, reasoning="STOP")
    assert parser.stop_hit is None


# -- any cut ----------------------------------------------------------------------------------------------------------

PIECES = st.lists(
    st.sampled_from([m.THINK, m.END_THINK, m.CALLS_BEGIN, m.CALL_BEGIN, m.SEP, m.CALL_END, m.CALLS_END, m.EOS])
    | st.sampled_from(
        ["function", "name\n```json\n", '{"a": 1}', "\n```", "\n", "``", " ", "🤷🏽‍♀️", "深度", "STOP", "ST", "x"]
    ),
    max_size=14,
)


@settings(deadline=None, max_examples=200)
@given(
    pieces=PIECES,
    cuts=st.lists(st.integers(0, 80), max_size=12),
    style=st.sampled_from(["v3", "v3.1"]),
    in_reasoning=st.booleans(),
)
def test_however_an_answer_is_cut_it_parses_the_same(
    tokenizer: Tokenizer, pieces: list[str], cuts: list[int], style: Style, in_reasoning: bool
) -> None:
    ids = ids_of(tokenizer, *pieces)
    options: dict[str, Any] = {"tools": True, "stops": ["STOP"], "in_reasoning": in_reasoning}
    one_piece = whole(parser_of(tokenizer, style, **options), ids)
    assert whole(parser_of(tokenizer, style, **options), ids, cuts) == one_piece
    assert whole(parser_of(tokenizer, style, **options), ids_of(tokenizer, "y", *pieces)) != one_piece


def test_no_half_character_at_a_boundary(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode_text("🤖")[:1]
    assert len(tokenizer.encode_text("🤖")) > 1
    ids = [*half, tokenizer.control_id(m.END_THINK), *tokenizer.encode_text("🤖")]
    assert whole(parser_of(tokenizer, in_reasoning=True), ids) == AssistantMessage("🤖", reasoning="\ufffd")


def test_deltas_know_whether_they_say_anything() -> None:
    assert not OutputDelta()
    assert OutputDelta(tool_calls=(ToolCallDelta(0),))
    assert OutputDelta(content=" ")


def test_call_ids_do_not_repeat() -> None:
    assert len({new_call_id() for _ in range(100)}) == 100
