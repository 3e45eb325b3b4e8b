"""Weighted sums of low-rank deltas, exactly: the factors of all stand side by side, so that ranks add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from luthier.bases.fingerprint import compare
from luthier.delta import FORMS, Site
from luthier.delta.artefact import Delta, Piece, made_of
from luthier.delta.seals import seal
from luthier.errors import LuthierError
from luthier.forms.lora import DoRA, LoRA
from luthier.parts.svd import trimmed

Weights = Sequence[float] | Callable[[int, Site], float]
"""A number for each delta, or one for each delta (by its place) and site."""


def why_not(deltas: Sequence[Delta]) -> str | None:
    """Why these deltas cannot be stacked; None where they can."""
    for delta in deltas:
        for piece in delta.pieces:
            if isinstance(piece.form, DoRA):
                return (
                    f"piece '{piece.name}' is DoRA, which rescales every row of the base's weight: that change is of full "
                    "rank; merge it as dense tensors"
                )
            if type(piece.form) is not LoRA:
                name = FORMS.name_of(type(piece.form))
                return f"piece '{piece.name}' is of form '{name}', which is no product of two factors"
    return None


def stack(
    deltas: Sequence[Delta],
    weights: Weights | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    name: str = "stack",
) -> Delta:
    """Σ wᵢ Δᵢ of LoRA deltas of one base as one LoRA delta whose rank is the sum of theirs: exact but for rounding.

    Ranks, alphas, scalings and sites may differ; a site that only some have carries only theirs. weights: default 1 each.
    rank, energy, ratio: trim every site to the best matrix of that rank, of that share of the squared norm, or without
    singular values below ratio · the largest, by QR of the factors: no matrix of the weight's size is made. The seals
    are those of the result. Raises LuthierError for other forms (with the reason) and for deltas of different bases.
    """
    if not deltas:
        raise LuthierError("nothing to stack: name at least one delta")
    if reason := why_not(deltas):
        raise LuthierError(f"cannot stack: {reason}")
    _one_base(deltas)
    if rank is not None and rank < 1:
        raise LuthierError(f"rank must be at least 1, got {rank}")
    for what, value in (("energy", energy), ("ratio", ratio)):
        if value is not None and not 0 < value <= 1:
            raise LuthierError(f"{what} must lie in (0, 1], got {value}")
    if weights is not None and not callable(weights) and len(weights) != len(deltas):
        raise LuthierError(f"{len(weights)} weights for {len(deltas)} deltas: state one for each")
    sites, factors = _gathered(deltas, weights)
    numbers: dict[str, dict[str, Tensor]] = {}
    for key, pairs in factors.items():
        a, b = torch.cat([a for a, _ in pairs], -2), torch.cat([b for _, b in pairs], -1)
        if rank is not None or energy is not None or ratio is not None:
            a, b = trimmed(a, b, rank=rank, energy=energy, ratio=ratio)
        numbers[key] = {"A": a.contiguous(), "B": b.contiguous()}
    piece = lora_piece(name, sites, numbers)
    lineage = made_of(deltas, "stack")
    if weights is not None and not callable(weights):
        lineage["weights"] = [float(w) for w in weights]
    return Delta([piece], dict(deltas[0].base), lineage, seals=sealed(piece), files=dict(deltas[0].files))


def lora_piece(name: str, sites: Mapping[str, Site], numbers: Mapping[str, Mapping[str, Tensor]]) -> Piece:
    """A LoRA piece of scale 1 whose ranks are those of the factors {"A": [.., r, d_in], "B": [.., d_out, r]} at each site.

    Fused experts of one module share a rank: the shorter factors are filled with zeros.
    """
    numbers = {k: dict(v) for k, v in numbers.items()}
    ranks: dict[str, int] = {}
    for key, site in sites.items():
        ranks[site.name] = max(ranks.get(site.name, 0), numbers[key]["A"].shape[-2])
    for key, site in sites.items():
        if short := ranks[site.name] - numbers[key]["A"].shape[-2]:
            a, b = numbers[key]["A"], numbers[key]["B"]
            numbers[key] = {
                "A": torch.cat([a, a.new_zeros(*a.shape[:-2], short, a.shape[-1])], -2),
                "B": torch.cat([b, b.new_zeros(*b.shape[:-1], short)], -1),
            }
    form = lora_of(ranks)
    return Piece(name, form, dict(sites), numbers, {k: {} for k in sites})


def lora_of(ranks: Mapping[str, int]) -> LoRA:
    """The LoRA form with these ranks by module name, and a scale of 1 everywhere."""
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    other = {n: r for n, r in ranks.items() if r != common}
    return LoRA(rank=common, alpha=float(common), ranks=other, alphas={n: float(r) for n, r in other.items()})


def sealed(piece: Piece) -> dict[str, list[float]]:
    """Seals of a piece whose change does not depend on the base's weight."""
    table = zip(piece.sites, piece.states(), strict=True)
    with torch.no_grad():
        return {f"{piece.name}/{key}": seal(piece.form, s, piece.scale) for key, s in table}


def _gathered(
    deltas: Sequence[Delta], weights: Weights | None
) -> tuple[dict[str, Site], dict[str, list[tuple[Tensor, Tensor]]]]:
    """Sites of all, and at each the factors [A, w · s · B] in float32."""
    sites: dict[str, Site] = {}
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for i, delta in enumerate(deltas):
        for piece in delta.pieces:
            form: LoRA = piece.form  # pyright: ignore[reportAssignmentType]
            for key, site in piece.sites.items():
                known = sites.setdefault(key, site)
                if (known.d_in, known.d_out, known.experts) != (site.d_in, site.d_out, site.experts):
                    raise LuthierError(
                        f"{site.name} is {known.d_out} x {known.d_in} in one delta and {site.d_out} x {site.d_in} in "
                        "another: they are not of one base"
                    )
                w = 1.0 if weights is None else weights(i, site) if callable(weights) else weights[i]
                a, b = piece.p[key]["A"].float(), piece.p[key]["B"].float()
                if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                    raise LuthierError(f"delta {i + 1}: {key} holds NaN or infinity: train it again")
                factors.setdefault(key, []).append((a, b * (w * piece.scale * form.at_site(site)[1])))
    if not sites:
        raise LuthierError("nothing to stack: the deltas have no sites")
    return sites, factors


def _one_base(deltas: Sequence[Delta]) -> None:
    first = deltas[0].base
    for other in (d.base for d in deltas[1:]):
        a, b = first.get("fingerprint"), other.get("fingerprint")
        if a and b and compare(a, b) == "different":
            raise LuthierError(
                f"cannot stack deltas of different bases: {a} ({first.get('name')}) and {b} ({other.get('name')}): port one "
                "of them to the other's base first"
            )
        if (first.get("new_tokens") or []) != (other.get("new_tokens") or []):
            raise LuthierError(
                "cannot stack deltas that were trained with different new tokens: train them with the same"
            )
