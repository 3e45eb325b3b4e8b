"""A small pair, tuned and untuned, steers a large base that knows more: its form of answering, and the large one's knowledge."""

from __future__ import annotations

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.lab import Lab, Model
from luthier.practice.world import Record, taught, verify

ABOUT = "a small tuned pair steers a larger base: the form that was tuned, with what the large one knows"
PAPERS = ("P160", "P267", "P463")
BASE, LARGE = "practice/s", "practice"
ARMS = {"large": (), "pair": (3e-4, 1e-3, 3e-3)}
CHOSEN_BY = "right"
CLAIMS = (
    Claim("the large base knows more than the tuned small one", "pair:known", "large:known", effect=0.05),
    Claim("steered, it is right in the tuned form", "large:right", "pair:steered_right", effect=0.3),
    Claim("and more often so than the tuned small one", "pair:right", "pair:steered_right", effect=0.05),
    Claim("it knows what it knew", "large:known", "pair:steered_known", effect=0.05, sign=0),
    Claim("a strength chosen at every token does better", "pair:steered_right", "pair:dynamic_right", effect=0.03),
)
ASKED, STEPS, RECORDS, ITEMS = ("lists", "tracking"), 150, 400, 100
CLOSING = " That is all I know."


def measures(lab: Lab, cell: Cell) -> Scores:
    """known: the verifier passes what is said, without its closing words. right: and it closes as it should. The pair is
    tuned on the easiest records of all taught families, and scored on harder ones of those that a small base knows less
    well; its rate is chosen by the small tuned model alone. Fusions: proxy at strength 1, and dynamic-fusion."""
    from luthier.verbs.assemble import assemble

    asked = [r for family in ASKED for level in (2, 3) for r in lab.items(family, ITEMS, difficulty=level)]
    if cell.arm == "large":
        with lab.untouched(LARGE) as model:
            return _scores(model, asked)
    told = [closed(r) for family in taught() for r in lab.told(family, RECORDS, difficulty=1)]
    with lab.tuned(told, delta={"choice": "full"}, steps=STEPS) as model:
        expert, scores = model.saved(lab.scratch / "expert"), _scores(model, asked)
    for name, method in (("steered", "proxy"), ("dynamic", "dynamic-fusion")):
        made = assemble({"large": LARGE, "expert": expert, "method": method})
        got = _scores(Model(made.model, made.base.tokenizer), asked)
        scores |= {f"{name}_{measure}": values for measure, values in got.items()}
    return scores


def closed(record: Record) -> Record:
    """The record with its response in the form that is tuned."""
    *before, last = record["messages"]
    return {**record, "messages": [*before, {**last, "content": last["content"] + CLOSING}]}


def _scores(model: Model, asked: list[Record]) -> Scores:
    said = model.says(asked)
    known = [verify(r, s.removesuffix(CLOSING)).reward for r, s in zip(asked, said, strict=True)]
    return {"known": known, "right": [k * s.endswith(CLOSING) for k, s in zip(known, said, strict=True)]}
