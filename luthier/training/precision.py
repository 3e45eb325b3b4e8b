"""The precision policy: which type the base, the trained numbers, the optimiser and the arithmetic have. See docs/precision.md."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Types of a run.

    fp32: everything in float32. bf16: forms alone on a frozen base hold the base in bfloat16 and compute in it, without
    autocast; where base parameters themselves move, those are held in float32 and autocast computes in bfloat16.
    Trained numbers, their gradients and optimiser moments are float32 always; losses are summed in float32.
    """

    name: str
    base: str
    moved: str
    numbers: str
    optimiser: str
    autocast: str | None

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Within it the forward pass runs."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, getattr(torch, self.autocast))

    def report(self) -> dict[str, str | None]:
        return asdict(self)


def choose_precision(name: str, moves_base: bool, bf16_hardware: bool) -> Precision:
    """The policy for train.precision; `moves_base` when any choice trains parameters of the base."""
    if name == "auto":
        name = "bf16" if bf16_hardware else "fp32"
    if name == "fp32":
        return Precision("fp32", "float32", "float32", "float32", "float32", None)
    return Precision("bf16", "bfloat16", "float32", "float32", "float32", "bfloat16" if moves_base else None)
