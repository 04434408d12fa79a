"""Questions are drawn from a seed, hold what they ask for, and are judged by what the reply says."""

from __future__ import annotations

import itertools
import json
from random import Random

import pytest

from serving.demo import evaluate, facts, questions, tools
from serving.demo.evaluate import MODEL_FOLDER, Reply
from serving.demo.questions import Question
from serving.text.messages import ToolCall
from serving.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(MODEL_FOLDER)
KINDS = evaluate.draws(TOKENIZER, (256,))


def count_tokens(text: str) -> int:
    return len(TOKENIZER.encode_text(text))


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_a_needle_text_is_as_long_as_asked_and_the_fact_lies_at_its_depth(length: int) -> None:
    found = []
    for depth in (0.0, 0.5, 1.0):
        question = questions.needle(Random("a"), length, depth, count_tokens)
        text = question.messages[0].content
        assert length <= count_tokens(text) < length + 80
        found.append(text.index(question.reply.content) / len(text))
    assert found[0] < 0.2
    assert 0.3 < found[1] < 0.7
    assert found[2] > found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_asks_the_same_and_another_seed_something_else(kind: str) -> None:
    ask = [evaluate.drawn_questions(kind, KINDS[kind], 5, seed) for seed in (1, 1, 2)]
    assert ask[0] == ask[1]
    assert ask[0] != ask[2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_reply_is_accepted_and_another_question_s_reply_is_not(kind: str) -> None:
    asked = evaluate.drawn_questions(kind, KINDS[kind], 40, 3)
    assert all(question.accepts(question.reply.content, question.reply.tool_calls) for question in asked)
    wrong = [q for q, other in itertools.pairwise(asked) if not q.accepts(other.reply.content, other.reply.tool_calls)]
    assert len(wrong) > (10 if kind == "greeting" else 30)


def test_a_value_inside_a_longer_one_is_not_accepted() -> None:
    question = questions.ask("needle", "?", "The code of X is 481.", "481")
    assert question.accepts("It is 481.")
    assert not question.accepts("It is 4812.")
    assert not question.accepts("It is 481.", [ToolCall("get_time", "{}")])


def test_a_call_is_judged_by_name_and_arguments_not_by_spacing() -> None:
    question = tools.tool_call(Random(0))
    (call,) = question.reply.tool_calls
    packed = json.dumps(json.loads(call.arguments), separators=(",", ":"))
    assert question.accepts("", [ToolCall(call.name, packed)])
    assert not question.accepts("", [ToolCall(call.name, "{")])
    assert not question.accepts("", [ToolCall("other", packed)])
    assert not question.accepts("", [])


def test_a_conversation_reads_as_the_openai_api_wants_it() -> None:
    question = tools.tool_answer(Random(1))
    user, assistant, tool = question.openai_messages()
    assert user["role"] == "user"
    assert tool == {
        "role": "tool",
        "content": question.messages[2].content,
        "tool_call_id": assistant["tool_calls"][0]["id"],  # type: ignore[index]
    }
    assert question.openai_tools()[0]["type"] == "function"


def test_a_rival_fact_never_has_both_the_name_and_the_attribute() -> None:
    rng = Random(5)
    for _ in range(300):
        fact = facts.draw(rng)
        other = facts.rival(fact, rng)
        assert (other.attribute, other.key) != (fact.attribute, fact.key)


def test_evaluation_counts_wrong_replies_and_parses_calls() -> None:
    asked = evaluate.drawn_questions("addition", KINDS["addition"], 6, 1)
    right = {id(question): Reply(question.reply.content) for question in asked}
    right[id(asked[2])] = Reply("I do not know.")
    score = evaluate.evaluate(lambda question: right[id(question)], asked, parallel=2)
    assert score.share == 5 / 6
    assert [question for question, _ in score.wrong] == [asked[2]]


def test_generation_by_ids_sees_the_prompt_and_yields_calls() -> None:
    question: Question = tools.tool_call(Random(2))
    (call,) = question.reply.tool_calls
    prompts = []

    def generate(ids: list[int]) -> list[int]:
        prompts.append(ids)
        control = TOKENIZER.control_id
        body = TOKENIZER.encode_text(f"{call.name}\n```json\n{call.arguments}\n```")
        begin = [
            control("<｜tool▁calls▁begin｜>"),
            control("<｜tool▁call▁begin｜>"),
            *TOKENIZER.encode_text("function"),
        ]
        end = [control("<｜tool▁call▁end｜>"), control("<｜tool▁calls▁end｜>"), TOKENIZER.eos_id]
        return [*begin, control("<｜tool▁sep｜>"), *body, *end]

    reply = evaluate.by_ids(TOKENIZER, generate)(question)
    assert question.accepts(reply.content, reply.calls)
    assert question.messages[0].content in TOKENIZER.decode(prompts[0])
