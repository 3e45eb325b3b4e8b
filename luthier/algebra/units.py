"""Two whole models of one architecture merged unit by unit, from what their units do on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from luthier.attach.weights import module_at
from luthier.bases.part import Part
from luthier.bases.recast import READS, RESIDUAL, WRITES
from luthier.bases.roles import Roles
from luthier.bridge.target import logits_of
from luthier.delta import Stack
from luthier.errors import LuthierError
from luthier.merging.pleas import PLeaS
from luthier.parts.assignment import assign
from luthier.parts.units import Blocks, averaged, permuted, shared

MOMENTS = 1 << 30
"""Bytes of moments held at once: so many layers are solved for in one reading of the text."""
ROWS = 4
"""Rows of text that go through at once."""
READ = {"attn.q": "attn", "attn.k": "attn", "attn.v": "attn", "ffn.gate": "ffn", "ffn.up": "ffn"}
"""Maps that read the same input."""
UNITS = {"attn.q": "query", "attn.k": "key", "attn.v": "value", "ffn.gate": "inner", "ffn.up": "inner"}
FED = {"attn.o": "output", "ffn.down": "inner"}
"""Units that a map gives, and that it reads; all else is the residual stream."""


@dataclass
class Moments:
    """Sums over the text at one linear map: ZᵀZ, YᵀZ and |Y|² of joined inputs Z and outputs Y."""

    gram: Tensor
    cross: Tensor
    square: float = 0.0

    def lost(self, weight: Tensor) -> float:
        """|Y − Z Wᵀ|²."""
        w = weight.double()
        return max(0.0, self.square - 2 * float((w * self.cross).sum()) + float(((w @ self.gram) * w).sum()))


@dataclass
class Units:
    """A merge of two models on its way. `errors`: the squared error of the merged features of all maps, as a share of their
    square, by the average and as solved."""

    method: PLeaS
    models: tuple[Any, Any]
    roles: Roles
    """Of either model."""
    ids: Tensor
    """Calibration text [n, length]."""
    errors: tuple[float, float] = (0.0, 0.0)
    inner: int = 0
    """Units of a feed-forward layer of the result."""
    _lost: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def __post_init__(self) -> None:
        a, b = (dict(m.named_parameters()) for m in self.models)
        family = getattr(self.models[0].config, "model_type", "")
        if family not in RESIDUAL:
            raise LuthierError(
                f"units are matched in {', '.join(RESIDUAL)}, these models are of type {family}: take another merge"
            )
        other = sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or a[n].shape != b[n].shape)
        if other:
            raise LuthierError(
                f"{other[0]} is not of one shape in both models: units are matched in models of one architecture and size"
            )

    @torch.no_grad()
    def run(self, progress: Callable[[int, int], None] = lambda done, of: None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the merged model by name, float32 on the CPU.

        Memory: both models, the inputs of the maps of some layers on a few rows, and their moments. Where a residual
        stream passes it is one set of units for the whole model, matched by what its norms read. Heads are matched with
        their keys' groups, values and what reads them also inside a head; queries and keys not, whose coordinates turn
        in pairs. Only feed-forward units are kept apart (our reading for transformers). Models that tie their head to
        the embeddings get its average.
        """
        stream = self._stream()
        layers = range(self.roles.layer_count)
        size = max(1, MOMENTS // max(1, self._bytes()))
        done = 0
        for first in range(0, len(layers), size):
            chosen = layers[first : first + size]
            blocks = self._matched(chosen)
            last = chosen[-1] == layers[-1]
            parts = [p for p in self.roles.parts if p.layer in chosen or (last and p.layer is None)]
            for part in parts:
                blocks.setdefault((part.layer, "stream"), stream)
            solved = self._solved(parts, blocks)
            for part in parts:
                for name in part.parameters:
                    if part.role == "head" and part.tied_with:
                        continue
                    yield name, solved[name] if name in solved else self._plain(part, name, blocks)
            done += len(chosen)
            progress(done, len(layers))
        whole = max(self._lost[2], 1e-30)
        self.errors = (self._lost[0] / whole, self._lost[1] / whole)

    # -- units

    def _stream(self) -> Blocks:
        """The residual stream's units, all merged; the norms' inputs at unit length, as they use them."""
        norms = [p for p in self.roles.parts if p.kind == "norm" and p.d_in == self.roles.hidden]
        total = torch.zeros(self.roles.hidden, self.roles.hidden, dtype=torch.float64)
        for a, b in self._read(norms):
            for part in norms:
                x, y = (t[part.name][0] / t[part.name][0].square().mean(-1, keepdim=True).sqrt() for t in (a, b))
                total += (x.T @ y).double().cpu()
        return permuted(assign(total))

    def _matched(self, layers: Sequence[int]) -> dict[tuple[int | None, str], Blocks]:
        """Blocks of heads and feed-forward units by (layer, kind)."""
        wanted = [p for p in self.roles.parts if p.layer in layers and p.role in ("attn.v", "attn.o", "ffn.down")]
        alike: dict[tuple[int | None, str], Tensor] = {}
        for a, b in self._read(wanted):
            for p in wanted:
                x, y = (t[p.name][1 if p.role == "attn.v" else 0] for t in (a, b))
                found = (x.T @ y).double().cpu()
                alike[p.layer, p.role] = alike[p.layer, p.role] + found if (p.layer, p.role) in alike else found
        blocks: dict[tuple[int | None, str], Blocks] = {}
        for n in layers:
            rows = _heads(alike[n, "attn.v"], alike[n, "attn.o"], self.roles.head_dim)
            blocks |= {(n, kind): permuted(order) for kind, order in rows.items()}
            blocks[n, "inner"] = self.method.match(alike[n, "ffn.down"])
            self.inner = blocks[n, "inner"].width
        return blocks

    # -- weights

    def _solved(self, parts: Sequence[Part], blocks: Mapping[tuple[int | None, str], Blocks]) -> dict[str, Tensor]:
        """The weights of all linear maps among the parts."""
        linear = [p for p in parts if p.role in (*READS, *WRITES) and not (p.role == "head" and p.tied_with)]
        sides = {p.name: self._sides(p, blocks) for p in linear}
        moments: dict[str, Moments] = {}
        grams: dict[tuple[int | None, str], Tensor] = {}
        for a, b in self._read(linear):
            met = set()
            for p in linear:
                out, into = sides[p.name]
                z = into.joined(a[p.name][0], b[p.name][0])
                y = out.joined(a[p.name][1], b[p.name][1])
                key = (p.layer, READ.get(p.role, p.role))
                gram = grams.setdefault(key, torch.zeros(into.width, into.width, dtype=torch.float64))
                if key not in met:
                    gram += (z.T @ z).double().cpu()
                    met.add(key)
                held = moments.setdefault(p.name, Moments(gram, torch.zeros(out.width, into.width).double()))
                held.cross += (y.T @ z).double().cpu()
                held.square += float(y.double().square().sum())
        made = {}
        for p in linear:
            out, into = sides[p.name]
            start = averaged(*self._values(p.parameters[0]), out, into)
            weight = self.method.solve(moments[p.name].gram, moments[p.name].cross, start, out, into)
            for k, value in enumerate(
                (moments[p.name].lost(start), moments[p.name].lost(weight), moments[p.name].square)
            ):
                self._lost[k] += value
            made[p.parameters[0]] = weight
        return made

    def _plain(self, part: Part, name: str, blocks: Mapping[tuple[int | None, str], Blocks]) -> Tensor:
        """Embeddings, norms and biases: matched, then the mean (for embeddings the least-squares answer)."""
        a, b = self._values(name)
        stream = blocks[part.layer, "stream"]
        if part.role in (*READS, *WRITES):
            return averaged(a[:, None], b[:, None], self._sides(part, blocks)[0], shared(1))[:, 0]
        if part.role == "embed" or (part.kind == "norm" and len(a) == self.roles.hidden):
            b = b[..., stream.pair_b]
        return self.method.merge(Stack(name, [a, b]))

    def _sides(self, part: Part, blocks: Mapping[tuple[int | None, str], Blocks]) -> tuple[Blocks, Blocks]:
        """Units that a map gives and that it reads."""
        if part.role == "head":
            return shared(part.d_out), blocks[part.layer, "stream"]
        return tuple(blocks[part.layer, table.get(part.role, "stream")] for table in (UNITS, FED))  # pyright: ignore

    def _values(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = (m.get_parameter(name).detach().float().cpu() for m in self.models)
        return a, b

    def _bytes(self) -> int:
        """Of the moments of one layer."""
        rows = [p for p in self.roles.parts if p.layer == 0 and p.role in (*READS, *WRITES)]
        wide = 2 - self.method.keep
        return int(8 * wide * sum(p.d_in * (p.d_out + wide * p.d_in) for p in rows))

    def _read(self, parts: Sequence[Part]) -> Iterator[list[dict[str, tuple[Tensor, Tensor]]]]:
        """Of every few rows of text, for A and for B: what goes into every part and what comes out but for its bias, [N, d]."""
        for ids in self.ids.split(ROWS):
            yield [_seen(model, parts, ids) for model in self.models]


def _seen(model: Any, parts: Sequence[Part], ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for part in parts:

        def note(module: nn.Module, given: Any, out: Tensor, name: str = part.name) -> None:
            bias = getattr(module, "bias", None)
            out = out if bias is None else out - bias
            seen[name] = (given[0].flatten(0, -2).float(), out.flatten(0, -2).float())

        hooks.append(module_at(model, part.name).register_forward_hook(note))
    try:
        logits_of(model)(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _heads(values: Tensor, outputs: Tensor, width: int) -> dict[str, Tensor]:
    """B's coordinate for each of A's in queries, keys, values and the output matrix's inputs, by inner products of the
    values [g · width]² and of those inputs [h · width]², with g groups of keys and h heads."""
    groups, heads = len(values) // width, len(outputs) // width
    each = heads // groups
    table = values.view(groups, width, groups, width).transpose(1, 2)
    inside = torch.stack([torch.stack([assign(m) for m in row]) for row in table])
    score = table.gather(-1, inside[..., None])[..., 0].sum(-1)
    group_of = assign(score)
    cells = outputs.view(heads, width, heads, width).transpose(1, 2)
    query, fed, key, value = [], [], [], []
    place = torch.arange(width)
    for i, j in enumerate(group_of.tolist()):
        order = inside[i, j]
        block = cells[i * each : (i + 1) * each, j * each : (j + 1) * each]
        head_of = assign(block[..., place, order].sum(-1)) + j * each
        key.append(j * width + place)
        value.append(j * width + order)
        query += [q * width + place for q in head_of.tolist()]
        fed += [q * width + order for q in head_of.tolist()]
    return {k: torch.cat(v) for k, v in {"query": query, "key": key, "value": value, "output": fed}.items()}
