"""assemble: small models, tuned and untuned, wired to steer a large one; the wiring is saved, loaded and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.attach.assembly import Assembly, Parts, Voice, dress
from luthier.bases.fingerprint import fingerprint_tokenizer
from luthier.bridge.peft import from_peft
from luthier.bridge.proof import Check, Report, holds, prove, refuse, same_base
from luthier.bridge.target import Target, logits_of
from luthier.delta import MOVES
from luthier.delta.artefact import Delta
from luthier.delta.folder import refuse_existing
from luthier.delta.probes import check_probes, record_probes
from luthier.delta.wiring import Member, Wiring, read_wiring
from luthier.errors import LuthierError
from luthier.moving.engine import Fusion
from luthier.plan.moving import AssembleSpec, MemberSpec, load_moving
from luthier.plan.places import kind_of
from luthier.plan.schema import BaseSpec
from luthier.verbs.load import load_base_for

SPEC = ("revision", "dtype", "attention", "tokenizer", "roles")
"""How a base is loaded, as far as an assembly's file may say: never that code be run."""


@dataclass(frozen=True)
class Assembled:
    """The assembly, as a model and on disk (`out` is None where nothing was written)."""

    model: Assembly
    wiring: Wiring
    out: Path | None
    base: Target
    """The assembly as a base: model, tokenizer, kind and fingerprint."""


def assemble(
    plan: AssembleSpec | Mapping[str, Any] | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    device: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Assembled:
    """Builds the assembly that a plan states (see plan.moving.AssembleSpec), proves it, and writes it to `out`.

    Errors: unequal vocabularies, a delta that does not hold on its base, a method that fuses no predictions, settings that
    do not fit the number of pairs, an `out` that is not empty.
    """
    spec = plan if isinstance(plan, AssembleSpec) else load_moving(AssembleSpec, plan, overrides)
    members = [spec.large, *(m for pair in spec.pairs for m in (pair.expert, pair.base) if m)]
    place = None if out is None else refuse_existing(out, [p for m in members for p in m.places])
    fusion = MOVES.make(spec.method, spec.settings)
    if not isinstance(fusion, Fusion):
        raise LuthierError(
            f"method '{spec.method}' moves weights and steers no model while it writes: use luthier port"
        )
    loader = _Loader(device, progress)
    large = loader.member(spec.large, "large")
    pairs = []
    for n, pair in enumerate(spec.pairs, 1):
        expert = loader.member(pair.expert, f"expert {n}")
        base = loader.member(pair.base, f"base {n}") if pair.base else loader.untuned(expert, n)
        pairs.append((expert, base))
    wiring = Wiring(fusion, large, pairs)
    model, on = _wired(wiring, loader, check=True)
    plans = [d.lineage["plan"] for e, _ in pairs for d in e.deltas if d.lineage.get("plan")]
    wiring.lineage = {
        "made_by": f"assemble {spec.method}",
        "plan": {**plans[0], "base": {"name": large.base.get("name")}} if plans else None,
        "parents": [d for m in (spec.large, *(p.expert for p in spec.pairs)) for d in m.deltas],
    }
    progress("recording probes")
    wiring.probes = _probes(model, on.tokenizer)
    if place is not None:
        wiring.save(place)
    return Assembled(model, wiring, place, on)


def load_assembly(
    folder: str | os.PathLike[str], *, check: bool = True, device: str | None = None
) -> tuple[Assembly, Target, Wiring]:
    """The assembly of a folder as a model, and as a base with its tokenizer. check: every delta's proof on its base, the
    vocabularies and the assembly's own probes; one that fails is a LuthierError."""
    wiring = Wiring.load(folder)
    model, on = _wired(wiring, _Loader(device), check)
    if check:
        refuse([probes_hold(wiring, model)], str(folder))
    return model, on, wiring


def verify_assembly(folder: Path) -> Report:
    """Checks an assembly folder: whole and unaltered, every delta on its base, vocabularies, probes."""
    report = Report(str(folder), "assembly")
    header = read_wiring(folder)
    try:
        wiring = Wiring.load(folder)
    except LuthierError as e:
        report.add("file", False, str(e))
        return report
    count = sum(1 for _ in wiring.members())
    report.add(
        "file", True, f"format {header['format']}, {count} members, fingerprint {wiring.fingerprint[:16]}… holds"
    )
    loader = _Loader(None, checks=report.checks)
    try:
        model, on = _wired(wiring, loader, check=True)
    except LuthierError as e:
        if report.ok:
            report.add("members", False, str(e))
        return report
    report.add("vocabulary", True, f"{model.vocabulary} tokens in all, one tokenizer" if on.tokenizer else
               f"{model.vocabulary} tokens in all")  # fmt: skip
    report.checks.append(probes_hold(wiring, model))
    return report


def inspect_assembly(folder: Path) -> dict[str, Any]:
    """What an assembly folder holds, without a model."""
    wiring = Wiring.load(folder)
    return {
        "folder": str(folder),
        "fusion": {"name": MOVES.name_of(type(wiring.fusion)), **wiring.fusion.__dict__},
        "fingerprint": wiring.fingerprint,
        "members": [
            {
                "part": role,
                "base": member.base.get("name"),
                "fingerprint": member.base.get("fingerprint"),
                "deltas": ", ".join(p.name for d in member.deltas for p in d.pieces) or None,
                "numbers": sum(d.count() for d in member.deltas),
            }
            for role, member in wiring.members()
        ],
        "files": {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()},
        "lineage": wiring.lineage,
        "audit": wiring.audit,
        "probes": len(wiring.probes.get("lengths", ())),
    }


def probes_hold(wiring: Wiring, model: Assembly) -> Check:
    """The assembly answers as when it was made."""
    if not wiring.probes:
        return Check("probes", None, "the assembly carries none")
    verdict = check_probes(wiring.probes, logits_of(model))
    told = verdict.reason.replace("the delta is there", "the members steer").replace("the delta", "the assembly")
    return Check("probes", verdict.ok, told + ("" if verdict.ok else ": make the assembly anew"))


def _probes(model: Assembly, tokenizer: Any) -> dict[str, torch.Tensor]:
    run = logits_of(model)

    def off(ids: torch.Tensor) -> torch.Tensor:
        with model.off():
            return run(ids)

    return record_probes(off, run, tokenizer if tokenizer is not None else model.vocabulary)


class _Loader:
    """Loads every base once, and proves every delta on it."""

    def __init__(
        self, device: str | None, progress: Callable[[str], None] = lambda _: None, checks: list[Check] | None = None
    ) -> None:
        self.device, self.progress, self.checks = device, progress, checks
        self.held: dict[str, Target] = {}
        self.of: dict[str, list[Delta]] = {}
        self.proven: set[int] = set()

    def target(self, spec: BaseSpec, deltas: Sequence[Delta]) -> Target:
        """The base of a spec, with the new tokens that its deltas brought; loaded at the first call."""
        new = next((d.base["new_tokens"] for d in deltas if d.base.get("new_tokens")), [])
        if Path(spec.name).is_dir():
            spec = spec.model_copy(update={"name": str(Path(spec.name).resolve())})
        key = json.dumps([spec.model_dump(mode="json"), new], sort_keys=True)
        if key not in self.held:
            self.progress(f"loading {spec.name}")
            self.held[key] = load_base_for(spec, list(deltas), {}, self.device)
        return self.held[key]

    def member(self, spec: MemberSpec, role: str) -> Member:
        """A stated member: its deltas read, its base found."""
        for path in spec.deltas:
            if not Path(path).exists():
                raise LuthierError(f"{role}: no delta at {path}: give a delta folder or a PEFT folder")
        peft = {p: kind_of(p) == "adapter" for p in spec.deltas}
        deltas = [None if peft[p] else Delta.load(p) for p in spec.deltas]
        base = spec.base or _named(deltas, spec.deltas, role)
        on = self.target(base, [d for d in deltas if d is not None])
        if on.kind != "causal":
            raise LuthierError(f"{role}: {on.name} is of kind {on.kind}, and only causal models can be assembled")
        ready = [prove(from_peft(p, on), on) if d is None else d for d, p in zip(deltas, spec.deltas, strict=True)]
        card = on.card()
        stated = base.model_dump(mode="json", exclude_defaults=True, include=set(SPEC))
        return Member({k: v for k, v in (card | {"spec": stated}).items() if v}, ready)

    def untuned(self, expert: Member, n: int) -> Member:
        """The base of an expert's deltas, with what those were trained on top of."""
        if not expert.deltas:
            raise LuthierError(f"expert {n} is a base without a delta ({expert.base.get('name')}): state base, the same model "
                               "before its tuning")  # fmt: skip
        below = []
        for delta in expert.deltas:
            parents = [p for p in delta.pieces if p.name.startswith("parent")]
            if parents:
                on = self.on(expert)
                below.append(prove(Delta(parents, dict(delta.base), {"made_by": "what a delta was trained on"}), on))
        return Member(dict(expert.base), below)

    def on(self, member: Member) -> Target:
        """A member's base."""
        stated = {"name": member.base.get("name"), "kind": member.base.get("kind", "causal")} | member.base.get(
            "spec", {}
        )
        return self.target(BaseSpec.model_validate(stated), member.deltas)

    def check(self, member: Member, role: str) -> None:
        """Every delta of a member on its base, each once; a failure is an error."""
        on = self.on(member)
        dress(on.model, None)
        stated, here = member.base.get("fingerprint"), on.card()["fingerprint"]
        own = Delta([], {k: v for k, v in member.base.items() if k in ("name", "fingerprint", "tokenizer")})
        found = [c for c in same_base(own, on) if c.ok is not None] if stated else []
        if member.deltas and all(c.ok for c in found):
            found = []  # its deltas say the same once more
        if not stated:
            raise LuthierError(
                f"{role}: the assembly states no fingerprint of {member.base.get('name')} ({here}): make it anew"
            )
        for delta in member.deltas:
            if id(delta) not in self.proven:
                self.proven.add(id(delta))
                found += [c for c in same_base(delta, on) if c.ok is not None]
                if all(c.ok for c in found):
                    handle = delta.apply(on.model)
                    try:
                        found += list(holds(delta, handle, on))
                    finally:
                        delta.detach(on.model)
        if self.checks is not None:
            self.checks += [Check(f"{role}: {c.name}", c.ok, c.detail) for c in found]
        refuse(found, role)


def _named(deltas: Sequence[Delta | None], paths: Sequence[str], role: str) -> BaseSpec:
    """The base that the first delta was made on."""
    for delta, path in zip(deltas, paths, strict=True):
        if delta is None:
            from luthier.bridge.peft_config import read_config

            name = read_config(Path(path)).get("base_model_name_or_path")
        else:
            name = delta.base.get("name")
        if name:
            return BaseSpec.model_validate({"name": name})
    said = f"{paths[0]} names no base" if paths else "neither base nor deltas are stated"
    raise LuthierError(f"{role}: {said}: state base")


def _wired(wiring: Wiring, loader: _Loader, check: bool) -> tuple[Assembly, Target]:
    """The models with their deltas, as one; equal members are one voice."""
    try:
        wiring.fusion.check(len(wiring.pairs))
    except ValueError as e:
        raise LuthierError(f"{MOVES.name_of(type(wiring.fusion))}: {e}") from e
    bases = {role: loader.on(member) for role, member in wiring.members()}
    _one_vocabulary(bases)
    if check:
        for role, member in wiring.members():
            loader.check(member, role)
    voices: list[Voice] = []
    number: dict[str, int] = {}
    marks = {role: member.mark for role, member in wiring.members()}
    for role, member in wiring.members():
        if marks[role] not in number:
            number[marks[role]] = len(voices)
            voices.append(Voice(role, bases[role].model, member.deltas))
    pairs = tuple((number[marks[f"expert {n}"]], number[marks[f"base {n}"]]) for n in range(1, len(wiring.pairs) + 1))
    model = Assembly(wiring.fusion, voices, Parts(number[marks["large"]], pairs)).eval()
    large, speaker = bases["large"], bases["expert 1"]
    name = f"{large.name}, steered"
    return model, Target(model, large.roles, name, speaker.tokenizer or large.tokenizer, wiring.fingerprint)


def _one_vocabulary(bases: Mapping[str, Target]) -> None:
    """Refuses members whose tokens are not the same; tables padded to different sizes behind them are fine."""
    large = bases["large"]
    sizes = {role: int(on.model.get_output_embeddings().weight.shape[0]) for role, on in bases.items()}
    for role, on in bases.items():
        if (on.tokenizer is None) != (large.tokenizer is None):
            raise LuthierError(
                f"{role} ({on.name}) and large ({large.name}) must both have a tokenizer: state base.tokenizer"
            )
        if on.tokenizer is None:
            if sizes[role] != sizes["large"]:
                raise LuthierError(f"{role} ({on.name}) has {sizes[role]} tokens, large ({large.name}) {sizes['large']}: an "
                                   "assembly needs one vocabulary")  # fmt: skip
        elif (moved := next(_moved(large.tokenizer, on.tokenizer), None)) is not None:
            raise LuthierError(f"{role} ({on.name}) and large ({large.name}) have unequal vocabularies (token {moved!r}): an "
                               "assembly needs one; take small models of the large one's family")  # fmt: skip


def _moved(a: Any, b: Any) -> Iterator[str]:
    """Tokens that do not have one id in both tokenizers."""
    if fingerprint_tokenizer(a) == fingerprint_tokenizer(b):
        return
    left, right = a.get_vocab(), b.get_vocab()
    yield from sorted(t for t in left.keys() | right.keys() if left.get(t) != right.get(t))
