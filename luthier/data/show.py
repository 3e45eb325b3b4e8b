"""The first rendered records, with the tokens that carry loss in colour."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from luthier.data.ledger import Ledger
from luthier.data.records import Example
from luthier.data.rows import Maker, Row
from luthier.data.stream import Place, Records
from luthier.plan.schema import DataSpec

if TYPE_CHECKING:
    from rich.text import Text


class Lenient(Maker):
    """Keeps every row, to look at it."""

    def checked(self, row: Row, example: Example) -> Row | None:
        return row


def first_rows(
    spec: DataSpec, tokenizer: Any, n: int = 3, *, kind: str = "causal", labels: list[str] | None = None
) -> tuple[list[Row], Ledger]:
    """The first n rows as training sees them, and what is noted on the way. Rows that a run would refuse are shown too, so
    that one sees why."""
    maker = Lenient(spec, tokenizer, kind, labels, Ledger())
    found = (row for row, _ in Records(spec.train).rows(maker, Place()) if row is not None)
    return list(islice(found, n)), maker.ledger


def show(
    spec: DataSpec, tokenizer: Any, n: int = 3, *, kind: str = "causal", labels: list[str] | None = None
) -> Iterator[Text]:
    """For each of the first n records a rich Text: a line of facts, then its tokens; green ones carry loss (bold above
    weight 1, dim below), others are grey; after them a line for each thing noted. Print it with a rich console."""
    from rich.text import Text

    rows, ledger = first_rows(spec, tokenizer, n, kind=kind, labels=labels)
    for row in rows:
        ended = {True: "end-of-turn supervised", False: "end-of-turn NOT supervised", None: "no end-of-turn"}[row.eot]
        facts = [row.where, f"{row.length} tokens", f"{row.supervised} supervised", ended]
        facts += [f"{row.truncated} cut off"] if row.truncated else []
        facts += [f"label {labels[row.label] if labels else row.label}"] if row.label >= 0 else []
        out = Text(" · ".join(facts) + "\n", style="bold")
        painted(out, row.ids, row.weights, tokenizer)
        if row.second is not None:
            out.append("\n→ ", style="bold")
            painted(out, row.second, row.second_weights, tokenizer)
        yield out
    yield from (Text(f"note: {said}", style="yellow") for said in ledger.notes)


def painted(out: Text, ids: Any, weights: Any, tokenizer: Any) -> None:
    """Append the tokens of one side. Runs of equal weight are decoded together, so that characters of several tokens show."""
    at = 0
    while at < len(ids):
        to = at + 1
        while to < len(ids) and weights[to] == weights[at]:
            to += 1
        weight = float(weights[at])
        style = (
            "bright_black" if weight == 0 else "green" if weight == 1 else "bold green" if weight > 1 else "dim green"
        )
        text = tokenizer.decode(
            [int(i) for i in ids[at:to]], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        out.append(text + (f"⟨{weight:g}⟩" if weight not in (0.0, 1.0) else ""), style=style)
        at = to


def plain(spec: DataSpec, tokenizer: Any, n: int = 3, *, kind: str = "causal", labels: list[str] | None = None) -> str:
    """The same without colour: what carries loss stands between ⟦ and ⟧."""
    lines = []
    for text in show(spec, tokenizer, n, kind=kind, labels=labels):
        head, body = text.split("\n", include_separator=True)[0].plain.rstrip("\n"), []
        for span in text.spans:
            piece = text.plain[span.start : span.end]
            body.append(f"⟦{piece}⟧" if "green" in str(span.style) else piece)
        lines.append(head + "\n" + "".join(body))
    return "\n\n".join(lines)
