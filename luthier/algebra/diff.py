"""Two checkpoints in, a delta out, tensor by tensor: exact, or as the LoRA that comes nearest."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.algebra.pairs import card_of, comparable, grown
from luthier.algebra.stacking import lora_of, lora_piece
from luthier.attach.sites import site_of
from luthier.attach.weights import oriented
from luthier.bases.fingerprint import Fingerprint, FullHash
from luthier.bridge.checkpoint import Checkpoint
from luthier.delta import FORMS, Site
from luthier.delta.artefact import Delta, Piece
from luthier.delta.folder import UNWRITABLE, refuse_existing
from luthier.delta.form import Form
from luthier.delta.seals import project, project_rows, seal, turned
from luthier.delta.stream import TensorStream
from luthier.errors import LuthierError
from luthier.forms.lora import LoRA
from luthier.parts.bits import INTEGER, encode
from luthier.parts.spread import spans
from luthier.parts.svd import balanced, svd_to

APART = ("head", "classifier", "router", "embed")
"""Roles that an extraction keeps exactly unless sites are stated."""
PIECE = 1 << 22
"""Numbers worked on at once in float32: of large tensors no such copy is made."""
SPARSE = 8
"""Bytes of an entry's place: where few entries changed, places and differences are smaller than all differences."""


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


class _Maker:
    """Collects pieces, their tensors going straight to the file."""

    def __init__(self, stream: TensorStream) -> None:
        self.stream = stream
        self.sites: dict[str, dict[str, Site]] = {}
        self.forms: dict[str, Form] = {}
        self.ranks: dict[str, int] = {}
        self.seals: dict[str, list[float]] = {}
        self.waiting: dict[str, tuple[Site, dict[str, Tensor]]] = {}

    def put(self, piece: str, form: Form, key: str, site: Site, p: dict[str, Tensor], fixed: dict[str, Tensor]) -> None:
        self.forms.setdefault(piece, form)
        self.sites.setdefault(piece, {})[key] = site
        for group, numbers in (("p", p), ("fixed", fixed)):
            for name, tensor in numbers.items():
                self.stream.add(f"{piece}/{key}/{group}/{name}", tensor)

    def exact(self, name: str, site: Site, tuned: Tensor, base: Tensor, module: Any) -> int:
        """A parameter's exact difference; gives how many numbers that takes."""
        dtype = str(tuned.dtype)[6:]
        bits = encode(tuned, base)
        count, width = int(bits.count_nonzero()), bits.element_size()
        few = count * (SPARSE + width) < bits.numel() * width
        moved = bits.reshape(-1).nonzero()[:, 0] if few else bits.new_zeros(0)
        kind = "entries" if few else "dense"
        piece = f"{kind}-{dtype}"
        p, fixed = {"bits": bits.reshape(-1)[moved] if few else bits}, {"index": moved} if few else {}
        site = replace(site, entries=count) if few else site
        self.put(piece, FORMS.make(kind, {"dtype": dtype}), name, site, p, fixed)
        self.seals[f"{piece}/{name}"] = _seal(tuned, base, module)
        return p["bits"].numel()

    def lowrank(self, key: str, site: Site, a: Tensor, b: Tensor) -> None:
        """Factors at one site. Fused experts wait for the others of their module, with which they share a rank."""
        module = site.name if site.kind == "fused-experts" else None
        if self.waiting and next(iter(self.waiting.values()))[0].name != module:
            self.settle()
        self.waiting[key] = (site, {"A": a, "B": b})
        if module is None:
            self.settle()

    def settle(self) -> None:
        """Writes the factors that wait."""
        if not self.waiting:
            return
        piece = lora_piece(
            "lora", {k: s for k, (s, _) in self.waiting.items()}, {k: p for k, (_, p) in self.waiting.items()}
        )
        for s, key in zip(piece.states(), piece.sites, strict=True):
            self.put("lora", piece.form, key, s.site, dict(s.p), {})
            self.seals[f"lora/{key}"] = seal(piece.form, s)
            self.ranks[s.site.name] = int(s.p["A"].shape[-2])
        self.waiting = {}

    def pieces(self) -> list[Piece]:
        self.settle()
        if "lora" in self.forms:
            self.forms["lora"] = lora_of(self.ranks)
        order = sorted(self.sites, key=lambda n: n != "lora")
        blank = {n: {k: {} for k in self.sites[n]} for n in order}
        return [Piece(n, self.forms[n], self.sites[n], blank[n], blank[n]) for n in order]


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
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{out.name}-", suffix=".safetensors", dir=out.parent)
    os.close(handle)
    room = [f"entries-bfloat16/{n}/fixed/index" for n in base.names] + [f"lora/{k}/fixed/A" for k, _ in lora.values()]
    stream = TensorStream(Path(temporary), 2 * room)
    try:
        maker = _Maker(stream)
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
        stream.close()
        card["fingerprint"], card["full_fingerprint"] = str(ours), str(full)
        lineage = {
            "parents": [],
            "made_by": "diff",
            "tuned": {"name": tuned.name, "fingerprint": str(theirs)},
            "how": "exact" if how is None else {k: v for k, v in vars(how).items() if v},
            "found": [r.to_dict() for r in rows.values()],
        }
        delta = Delta(pieces, card, lineage, seals=maker.seals, files=files)
        delta.save(out, numbers=temporary)
    except UNWRITABLE as e:
        raise LuthierError(
            f"cannot write the delta to {out}: {getattr(e, 'strerror', None) or e}; nothing was left behind"
        ) from e
    finally:
        stream.drop()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return Diff(delta, list(rows.values()), notes, (out / "delta.safetensors").stat().st_size)


def _one(
    maker: _Maker,
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
    size = _squared(now, was)
    for which, values in ((base, was), (tuned, now)):
        if not math.isfinite(size) and not torch.isfinite(values).all():
            raise LuthierError(f"{which.folder}: {name} holds NaN or infinity: fetch or train it again")
    row.changed += 1
    row.numbers += now.numel()
    row.change += size
    row.base += _squared(was)
    if lora is not None and how is not None:
        key, at = lora
        a, b, lost = _factors(oriented(_change(now, was), at), how)
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
    lost = _squared(change - b @ a)
    return a, b, lost


def _change(now: Tensor, was: Tensor) -> Tensor:
    """now − was in float32, or wider numbers' difference rounded to it."""
    wide = torch.promote_types(torch.promote_types(now.dtype, was.dtype), torch.float32)
    return now.to(wide).sub(was).float()


def _squared(tensor: Tensor, less: Tensor | None = None) -> float:
    """Squared norm of a tensor, or of its change from another one, piece by piece: no wide copy of the whole is made."""
    x, y = tensor.reshape(-1), None if less is None else less.reshape(-1)
    total = 0.0
    for a, b in spans(len(x), PIECE):
        piece = x[a:b].float() if y is None else _change(x[a:b], y[a:b])
        total += float(piece.square().sum(dtype=torch.float64))
    return total


def _seal(tuned: Tensor, base: Tensor, module: Any) -> list[float]:
    """`project` of the change as the module turns it, a few rows of it at a time."""
    if tuned.dim() < 2:
        return project(_change(tuned, base))
    now, was = (x.reshape(-1, x.shape[-1]) for x in (tuned, base))
    size = max(1, PIECE // max(1, now.shape[1]))
    flip = turned(tuned, module) is not tuned
    return project_rows(lambda a, b: _change(now[a:b], was[a:b]), (now.shape[0], now.shape[1]), size, flip)


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
