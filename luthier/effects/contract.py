"""What an effect states: its arms, the rates that each is swept over, how a run is scored, and what is claimed of the scores.

A file of ``luthier/effects/known`` gives

    ABOUT = "…"                      one line: the claim
    PAPERS = ("P123",)               rows of the papers table it is about
    BASE = "practice/s"              what is tuned
    ARMS = {"base": (), "full": (3e-4, 1e-3, 3e-3)}    arm -> learning rates tried; () where nothing is tuned
    CHOSEN_BY = "target"             the measure whose mean decides an arm's rate, higher being better
    CLAIMS = (Claim("tuning forgets", "base:kept", "full:kept", effect=0.1, sign=-1),)
    def measures(lab, cell) -> {measure: scores}       one run of one arm; entry i of a measure is item i in every run

and, where a piece is missing, WAITING = "what it waits for": then it is planned and not run.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from luthier.effects import known
from luthier.errors import LuthierError, nearest

if TYPE_CHECKING:
    from luthier.effects.lab import Lab

Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Cell:
    """One run: an arm at a learning rate (None where nothing is tuned) with a seed. ``trial`` runs choose rates and tell
    the spread; they see other items than the runs that count."""

    arm: str
    rate: float | None
    seed: int
    trial: bool = False

    @property
    def key(self) -> str:
        """Name of its file."""
        return f"{'trial' if self.trial else 'run'}-{self.arm}-{'none' if self.rate is None else f'{self.rate:g}'}-{self.seed}"


@dataclass(frozen=True)
class Claim:
    """``method`` scores higher (sign 1) or lower (-1) than ``baseline``, or as they do (0). Both are 'arm:measure';
    ``effect`` is the smallest difference that matters, in the measure's unit."""

    says: str
    baseline: str
    method: str
    effect: float
    sign: int = 1


class Effect(Protocol):
    """A module of ``known``."""

    ABOUT: str
    PAPERS: tuple[str, ...]
    BASE: str
    ARMS: Mapping[str, tuple[float, ...]]
    CHOSEN_BY: str
    CLAIMS: tuple[Claim, ...]

    def measures(self, lab: Lab, cell: Cell) -> Scores:
        """The scores of one run, by measure."""
        ...


@cache
def effects() -> tuple[str, ...]:
    """Names of all effects, in alphabetical order."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(known.__path__) if not m.name.startswith("_")))


def effect_named(name: str) -> Effect:
    """The effect of this name. Raises LuthierError for an unknown one, naming the nearest."""
    if name not in effects():
        raise LuthierError(f"effects: unknown effect {name!r}; {nearest(name, effects(), 'effect')}")
    return cast(Effect, importlib.import_module(f"{known.__name__}.{name}"))


def waiting(effect: Any) -> str | None:
    """What an effect waits for, if it does."""
    return getattr(effect, "WAITING", None)
