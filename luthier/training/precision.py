"""The precision policy: which type the base, the trained numbers, the optimiser and the arithmetic have. See docs/precision.md."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch

from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec, Plan


@dataclass(frozen=True)
class Precision:
    """Types of a run.

    fp32: everything in float32. bf16: forms alone on a frozen base hold the base in bfloat16 and compute in it, without
    autocast; where base parameters themselves move, the base is held in the checkpoint's own type (float32 on a CPU), what
    moves in float32, and autocast computes in bfloat16. Trained numbers, their gradients and optimiser moments are float32 always; losses are summed in float32.
    """

    name: str
    base: str
    moved: str
    numbers: str
    optimiser: str
    autocast: str | None
    note: str | None = None
    """What differs from what was asked, for the report."""

    @property
    def compute(self) -> torch.dtype:
        """Type of the activations."""
        return getattr(torch, self.autocast or self.base)

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Within it the forward pass runs."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, getattr(torch, self.autocast))

    def report(self) -> dict[str, str | None]:
        return asdict(self)


def precision_of(plan: Plan, bf16_hardware: bool) -> tuple[Precision, BaseSpec]:
    """The types of a plan's run, and its base with the type it is to be held in ('auto': the checkpoint's own).

    bf16 on hardware without bfloat16 arithmetic, where a product takes some hundred times as long, is computed in
    float32 and said so, unless base.dtype states bfloat16 itself.
    """
    stated, asked = plan.base.dtype, plan.train.precision
    moves_base = any(d.choice for d in plan.delta) or bool(plan.base.new_tokens) or plan.base.kind == "classify"
    if asked == "auto":
        asked = "bf16" if stated == "bfloat16" or (bf16_hardware and stated == "auto") else "fp32"
    if stated == "float16" and moves_base:
        raise LuthierError(
            "base.dtype: float16 cannot train parameters of the base without scaling the loss: use bfloat16"
        )
    if stated == "float16" and asked == "fp32":
        raise LuthierError(
            "base.dtype: float16 would have the run computed in float16, where gradients vanish without scaling the loss: "
            "use bfloat16 or float32, or state train.precision: bf16"
        )
    if asked == "fp32" and stated == "bfloat16":
        raise LuthierError("train.precision: fp32 and base.dtype: bfloat16 contradict each other: state one of them")
    note = None
    if asked == "bf16" and not bf16_hardware and stated == "auto":
        asked, note = "fp32", "train.precision: bf16 is computed in float32: this processor has no bfloat16 arithmetic"
    if asked == "fp32":
        held, autocast = ("float32" if stated == "auto" else stated), None
    else:
        held = stated if stated != "auto" else "auto" if moves_base else "bfloat16"
        autocast = "bfloat16" if moves_base or held != "bfloat16" else None
    precision = Precision(asked, held, "float32", "float32", "float32", autocast, note)
    return precision, plan.base.model_copy(update={"dtype": held})
