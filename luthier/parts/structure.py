"""Linear maps with rows and columns that are zero: smaller ones that give the same."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Compact(nn.Module):
    """y = W x + b of which only some inputs and outputs are there: x's kept entries in, zeros at the outputs left out.

    weight [kept outputs, kept inputs], bias [kept outputs] or None; `inputs` and `outputs` are their numbers in a map of
    d_out outputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, inputs: Tensor, outputs: Tensor, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("inputs", inputs)
        self.register_buffer("outputs", outputs)
        self.d_out = d_out

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.index_select(-1, self.inputs), self.weight, self.bias)  # pyright: ignore[reportArgumentType]
        if len(self.outputs) == self.d_out:  # pyright: ignore[reportArgumentType]
            return y
        out = y.new_zeros(*y.shape[:-1], self.d_out)
        return out.index_copy(-1, self.outputs, y)  # pyright: ignore[reportArgumentType]


def compact(weight: Tensor, bias: Tensor | None = None) -> Compact:
    """The smaller map of a weight [d_out, d_in] without its zero rows and columns. A row whose bias is not zero stays."""
    some = weight != 0
    rows = some.any(1) if bias is None else some.any(1) | (bias != 0)
    outputs, inputs = rows.nonzero()[:, 0], some.any(0).nonzero()[:, 0]
    small = weight.index_select(0, outputs).index_select(1, inputs).contiguous()
    return Compact(small, None if bias is None else bias[outputs], inputs, outputs, len(weight))


class Factored(nn.Module):
    """y = B A x + b, for a matrix that was replaced by two thin ones."""

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(t, requires_grad=False) for t in (a, b))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b, self.bias)


def scaled_norm(weight: Tensor, kept: Tensor, offset: float = 0.0) -> Tensor:
    """A root-mean-square norm's weight for the kept channels only, so that it gives what the full one gave with the others
    at zero: times sqrt(d / kept). offset: 1 for norms that multiply by 1 + weight. The eps has to grow by d / kept."""
    grown = (weight[kept].float() + offset) * (len(weight) / len(kept)) ** 0.5 - offset
    return grown.to(weight.dtype)
