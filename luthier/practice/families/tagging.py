"""Marking every word of a sentence of an invented grammar: a hidden Markov model whose posterior is known exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.families._vellish import WORDS as VELLISH
from luthier.practice.words import invented

ABOUT = "a mark for every word of a sentence, each word being of two kinds or three: the exact posterior is known"
TAUGHT = False

TAGS = ("thing", "deed", "kind", "link")
FOLLOWS = ((1, 6, 1, 8), (7, 1, 5, 3), (12, 2, 1, 1), (6, 1, 8, 1))
"""How often, of 16 times, a word of each kind is followed by one of each kind."""
LENGTHS = {1: 3, 2: 5, 3: 7}
ASKED = ["Mark each word: {}", "What is each word in {}"]
SHIFTED = "Give the kinds, in order: {}"


def _lexicon() -> dict[str, tuple[int, ...]]:
    """24 words and how often, of every 42, each is drawn for each kind; a word is mostly of one kind."""
    draw = Draw("luthier/tagging")
    found: list[str] = []
    while len(found) < 24:
        word = invented(draw)
        if word not in found and word not in VELLISH:
            found.append(word)
    spread = ((5, 1, 1, 0), (1, 5, 0, 1), (1, 0, 5, 1), (0, 1, 1, 5))
    return {word: spread[i % 4] for i, word in enumerate(found)}


EMITS = _lexicon()
EACH = 42
_FROM = [[word for word, counts in EMITS.items() for _ in range(counts[t])] for t in range(4)]
_NEXT = [[t for t in range(4) for _ in range(row[t])] for row in FOLLOWS]


def marginals(sentence: Sequence[str]) -> list[list[int]]:
    """For every word, what the sentence says for each of ``TAGS``, up to a common factor, in whole numbers: forwards
    and backwards through the chain, which starts with every kind equally likely."""
    ahead: list[list[int]] = []
    for word in sentence:
        reach = [sum(a * FOLLOWS[s][t] for s, a in enumerate(ahead[-1])) for t in range(4)] if ahead else [1] * 4
        ahead.append([e * r for e, r in zip(EMITS[word], reach, strict=True)])
    back, out = [1] * 4, []
    for i in range(len(sentence) - 1, -1, -1):
        out.append([a * b for a, b in zip(ahead[i], back, strict=True)])
        seen = [e * b for e, b in zip(EMITS[sentence[i]], back, strict=True)]
        back = [sum(FOLLOWS[t][s] * seen[s] for s in range(4)) for t in range(4)]
    return out[::-1]


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: 3, 5, 7 words. Shifted: reworded, and three words longer."""
    while True:
        tag, sentence = draw.below(4), []
        for _ in range(LENGTHS[level] + (3 if shifted else 0)):
            sentence.append(_FROM[tag][draw.below(EACH)])
            tag = _NEXT[tag][draw.below(16)]
        seen = marginals(sentence)
        if all(row.count(max(row)) == 1 for row in seen):
            break
    answer = " ".join(TAGS[row.index(max(row))] for row in seen)
    told = " ".join(sentence)
    return Item(told, (SHIFTED if shifted else draw.pick(ASKED)).format(told), answer, answer)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if every word has its most likely mark; the reason counts those that have."""
    got, want = words(response), answer.split()
    if got == want:
        return right()
    hits = sum(g == w for g, w in zip(got, want, strict=False))
    return wrong(f"{hits} of {len(want)} marks right, {len(got)} given")


def meaning(record: Mapping[str, Any]) -> str:
    """The sentence."""
    return " ".join(w for w in words(said(record)) if w in EMITS)
