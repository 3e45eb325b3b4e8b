"""Soft prompts: learned embeddings before the first token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, No, Site, State


@FORMS.add("prompt")
@dataclass(frozen=True)
class Prompt(Form):
    """`length` vectors of the embedding width stand before every row; mask and positions grow with them.

    They are drawn normal with standard deviation `spread`. In an encoder that reads its first position (BERT's pooler)
    that position is then the prompt's. Source: Lester et al. 2021, "The power of scale for parameter-efficient prompt
    tuning", which starts from words of the vocabulary instead.
    """

    length: int = 20
    """Number of vectors."""
    spread: float = 0.02
    """Standard deviation of the start; about that of trained embeddings."""

    at: ClassVar[str] = "input"
    scope: ClassVar[str] = "model"
    sites: ClassVar[tuple[str, ...]] = ("model",)
    kinds: ClassVar[tuple[str, ...]] = ("model",)
    dense: ClassVar[bool | No] = No("adds positions to the input; there is no weight change to fold")
    identity: ClassVar[bool | No] = No("any vector before the text is attended to")
    scales: ClassVar[bool | No] = No("a prompt multiplied by 0 is still attended to")
    packs: ClassVar[bool | No] = No("stands before a row's first token; packed rows have several first tokens")

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"embeddings": torch.randn(self.length, site.d_out, generator=g) * self.spread}, {}

    def extra(self, s: State) -> Tensor:
        return s.p["embeddings"]

    def count(self, site: Site) -> int:
        return self.length * site.d_out
