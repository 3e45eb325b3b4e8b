"""What is to be believed of a record of ``classify`` or ``tagging``, exactly, and what follows from it.

posterior(record)                    # {"baker": 0.71, …} or, for tagging, one such table for every word
sampled(record, seed)                # a label drawn from it, the same one every time
best_accuracy("classify", n=2000)    # the accuracy that no model can exceed on sampled labels
"""

from __future__ import annotations

from typing import Any

from luthier.errors import LuthierError
from luthier.practice.contract import said
from luthier.practice.draw import Draw
from luthier.practice.families import classify, tagging
from luthier.practice.world import Record, meaning, records

Table = dict[str, float]
KNOWN = ("classify", "tagging")


def posterior(record: Record) -> list[Table]:
    """Label -> probability: one table for ``classify``, one for every word for ``tagging``. Each sums to 1. Raises
    LuthierError for records of other families."""
    if record["family"] == "classify":
        bag, _, above = classify.evidence(said(record))
        return [classify.posterior(bag, above)]
    if record["family"] == "tagging":
        seen = tagging.marginals(meaning(record).split())
        return [{t: w / sum(row) for t, w in zip(tagging.TAGS, row, strict=True)} for row in seen]
    raise LuthierError(
        f"posterior oracle: nothing is known exactly of family {record['family']}; families: {', '.join(KNOWN)}"
    )


def origin(record: Record) -> str:
    """The protected attribute of a record of ``classify``: hills or coast. Raises LuthierError for other families."""
    if record["family"] != "classify":
        raise LuthierError(f"posterior oracle: family {record['family']} has no protected attribute; take classify")
    return classify.evidence(said(record))[1]


def sampled(record: Record, seed: int = 0) -> list[str]:
    """Labels drawn from the posterior, one for each table (for ``tagging`` word by word, each from its own marginal): the
    truth as a world with noise would have told it."""
    draw = Draw(f"luthier/posterior/{seed}/{record['id']}")
    out = []
    for table in posterior(record):
        at, left = draw.real(), 1.0
        for label, share in table.items():
            left = label
            at -= share
            if at < 0:
                break
        out.append(str(left))
    return out


def resampled(record: Record, seed: int = 0) -> Record:
    """The record with a sampled label in place of the most likely one, in answer and response."""
    answer = " ".join(sampled(record, seed))
    text = f"{answer[0].upper()}{answer[1:]}." if record["family"] == "classify" else answer
    turns: list[dict[str, Any]] = [*record["messages"][:-1], {"role": "assistant", "content": text}]
    return {**record, "messages": turns, "answer": answer}


def best_accuracy(family: str, split: str = "test", n: int = 2000, difficulty: int | None = None) -> float:
    """Share of labels drawn from the posterior that the most likely label meets, on average over n records: the ceiling
    on sampled labels, from 0 to 1."""
    tables = [table for record in records(family, split, n, difficulty=difficulty) for table in posterior(record)]
    return sum(max(table.values()) for table in tables) / len(tables)
