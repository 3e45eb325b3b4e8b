"""Parameter groups: every piece its own learning rate and decay; optimiser state only for what moves, kept by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.attach import Attached
from luthier.attach.edits import assign
from luthier.delta import OPTIMISERS
from luthier.errors import LuthierError
from luthier.plan.schema import TrainSpec


@dataclass(frozen=True)
class Rates:
    """A piece's own rate and decay; None is the loop's."""

    lr: float | None = None
    weight_decay: float | None = None


@dataclass
class Optimiser:
    """A torch optimiser whose state is addressed by parameter names, so that it survives redraws and restarts."""

    torch: torch.optim.Optimizer
    names: dict[str, nn.Parameter]

    def set_rate(self, factor: float) -> None:
        """Every group at `factor` times its peak rate."""
        for group in self.torch.param_groups:
            group["lr"] = group["peak"] * factor

    def state(self) -> dict[str, Tensor]:
        """'name/moment' -> tensor, as they are (sharded ones stay so)."""
        out = {}
        for name, parameter in self.names.items():
            for key, value in self.torch.state.get(parameter, {}).items():
                out[f"{name}//{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave, for the names that are there now."""
        for key, value in state.items():
            name, moment = key.rsplit("//", 1)
            if name in self.names:
                parameter = self.names[name]
                if value.shape == parameter.shape and moment != "step":
                    place = torch.zeros_like(parameter, dtype=value.dtype, memory_format=torch.preserve_format).detach()
                    assign(place, value)
                else:
                    place = value.to(parameter.device).clone()
                self.torch.state[parameter][moment] = place


def make_optimiser(
    handle: Attached, train: TrainSpec, rates: Mapping[str, Rates], old: Optimiser | None = None
) -> Optimiser:
    """Groups of everything that trains now. Moments of parameters that already trained are taken over from `old`.

    Vectors (norms, biases, scales, magnitudes) are not decayed; entries of a matrix are, as the matrix is.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    names: dict[str, nn.Parameter] = {}
    # Single entries are a vector here; whether they decay is told by the parameter that they are entries of.
    of = {id(e.values): e.parameter for t in handle.edits.values() for e in t.values() if e.values is not None}
    for piece, rows in handle.trained().items():
        own = rates.get(piece, Rates())
        for name, parameter in sorted(
            rows, key=lambda row: row[0]
        ):  # sums of norms depend on the order; a resume has it too
            decay = train.weight_decay if own.weight_decay is None else own.weight_decay
            key = (own.lr or train.lr, decay if of.get(id(parameter), parameter).dim() > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
            names[name] = parameter
    if not names:
        raise LuthierError("nothing would be trained: no piece has a number that moves; see delta in the plan")
    rows = [{"params": ps, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]
    optimiser = Optimiser(OPTIMISERS[train.optimiser](rows, betas=train.betas, eps=train.eps), names)
    if old is not None:
        kept = {id(p): old.torch.state[p] for p in old.names.values() if p in old.torch.state}
        optimiser.torch.state.update({p: kept[id(p)] for p in names.values() if id(p) in kept})
    return optimiser
