"""What a delta carries to prove itself, made and checked: seals of every site and probes of the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from luthier.attach import Attached, attached
from luthier.bases.fingerprint import compare, fingerprint_template, fingerprint_tokenizer, full_fingerprint
from luthier.bridge.target import Target, logits_of, target
from luthier.delta.artefact import Delta
from luthier.delta.probes import ModelFn, check_probes, record_probes
from luthier.delta.seals import check_seals, seals_of
from luthier.errors import LuthierError


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `ok` None: could not be, or is only a note; the detail says why."""

    name: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'note' if self.ok is None else 'FAIL'}  {self.name}: {self.detail}"


@dataclass
class Report:
    """What verify says. True where no check failed and at least one was made."""

    path: str
    kind: str
    """delta, adapter or checkpoint."""
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all that could be checked holds."""
        decided = [c.ok for c in self.checks if c.ok is not None]
        return bool(decided) and all(decided)

    @property
    def failed(self) -> list[Check]:
        """The checks that do not hold."""
        return [c for c in self.checks if c.ok is False]

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = f"{self.path} ({self.kind}): {'holds' if self.ok else 'does NOT hold'}"
        return "\n".join([head, *(f"  {c}" for c in self.checks)])

    def add(self, name: str, ok: bool | None, detail: str) -> bool:
        """Notes a check; gives whether it holds."""
        self.checks.append(Check(name, ok, detail))
        return bool(ok)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {"path": self.path, "kind": self.kind, "ok": self.ok, "checks": [asdict(c) for c in self.checks]}


def prove(delta: Delta, base: Any, prompts: Sequence[str] = (), seed: int = 0, *, full: bool = False) -> Delta:
    """Gives the delta its seals, probes and base card, by putting it on the base for a moment. Gives the same delta.

    full: the card also holds the hash over every value of the base, for `verify --full`.
    """
    on = target(base)
    words = on.tokenizer if on.tokenizer is not None else on.model.get_input_embeddings().weight.shape[0]
    delta.base = on.card() | {k: v for k, v in delta.base.items() if v}
    if full and (mark := full_mark(on)):
        delta.base["full_fingerprint"] = mark
    handle = delta.apply(on.model)
    try:
        delta.seals = seals_of(handle)
        run = logits_of(on.model)

        def off(ids: torch.Tensor) -> torch.Tensor:
            with handle.off():
                return run(ids)

        delta.probes = record_probes(off, run, words, prompts, seed)
    finally:
        delta.detach(on.model)
    return delta


def full_mark(base: Any) -> str | None:
    """Hash over every value of a base as its checkpoint has it: no deltas, no new rows, no fresh head.

    base: as for `bridge.target`; deltas on it are switched off meanwhile. None for a base that has grown, which no longer
    has its old tables. Reads about 2 GB a second.
    """
    on = target(base)
    if on.new_rows:
        return None
    with attached(on.model).off():
        return full_fingerprint(on.model, on.fresh)


def same_values(delta: Delta, on: Target) -> Check:
    """Whether every value of the base is the one that the delta was made on, not only a sample of them."""
    told = delta.base.get("full_fingerprint")
    if told is None:
        return Check("full fingerprint", None, "not checked: the delta states none, as where new tokens grew the base")
    if compare(delta.base["fingerprint"], on.card()["fingerprint"]) == "same, other dtype":
        made = delta.base["fingerprint"].split(":")[-1]
        return Check(
            "full fingerprint", None, f"not checked: the delta's base was held in {made}, load it with dtype: {made}"
        )
    here = full_mark(on)
    if here is None:
        return Check("full fingerprint", None, "not checked: this base has grown by new tokens")
    if here == told:
        return Check("full fingerprint", True, "every value is the same")
    return Check("full fingerprint", False, f"values outside the sample differ (delta: {told[:16]}…, base: {here[:16]}…): the base "
                 "was altered; fetch it again")  # fmt: skip


def same_base(delta: Delta, on: Target) -> Iterator[Check]:
    """Whether the delta was made on this base, with this tokenizer and chat template."""
    stated, here = delta.base.get("fingerprint"), on.card()
    if not stated:
        yield Check("base", False, "the delta states no fingerprint of its base: import it again, or train it here")
    else:
        said = compare(stated, here["fingerprint"])
        names = f"delta: {stated} ({delta.base.get('name')}), base: {here['fingerprint']} ({on.name})"
        remedy = "the same" if said == "same" else "the same, held in another dtype"
        yield Check("base", said != "different", remedy if said != "different" else f"another base; {names}")
        if said == "same, other dtype" and _loses(delta, on):
            yield Check(
                "dtype",
                False,
                f"the delta holds exact differences of a base in {delta.base.get('dtype') or stated.split(':')[-1]}, this one "
                f"is held in {_dtype(on)}: load it with dtype: {stated.split(':')[-1]}",
            )
    for key, make in (("tokenizer", fingerprint_tokenizer), ("template", fingerprint_template)):
        told = delta.base.get(key)
        if on.tokenizer is None or not told:
            yield Check(key, None, f"not checked: {'no tokenizer at hand' if told else 'the delta states none'}")
            continue
        same = told == make(on.tokenizer)
        remedy = (
            "the same"
            if same
            else f"the {key} is not the one it was trained with ({told[:12]}… against {make(on.tokenizer)[:12]}…): use the "
            "files saved beside the delta, or the base's original ones"
        )
        yield Check(key, same, remedy)


def _dtype(on: Target) -> str:
    return str(next(on.model.parameters()).dtype).removeprefix("torch.")


def _loses(delta: Delta, on: Target) -> bool:
    """Whether bits of moved parameters were taken in a wider type than the base is held in now."""
    if not any(piece.form.at == "base" for piece in delta.pieces):
        return False
    made = getattr(torch, str(delta.base.get("fingerprint")).split(":")[-1])
    return torch.finfo(made).bits > torch.finfo(next(on.model.parameters()).dtype).bits


def holds(delta: Delta, handle: Attached, on: Target) -> Iterator[Check]:
    """The checks of a delta that lies on a model: every tensor there and not zero, every seal, and the probes."""
    yield applied(delta, handle)
    yield seals_hold(delta, seals_of(handle), next(on.model.parameters()).dtype)
    yield probes_hold(delta, on)


def applied(delta: Delta, handle: Attached) -> Check:
    """Counts tensors: stated, found, applied; and those without a single number other than where they start."""
    stated = sum(len(piece.sites) for piece in delta.pieces)
    there = sum(
        len(handle.edits[piece.name]) if piece.name in handle.edits else len(handle.placed.get(piece.name, []))
        for piece in delta.pieces
    )
    tensors = sum(len(piece.p[key]) for piece in delta.pieces for key in piece.sites)
    if there != stated:
        return Check("tensors", False, f"{stated} sites in the delta, {there} on the model: attach it again")
    return Check("tensors", True, f"{tensors} tensors at {stated} sites, all applied")


def norms_hold(delta: Delta) -> Check:
    """Whether the seals say that anything changed at all, and where nothing did."""
    silent = [site for site, seal in delta.seals.items() if not any(seal)]
    if not delta.seals:
        return Check("norms", None, "not checked: the delta carries no seals")
    if len(silent) == len(delta.seals):
        if any(p["bits"].any() for piece in delta.pieces if piece.form.at == "base" for p in piece.p.values()):
            return Check("norms", None, "zeros change their sign and nothing else: no value differs from the base's")
        return Check("norms", False, "every change is zero: nothing was trained, or the save was empty; train again")
    return Check("norms", True, f"{len(delta.seals) - len(silent)} of {len(delta.seals)} sites changed")


def seals_hold(delta: Delta, found: dict[str, list[float]], dtype: torch.dtype) -> Check:
    """Every site's seeded projection is the stored one."""
    if not delta.seals:
        return Check("seals", None, "the delta carries none (written by an older version, or by hand)")
    own = {k: v for k, v in found.items() if k in delta.seals or k.split("/")[0] in {p.name for p in delta.pieces}}
    broken = check_seals(own, delta.seals, dtype)
    if extra := sorted(set(own) - set(delta.seals)):
        return Check(
            "seals", False, f"{len(extra)} sites carry no seal ({extra[0]}): the delta was changed after its save"
        )
    if broken:
        worst = broken[0]
        return Check(
            "seals",
            False,
            f"{len(broken)} of {len(delta.seals)} sites do not hold: {worst.site} is {worst.why}"
            f"{f', off by {worst.share:.0%}' if worst.why == 'altered' else ''}: copy the delta again",
        )
    return Check("seals", True, f"all {len(delta.seals)} sites hold")


def probes_hold(delta: Delta, on: Target) -> Check:
    """The model is the tuned one, not the base, on the stored inputs."""
    if not delta.probes:
        return Check("probes", None, "the delta carries none")
    other = other_type(delta, on) if attached(on.model).enabled else None
    verdict = check_probes(delta.probes, logits_of(on.model), base_fn=other)
    remedy = ": load the delta again on its own base" if verdict.ok is False else ""
    return Check("probes", verdict.ok, verdict.reason + remedy)


def other_type(delta: Delta, on: Target) -> ModelFn | None:
    """The base without any delta, by which `check_probes` measures the difference of types, where it is held in another
    type than the delta was made on; else None."""
    made = delta.base.get("fingerprint")
    if not made or compare(made, on.card()["fingerprint"]) != "same, other dtype":
        return None
    run = logits_of(on.model)

    def plain(ids: torch.Tensor) -> torch.Tensor:
        with attached(on.model).off():
            return run(ids)

    return plain


def refuse(checks: Sequence[Check], what: str) -> None:
    """One LuthierError for the first check that fails."""
    if failed := [c for c in checks if c.ok is False]:
        more = f" (and {len(failed) - 1} more: luthier verify {what})" if len(failed) > 1 else ""
        raise LuthierError(f"{what}: {failed[0].name}: {failed[0].detail}{more}")
