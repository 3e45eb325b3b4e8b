"""A trained base as a compressed delta on its parent: the first compression that costs it nothing it knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.practice import card
from luthier.practice.train_base import save_base

LOST = 0.02
"""Most that the test score of any family told of may lose for a compression to be taken."""
TEXT = 16_384
"""Tokens of calibration text, of the families told of."""


def keep(trained: Path, parent: str, ways: Sequence[Mapping[str, Any]], items: int) -> dict[str, Any]:
    """Replaces ``trained``, a base's folder, by its parent with the compressed change folded in, and puts the delta into
    ``trained/delta``. Gives what was tried, with bytes and scores before and after; the same stands in training.json.

    parent: the base's name. ways: plans of ``luthier compress`` (method and settings), smallest first; where each loses more
    than `LOST` the folder stays as it is. items: test records of each family.
    """
    story = json.loads((trained / "training.json").read_text())
    known = card.told_of(story)
    before = _scores(trained, known, items)
    record: dict[str, Any] = {"as": "bf16", "before": before, "tried": []}
    for way in ways:
        part = trained.with_name("folded")
        shutil.rmtree(part, ignore_errors=True)
        size = _folded(trained, parent, way, known, part)
        after = _scores(part, known, items)
        record["tried"].append({**way, "bytes": size, "scores": after})
        if all(after[name] >= before[name] - LOST for name in known):
            record["as"] = str(way["method"])
            (part / "training.json").write_text(json.dumps({**story, "kept": record}, indent=1) + "\n")
            shutil.rmtree(trained)
            part.rename(trained)
            return record
        shutil.rmtree(part)
    (trained / "training.json").write_text(json.dumps({**story, "kept": record}, indent=1) + "\n")
    return record


def unfold(delta: Path, parent: str, folder: Path) -> None:
    """The base that a kept delta makes of its parent, in bf16, into a new folder, with the delta beside it.

    Raises LuthierError where the parent is not the base that the delta was made on, or its seals or probes do not hold.
    """
    from luthier.bases.load import load_base
    from luthier.bridge.proof import holds, refuse, same_base
    from luthier.bridge.target import target
    from luthier.delta.artefact import Delta
    from luthier.plan.schema import BaseSpec

    own = Delta.load(delta)
    on = target(load_base(BaseSpec.model_validate({"name": parent, "dtype": "float32"}), device="cpu"))
    refuse([c for c in same_base(own, on) if c.name == "base"], str(delta))
    handle = own.apply(on.model)
    refuse([*holds(own, handle, on)], str(delta))
    handle.fold()  # in float32, of which what stays exact is told; bf16 comes after
    save_base(folder, on.model, on.tokenizer)
    shutil.copytree(delta, folder / "delta")


def _folded(trained: Path, parent: str, way: Mapping[str, Any], known: Sequence[str], part: Path) -> int:
    """The compressed base in ``part``; gives the delta's bytes."""
    from luthier.algebra.changes import Pair
    from luthier.algebra.compress import compress
    from luthier.bridge.checkpoint import Checkpoint
    from luthier.bridge.target import target
    from luthier.delta import COMPRESSIONS
    from luthier.plan.compressing import load_compressing

    text = [{"path": f"practice:{','.join(known)}", "limit": TEXT // 8}]
    spec = load_compressing({"base": parent, "tuned": str(trained), "calibration": text, "tokens": TEXT, **way})
    base = Checkpoint(parent)
    method = COMPRESSIONS.make(spec.method, spec.settings)
    outcome = compress(base, Pair(base, Checkpoint(trained)), method, spec, target(parent))
    outcome.delta.lineage = {"made_by": f"compress {spec.method}", "parents": [parent]}
    new = part.with_name("delta.new")
    shutil.rmtree(new, ignore_errors=True)
    outcome.delta.save(new)
    unfold(new, parent, part)
    shutil.rmtree(new)
    return (part / "delta" / "delta.safetensors").stat().st_size


def _scores(folder: Path, known: Sequence[str], items: int) -> dict[str, float]:
    model, tokenizer = card.load(folder)
    return {name: round(card.score(model, tokenizer, name, "test", items), 4) for name in known}
