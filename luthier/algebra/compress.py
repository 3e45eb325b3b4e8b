"""A tuned model's change in a smaller form, site by site; what it takes and what it loses."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.algebra import calibrate
from luthier.algebra.calibrate import Text
from luthier.algebra.changes import Tuned, finite
from luthier.attach.sites import sites_of
from luthier.attach.weights import module_at, oriented
from luthier.bridge.checkpoint import Checkpoint
from luthier.bridge.proof import prove
from luthier.bridge.target import Target, logits_of
from luthier.delta import FORMS, Change, Compression, No, Site, Small, State
from luthier.delta.artefact import Delta, Piece
from luthier.delta.probes import probe_inputs
from luthier.delta.seals import project, seal
from luthier.errors import LuthierError
from luthier.parts.bits import encode
from luthier.plan.compressing import CompressSpec

Say = Callable[[str], None]


@dataclass
class Account:
    """What a role's matrices take and lose."""

    role: str
    kept: str
    """packed, or exact."""
    matrices: int = 0
    weights: int = 0
    bytes: int = 0
    """On disk."""
    lost: float = 0.0
    """‖Δ − Δ̂‖², summed."""
    size: float = 0.0
    """‖Δ‖², summed."""

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / max(1, self.weights)

    @property
    def error(self) -> float:
        """‖Δ − Δ̂‖ / ‖Δ‖."""
        return (self.lost / self.size) ** 0.5 if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        own = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("lost", "size")}
        return own | {"bits": self.bits, "error": self.error}


@dataclass
class Outcome:
    """The compressed delta, and the account of it."""

    delta: Delta
    roles: list[Account]
    logits: dict[str, float] = field(default_factory=dict)
    tries: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Work:
    """One compression on its way."""

    def __init__(self, base: Checkpoint, tuned: Tuned, method: Compression, spec: CompressSpec, say: Say) -> None:
        self.base, self.tuned, self.method, self.spec, self.say = base, tuned, method, spec, say
        self.packed = self._packed_sites()
        self.beside = max(Counter(s.layer for s in self.packed if s.layer is not None).values(), default=1)
        self.accounts: dict[tuple[str, str], Account] = {}
        self.pieces: list[Piece] = []
        self.notes: Counter[str] = Counter()

    def _packed_sites(self) -> list[Site]:
        """The matrices to compress, in model order: those stated, and embedding and head where the plan says so."""
        found = sites_of(self.base.roles, self.spec.sites, self.spec.except_)
        found = [s for s in found if s.role not in ("embed", "head") or self.spec.embeddings == "compress"]
        if self.spec.embeddings == "compress":
            ends = {p.role for p in self.base.roles.parts} & {"embed", "head"}
            found += [s for s in sites_of(self.base.roles, sorted(ends)) if s not in found]
        wrong = [s for s in found if s.kind not in self.method.kinds]
        stated = self.spec.sites != ["linear"]
        if wrong and stated:
            raise LuthierError(
                f"method '{self.spec.method}' cannot compress {wrong[0].name} ({wrong[0].kind}); it compresses "
                f"{', '.join(self.method.kinds)}: leave it out of sites"
            )
        return [s for s in found if s.kind in self.method.kinds and self.tuned.moved(_parameter(s))]

    def value(self, name: str) -> Tensor:
        """The tuned values of a parameter, rounded first where the plan says so; finite."""
        value = finite(name, self.tuned.tuned(name))
        return value if self.spec.dtype == "auto" else value.to(getattr(torch, self.spec.dtype))

    def change(self, site: Site) -> tuple[Tensor, Tensor]:
        """(base, tuned − base) at a site, float32 [d_out, d_in], or the table of an embedding."""
        name = _parameter(site)
        base = self.base.tensor(name).float()
        change = self.value(name).float() - base
        if site.kind == "conv1d":
            base, change = base.t(), change.t()
        return base, change.contiguous()

    def one(self, site: Site, inputs: Tensor | None) -> tuple[Small, Tensor]:
        """A site compressed and put into its piece; with the change that came out, as `change` lays it out."""
        base, change = self.change(site)
        g = torch.Generator().manual_seed(self.spec.seed)
        small = self.method.compress(Change(site, base, change, inputs, g, self.beside))
        self.notes.update([small.note] if small.note else [])
        state = State(site, small.p, small.fixed, lambda: oriented(base, site) if site.kind == "embedding" else base)
        made = small.form.delta(state)
        assert not isinstance(made, No)
        back = oriented(made["weight"], site) if site.kind == "embedding" else made["weight"]
        finite(site.name, back)
        piece = self._piece(small)
        piece.sites[site.name], piece.p[site.name], piece.fixed[site.name] = site, small.p, small.fixed
        stored = piece.stored(site.name, site)
        taken = sum(t.numel() * t.element_size() for group in stored for t in group.values())
        if self.method.alone:  # measured by the weight, not by a change of it
            self._count(site, "packed", base.numel(), taken, base, base + back)
        else:
            self._count(site, "packed", change.numel(), taken, change, back)
        return small, back

    def _piece(self, small: Small) -> Piece:
        """The piece of this form and these settings, made at its first site."""
        for piece in self.pieces:
            if piece.form == small.form:
                return piece
        name = self.spec.method if not self.pieces else f"{self.spec.method}-{len(self.pieces) + 1}"
        self.pieces.append(Piece(name, small.form, {}, {}, {}))
        return self.pieces[-1]

    def _count(self, site: Site, kept: str, weights: int, taken: int, change: Tensor, back: Tensor) -> None:
        row = self.accounts.setdefault((site.role, kept), Account(site.role, kept))
        row.matrices, row.weights, row.bytes = row.matrices + 1, row.weights + weights, row.bytes + taken
        row.lost += float((change - back).double().square().sum())
        row.size += float(change.double().square().sum())

    def rest(self) -> list[Piece]:
        """What is kept exactly: integer differences of bit patterns, a piece for each type; unchanged tensors left out."""
        done = {_parameter(s) for s in self.packed}
        out: dict[torch.dtype, Piece] = {}
        for name, site in self.base.items.items():
            end = site.role in ("embed", "head")
            drop = self.spec.embeddings == "drop" if end else self.spec.rest == "drop"
            if name in done or drop or not self.tuned.moved(name) or self._tied(name, done):
                continue
            base, value = self.base.tensor(name), self.value(name)
            dtype = torch.promote_types(base.dtype, value.dtype)
            if dtype != value.dtype and torch.equal(base.to(value.dtype).to(base.dtype), base):
                dtype = value.dtype
            bits = encode(value.to(dtype), base.to(dtype))
            if not bool(bits.any()):
                continue
            kind = str(dtype)[6:]
            if dtype not in out:
                out[dtype] = Piece(f"kept-{kind}", FORMS.make("dense", {"dtype": kind}), {}, {}, {})
            piece = out[dtype]
            piece.sites[name], piece.p[name], piece.fixed[name] = site, {"bits": bits.clone()}, {}
            change = value.float() - base.float()
            self._count(site, "exact", bits.numel(), bits.numel() * bits.element_size(), change, change)
        return list(out.values())

    def _tied(self, name: str, done: set[str]) -> bool:
        return any(n in done for n in self.base.aliases(name))

    # -- on a model

    def load(self, model: Any) -> None:
        """Writes the tuned values into the model."""
        for name in self.base.items:
            if self.tuned.moved(name):
                self._write(model, name, self.value(name))

    def unload(self, model: Any) -> None:
        """Writes the base's values back."""
        for name in self.base.items:
            if self.tuned.moved(name):
                self._write(model, name, self.base.tensor(name))

    def _write(self, model: Any, name: str, value: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        with torch.no_grad():
            module_at(model, module)._parameters[leaf].copy_(value)  # pyright: ignore[reportOptionalMemberAccess]

    def calibrated(self, model: Any, text: Text) -> None:
        """All sites, layer by layer, each layer's inputs coming through the compressed layers before it."""

        def visit(site: Site, inputs: Tensor | None) -> None:
            self.say(f"{site.name}")
            _, back = self.one(site, inputs)
            total = self.base.tensor(_parameter(site)).float() + (back.t() if site.kind == "conv1d" else back)
            self._write(model, _parameter(site), total)

        calibrate.walk(model, self.base.roles, text.ids, self.packed, visit)

    def plain(self) -> None:
        """All sites, one after the other, from the files alone."""
        for site in self.packed:
            self.say(f"{site.name}")
            self.one(site, None)


def compress(
    base: Checkpoint,
    tuned: Tuned,
    method: Compression,
    spec: CompressSpec,
    on: Target | None,
    say: Say = lambda _: None,
) -> Outcome:
    """The whole of it: sites, what is kept, scales, seals and probes.

    on: the base loaded, where the method or the plan needs it; afterwards it is as it was. Without it tensors go
    through one by one, and the delta has seals but no probes.
    """
    work = Work(base, tuned, method, spec, say)
    if not work.packed:
        raise LuthierError("the tuned model changes none of the matrices to compress: state other sites")
    text = None
    if spec.calibration:
        words = on.tokenizer if on is not None else base.tokenizer
        if words is None:
            raise LuthierError(
                "calibration text needs a tokenizer, and the base came without one: state base.tokenizer"
            )
        text = calibrate.read_text(spec.calibration, words, base.kind, spec.tokens, spec.length)
    if on is None:
        work.plain()
        delta = Delta([*work.pieces, *work.rest()], _card(base))
        delta.seals = _seals(delta, base)
        return Outcome(delta, _rows(work), notes=_notes(work))
    return _on_model(work, on, text)


def _on_model(work: Work, on: Target, text: Text | None) -> Outcome:
    spec, model = work.spec, on.model
    run = logits_of(model)
    rows = text.kept(_width(on)) if text is not None else _probe_rows(on, spec.seed)
    at_base = calibrate.logits(run, rows)
    work.load(model)
    try:
        wanted = calibrate.logits(run, rows)
        if work.method.calibrated and text is not None:
            work.calibrated(model, text)
        else:
            work.plain()
    finally:
        work.unload(model)
    outcome = Outcome(Delta([*work.pieces, *work.rest()]), _rows(work), notes=_notes(work))
    names = [p.name for p in work.pieces]
    handle = outcome.delta.apply(model, strict=False)
    try:
        found = {"base": float((at_base - wanted).square().mean().sqrt())}
        numbers = calibrate.scales(handle, names)
        if text is not None and numbers and (factors := work.method.factors()):
            work.say("trying factors")
            outcome.tries = calibrate.sweep(run, numbers, factors, text)
        found["compressed"] = calibrate.apart(run, rows, wanted)
        tune = work.method.tunes if spec.tune is None else (work.method.tunes or "scales") if spec.tune else ""
        common = {"steps": spec.steps, "batch": spec.batch_size, "lr": spec.lr, "seed": spec.seed}
        if tune == "features" and text is not None:
            work.say("tuning to the base's features")
            found |= calibrate.tune_features(handle, calibrate.trained(handle, names), rows, **common)
            found["tuned"] = calibrate.apart(run, rows, wanted)
        elif tune and text is not None and numbers:
            work.say("tuning scales")
            found["compressed"], found["tuned"] = calibrate.tune_scales(model, numbers, rows, wanted, **common)
        outcome.delta = Delta(handle.delta().pieces)
    finally:
        outcome.delta.detach(model)
    outcome.logits = found | {"positions": float(rows.numel())}
    prove(outcome.delta, on, full=True)
    return outcome


def _width(on: Target) -> int:
    head = on.model.get_output_embeddings()
    return int(head.weight.shape[0]) if head is not None else int(getattr(on.model.config, "num_labels", 1))


def _probe_rows(on: Target, seed: int) -> Tensor:
    """Without text: the seeded random rows that probes are made of."""
    words = on.tokenizer if on.tokenizer is not None else on.model.get_input_embeddings().weight.shape[0]
    return torch.tensor(probe_inputs(words, seed=seed))


def _rows(work: Work) -> list[Account]:
    return sorted(work.accounts.values(), key=lambda row: (row.kept != "packed", row.role))


def _notes(work: Work) -> list[str]:
    """What the method had to say, with the number of matrices it said it of."""
    return [f"{note} ({count} of {len(work.packed)} matrices)" for note, count in work.notes.items()]


def _parameter(site: Site) -> str:
    return f"{site.name}.{site.parameter}"


def _card(base: Checkpoint) -> dict[str, Any]:
    from luthier.bases.fingerprint import fingerprint_of, fingerprint_template, fingerprint_tokenizer

    card: dict[str, Any] = {"name": base.name, "fingerprint": fingerprint_of(base.tensors()), "kind": base.kind}
    if base.tokenizer is not None:
        card |= {
            "tokenizer": fingerprint_tokenizer(base.tokenizer),
            "template": fingerprint_template(base.tokenizer),
        }
    return card


def _seals(delta: Delta, base: Checkpoint) -> dict[str, list[float]]:
    """Seals worked out from the files, a tensor at a time."""
    out: dict[str, list[float]] = {}
    for piece in delta.pieces:
        for key, site in piece.sites.items():
            if piece.form.at == "base":
                before = base.tensor(key)
                after = piece.form.edit(before, State(site, piece.p[key], {}, lambda b=before: b))  # pyright: ignore
                change = after.float() - before.float()
                out[f"{piece.name}/{key}"] = project(oriented(change, site) if change.dim() == 2 else change)
                continue
            weight = lambda s=site: oriented(base.tensor(_parameter(s)).float(), s)  # noqa: E731
            out[f"{piece.name}/{key}"] = seal(
                piece.form, State(site, piece.p[key], piece.fixed[key], weight), piece.scale
            )
    return out


def totals(rows: Sequence[Account], file: int, parameters: int, tuned_bytes: int) -> dict[str, float]:
    """What the compressed matrices and the file take: bits a weight, and ratios to 16 bits and to the tuned checkpoint."""
    packed = [r for r in rows if r.kept == "packed"]
    weights, taken = sum(r.weights for r in packed), sum(r.bytes for r in packed)
    lost, size = sum(r.lost for r in packed), sum(r.size for r in packed)
    return {
        "matrices_bits": 8 * taken / max(1, weights),
        "matrices_share": weights / max(1, parameters),
        "matrices_error": (lost / size) ** 0.5 if size else 0.0,
        "file_bytes": file,
        "file_bits": 8 * file / max(1, parameters),
        "file_ratio_16": 2 * parameters / max(1, file),
        "file_ratio": tuned_bytes / max(1, file),
    }
