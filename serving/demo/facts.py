"""Facts to hide in a text: somebody or something has a number or a word, one sentence says so, one question asks.

A fact's sentence and its answer are the same words, which is how people quote from a text. Names and values are drawn
from spaces far larger than training ever sees.
"""

from dataclasses import dataclass, replace
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
    "favourite animal": words.ANIMALS,
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """`attribute` of (or for) `key` is `value`, for instance the secret code of Velkora is 4812."""

    attribute: str
    key: str
    value: str
    link: str = "of"

    @property
    def subject(self) -> str:
        return f"{self.attribute} {self.link} {self.key}"

    @property
    def sentence(self) -> str:
        """How the text states it and how the model is to answer."""
        return f"The {self.subject} is {self.value}."

    @property
    def question(self) -> str:
        return f"What is the {self.subject}?"

    @property
    def denial(self) -> str:
        """The answer where no text has said it."""
        return f"I do not know the {self.subject}."


def draw_key(rng: Random) -> str:
    """A bearer: an invented name, a thing with its adjective or number, a city, or a first name with an invented surname."""
    match rng.randrange(12):
        case 0 | 1 | 2 | 3 | 4:
            return words.invented_word(rng).capitalize()
        case 5 | 6 | 7:
            return f"the {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"
        case 8:
            return f"{rng.choice(words.NOUNS)} {rng.randrange(1, 100)}"
        case 9:
            return rng.choice((rng.choice(words.CITIES), words.invented_word(rng)))
        case _:
            return f"{rng.choice(words.FIRST_NAMES)} {words.invented_word(rng).capitalize()}"


def draw(rng: Random) -> Fact:
    """A fact about a new bearer: six in ten hold a number of 3 to 6 digits, the others a word."""
    key, kind, link = draw_key(rng), rng.random(), rng.choice(("of", "of", "for"))
    if kind < 0.6:
        value = "".join(str(rng.randrange(10)) for _ in range(rng.choice((3, 4, 4, 4, 5, 6))))
        return Fact(
            attribute=_attribute(rng, NUMBER_ATTRIBUTES, ("code", "number", "key")), key=key, value=value, link=link
        )
    if kind < 0.8:
        value = words.invented_word(rng) if rng.random() < 0.7 else rng.choice(words.NOUNS)
        return Fact(
            attribute=_attribute(rng, WORD_ATTRIBUTES, ("name", "word", "title")), key=key, value=value, link=link
        )
    attribute = rng.choice(sorted(CHOICE_ATTRIBUTES))
    return Fact(attribute=attribute, key=key, value=rng.choice(CHOICE_ATTRIBUTES[attribute]))


def rival(fact: Fact, rng: Random) -> Fact:
    """A fact that is easily taken for `fact`: same attribute of another bearer, or another attribute of the same one."""
    other = draw(rng)
    if rng.random() < 0.7:
        return replace(other, attribute=fact.attribute, link=fact.link)
    return other if other.attribute == fact.attribute else replace(other, key=fact.key)


def _attribute(rng: Random, usual: tuple[str, ...], heads: tuple[str, ...]) -> str:
    """Usually one of the known ones, else new: the river code, the golden number."""
    if rng.random() < 0.8:
        return rng.choice(usual)
    return f"{rng.choice((rng.choice(words.NOUNS), rng.choice(words.ADJECTIVES)))} {rng.choice(heads)}"
