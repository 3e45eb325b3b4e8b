"""What a verifier or judge says about one response."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A reward with its reason. A verdict that was not decided never counts as a pass, whatever its reward."""

    reward: float
    """0 for wrong to 1 for right; judges may use other scales and say so."""
    reason: str = ""
    """Why, in a few words; shown beside samples in the report."""
    decided: bool = True
    """False where the verifier could not tell (no reference, unreadable answer key …)."""

    @property
    def passed(self) -> bool:
        """Whether this counts as right: decided, and the full reward of 1."""
        return self.decided and self.reward >= 1.0


def undecided(reason: str) -> Verdict:
    """The verdict of a verifier that cannot tell."""
    return Verdict(0.0, reason, False)
