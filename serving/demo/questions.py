"""What the embedded model must be able to answer, and how an answer is judged.

Every question is drawn from a `Random`, holds an OpenAI-like conversation, the reply it was trained towards and a check
of any reply. The same generators serve training, the offline evaluation and tests over HTTP, so nothing here needs
torch, a tokenizer or a server. `held_out` words and sums are never trained on.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from zlib import crc32

from serving.demo import facts, filler, words
from serving.text.messages import AssistantMessage, Message, ToolCall, ToolSpec, UserMessage

HEADS = (
    "",
    "",
    "Read this text.\n\n",
    "Here is a text:\n\n",
    "Text: ",
    "Read the following text and answer the question.\n\n",
)
JOINTS = ("\n\n", "\n\n", " ", "\n", "\n\nQuestion: ", "\n\nNow tell me: ")
WAYS = (
    "What is the {subject}?",
    "What is the {subject}?",
    "What is the {subject}?",
    "Tell me the {subject}.",
    "Do you know the {subject}?",
)
ADDITIONS = (
    "What is {a} + {b}?", "What is {a} + {b}?", "What is {a} + {b}?", "{a} + {b} = ?", "How much is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b}",
    "What's {a} + {b}?", "What is {a}+{b}?", "{a}+{b}", "{a}+{b}=", "what is {a} plus {b}", "Calculate {a} + {b}.", "What is the sum of {a} and {b}?",
)  # fmt: skip
REPEATS = (
    "Repeat the word {word}.",
    "Repeat the word {word}.",
    "Say the word {word}.",
    "Please repeat: {word}",
    'Repeat the word "{word}".',
    "Say {word}.",
)
REVERSES = (
    "Reverse the word {word}.", "Reverse the word {word}.", "Write the word {word} backwards.", "Spell {word} backwards.", 'Reverse the word "{word}".',
    "Reverse {word}.", "What is {word} backwards?", "reverse {word}",
)  # fmt: skip
KNOWN_WORDS = frozenset((*words.SPELLED, *words.CITIES, *words.FIRST_NAMES))
GREETINGS = (
    "Hello",
    "Hi",
    "Hey",
    "Hello there",
    "Hi there",
    "Good morning",
    "Good evening",
    "Good afternoon",
    "Greetings",
    "Good day",
)
SMALL_TALK = {
    "Who are you": "I am the demo model of Baton, a very small language model.",
    "What is your name": "I am the demo model of Baton, a very small language model.",
    "How are you": "I am well, thank you. How can I help you?",
    "Thank you": "You are welcome!",
    "Thanks": "You are welcome!",
    "Goodbye": "Goodbye!",
    "Bye": "Goodbye!",
}
ABILITIES = "I can find a fact in a text, add two numbers, repeat or reverse a word, and call a tool."
HELP_QUESTIONS = ("What can you do", "Help", "How can you help me", "What are you able to do")
UNKNOWN = "I am too small to know that. " + ABILITIES
UNKNOWN_QUESTIONS = (
    "Why is the {noun} {adjective}?", "Who made the {noun}?", "Tell me a story about a {noun}.", "What is the capital of {city}?",
    "Write a poem about the {noun}.", "How old is the {noun} of {city}?", "Explain what a {noun} is.", "Is the {noun} {adjective}?",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Question:
    """One conversation that waits for the model. `needed` must stand in the reply as a whole word, where it is a text."""

    kind: str
    messages: tuple[Message, ...]
    reply: AssistantMessage
    needed: str = ""
    tools: tuple[ToolSpec, ...] = ()
    spelled: bool = False
    """The reply was trained letter by letter."""

    def accepts(self, content: str, calls: Sequence[ToolCall] = ()) -> bool:
        """Whether a reply with this text and these tool calls is right."""
        if self.reply.tool_calls:
            return [_call_key(call) for call in calls] == [_call_key(call) for call in self.reply.tool_calls]
        return not calls and re.search(rf"(?<!\w){re.escape(self.needed)}(?!\w)", content) is not None

    def openai_messages(self) -> list[dict[str, object]]:
        """The conversation as the body of a chat completion request has it."""
        return [_openai_message(message) for message in self.messages]

    def openai_tools(self) -> list[dict[str, object]]:
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": json.loads(tool.parameters),
                },
            }
            for tool in self.tools
        ]


def held_out(question: Question) -> bool:
    """Whether a sum or spelling question is kept from training: every eighth sum and every eighth invented word is, by its
    text alone. Dictionary words are not: many are a single token, whose letters nothing else would teach."""
    said = question.reply.content
    text = said[::-1] if question.kind == "reverse" else said
    return crc32(text.encode()) % 8 == 0 and text not in KNOWN_WORDS


def ask(kind: str, text: str, answer: str, needed: str | None = None, *, spelled: bool = False) -> Question:
    """A single user message and its answer; `needed` None asks for the whole answer."""
    reply = AssistantMessage(answer)
    return Question(
        kind=kind,
        messages=(UserMessage(text),),
        reply=reply,
        needed=answer if needed is None else needed,
        spelled=spelled,
    )


def needle(rng: Random, num_tokens: int, depth: float, count_tokens: Callable[[str], int]) -> Question:
    """A fact in a text of at least `num_tokens` tokens (less than one sentence more), `depth` (0 to 1) of the way down."""
    fact = facts.draw(rng)
    sentences, total = [], count_tokens(fact.sentence)
    while total < num_tokens:
        sentences.append(filler.sentence(rng))
        total += count_tokens(" " + sentences[-1])
    sentences.insert(round(depth * len(sentences)), fact.sentence[0].upper() + fact.sentence[1:])
    text = rng.choice(HEADS) + " ".join(sentences) + rng.choice(JOINTS) + wording(rng, fact)
    return ask("needle", text, fact.sentence, fact.value)


def wording(rng: Random, fact: facts.Fact) -> str:
    """A way to ask for `fact`; three times in five the plain one."""
    return rng.choice(WAYS).format(subject=fact.subject)


def addition(rng: Random, *, a: int | None = None, b: int | None = None) -> Question:
    """A sum of two two-digit numbers, in the words of the issue unless drawn otherwise."""
    a, b = rng.randrange(10, 100) if a is None else a, rng.randrange(10, 100) if b is None else b
    return ask("addition", rng.choice(ADDITIONS).format(a=a, b=b), f"{a} + {b} = {a + b}.", str(a + b))


def draw_word(rng: Random) -> str:
    """A word: half of the time from the dictionary, else invented; one in ten is a name."""
    pick = rng.random()
    if pick < 0.1:
        return rng.choice(
            (rng.choice(words.CITIES), rng.choice(words.FIRST_NAMES), words.invented_word(rng).capitalize())
        )
    return rng.choice(words.SPELLED) if pick < 0.5 else words.invented_word(rng)


def repeat(rng: Random, word: str | None = None) -> Question:
    word = draw_word(rng) if word is None else word
    return ask("repeat", rng.choice(REPEATS).format(word=word), word, spelled=True)


def reverse(rng: Random, word: str | None = None) -> Question:
    word = draw_word(rng) if word is None else word
    return ask("reverse", rng.choice(REVERSES).format(word=word), word[::-1], spelled=True)


def greeting(rng: Random) -> Question:
    """Greetings, thanks, who are you, what can you do."""
    pick, mark = rng.random(), rng.choice(("", "!", "."))
    if pick < 0.6:
        said = rng.choice(GREETINGS)
        text = said if rng.random() < 0.7 else said.lower()
        return ask("greeting", text + mark, f"{said}! How can I help you?", "help")
    if pick < 0.85:
        said = rng.choice(sorted(SMALL_TALK))
        text = said + (rng.choice(("?", "?", "")) if said.startswith(("Who", "What", "How")) else mark)
        return ask("greeting", text, SMALL_TALK[said])
    return ask("greeting", rng.choice(HELP_QUESTIONS) + rng.choice(("?", "?", "")), ABILITIES)


def unknown(rng: Random) -> Question:
    """Something beyond the model, which it is to say."""
    parts = {
        "noun": rng.choice(words.NOUNS),
        "adjective": rng.choice(words.ADJECTIVES),
        "city": rng.choice(words.CITIES),
    }
    return ask("unknown", rng.choice(UNKNOWN_QUESTIONS).format(**parts), UNKNOWN, "too small")


def _call_key(call: ToolCall) -> tuple[str, object]:
    try:
        return call.name, json.loads(call.arguments)
    except ValueError:
        return call.name, None


def _openai_message(message: Message) -> dict[str, object]:
    """`tool_call_id` pairs a tool's output with its call, as the API demands."""
    match message:
        case AssistantMessage(tool_calls=calls) if calls:
            listed = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
            return {"role": "assistant", "content": message.content or None, "tool_calls": listed}
        case _:
            body: dict[str, object] = {"role": message.__struct_config__.tag, "content": message.content}
            return body | ({"tool_call_id": call_id} if (call_id := getattr(message, "tool_call_id", "")) else {})
