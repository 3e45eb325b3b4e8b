"""The account of a run's data: what was read, kept, dropped, cut, and which tokens carry loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.data.rows import Row


@dataclass
class Ledger:
    """Counts over the records of one data set. `to_dict` is what the report shows; `state`/`restore` travel with a resume.

    supervised: how many rows have that many supervised tokens (so that the median needs no list of all rows).
    ended / ending: rows whose end-of-turn is supervised, of those that should have one. notes: anything worth a line.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated_rows: int = 0
    truncated_tokens: int = 0
    truncated_supervised: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    supervised: Counter[int] = field(default_factory=Counter)
    ended: int = 0
    ending: int = 0
    cut_endings: int = 0
    bos: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    unused_columns: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    fingerprints: dict[str, str] = field(default_factory=dict)
    scope: str = "all records"
    quiet: bool = False

    def note(self, text: str) -> None:
        """Count one more occurrence of something worth telling."""
        if not self.quiet:
            self.notes[text] += 1

    def drop(self, reason: str) -> None:
        """Count a record that does not become a row."""
        if not self.quiet:
            self.dropped[reason] += 1

    def keep(self, row: Row) -> None:
        """Count a row that will be trained on."""
        if self.quiet:
            return
        supervised = row.supervised
        self.kept += 1
        self.tokens += row.length
        self.supervised_tokens += supervised
        self.supervised[supervised] += 1
        if row.eot is not None:
            self.ending += 1
            self.ended += row.eot
            self.cut_endings += not row.eot and row.truncated > 0

    def cut(self, tokens: int, supervised: int) -> None:
        """Count a row shortened to max_length."""
        if not self.quiet:
            self.truncated_rows += 1
            self.truncated_tokens += tokens
            self.truncated_supervised += supervised

    @property
    def median(self) -> int:
        """Median number of supervised tokens in a row (the lower one of two)."""
        left = (sum(self.supervised.values()) + 1) // 2
        for count in sorted(self.supervised):
            left -= self.supervised[count]
            if left <= 0:
                return count
        return 0

    def to_dict(self) -> dict[str, Any]:
        """For the report: plain numbers, strings and dicts."""
        return {
            "scope": self.scope,
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "duplicates": self.duplicates,
            "formats": dict(self.formats),
            "unused_columns": dict(self.unused_columns),
            "truncated": {
                "rows": self.truncated_rows,
                "tokens": self.truncated_tokens,
                "supervised": self.truncated_supervised,
            },
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "supervised_per_row": {
                "min": min(self.supervised, default=0),
                "median": self.median,
                "max": max(self.supervised, default=0),
                "zero": self.supervised.get(0, 0),
            },
            "end_of_turn": {
                "rows": self.ending,
                "supervised": self.ended,
                "share": self.ended / self.ending if self.ending else None,
                "lost_to_truncation": self.cut_endings,
            },
            "bos": dict(self.bos),
            "notes": dict(self.notes),
            "fingerprints": dict(self.fingerprints),
        }

    def state(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        plain = {k: v for k, v in vars(self).items() if k != "quiet"}
        out = {k: dict(v) if isinstance(v, Counter) else v for k, v in plain.items()}
        return out | {"supervised": {str(k): v for k, v in self.supervised.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        for name, value in state.items():
            if name == "supervised":
                value = {int(k): v for k, v in value.items()}
            setattr(self, name, Counter(value) if isinstance(getattr(self, name), Counter) else value)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Ledger:
        made = cls()
        made.restore(state)
        return made
