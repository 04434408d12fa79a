"""The words that the demo's texts, names and questions are made of.

Plain data and one rule for new names. Every text the embedded model was trained on is drawn from these lists (or from
the topics of `pydoc`), so that making it again needs no download. Knows nothing of tokens, chats or models.
"""

from random import Random


def _listed(text: str) -> list[str]:
    return text.split()


NOUNS = _listed(
    """
    river garden window market teacher sailor farmer doctor baker painter castle bridge forest mountain village
    harbour station kitchen library engine letter basket bottle carpet candle mirror blanket ladder hammer pencil
    button ticket wallet pocket jacket shoulder finger mother father sister brother uncle cousin neighbour stranger
    soldier captain king queen merchant lawyer student child dog cat horse sheep goat eagle sparrow falcon badger
    otter rabbit wolf bear lion tiger camel donkey spider turtle salmon lantern anchor barrel compass feather marble
    ribbon saddle thimble trumpet violin whistle orchard meadow valley island desert glacier canyon lagoon cottage
    tower temple tavern stable cellar attic corridor balcony fountain statue monument museum theatre school office
    factory workshop warehouse airport tunnel road path street corner field fence gate door wall roof floor table
    chair bed lamp clock piano book page story song poem picture photograph newspaper map coin ring crown sword
    shield arrow helmet cloak boot glove hat scarf apple pear plum cherry lemon orange melon grape peach carrot
    onion potato pepper cabbage bread butter cheese honey sugar salt soup coffee tea milk water stone sand iron
    copper silver gold glass paper cotton wool silk leather summer winter autumn spring morning evening midnight
    storm thunder snow rain wind cloud rainbow planet comet moon star shadow
    """
)

ADJECTIVES = _listed(
    """
    old young small large quiet loud bright dark cold warm heavy light narrow wide gentle brave clever lazy hungry
    tired happy angry famous strange simple broken wooden golden silver amber crimson scarlet purple green yellow
    white black grey dusty muddy frozen hidden distant ancient modern empty crowded hollow rusty shiny smooth rough
    sharp round square tall short deep shallow sweet bitter fresh stale soft solid proud humble polite careful
    careless silent patient curious friendly lonely nervous steady swift slow early late
    """
)

VERBS = _listed(
    """
    watched followed carried painted repaired visited remembered forgot admired ignored found lost bought sold
    borrowed returned opened closed cleaned moved lifted dropped pushed pulled touched measured described
    photographed guarded crossed entered left reached circled copied counted burned buried washed polished collected
    delivered praised noticed discovered inspected protected chased greeted helped invited
    """
)

ADVERBS = _listed(
    """
    slowly quickly quietly carefully often rarely always never suddenly finally gently proudly secretly twice again
    today yesterday later
    """
)

PLACES = _listed("near behind beside above below inside outside across from around beyond")

COLOURS = _listed("red blue green yellow purple orange white black brown pink grey silver golden crimson")

FRUITS = _listed("apple pear plum cherry lemon orange melon grape peach mango banana fig kiwi apricot")

ANIMALS = _listed("dog cat horse sheep goat eagle sparrow falcon badger otter rabbit wolf bear lion tiger camel")

CITIES = _listed(
    """
    Paris London Berlin Madrid Rome Vienna Oslo Dublin Lisbon Athens Prague Warsaw Tokyo Kyoto Seoul Beijing Delhi
    Mumbai Cairo Nairobi Lagos Sydney Auckland Toronto Boston Chicago Denver Austin Lima Bogota Quito Havana Geneva
    Zurich Munich Hamburg Milan Naples Porto Seville Helsinki
    """
)

FIRST_NAMES = _listed(
    """
    Anna Boris Clara David Elena Frank Greta Henry Irene James Karin Louis Maria Nadia Oscar Paula Quentin Rosa
    Simon Tessa Ulrich Vera Walter Yara Zoe Adam Bella Carl Diana Emil Fiona Gustav Hanna Ivan Julia Kevin Laura
    Martin Nora Otto
    """
)

WEATHERS = _listed("sunny cloudy rainy windy snowy foggy stormy clear")

ONSETS = _listed("b br c ch d dr f g gr h j k kl l m n p pr qu r s sh st t th tr v w y z")
NUCLEI = _listed("a e i o u ai ea ee io oa ou")
CODAS = ["", "", "", "l", "n", "r", "s", "m", "x", "nd", "rk", "th", "ll", "st"]

SPELLED = sorted({*NOUNS, *ADJECTIVES, *VERBS, *ADVERBS, *COLOURS, *FRUITS, *WEATHERS})
"""Every lower-case dictionary word above, once."""


def invented_word(rng: Random) -> str:
    """A pronounceable lower-case word of two or three syllables, of which there are tens of millions."""
    count = rng.choice((2, 2, 3))
    return "".join(rng.choice(ONSETS) + rng.choice(NUCLEI) for _ in range(count)) + rng.choice(CODAS)
