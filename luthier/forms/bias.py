"""Added biases: the way to bias-only tuning on a base that has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, Site, State


@FORMS.add("bias")
@dataclass(frozen=True)
class Bias(Form):
    """y' = y + b with b [out] zero at the start: BitFit where the base's linear maps have no bias (Llama, Qwen 3 …).

    The b are counted and saved as the delta; folding needs a bias in the base, or an export that switches it on in the
    config. Where the base has biases the choice `bias` moves those instead. Source: Ben Zaken et al. 2022 (P221).
    """

    paper: ClassVar[str] = "P221"
    reads_output: ClassVar[bool] = False

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"b": torch.zeros(site.d_out)}, {}

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        return s.p["b"].to(y.dtype).expand_as(y)

    def delta(self, s: State) -> dict[str, Tensor]:
        return {"bias": s.p["b"]}

    def count(self, site: Site) -> int:
        return site.d_out
