"""compress: a tuned model's change in a few bits a weight, as a delta like any other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.algebra.changes import Itself, OfDelta, Pair, Tuned
from luthier.algebra.compress import Outcome, totals
from luthier.algebra.compress import compress as run
from luthier.bridge.checkpoint import Checkpoint
from luthier.bridge.peft import from_peft
from luthier.bridge.proof import refuse, same_base
from luthier.bridge.target import Target
from luthier.delta import COMPRESSIONS, Compression
from luthier.delta.artefact import Delta
from luthier.delta.folder import refuse_existing
from luthier.errors import LuthierError
from luthier.plan.compressing import CompressSpec, load_compressing
from luthier.plan.places import kind_of
from luthier.plan.schema import BaseSpec
from luthier.verbs.load import load_base_for


@dataclass(frozen=True)
class Compressed:
    """The compressed delta, where it lies, and what it takes and loses (the report)."""

    delta: Delta
    out: Path | None
    report: dict[str, Any]


def compress(
    plan: CompressSpec | Mapping[str, Any] | Delta | str | os.PathLike[str],
    tuned: str | os.PathLike[str] | None = None,
    *,
    method: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Compressed:
    """Compresses the change of a delta, or of a tuned checkpoint against its base; writes the delta to `out`.

    plan: a plan (mapping or YAML file: see plan.compressing.CompressSpec), a delta or PEFT folder, a Delta, or with
    `tuned` the base. out: a folder that is new or empty. settings: of the plan (calibration, embeddings, sites …) and
    of the method (density, bits …).
    Errors: no change to compress, a delta without a weight change, other shapes, NaN, an unknown method or setting, empty
    calibration text; nothing is then written.
    """
    own, spec = _spec(plan, tuned, method, settings, overrides)
    made: Compression = COMPRESSIONS.make(spec.method, spec.settings)
    read = [spec.delta, spec.tuned, spec.base.name if spec.base is not None else None]
    place = None if out is None else refuse_existing(out, read)
    _checks(made, spec)
    base, change, own, on = _sides(spec, own, made)
    outcome = run(base, change, made, spec, on, progress)
    if not any(row.size for row in outcome.roles):
        raise LuthierError(f"{spec.tuned or spec.delta or spec.base} changes nothing: there is no change to compress")
    delta = outcome.delta
    delta.lineage = _lineage(spec, own, outcome)
    if own is not None:
        delta.files = {k: v for k, v in own.files.items() if k != "README.md"}
        delta.base |= {k: own.base[k] for k in ("labels", "seed", "template") if own.base.get(k)}
    if place is not None:
        delta.save(place)
    return Compressed(delta, place, _report(spec, base, change, outcome, place))


def _spec(
    plan: Any, tuned: Any, method: str | None, settings: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[Delta | None, CompressSpec]:
    stated: dict[str, Any] = dict(settings) | ({"method": method} if method else {})
    if isinstance(plan, CompressSpec):
        plan = plan.model_dump(by_alias=True, exclude_defaults=True)
    if isinstance(plan, Delta):
        return plan, load_compressing({"delta": "", **stated}, overrides)
    if isinstance(plan, Mapping):
        return None, load_compressing({**plan, **stated}, overrides)
    name = os.fspath(plan)
    if Path(name).suffix in (".yaml", ".yml"):
        from luthier.plan.load import read_plan

        return None, load_compressing({**read_plan(name)[1], **stated}, overrides)
    if tuned is not None:
        return None, load_compressing({"base": name, "tuned": os.fspath(tuned), **stated}, overrides)
    alone = stated.get("method") in COMPRESSIONS and COMPRESSIONS[stated["method"]].alone
    return None, load_compressing({"base" if alone else "delta": name, **stated}, overrides)


def _checks(method: Compression, spec: CompressSpec) -> None:
    """Settings that cannot go together."""
    if method.alone and (spec.delta is not None or spec.tuned is not None):
        raise LuthierError(
            f"method '{spec.method}' makes a base smaller and takes no tuned model: state the base alone"
        )
    if not method.alone and spec.delta is None and spec.tuned is None:
        raise LuthierError(
            f"method '{spec.method}' compresses a change: state a delta, or a tuned checkpoint beside the base"
        )
    if spec.tune and not spec.calibration:
        raise LuthierError("tuning needs calibration text: state calibration, or leave tune out")
    if spec.calibration and not spec.probes:
        raise LuthierError("calibration runs the model, which probes: false leaves on disk: leave one of them out")


def _sides(
    spec: CompressSpec, own: Delta | None, method: Compression
) -> tuple[Checkpoint, Tuned, Delta | None, Target | None]:
    """The base on disk, the tuned side, the delta it comes from, and the base in memory where it is needed."""
    if spec.base is not None and (spec.tuned is not None or method.alone):
        base = Checkpoint(spec.base)
        change: Tuned = (
            Itself(base)
            if spec.tuned is None
            else Pair(base, Checkpoint(BaseSpec.model_validate({"name": spec.tuned, "kind": base.kind})))
        )
        stated = spec.base.model_copy(update={"kind": base.kind})
        return base, change, None, load_base_for(stated, [], {}, None) if spec.probes else None
    if own is None and (kind := kind_of(spec.delta or "")) != "adapter":
        if kind != "delta":
            raise LuthierError(
                f"no delta at {spec.delta}: give a delta folder, a PEFT folder, or a base and a checkpoint"
            )
        own = Delta.load(spec.delta or "")
    stated = spec.base or _base_of(spec, own)
    on = load_base_for(stated, [own] if own else [], {}, None) if spec.probes or own is None else None
    if own is None:
        assert on is not None
        own = from_peft(spec.delta or "", on)
    elif on is not None and own.base.get("fingerprint"):
        refuse([c for c in same_base(own, on) if c.name in ("base", "dtype")], spec.delta or "the delta")
    if own.base.get("new_tokens"):
        raise LuthierError(f"{spec.delta} brings new tokens: 'luthier export' it to a checkpoint and compress that")
    base = Checkpoint(stated)
    return base, OfDelta(base, own), own, on if spec.probes else None


def _base_of(spec: CompressSpec, own: Delta | None) -> BaseSpec:
    if own is None:
        from luthier.bridge.peft_config import named_base

        return BaseSpec.model_validate({"name": named_base(spec.delta or "")})
    if not (named := own.base.get("name")):
        raise LuthierError(f"{spec.delta or 'the delta'} names no base: state it (--base)")
    kind = own.base.get("kind")
    return BaseSpec.model_validate({"name": named} | ({"kind": kind} if kind else {}))


def _lineage(spec: CompressSpec, own: Delta | None, outcome: Outcome) -> dict[str, Any]:
    stated = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    lineage: dict[str, Any] = {"made_by": f"compress {spec.method}", "parents": [spec.delta or spec.tuned or None]}
    lineage["compress"] = stated | {"matrices": [row.to_dict() for row in outcome.roles]}
    if own is not None and own.lineage.get("plan"):
        lineage["plan"] = own.lineage["plan"]
    return lineage


def _report(
    spec: CompressSpec, base: Checkpoint, change: Tuned, outcome: Outcome, place: Path | None
) -> dict[str, Any]:
    parameters = tuned_bytes = 0
    for name in base.items:
        size = math.prod(base.shapes[name])
        parameters += size
        width = 2 if spec.dtype in ("bfloat16", "float16") else base.stored_as(name).itemsize
        tuned_bytes += size * width
    file = (place / "delta.safetensors").stat().st_size if place is not None else outcome.delta.nbytes()
    return {
        "method": spec.method,
        "roles": [row.to_dict() for row in outcome.roles],
        "total": totals(outcome.roles, file, parameters, tuned_bytes),
        "logits": outcome.logits,
        "tries": outcome.tries,
        "notes": outcome.notes,
        "parameters": parameters,
        "seals": len(outcome.delta.seals),
        "probes": bool(outcome.delta.probes),
    }
