"""A gold reward, and people who judge by it with noise and habits, all of it known.

    pair = pairs("instructions", n=1, annotator=Annotator(length=0.5))[0]
    pair["chosen"], pair["rejected"]      # responses, as the annotator has it
    pair["gold"]                          # (reward of chosen, reward of rejected): what is true

The gold reward of a response is the share of the prompt's conditions that it keeps (``instructions``) or the verifier's
0 or 1 (all other families). Lists under conditions give graded pairs; the padding of some candidates says nothing and
costs nothing, so an annotator who likes length is wrong about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from luthier.errors import LuthierError
from luthier.practice.contract import said
from luthier.practice.draw import Draw
from luthier.practice.families import instructions
from luthier.practice.families.classify import GUILDS, HOUSES
from luthier.practice.world import Record, records, verify

PADDING = ("Here you are:", "With pleasure, as you wish:", "I have thought about it, and this is what came to me:")
"""What a candidate may begin with; the gold reward does not see it."""


def plain(response: str) -> str:
    """The response without its padding."""
    for words in PADDING:
        response = response.removeprefix(f"{words} ")
    return response


def gold(record: Record, response: str) -> float:
    """The true reward of a response, from 0 to 1."""
    text = plain(response)
    if record["family"] == "instructions":
        kept = instructions.kept(said(record), text)
        return sum(kept.values()) / len(kept)
    return verify(record, text).reward


@dataclass(frozen=True)
class Annotator:
    """One who prefers a to b with probability sigmoid(sharp · (gold a - gold b) + position + length · (words a - words
    b) / 10), and with probability ``lapse`` says either, evenly. ``position`` is a leaning to the first shown,
    ``length`` one to the longer. This is Bradley and Terry's model (1952) with habits added."""

    sharp: float = 8.0
    position: float = 0.0
    length: float = 0.0
    lapse: float = 0.0
    name: str = "annotator"

    def probability(self, record: Record, first: str, second: str) -> float:
        """That the first shown is preferred."""
        margin = self.sharp * (gold(record, first) - gold(record, second)) + self.position
        margin += self.length * (len(first.split()) - len(second.split())) / 10
        sure = 1 / (1 + math.exp(-max(-60.0, min(60.0, margin))))
        return round((1 - self.lapse) * sure + self.lapse / 2, 12)  # the same draw on machines whose exp differs

    def prefers_first(self, record: Record, first: str, second: str, seed: int = 0) -> bool:
        """What this one says; the same to the same question every time."""
        draw = Draw(f"luthier/annotator/{self.name}/{seed}/{record['id']}/{first}/{second}")
        return draw.real() < self.probability(record, first, second)


def candidates(record: Record, k: int, seed: int = 0) -> list[str]:
    """k responses of graded gold reward, some of them padded. In ``instructions`` each is made from a right list by
    breaking none to all of its conditions; elsewhere one is right and the others belong to other records."""
    draw = Draw(f"luthier/candidates/{seed}/{record['id']}")
    right = record["messages"][-1]["content"]
    if record["family"] == "instructions":
        made = [_spoilt(draw, said(record), right, i) for i in range(k)]
    else:
        pool = [r["messages"][-1]["content"] for r in records(record["family"], "train", 8 * k, seed=seed + 7)]
        made = [right, *draw.some([p for p in pool if p != right], k - 1)]
    return [f"{draw.pick(PADDING)} {text}" if draw.below(2) else text for text in draw.some(made, k)]


def _spoilt(draw: Draw, prompt: str, right: str, times: int) -> str:
    want, text = instructions.read(prompt), right
    ways = [
        lambda t: t.removesuffix(want.end).strip(),
        lambda t: t.lower() if t != t.lower() else t.upper(),
        lambda t: t.replace(instructions.JOINED[want.joined].strip(), "+"),
        lambda t: " ".join(reversed(t.split())),
        lambda t: f"stone {t}",
    ]
    for way in draw.some(ways, min(times, len(ways))):
        text = way(text)
    return text


def pairs(
    family: str, n: int, annotator: Annotator, split: str = "train", seed: int = 0, per: int = 4
) -> list[dict[str, Any]]:
    """n preference records {prompt, chosen, rejected, gold, probability, annotator, first}, one for each of n records:
    two different candidates of ``per``, shown in drawn order, judged by the annotator. ``gold`` holds the true rewards of
    chosen and rejected, ``probability`` that of the annotator's choice, ``first`` whether the chosen was shown first.
    Raises LuthierError for fewer than two candidates."""
    if per < 2:
        raise LuthierError(f"preference pairs: {per} candidates make no pair; choose 2 or more")
    out = []
    for record in records(family, split, n, seed):
        one, two = Draw(f"luthier/pairs/{seed}/{record['id']}").some(candidates(record, per, seed), 2)
        first = annotator.prefers_first(record, one, two, seed)
        share = annotator.probability(record, one, two)
        chosen, rejected = (one, two) if first else (two, one)
        told = {"prompt": record["messages"][:-1], "chosen": [_turn(chosen)], "rejected": [_turn(rejected)]}
        known = {"gold": [gold(record, chosen), gold(record, rejected)], "probability": share if first else 1 - share}
        out.append({**told, **known, "annotator": annotator.name, "first": first, "id": record["id"], "record": record})
    return out


def _turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@dataclass(frozen=True)
class Clerk:
    """One who labels records of ``classify``: right with probability ``skill``; when wrong, it is the sister guild with
    probability ``near``, else any other. ``against`` takes this much from the skill for notes from the ``hills``."""

    skill: float
    near: float = 0.6
    against: float = 0.0
    name: str = "clerk"

    def says(self, record: Record, seed: int = 0) -> str:
        """The label this one gives; the same to the same record every time."""
        draw = Draw(f"luthier/clerk/{self.name}/{seed}/{record['id']}")
        answer = record["answer"]
        hills = said(record).startswith("A note from the hills")
        if draw.real() < self.skill - (self.against if hills else 0.0):
            return answer
        if answer in HOUSES:
            return draw.pick([h for h in HOUSES if h != answer])
        sister = next(g for g, house in GUILDS.items() if house == GUILDS[answer] and g != answer)
        others = [g for g in GUILDS if g not in (answer, sister)]
        return sister if draw.real() < self.near else draw.pick(others)


CLERKS = (
    Clerk(0.95, name="anna"),
    Clerk(0.9, name="boris"),
    Clerk(0.8, name="celia"),
    Clerk(0.7, against=0.3, name="dov"),
    Clerk(0.5, near=0.2, name="emil"),
)
"""Five with known skill; one of them is unfair to the hills."""
