"""The two models of a comparison, from what a user calls them: 'base', a delta or PEFT folder, a base's name, a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.bridge.target import Target
from luthier.delta.artefact import Delta
from luthier.delta.wiring import is_assembly
from luthier.errors import LuthierError
from luthier.plan.places import kind_of
from luthier.plan.schema import BaseSpec, Plan
from luthier.verbs.load import load_all, load_base_for


@dataclass
class Side:
    """A base with deltas that are on it inside `here()` only, so that several sides may share one base."""

    name: str
    base: Target
    deltas: list[Delta] = field(default_factory=list)

    @contextmanager
    def here(self) -> Iterator[Any]:
        """The model answers as this side."""
        if not self.deltas:
            yield self.base.model
            return
        for delta in self.deltas:
            delta.apply(self.base.model, strict=False)  # the fingerprints were compared when the side was opened
        try:
            yield self.base.model
        finally:
            for delta in self.deltas:
                delta.detach(self.base.model)

    def card(self) -> dict[str, Any]:
        """What a report says about it."""
        return {
            "name": self.name,
            "base": self.base.name,
            "fingerprint": self.base.fingerprint,
            "deltas": len(self.deltas),
        }


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a delta, ours or PEFT's, rather than a base."""
    return kind_of(folder) in ("delta", "adapter")


class Sides:
    """Opens sides and holds every base once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._bases: dict[str, Target] = {}

    def open(self, name: str, on: str | None = None) -> Side:
        """The side called `name`, checked as `luthier.load` checks.

        A delta goes on `on`, else on the plan's base where the plan states one, else on the base that it names itself.
        Errors: whatever loading refuses, with the side's name in front.
        """
        try:
            return self._open(name, on)
        except LuthierError as e:
            raise LuthierError(str(e) if str(e).startswith(name) else f"{name}: {e}") from e

    def put(self, name: str, delta: Delta, base: Target) -> Side:
        """A side of a delta at hand on a base that is loaded; its checks are run."""
        base = dataclasses.replace(base)  # its tokenizer may get the delta's own template
        load_all(base, [delta])
        delta.detach(base.model)
        return Side(name, base, [delta])

    def _open(self, name: str, on: str | None) -> Side:
        folder = Path(name)
        stated = self.plan.base
        if name == "base":
            return Side("base", dataclasses.replace(self._base(stated, [])))
        if is_assembly(folder):
            return Side(name, load_all(name)[1])
        if not is_delta(folder):
            if folder.is_dir() and kind_of(folder) is None:
                raise LuthierError(
                    "holds no delta.json, adapter_config.json or config.json: give the folder that holds one"
                )
            return Side(name, dataclasses.replace(self._base(stated.model_copy(update={"name": name}), [])))
        if kind_of(folder) == "delta":
            delta = Delta.load(folder)
            if on is None and "base" not in self.plan.model_fields_set:
                on = delta.base.get("name")
            spec = stated.model_copy(update={"name": on}) if on else stated
            return self.put(name, delta, self._base(spec, [delta]))
        from luthier.bridge.peft import from_peft
        from luthier.bridge.proof import prove

        base = self._base(stated.model_copy(update={"name": on}) if on else stated, [])
        return self.put(name, prove(from_peft(folder, base), base), base)

    def _base(self, spec: BaseSpec, deltas: list[Delta]) -> Target:
        """A base, loaded at first use; one with new tokens or a fresh head is another than the one without."""
        grown = [{k: d.base[k] for k in ("labels", "new_tokens") if d.base.get(k)} for d in deltas]
        key = f"{spec.model_dump_json()}{[g for g in grown if g]}"
        if key not in self._bases:
            self._bases[key] = load_base_for(spec, deltas, {}, None)
        return self._bases[key]
