"""Two checkpoints in, a delta out, tensor by tensor: exact, or as the LoRA that comes nearest."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.algebra.maker import Maker, difference, squared, streamed
from luthier.algebra.pairs import card_of, comparable, grown
from luthier.attach.sites import site_of
from luthier.attach.weights import oriented
from luthier.bases.fingerprint import Fingerprint, FullHash
from luthier.bridge.checkpoint import Checkpoint
from luthier.delta import Site
from luthier.delta.artefact import Delta
from luthier.delta.folder import refuse_existing
from luthier.errors import LuthierError
from luthier.forms.lora import LoRA
from luthier.parts.bits import INTEGER
from luthier.parts.svd import balanced, svd_to

APART = ("head", "classifier", "router", "embed")
"""Roles that an extraction keeps exactly unless sites are stated."""


@dataclass(frozen=True)
class Extraction:
    """How a change is written as a LoRA: by the number of directions, or by what they have to hold."""

    rank: int | None = None
    """Most directions of a weight."""
    energy: float | None = None
    """Share of a change's squared norm to keep."""
    ratio: float | None = None
    """Directions whose singular value is below this share of the largest are left out."""
    sites: tuple[str, ...] = ()
    """Roles or names of the weights to decompose; default all linear maps but head, classifier and router."""
    rest: str = "exact"
    """What becomes of all other parameters that changed: exact or drop."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise LuthierError(f"rank must be at least 1, got {self.rank}")
        for what, value in (("energy", self.energy), ("ratio", self.ratio)):
            if value is not None and not 0 < value <= 1:
                raise LuthierError(f"{what} must lie in (0, 1], got {value}")
        if self.rank is None and self.energy is None and self.ratio is None:
            raise LuthierError(
                "an extraction needs a rank, an energy or a ratio: state one, or ask for the exact delta"
            )
        if self.rest not in ("exact", "drop"):
            raise LuthierError(f"rest is 'exact' or 'drop', got '{self.rest}'")


@dataclass
class Row:
    """What the diff found in one role."""

    role: str
    tensors: int = 0
    changed: int = 0
    numbers: int = 0
    """Numbers in the changed tensors."""
    kept: int = 0
    """Numbers that the delta holds for them."""
    ranks: list[int] = field(default_factory=list)
    change: float = 0.0
    """Squared norm of the change."""
    base: float = 0.0
    """Squared norm of the base's values where something changed."""
    lost: float = 0.0
    """Squared norm of what the delta does not hold of the change."""

    @property
    def error(self) -> float:
        """Norm of what is not held, as a share of the norm of the change; 0 where all is."""
        return (self.lost / self.change) ** 0.5 if self.change else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {
            "role": self.role,
            "tensors": self.tensors,
            "changed": self.changed,
            "numbers": self.numbers,
            "kept": self.kept,
            "ranks": [min(self.ranks), max(self.ranks)] if self.ranks else None,
            "size": (self.change / self.base) ** 0.5 if self.base else None,
            "error": self.error,
        }


@dataclass
class Diff:
    """A delta written to disk, and what was found on the way. Its pieces hold no tensors: load the folder for them."""

    delta: Delta
    rows: list[Row]
    notes: list[str]
    bytes: int


def diff(base: Checkpoint, tuned: Checkpoint, out: str | os.PathLike[str], how: Extraction | None = None) -> Diff:
    """Writes the delta that turns `base` into `tuned` to the folder `out`, which must be new or empty.

    how: None for the exact delta, integer differences of the bit patterns: applied to the base it gives the tuned values
    bit for bit. Parameters that did not change are left out; of those where few entries did, only these are kept. Memory
    is that of the largest tensor, a few times over. Tokens that only `tuned` has are the delta's new tokens, their rows
    differences from those that the base starts with. The delta carries both fingerprints, seals and what was found; probes
    need the models whole and are the verb's. Raises LuthierError in one line where the two do not belong together.
    """
    out = Path(out)
    refuse_existing(out)
    rows: dict[str, Row] = {}
    base = grown(base, tuned)
    comparable(base, tuned)
    card, files, notes = card_of(base, tuned)
    lora = _lora_sites(base, how)
    with streamed(out, Maker.names(base.names, [key for key, _ in lora.values()])) as stream:
        maker = Maker(stream)
        full, ours, theirs = FullHash(), Fingerprint(), Fingerprint()
        wide, other = base.dtype(), tuned.dtype()
        for name, was in base.tensors():
            now = tuned.tensor(name)
            held = (base.stored(name) if name in base.tables else was).to(wide)
            full.add(name, held)
            ours.add(name, held)
            theirs.add(name, now.to(other))
            del held
            _one(maker, name, was, now, tuned, base, lora.get(name), how, rows)
            del was, now  # before the next ones are read
        pieces = maker.pieces()
        if not pieces:
            raise LuthierError(f"{tuned.name} and {base.name} hold the same values: there is no delta to write")
        card["fingerprint"], card["full_fingerprint"] = str(ours), str(full)
        lineage = {
            "parents": [],
            "made_by": "diff",
            "tuned": {"name": tuned.name, "fingerprint": str(theirs)},
            "how": "exact" if how is None else {k: v for k, v in vars(how).items() if v},
            "found": [r.to_dict() for r in rows.values()],
        }
        delta = Delta(pieces, card, lineage, seals=maker.seals, files=files)
        delta.save(out, numbers=stream.close())
    return Diff(delta, list(rows.values()), notes, (out / "delta.safetensors").stat().st_size)


def _one(
    maker: Maker,
    name: str,
    was: Tensor,
    now: Tensor,
    tuned: Checkpoint,
    base: Checkpoint,
    lora: tuple[str, Site] | None,
    how: Extraction | None,
    rows: dict[str, Row],
) -> None:
    site = base.items.get(name)
    role = site.role if site is not None else "buffer"
    row = rows.setdefault(role, Row(role))
    row.tensors += 1
    wide = torch.promote_types(was.dtype, now.dtype)
    if torch.equal(was.to(wide).view(INTEGER[wide]), now.to(wide).view(INTEGER[wide])):
        return
    if site is None:
        raise LuthierError(
            f"{name} differs, a constant that is no parameter: a delta cannot hold it; fetch {tuned.name} again"
        )
    size = squared(now, was)
    for which, values in ((base, was), (tuned, now)):
        if not math.isfinite(size) and not torch.isfinite(values).all():
            raise LuthierError(f"{which.folder}: {name} holds NaN or infinity: fetch or train it again")
    row.changed += 1
    row.numbers += now.numel()
    row.change += size
    row.base += squared(was)
    if lora is not None and how is not None:
        key, at = lora
        a, b, lost = _factors(oriented(difference(now, was), at), how)
        maker.lowrank(key, at, a, b)
        row.ranks.append(int(a.shape[-2]))
        row.kept += a.numel() + b.numel()
        row.lost += lost
    elif how is not None and how.rest == "drop":
        row.lost += size
    else:
        row.kept += maker.exact(name, site, now, was, base.model.get_submodule(site.name))


def _factors(change: Tensor, how: Extraction) -> tuple[Tensor, Tensor, float]:
    """A, B of a change [d_out, d_in], or of [experts, d_out, d_in], and the squared norm of what they leave out."""
    if change.dim() == 3:
        each = [_factors(one, how) for one in change]
        most = max(a.shape[0] for a, _, _ in each)
        short = [(a, b, most - a.shape[0]) for a, b, _ in each]
        a = torch.stack([torch.cat([a, a.new_zeros(n, a.shape[1])]) for a, _, n in short])
        b = torch.stack([torch.cat([b, b.new_zeros(b.shape[0], n)], 1) for _, b, n in short])
        return a, b, sum(lost for _, _, lost in each)
    u, s, vh = svd_to(change, rank=how.rank, energy=how.energy, ratio=how.ratio)
    a, b = balanced(u, s, vh)
    lost = squared(change - b @ a)
    return a, b, lost


def _lora_sites(base: Checkpoint, how: Extraction | None) -> dict[str, tuple[str, Site]]:
    """Parameter name -> (the piece's key, the site), for the weights to be decomposed."""
    if how is None:
        return {}
    if how.sites:
        parts = base.roles.select(list(how.sites))
        if wrong := [p for p in parts if p.kind not in LoRA.kinds]:
            raise LuthierError(
                f"{wrong[0].name} is a {wrong[0].kind}, which LoRA cannot change: leave it out of the sites"
            )
    else:
        parts = [p for p in base.roles.parts if p.kind in LoRA.kinds and p.role.split(".")[0] not in APART]
        parts = [p for p in parts if not (p.kind == "fused-experts" and p.transposed)]
    found = {}
    for part in parts:
        site = site_of(base.roles, part)
        name = f"{site.name}.{site.parameter}"
        if name in base.items:  # of tied weights the first
            found[name] = (name if site.kind == "fused-experts" else site.name, site)
    return found
