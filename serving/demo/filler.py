"""Ordinary filler: endless plain sentences without meaning, drawn from a seed.

Each sentence ends with a full stop and holds nothing that a question asks for, so a text of any length can be made
around a fact. Knows nothing of tokens or questions.
"""

from random import Random

from serving.demo import words


def sentence(rng: Random) -> str:
    """One English sentence of 5 to 16 words, ending with a full stop."""
    noun, adjective, verb = (
        (lambda: rng.choice(words.NOUNS)),
        (lambda: rng.choice(words.ADJECTIVES)),
        (lambda: rng.choice(words.VERBS)),
    )
    name, place, adverb = rng.choice(words.FIRST_NAMES), rng.choice(words.PLACES), rng.choice(words.ADVERBS)
    match rng.randrange(12):
        case 0:
            return f"The {adjective()} {noun()} {verb()} the {noun()} {place} the {noun()}."
        case 1:
            return f"{name} {verb()} the {adjective()} {noun()} {adverb}."
        case 2:
            return f"In {rng.choice(words.CITIES)} the {noun()} was {adjective()} and the {noun()} was {adjective()}."
        case 3:
            return f"There were {rng.randrange(2, 1000)} {noun()}s {place} the {adjective()} {noun()}."
        case 4:
            return f"{name} said that the {noun()} {place} the {noun()} was {adjective()}."
        case 5:
            return f"A {adjective()} {noun()} {adverb} {verb()} a {noun()}."
        case 6:
            return f"When the {noun()} {verb()} the {noun()}, {name} was {adjective()}."
        case 7:
            return f"It was a {adjective()} {rng.choice(('morning', 'evening', 'day', 'night', 'winter', 'summer'))}, and the {noun()} was {adjective()}."
        case 8:
            return f"{name} and {rng.choice(words.FIRST_NAMES)} {verb()} {rng.randrange(2, 100)} {noun()}s in {rng.choice(words.CITIES)}."
        case 9:
            return f"Nobody {verb()} the {adjective()} {noun()} because the {noun()} was too {adjective()}."
        case 10:
            return f"The {noun()} of {rng.choice(words.CITIES)} is {adjective()}, {adjective()} and {adjective()}."
        case _:
            return f"Later that day the {noun()} {verb()} {rng.choice(('every', 'another', 'the last', 'the first'))} {noun()}."
