"""A plan as a chain of stages: each is one verb with its settings, and says by `@name` which earlier stage it starts from."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier.errors import LuthierError, nearest
from luthier.plan.load import override, read_plan
from luthier.plan.problems import first_problem
from luthier.plan.schema import Plan

VERBS = ("tune", "merge", "compress", "edit", "port", "diff", "assemble", "audit")
"""What a stage can do; the mapping under the verb is the verb's own plan."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Stage:
    """One step: `settings` is the verb's plan; '@lists' in it stands for the folder that the stage 'lists' wrote."""

    name: str
    verb: str
    settings: dict[str, Any]


def is_chain(source: Any) -> bool:
    """Whether a YAML file's path, or its content, is a chain of stages rather than one run."""
    if isinstance(source, Plan):
        return False
    raw = source if isinstance(source, Mapping) else read_plan(source)[1]
    return "stages" in raw


def load_stages(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> list[Stage]:
    """The checked stages of a chain, in order.

    overrides: 'lists.train.steps=2' for the stage called lists, 'tune.train.steps=2' for every stage of a verb.
    Errors: LuthierError naming the stage: an unknown verb or key, a name twice, a reference to no earlier stage, and
    whatever is wrong with a run's plan. The settings of other verbs are checked by `luthier.verbs.foresee`.
    """
    where, raw = ("plan", copy.deepcopy(dict(source))) if isinstance(source, Mapping) else read_plan(source)
    for key in raw:
        if key not in ("stages",):
            raise LuthierError(f"{where}: unknown key '{key}' beside stages: {nearest(key, ['stages'], 'key')}")
    rows = raw["stages"]
    if not isinstance(rows, list) or not rows:
        raise LuthierError(f"{where}: stages: must be a list of steps such as {{name: first, tune: {{…}}}}")
    stages: list[Stage] = []
    for i, row in enumerate(rows):
        stages.append(_stage(f"{where}: stages.{i}", row, stages))
    for text in overrides:
        _override(stages, text)
    for stage in stages:
        if stage.verb == "tune":
            try:
                Plan.model_validate(stage.settings)
            except ValidationError as e:
                raise LuthierError(f"{where}: stage '{stage.name}': {first_problem(e, stage.settings)}") from e
    return stages


def _stage(where: str, row: Any, earlier: Sequence[Stage]) -> Stage:
    if not isinstance(row, Mapping):
        raise LuthierError(f"{where}: is a {type(row).__name__}: write {{name: first, tune: {{…}}}}")
    name = str(row.get("name", ""))
    if not NAME.fullmatch(name) or name in VERBS:
        raise LuthierError(f"{where}: name: '{name}' must be letters, digits, '-' and '_', and no verb's name")
    if name in [s.name for s in earlier]:
        raise LuthierError(f"{where}: name: '{name}' is taken by an earlier stage: choose another")
    verbs = [key for key in row if key != "name"]
    if len(verbs) != 1 or verbs[0] not in VERBS:
        unknown = next((v for v in verbs if v not in VERBS), "")
        hint = nearest(unknown, VERBS, "verb") if unknown else f"verbs: {', '.join(VERBS)}"
        raise LuthierError(f"{where}: a stage states its name and exactly one verb, got {verbs or 'none'}: {hint}")
    settings = row[verbs[0]]
    if not isinstance(settings, Mapping):
        raise LuthierError(f"{where}: {verbs[0]}: is a {type(settings).__name__}, not a table of settings")
    for reference in references(settings):
        if reference not in [s.name for s in earlier]:
            known = [s.name for s in earlier]
            raise LuthierError(f"{where}: '@{reference}' names no earlier stage: {nearest(reference, known, 'stage')}")
    return Stage(name, verbs[0], copy.deepcopy(dict(settings)))


def references(value: Any) -> Iterator[str]:
    """Names of the stages that a value refers to."""
    if isinstance(value, str) and value.startswith("@"):
        yield value[1:].partition("/")[0]
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from references(inner)


def resolved(value: Any, folders: Mapping[str, Path]) -> Any:
    """A value with every '@name' and '@name/part' replaced by the stage's folder."""
    if isinstance(value, str) and value.startswith("@"):
        name, slash, rest = value[1:].partition("/")
        return str(folders[name] / rest) if slash else str(folders[name])
    if isinstance(value, Mapping):
        return {k: resolved(v, folders) for k, v in value.items()}
    return [resolved(v, folders) for v in value] if isinstance(value, list | tuple) else value


def _override(stages: Sequence[Stage], text: str) -> None:
    head, dot, rest = text.partition(".")
    meant = [s for s in stages if head in (s.name, s.verb)]
    if not dot or not meant:
        known = [*(s.name for s in stages), *dict.fromkeys(s.verb for s in stages)]
        raise LuthierError(
            f"override '{text}': a chain's overrides begin with a stage or a verb, as in tune.train.steps=2: "
            f"{nearest(head, known, 'name')}"
        )
    for stage in meant:
        override(stage.settings, rest, run=stage.verb == "tune")
