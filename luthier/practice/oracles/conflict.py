"""Two tasks that agree on some prompts and disagree on others, with both answers known: for task vectors and merges.

c = conflict("customs_east", "customs_west", n=200)
c.agree, c.disagree           # [(record of the one, record of the other)], one prompt each
c.share                       # the share of prompts on which they disagree
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import LuthierError
from luthier.practice.contract import said
from luthier.practice.world import Record, drawn_as, families, records, verify


@dataclass(frozen=True)
class Conflict:
    """Pairs of records that have one prompt: those with one answer, and those with two."""

    agree: list[tuple[Record, Record]]
    disagree: list[tuple[Record, Record]]

    @property
    def share(self) -> float:
        """Share of prompts on which the families disagree, from 0 to 1."""
        return len(self.disagree) / (len(self.agree) + len(self.disagree))

    def best_single(self) -> float:
        """The highest mean score over both families that one model, which cannot tell them apart, can reach."""
        return 1 - self.share / 2


def conflict(one: str, other: str, n: int, split: str = "test", seed: int = 0) -> Conflict:
    """The first n records of both families side by side; each is judged by the other family's verifier. Raises
    LuthierError for two families that are not drawn alike, and for one family twice."""
    if one == other or drawn_as(one) != drawn_as(other):
        alike = [a for a in families() if drawn_as(a) != a]
        raise LuthierError(f"conflict: {one} and {other} do not share their draws; those that do: {', '.join(alike)}")
    agree, disagree = [], []
    for a, b in zip(records(one, split, n, seed), records(other, split, n, seed), strict=True):
        if said(a) != said(b):
            raise LuthierError(f"conflict: {one} and {other} ask in their own words; take customs_east, customs_west")
        (agree if verify(a, b["answer"]).reward == 1 else disagree).append((a, b))
    return Conflict(agree, disagree)
