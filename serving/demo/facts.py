"""Facts to hide in a text: somebody or something has a number or a word, one sentence says so, one question asks.

A fact's sentence and its answer are the same words, which is how people quote from a text. Names and values are drawn
from spaces far larger than training ever sees.
"""

from dataclasses import dataclass
from random import Random

from serving.demo import words

NUMBER_ATTRIBUTES = (
    "secret code", "access code", "lucky number", "locker number", "room number", "ticket number", "badge number", "phone number", "house number",
    "magic number", "door code", "serial number", "order number", "box number", "seat number",
)  # fmt: skip
WORD_ATTRIBUTES = ("password", "secret word", "code name", "code word", "nickname", "middle name")
CHOICE_ATTRIBUTES = {
    "favourite colour": words.COLOURS,
    "favourite fruit": words.FRUITS,
    "home town": words.CITIES,
    "best friend": words.FIRST_NAMES,
    "favourite animal": "dog cat horse sheep goat eagle sparrow falcon badger otter rabbit wolf bear lion tiger camel".split(),
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """`attribute` of `key` is `value`, for instance the secret code of Velkora is 4812."""

    attribute: str
    key: str
    value: str

    @property
    def sentence(self) -> str:
        """How the text states it and how the model is to answer."""
        return f"The {self.attribute} of {self.key} is {self.value}."

    @property
    def question(self) -> str:
        return f"What is the {self.attribute} of {self.key}?"


def draw_key(rng: Random) -> str:
    """A bearer: an invented name, a thing with its adjective, or a first name with an invented surname."""
    match rng.randrange(4):
        case 0 | 1:
            return words.invented_word(rng).capitalize()
        case 2:
            return f"the {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"
        case _:
            return f"{rng.choice(words.FIRST_NAMES)} {words.invented_word(rng).capitalize()}"


def draw(rng: Random) -> Fact:
    """A fact about a new bearer: six in ten hold a number of 3 to 6 digits, the others a word."""
    key, kind = draw_key(rng), rng.random()
    if kind < 0.6:
        digits = rng.choice((3, 4, 4, 4, 5, 6))
        return Fact(attribute=rng.choice(NUMBER_ATTRIBUTES), key=key, value="".join(str(rng.randrange(10)) for _ in range(digits)))
    if kind < 0.8:
        return Fact(attribute=rng.choice(WORD_ATTRIBUTES), key=key, value=words.invented_word(rng))
    attribute = rng.choice(sorted(CHOICE_ATTRIBUTES))
    return Fact(attribute=attribute, key=key, value=rng.choice(CHOICE_ATTRIBUTES[attribute]))


def rival(fact: Fact, rng: Random) -> Fact:
    """A fact that is easily taken for `fact`: same attribute of another bearer, or another attribute of the same one."""
    other = draw(rng)
    if rng.random() < 0.7:
        return Fact(attribute=fact.attribute, key=other.key, value=other.value)
    return other if other.attribute == fact.attribute else Fact(attribute=other.attribute, key=fact.key, value=other.value)
