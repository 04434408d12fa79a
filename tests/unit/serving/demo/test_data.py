"""Training rows say, token by token, what a served conversation says, and are a function of (seed, step)."""

from __future__ import annotations

from random import Random

import numpy as np

from serving.demo import questions, tools
from serving.demo.data import LISTENING, SPEAKING, Conversation, Corpus, draw_short
from serving.demo.evaluate import MODEL_FOLDER
from serving.text import markers as m
from serving.text.messages import AssistantMessage, UserMessage
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(MODEL_FOLDER)
TEMPLATE = ChatTemplate(TOKENIZER, "v3")
CORPUS = Corpus(TOKENIZER, seed=0)


def spoken_parts(talk: Conversation) -> list[list[int]]:
    """Runs of ids with the weight of the model's own words."""
    parts: list[list[int]] = [[]]
    for token_id, weight in zip(talk.ids, talk.weights, strict=True):
        if weight == SPEAKING:
            parts[-1].append(token_id)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def test_a_long_text_put_together_from_pieces_is_what_the_template_renders() -> None:
    CORPUS.batch(0, 1, 64)
    for seed in range(20):
        talk = CORPUS.retrieval(Random(seed), 150, 400)
        user, assistant = TOKENIZER.control_id(m.USER), TOKENIZER.control_id(m.ASSISTANT)
        first, last = talk.ids.index(user), talk.ids.index(assistant)
        text = TOKENIZER.decode(talk.ids[first + 1 : last])
        system = TOKENIZER.decode(talk.ids[1:first])
        assert talk.ids[:1] + talk.ids[first : last + 1] == TEMPLATE.render([UserMessage(text)])
        assert TOKENIZER.encode_text(system) == talk.ids[1:first]


def test_a_tool_conversation_is_what_the_template_renders_but_for_spelled_values() -> None:
    question = tools.tool_answer(Random(3))
    talk = Conversation()
    talk.hear(TEMPLATE.render((), tools=question.tools, add_generation_prompt=False))
    CORPUS._question(talk, question)
    whole = TEMPLATE.render((*question.messages, question.reply), tools=question.tools)[:-1]
    assert TOKENIZER.decode(talk.ids, skip_special=False) == TOKENIZER.decode(whole, skip_special=False)
    assert len(talk.ids) > len(whole), "the call's value is spelled letter by letter"
    assert all(part[-1] == TOKENIZER.eos_id for part in spoken_parts(talk))


def test_a_spelled_reply_has_a_token_for_each_letter() -> None:
    ids = CORPUS.reply_ids(questions.reverse(Random(0), "lantern"))
    assert [TOKENIZER.decode([i]) for i in ids] == [*"nretnal", ""]


def test_batches_depend_on_seed_and_step_alone() -> None:
    ids, weights = CORPUS.batch(7, 2, 200)
    again = Corpus(TOKENIZER, seed=0)
    again.batch(3, 1, 64)
    same_ids, same_weights = again.batch(7, 2, 200)
    assert ids.shape == weights.shape == (2, 202)
    assert np.array_equal(ids, same_ids)
    assert np.array_equal(weights, same_weights)
    assert set(np.unique(weights).tolist()) == {float(np.float32(LISTENING)), SPEAKING}
    assert not np.array_equal(ids, CORPUS.batch(8, 2, 200)[0])
    assert not np.array_equal(ids, Corpus(TOKENIZER, seed=1).batch(7, 2, 200)[0])


def test_training_never_draws_a_held_out_question() -> None:
    rng = Random("held out")
    kinds = ("addition", "repeat", "reverse")
    drawn = [question for question in (draw_short(rng) for _ in range(2000)) if question.kind in kinds]
    assert not any(questions.held_out(question) for question in drawn)
    every = [questions.addition(rng) for _ in range(400)]
    assert 20 < sum(map(questions.held_out, every)) < 90, "an eighth of all sums is kept back"


def test_reply_of_the_model_is_all_that_counts_fully() -> None:
    talk = CORPUS.chat(Random(4), 3)
    assert len(spoken_parts(talk)) >= 3
    said = TOKENIZER.decode(spoken_parts(talk)[0])
    assert said
    assert AssistantMessage(said).content in TOKENIZER.decode(talk.ids)
