"""The small vocabulary that the families share."""

from __future__ import annotations

from luthier.practice.draw import Draw


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


FIRST = listed(
    "Ada Alva Bela Bram Cleo Dara Edda Elin Fenn Gita Hale Ines Iver Jora Kaia Kell Lark Lena Luca Mira "
    "Nell Nico Odil Oren Pell Petra Quin Rhea Rosa Sami Signe Tavi Tilda Ulla Vera Vito Wren Yara Yves Zora"
)
LAST = listed(
    "Alder Amsel Birch Bracken Calder Dunn Ember Fallow Finch Gale Hazel Heath Holm Iris Juniper Kestrel Linden "
    "Marsh Moss Norr Oakes Pike Quill Reed Rook Sorrel Tarn Thorne Vale Willow"
)
FRUITS = listed(
    "apple date fig grape kiwi lemon lime mango melon olive orange pear plum quince turnip onion carrot leek walnut nettle"
)
OBJECTS = listed(
    "key coin lantern ring letter button map spoon whistle feather candle bell ribbon compass shell mirror pebble thimble"
)
PLACES = listed("box trunk drawer basket jar chest barrel cupboard pocket bucket")
ANIMALS = listed("raven fox hare heron weasel badger crow mole goat cat hedgehog swan toad lamb")
TOWNS = listed(
    "Dunmere Ashford Brill Carrow Eastwick Fairlow Glenby Harrow Kirkby Lowmoor Millbay Northolt Oxley Penrith Rowan "
    "Stowe"
)
CRAFTS = listed(
    "baker carpenter cooper dyer farmer fisher glazier hatter joiner mason miller painter potter smith tailor weaver"
)
INSTRUMENTS = listed("fiddle flute harp horn lute lyre oboe organ piano pipe drum viol zither cello bassoon guitar")
NUMBERS = listed("zero one two three four five six seven eight nine ten eleven twelve")

SYLLABLES: list[str] = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "l", "n", "r", "s")]
"""Of which every invented word is made: those of the invented language and those in the notes to be copied."""


def invented(draw: Draw) -> str:
    """A word of two syllables that means nothing."""
    return SYLLABLES[draw.below(350)] + SYLLABLES[draw.below(350)]
