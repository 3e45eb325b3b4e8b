"""Site seals: for every site a seeded projection of its change, so that one unloaded, zeroed or altered layer is found
even where its effect on the probes is small, also in a merged checkpoint (as W_merged − W_base).

The projection is Sᵀ ΔW X / sqrt(d_in · d_out), with random signs X [d_in, 4] and S [d_out, 4]: 16 numbers whose root
mean square estimates that of ΔW's entries. It is linear in ΔW, so the seals of several deltas at one weight add. A
change that is no weight's is sealed through the form's own numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luthier.delta.artefact import Piece
from luthier.delta.form import Context, Form, No, State
from luthier.delta.probes import _signs as signs
from luthier.errors import LuthierError
from luthier.parts.spread import spans

WIDTH = 4
"""Columns of X and of S."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest distance of two seals of one change, as a share of the seal's norm, by the type the base is held in."""
FLAT = ("linear", "conv1d")


@dataclass(frozen=True)
class Broken:
    """A seal that does not hold: the site ("piece/site"), what was stored, what was found, and the share they differ by."""

    site: str
    expected: list[float]
    found: list[float]
    share: float

    @property
    def why(self) -> str:
        """missing, zero or altered."""
        if not self.found:
            return "missing"
        return "zero" if not any(self.found) else "altered"


def project(change: Tensor, bias: Tensor | None = None) -> list[float]:
    """Seal of a weight's change [..., d_out, d_in] (with its bias's [d_out]), or of a vector's [n], in float32."""
    change = change.detach().float().cpu()
    if change.dim() == 1:
        return _rounded(change @ signs(len(change), 4 * WIDTH, 1) / math.sqrt(max(1, len(change))))
    flat = change.reshape(-1, change.shape[-1])
    return _sealed(flat @ signs(flat.shape[1], WIDTH, 1), bias, flat.shape[1])


def project_rows(
    rows: Callable[[int, int], Tensor], shape: tuple[int, int], size: int, flip: bool = False
) -> list[float]:
    """`project` of a matrix [n, m], or of its transpose (`flip`), of which no more than `size` rows are made at a time.

    rows: (a, b) to its rows a … b − 1 in float32.
    """
    n, m = shape
    x = signs(n if flip else m, WIDTH, 1)
    parts = [rows(a, b).t() @ x[a:b] if flip else rows(a, b) @ x for a, b in spans(n, size)]
    return _sealed(torch.stack(parts).sum(0) if flip else torch.cat(parts), None, len(x))


def _sealed(columns: Tensor, bias: Tensor | None, d_in: int) -> list[float]:
    """From ΔW X [d_out, 4] (and Δb [d_out]) to the seal."""
    if bias is not None:
        columns = columns + bias.detach().float().cpu()[:, None]
    d_out = columns.shape[0]
    return _rounded(signs(d_out, WIDTH, 2).t() @ columns / math.sqrt(d_in * d_out))


@torch.no_grad()
def seal(form: Form, state: State, scale: float = 1.0) -> list[float]:
    """Seal of one site's change, whatever the form: through `change` where there is a cheap path, through `delta` where
    not, and through the numbers where there is no weight change at all."""
    state = replace(state, ctx=Context())
    site = state.site
    if not isinstance(form.dense, No):
        if site.kind in FLAT and not form.changes_weight and (columns := _cheap(form, state)) is not None:
            return _sealed(columns.cpu() * scale, None, site.d_in)
        change = form.delta(state)
        if not isinstance(change, No):
            weight = change.get("weight")
            bias = change.get("bias")
            if weight is None:
                assert bias is not None
                return project(bias * scale)
            return project(weight * scale, None if bias is None else bias * scale)
    parts = [_numbers(name, tensor * scale) for name, tensor in sorted(state.p.items())]
    return _rounded(torch.stack(parts).sum(0))


def _cheap(form: Form, state: State) -> Tensor | None:
    """ΔW X (+ Δb) [d_out, 4] by the form's own path, W read only where the form looks at the output."""
    if type(form).before is not Form.before:
        return None
    device = next(iter(state.p.values())).device
    x = signs(state.site.d_in, WIDTH, 1).t().to(device)
    if form.reads_output:
        y = x @ state.W().float().t()
        y = y if state.bias is None else y + state.bias.float()
    else:
        y = x.new_zeros(WIDTH, state.site.d_out)
    change = form.change(x, y, state)
    return None if change is None else change.float().t()


def _numbers(name: str, tensor: Tensor) -> Tensor:
    """16 numbers of any tensor; its name goes in, so that exchanged tensors are seen."""
    flat = tensor.detach().float().cpu().flatten()
    skip = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big")
    return flat @ signs(skip + len(flat), 4 * WIDTH, 3)[skip:] / math.sqrt(max(1, len(flat)))


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{v:.6g}") for v in values.flatten().tolist()]


def seals_of(handle: Any) -> dict[str, list[float]]:
    """Seals of everything on a model, "piece/site" -> 16 numbers. `handle` is what Delta.apply gives."""
    out: dict[str, list[float]] = {}
    for name, placed in handle.placed.items():
        for q in placed:
            site = q.state.site
            key = f"{site.name}.{site.parameter}" if site.kind == "fused-experts" else site.name
            out[f"{name}/{key}"] = seal(q.form, q.state, q.scale)
    for name, table in handle.edits.items():
        kinds: list[str] = []
        for key, edit in table.items():
            change = edit.parameter.detach().float() - edit.original.to(edit.parameter.device).float()
            if name in handle.pieces:
                piece = name
            else:  # still moving: named as the pieces will be that Attached.delta makes of it
                kind = f"{'dense' if edit.index is None else 'entries'}-{str(edit.parameter.dtype)[6:]}"
                kinds += [kind] if kind not in kinds else []
                piece = name if kind == kinds[0] else f"{name}-{kind}"
            out[f"{piece}/{key}"] = project(turned(change, edit.module))
    return out


def turned(change: Tensor, module: Any) -> Tensor:
    """A stored parameter's change as [d_out, d_in]."""
    return change.t() if type(module).__name__ in ("Conv1D", "Embedding") and change.dim() == 2 else change


def check_seals(
    found: Mapping[str, list[float]],
    expected: Mapping[str, list[float]],
    dtype: torch.dtype = torch.float32,
    noise: Mapping[str, float] | None = None,
) -> list[Broken]:
    """The seals that do not hold, worst first; [] when all do. A site that is not there counts as missing.

    dtype: the type the base is held in, which sets the share by which two seals may differ. noise: site -> root mean
    square of a rounding that is to be allowed on top (a merge into bfloat16).
    """
    if not expected:
        raise LuthierError(
            "the delta carries no seals: it was not saved by a run or an import; import or train it again"
        )
    broken = []
    for site, wanted in expected.items():
        have = found.get(site, [])
        if len(have) != len(wanted):
            broken.append(Broken(site, list(wanted), list(have), math.inf))
            continue
        distance, size = math.dist(have, wanted), math.hypot(*wanted)
        allowed = TOLERANCE[dtype] * size + 4 * math.sqrt(len(wanted)) * (noise or {}).get(site, 0.0) + 1e-9
        if not distance <= allowed:  # also when it is not a number
            broken.append(Broken(site, list(wanted), list(have), distance / size if size else math.inf))
    return sorted(broken, key=lambda b: -b.share)


def merged_seals(
    pieces: list[Piece], seals: Mapping[str, list[float]]
) -> Iterator[tuple[str, list[float] | None, tuple[str, ...]]]:
    """(module or parameter, what W_merged − W_base must project to, its pieces) for every site of a delta.

    None where that is no sum of seals: a change that no weight can hold, or forms that chain at one module.
    """
    at: dict[str, list[tuple[Piece, str]]] = {}
    for piece in pieces:
        for key, site in piece.sites.items():
            at.setdefault(key if piece.form.at == "base" else site.name, []).append((piece, key))
    edited = {key.rpartition(".")[0] for piece in pieces if piece.form.at == "base" for key in piece.sites}
    for place, members in at.items():
        names = tuple(piece.name for piece, _ in members)
        folds = all(not isinstance(piece.form.dense, No) for piece, _ in members)
        chained = len(members) > 1 and any(piece.form.at not in ("weight", "base") for piece, _ in members)
        mixed = place in edited and any(piece.form.at != "base" for piece, _ in members)
        if not folds or chained or mixed:
            yield place, None, names
            continue
        rows = [seals[f"{piece.name}/{key}"] for piece, key in members]
        yield place, [sum(column) for column in zip(*rows, strict=True)], names
