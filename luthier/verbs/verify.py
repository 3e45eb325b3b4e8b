"""verify: is the delta there, is it this one, and does what others wrote do what they think it does?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from luthier.bridge.foreign import verify_adapter
from luthier.bridge.merged import verify_merged
from luthier.bridge.proof import Check, Report, applied, norms_hold, probes_hold, same_base, same_values, seals_hold
from luthier.bridge.target import Target, target
from luthier.delta.artefact import Delta, read_header
from luthier.delta.seals import seals_of
from luthier.delta.wiring import is_assembly
from luthier.errors import LuthierError
from luthier.plan.places import kind_of
from luthier.plan.schema import BaseSpec

__all__ = ["Check", "Report", "verify"]


def verify(
    path: str | os.PathLike[str],
    base: Any = None,
    merged: str | os.PathLike[str] | None = None,
    *,
    full: bool = False,
) -> Report:
    """Checks a delta folder, an assembly's, a PEFT adapter folder, or (path a checkpoint, or `merged`) a merged checkpoint; true when all
    holds. Every failing check says the remedy.

    base: name, folder, model or what load_base gives; default the one the folder names. merged: a checkpoint said to hold
    the delta or adapter at `path`, which is then compared with it. full: hash every value of the base, not a sample.
    A folder that is none of these, or cannot be read at all, is a LuthierError.
    """
    path = Path(path)
    if merged is not None and not (Path(merged) / "config.json").exists():
        raise LuthierError(f"merged: {merged} is no checkpoint: give the folder that holds its config.json")
    if is_assembly(path):
        from luthier.verbs.assemble import verify_assembly

        if base is not None or merged is not None:
            raise LuthierError(f"{path} is an assembly, which names its own bases: leave base and merged out")
        return verify_assembly(path)
    kind = kind_of(path)
    if kind == "delta":
        return _delta(path, base, merged, full)
    if kind == "adapter":
        return verify_adapter(path, base, merged)
    if kind == "checkpoint":
        if base is None:
            raise LuthierError(f"{path} is a checkpoint: state the base it was made from (--base)")
        return verify_merged(Report(str(path), "checkpoint"), target(base), path)
    if not path.exists():
        raise LuthierError(f"nothing at {path}: give a delta folder, a PEFT adapter folder, or a checkpoint folder")
    raise LuthierError(
        f"{path} holds no delta.json, adapter_config.json or config.json: give the folder that holds one"
    )


def _delta(path: Path, base: Any, merged: str | os.PathLike[str] | None, full: bool) -> Report:
    report = Report(str(path), "delta")
    header = read_header(path)
    try:
        delta = Delta.load(path)
    except LuthierError as e:
        report.add("file", False, str(e))
        return report
    report.add("file", True, f"format {header['format']}, digest holds, {delta.nbytes() / 2**20:.2f} MB")
    report.checks.append(norms_hold(delta))
    on = _base(delta, base)
    report.checks += same_base(delta, on)
    if any(c.name in ("base", "dtype") and c.ok is False for c in report.checks):
        return report
    if full:
        report.checks.append(same_values(delta, on))
    try:
        handle = delta.apply(on.model)
    except LuthierError as e:
        report.add("tensors", False, str(e))
        return report
    try:
        report.checks.append(applied(delta, handle))
        report.checks.append(seals_hold(delta, seals_of(handle), next(on.model.parameters()).dtype))
        report.checks.append(probes_hold(delta, on))
    finally:
        delta.detach(on.model)
    if merged is not None:
        verify_merged(report, on, Path(merged), delta)
    return report


def _base(delta: Delta, base: Any) -> Target:
    if base is not None and not isinstance(base, (str, os.PathLike, BaseSpec)):
        return target(base)
    from luthier.verbs.load import load_base_for

    name = base if base is not None else delta.base.get("name")
    if not name:
        raise LuthierError("the delta names no base: state it (--base)")
    return load_base_for(name, [delta], {}, None)
