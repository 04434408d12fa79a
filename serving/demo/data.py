"""Training batches: conversations packed into rows, every one a function of (seed, step).

A row is filled with conversations one behind the other and cut at its end. Each token carries a weight: 1 where the
model speaks, little where it listens. Conversations are put together from token pieces that were encoded once, and equal
what `serving.text.template` makes of them token by token. Needs numpy, not torch.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from random import Random

import numpy as np
import numpy.typing as npt

from serving.demo import facts, filler, questions, tools, words
from serving.demo.questions import Question
from serving.text import markers as m
from serving.text.messages import AssistantMessage, SystemMessage
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a small model.",
    "Answer in one short sentence.",
    "Be brief.",
    "You are Baton.",
)
REMEMBERED = "I will remember that."
LISTENING = 0.05
SPEAKING = 1.0
JSON_VALUE = re.compile(r'(?<=: ")[^"]*(?=")')


@dataclass
class Conversation:
    """Ids and weights of a conversation under construction."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def hear(self, ids: Iterable[int]) -> None:
        self._add(list(ids), LISTENING)

    def speak(self, ids: Iterable[int]) -> None:
        self._add(list(ids), SPEAKING)

    def _add(self, ids: list[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)


@dataclass(frozen=True)
class Piece:
    """A sentence's ids without its full stop, as it stands after another sentence."""

    text: str
    ids: list[int]


class Corpus:
    """Makes conversations out of one tokenizer. Stateless but for the pool of encoded filler sentences, which is redrawn for each batch."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._template = ChatTemplate(tokenizer, "v3")
        self._control = {name: tokenizer.control_id(name) for name in tokenizer.control_names}
        self._encoded: dict[str, list[int]] = {}
        self._manual = [self._piece(text) for text in manual_sentences()]
        self._plain: list[Piece] = []

    def batch(self, step: int, rows: int, length: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
        """Ids and weights [rows, length + 2] of training step `step`; the two extra columns are targets."""
        rng = Random(f"train/{self._seed}/{step}")
        self._plain = [self._piece(filler.sentence(rng)) for _ in range(1500)]
        made = [self._row(rng, length + 2) for _ in range(rows)]
        return np.array([ids for ids, _ in made], np.int16), np.array([weights for _, weights in made], np.float32)

    # -- conversations ----------------------------------------------------------------------------------------------

    def retrieval(self, rng: Random, num_tokens: int, room: int) -> Conversation:
        """A text of about `num_tokens` with hidden facts, then questions about them while `room` tokens last."""
        sentences = self._sentences(rng, num_tokens)
        single = rng.random() < 0.3
        count = 1 if single else rng.randint(2, max(2, min(30, len(sentences) // 3)))
        hidden = [facts.draw(rng) for _ in range(count)]
        rivals = [facts.rival(rng.choice(hidden), rng) for _ in range(rng.choice((0, 0, 1, 2, 4)))]
        hidden = list({(fact.attribute, fact.key): fact for fact in hidden}.values())
        told = {(fact.attribute, fact.key): fact for fact in (*rivals, *hidden)}
        for fact in told.values():
            sentences.insert(self._depth(rng, len(sentences)), self._piece(fact.sentence))
        rng.shuffle(hidden)
        talk = self._opened(rng)
        tail = rng.choice(questions.JOINTS) + questions.wording(rng, hidden[0])
        self._turn(talk, self.text_ids(rng.choice(questions.HEADS), sentences, tail), self._encode(hidden[0].sentence))
        for fact in hidden[1:]:
            if len(talk.ids) > room - 40:
                break
            self._ask(rng, talk, fact, fact.sentence)
            if rng.random() < 0.05 and ((absent := facts.rival(fact, rng)).attribute, absent.key) not in told:
                self._ask(rng, talk, absent, absent.denial)
        return talk

    def chat(self, rng: Random, turns: int) -> Conversation:
        """Short questions of every other kind, one after the other."""
        talk, known = self._opened(rng), list[facts.Fact]()
        for _ in range(turns):
            if rng.random() < 0.12:
                self._recall(rng, talk, known)
            elif rng.random() < 0.03:
                self._introduction(rng, talk)
            else:
                self._question(talk, draw_short(rng))
        return talk

    def tool_talk(self, rng: Random) -> Conversation:
        """A conversation that opens with tools on offer; a call, its output, an answer, or none of it."""
        question = tools.tool_answer(rng) if rng.random() < 0.85 else tools.tools_unused(rng, draw_short(rng))
        talk, system = Conversation(), self._system(rng)
        messages = (SystemMessage(system),) if system else ()
        talk.hear(self._template.render(messages, tools=question.tools, add_generation_prompt=False))
        self._question(talk, question)
        for _ in range(rng.choice((0, 0, 1, 2))):
            self._question(talk, draw_short(rng))
        return talk

    def plain_text(self, rng: Random) -> Conversation:
        """Filler alone, as a plain completion reads it."""
        talk = Conversation()
        talk.hear(
            [
                self._control[m.BOS],
                *self.text_ids("", self._sentences(rng, rng.randint(10, 200)), ""),
                self._control[m.EOS],
            ]
        )
        return talk

    def text_ids(self, head: str, sentences: list[Piece], tail: str) -> list[int]:
        """Ids of head + sentences joined by spaces + tail: what encoding the whole text gives, since no token spans two pieces."""
        ids, stop = list(self._tokenizer.encode_text(head + sentences[0].text)), self._encode(".")
        for sentence in sentences[1:]:
            ids += stop
            ids += sentence.ids
        return ids + self._tokenizer.encode_text("." + tail)

    def reply_ids(self, question: Question) -> list[int]:
        """What the model is to say, the end included. Spelled words and the values of a call go letter by letter."""
        reply, spell = question.reply, self._spell
        ids = spell(reply.content) if question.spelled else self._encode(reply.content)
        return [*ids, *(self._call_ids(reply) if reply.tool_calls else ()), self._control[m.EOS]]

    # -- pieces -----------------------------------------------------------------------------------------------------

    def _row(self, rng: Random, length: int) -> tuple[list[int], list[float]]:
        ids, weights = list[int](), list[float]()
        while len(ids) < length:
            talk = self._conversation(rng, length - len(ids))
            ids += talk.ids
            weights += talk.weights
        return ids[:length], weights[:length]

    def _conversation(self, rng: Random, room: int) -> Conversation:
        """Long rows open with a long text more often than not; what is left over gets shorter conversations."""
        pick = rng.random()
        if pick < 0.02:
            return self.plain_text(rng)
        if pick < (0.45 if room < 1000 else 0.8) and room > 150:
            longest = room - 90
            num_tokens = (
                rng.randint(30, longest) if rng.random() < 0.6 else rng.randint(max(30, longest * 4 // 5), longest)
            )
            return self.retrieval(rng, num_tokens, room)
        if pick < 0.85:
            return self.chat(rng, rng.choice((1, 1, 2, 4, 8, 12)))
        return self.tool_talk(rng)

    def _opened(self, rng: Random) -> Conversation:
        talk = Conversation()
        talk.hear([self._control[m.BOS], *self._encode(self._system(rng))])
        return talk

    def _system(self, rng: Random) -> str:
        """Mostly none, or one of a few, or any sentence."""
        pick = rng.random()
        return "" if pick < 0.75 else rng.choice(SYSTEMS) if pick < 0.95 else rng.choice(self._plain).text + "."

    def _turn(self, talk: Conversation, asked: list[int], answer: list[int]) -> None:
        talk.hear([self._control[m.USER], *asked, self._control[m.ASSISTANT]])
        talk.speak([*answer, self._control[m.EOS]])

    def _ask(self, rng: Random, talk: Conversation, fact: facts.Fact, answer: str) -> None:
        self._turn(talk, self._tokenizer.encode_text(questions.wording(rng, fact)), self._tokenizer.encode_text(answer))

    def _question(self, talk: Conversation, question: Question) -> None:
        """All of its messages, those of the model spoken, then the reply."""
        talk.hear([self._control[m.USER], *self._encode(question.messages[0].content), self._control[m.ASSISTANT]])
        for message in question.messages[1:]:
            if isinstance(message, AssistantMessage):
                talk.speak([*self._call_ids(message), self._control[m.EOS]])
            else:
                talk.hear(self._control[name] for name in (m.OUTPUTS_BEGIN, m.OUTPUT_BEGIN))
                talk.hear(
                    [*self._encode(message.content), *(self._control[name] for name in (m.OUTPUT_END, m.OUTPUTS_END))]
                )
        talk.speak(self.reply_ids(question))

    def _recall(self, rng: Random, talk: Conversation, known: list[facts.Fact]) -> None:
        """The user states a fact to be remembered, or asks for one stated before."""
        if known and rng.random() < 0.6:
            fact = rng.choice(known)
            self._ask(rng, talk, fact, fact.sentence)
        elif rng.random() < 0.15:
            fact = facts.draw(rng)
            self._ask(rng, talk, fact, fact.denial)
        else:
            known.append(facts.draw(rng))
            said = rng.choice(("Remember this: ", "Remember: ", "")) + known[-1].sentence
            self._turn(talk, self._encode(said), self._encode(REMEMBERED))

    def _introduction(self, rng: Random, talk: Conversation) -> None:
        """The user gives a name, and may ask for it at once."""
        name = rng.choice((*words.FIRST_NAMES, words.invented_word(rng).capitalize()))
        self._turn(
            talk,
            self._encode(f"{rng.choice(('My name is', 'I am'))} {name}."),
            self._encode(f"Nice to meet you, {name}!"),
        )
        if rng.random() < 0.6:
            self._turn(talk, self._encode("What is my name?"), self._encode(f"Your name is {name}."))

    def _call_ids(self, message: AssistantMessage) -> list[int]:
        control, ids = self._control, [self._control[m.CALLS_BEGIN]]
        for call in message.tool_calls:
            head = [control[m.CALL_BEGIN], *self._encode("function"), control[m.SEP]]
            ids += [*head, *self._spell_values(f"{call.name}\n```json\n{call.arguments}\n```"), control[m.CALL_END]]
        return [*ids, control[m.CALLS_END]]

    def _spell_values(self, text: str) -> list[int]:
        ids, done = list[int](), 0
        for value in JSON_VALUE.finditer(text):
            ids += self._encode(text[done : value.start()]) + self._spell(value.group())
            done = value.end()
        return ids + self._encode(text[done:])

    def _spell(self, text: str) -> list[int]:
        return [token_id for letter in text for token_id in self._encode(letter)]

    def _sentences(self, rng: Random, num_tokens: int) -> list[Piece]:
        """Filler of at least one sentence; in every fifth text sentences of the Python manual stand among it."""
        share = rng.choice((0.3, 1.0)) if rng.random() < 0.2 and self._manual else 0.0
        chosen, total = [rng.choice(self._plain)], 0
        while total < num_tokens:
            chosen.append(rng.choice(self._manual if share and rng.random() < share else self._plain))
            total += len(chosen[-1].ids) + 1
        return chosen

    def _depth(self, rng: Random, count: int) -> int:
        return rng.choice(
            (0, count, rng.randint(0, count), rng.randint(0, count), rng.randint(0, count), rng.randint(0, count))
        )

    def _piece(self, sentence: str) -> Piece:
        text = sentence.removesuffix(".")
        return Piece(text, self._tokenizer.encode_text(" " + text))

    def _encode(self, text: str) -> list[int]:
        if (ids := self._encoded.get(text)) is None:
            if len(self._encoded) > 100_000:
                self._encoded.clear()
            ids = self._encoded[text] = self._tokenizer.encode_text(text)
        return ids


SHORT: tuple[tuple[float, Callable[[Random], Question]], ...] = (
    (0.30, questions.addition),
    (0.14, questions.repeat),
    (0.34, questions.reverse),
    (0.12, questions.greeting),
    (0.06, questions.unknown),
    (0.04, tools.no_tool),
)


def draw_short(rng: Random) -> Question:
    """A short question of any kind that training may see."""
    draw = rng.choices([draw for _, draw in SHORT], [share for share, _ in SHORT])[0]
    if draw is questions.addition:
        return _unheld(lambda: _sum(rng))
    if draw in (questions.repeat, questions.reverse):
        return _unheld(
            lambda: (questions.repeat if draw is questions.repeat else questions.reverse)(rng, _training_word(rng))
        )
    return draw(rng)


def _unheld(draw: Callable[[], Question]) -> Question:
    while questions.held_out(question := draw()):
        pass
    return question


def _sum(rng: Random) -> Question:
    return (
        questions.addition(rng)
        if rng.random() < 0.9
        else questions.addition(rng, a=rng.randrange(100), b=rng.randrange(100))
    )


def _training_word(rng: Random) -> str:
    """Also plain letter strings, so that every token's spelling is learned."""
    if rng.random() < 0.15:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7)))
    return questions.draw_word(rng)


def manual_sentences() -> list[str]:
    """Sentences of Python's own manual as `pydoc` ships it (they differ a little between Python versions)."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    found = re.findall(r"(?<=\. )[A-Z][A-Za-z ,'\-()0-9]{30,160}\.(?= [A-Z])", text)
    return sorted(set(found))
