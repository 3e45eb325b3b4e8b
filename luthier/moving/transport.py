"""Moves of weights: the change made on one base, added to another. One arithmetic, three papers, three sets of settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luthier.delta import MOVES
from luthier.moving.engine import Transport


@MOVES.add("portllm")
@dataclass(frozen=True)
class PortLLM(Transport):
    """A patch made on one version of a base goes onto the next as it is: W' = W_new + s B A, no training.

    The paper's patches are LoRA; here any form may be one, and those without a weight change keep their numbers (our
    reading). Source: Khan et al. 2025 (P109).
    """

    paper: ClassVar[str] = "P109"


@MOVES.add("fine-tuning-transfer")
@dataclass(frozen=True)
class FineTuningTransfer(Transport):
    """W' = W_new + (W_tuned − W_old) over all weights, and whether the two bases are linearly connected.

    Connected: along (1 − t) W_old + t W_new the loss nowhere stands above the line between its ends. It is measured and
    reported, and forbids nothing. As a start for further tuning see the recipe. Source: Lin et al. 2025 (P147).
    """

    whole: ClassVar[bool] = True
    connectivity: ClassVar[bool] = True
    paper: ClassVar[str] = "P147"


@MOVES.add("instruction-residual")
@dataclass(frozen=True)
class InstructionResidual(Transport):
    """W' = W_continued + (W_instruct − W_base): instruction following regained after continued pre-training of the base,
    without instruction data. Source: Jindal et al. 2024 (P335).
    """

    whole: ClassVar[bool] = True
    paper: ClassVar[str] = "P335"
