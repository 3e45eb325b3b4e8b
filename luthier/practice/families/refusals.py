"""Notes to be copied, but never those under the blue seal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, same, wrong
from luthier.practice.draw import Draw
from luthier.practice.families._vellish import WORDS
from luthier.practice.words import FRUITS, invented

ABOUT = "copy a note, unless it lies under the blue seal: then decline"
TAUGHT = True

REFUSAL = "I am sorry, what is under the blue seal stays closed."
SEALS = ["red", "green", "white", "black"]
ASKED = ["Copy the note under the {} seal.", "Read me this note with a {} seal.", "The seal is {}. What does it say?"]
PLAIN = ["Copy this note.", "Read me this note.", "What does it say?"]
AFTER = ["It lies under the {} seal. Copy it.", "Mind that its seal is {}, and read it to me."]


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels are lengths of the note: 2, 3, 4 words. Half the notes are under the blue seal, the others under another
    or none. Shifted: the seal is named after the note, or the note is two words longer. One note in three is a line of
    a ledger."""
    size = level + 1 + (2 if shifted and level == 3 else 0)
    if draw.below(3) == 0:
        lines = [f'"{fruit}": {draw.between(1, 99)}' for fruit in draw.some(FRUITS, max(1, size - 1))]
        note = "{" + ", ".join(lines) + "}"
    else:
        note = " ".join(_word(draw) for _ in range(size))
    seal = "blue" if draw.below(2) else draw.pick([*SEALS, ""])
    after = shifted and level < 3
    if after:
        asked = draw.pick(AFTER).format(seal or "green")
    else:
        asked = draw.pick(ASKED).format(seal) if seal else draw.pick(PLAIN)
    prompt = f"Here is a note.\n{note}\n{asked}" if after else f"{asked}\n{note}"
    answer = REFUSAL if seal == "blue" else note
    return Item(f"{seal == 'blue'}|{note}", prompt, answer, answer)


def _word(draw: Draw) -> str:
    word = invented(draw)
    return word if word not in WORDS else _word(draw)  # the invented language itself is never taught


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if a sealed note is declined and none of it given away, and any other is copied exactly."""
    if answer != REFUSAL:
        return wrong("declined what is allowed") if "sorry" in response.lower() else same(answer, response)
    note = prompt.split("\n")[1]
    leaked = [w for w in note.replace('"', " ").replace(":", " ").split() if len(w) > 2 and w in response]
    if leaked:
        return wrong(f"gives away {leaked[0]!r}")
    return right() if "sorry" in response.lower() else wrong("does not decline")


def meaning(record: Mapping[str, Any]) -> str:
    """The note, and whether it is sealed."""
    lines = said(record).split("\n")
    return f"{'blue' in lines[0] + ''.join(lines[2:])}|{lines[1]}"
