"""From a plan's checks to items: records read, a metric chosen, prompts rendered as they were for training."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np

from luthier.data.read import open_source, read
from luthier.data.records import example, mark, recognise
from luthier.errors import LuthierError
from luthier.measuring.checks import ACCURACY, LOSS, PERPLEXITY, Kind, Metric
from luthier.measuring.items import Item
from luthier.measuring.rendering import Found, Rendering, expected
from luthier.parts.verdict import Verdict
from luthier.plan.schema import AuditSpec, CheckSpec, DataSpec, SourceSpec
from luthier.sampling.verifiers import VERIFIERS, get_verifier, judge

_SEEN = 10_000  # records looked at when drawing the items of a check


@dataclass(frozen=True)
class Prepared:
    """A check ready to be measured."""

    name: str
    kind: Kind
    metric: Metric
    items: list[Item]
    max_new_tokens: int = 64
    dropped: dict[str, int] = field(default_factory=dict)
    """Records that could not be measured, by reason."""


def known(spec: AuditSpec, whose: str | os.PathLike[str]) -> None:
    """Whether every check's source and metric are there, before a model is loaded. `whose`: the plan, for the error,
    which names the key too."""
    built_in = {"auto", "practice", *(m.name for m in (LOSS, PERPLEXITY, ACCURACY))}
    for group in ("target", "guards", "shifted"):
        for number, check in enumerate(getattr(spec, group)):
            key = f"{whose}: audit.{group}.{number}"
            try:
                open_source(check.source)
            except LuthierError as e:
                raise LuthierError(f"{key}.source: {e}") from e
            try:
                if check.metric not in built_in:
                    get_verifier(check.metric, check.metric_options)
            except LuthierError as e:  # which begins with the setting's name
                raise LuthierError(f"{key}.{e}") from e


def prepare_checks(base: Any, spec: AuditSpec, data: DataSpec | None = None, seed: int = 0) -> list[Prepared]:
    """All checks of an audit, targets first; names are made unique."""
    groups: list[tuple[Kind, list[CheckSpec]]] = [
        ("target", spec.target), ("guard", spec.guards), ("shifted", spec.shifted),
    ]  # fmt: skip
    out: list[Prepared] = []
    for kind, checks in groups:
        for check in checks:
            found = prepare_check(base, check, kind, items=spec.items, data=data, seed=seed)
            taken = sum(p.name == found.name or p.name.startswith(f"{found.name} (") for p in out)
            name = found.name if not taken else f"{found.name} ({taken + 1})"
            out.append(replace(found, name=name))
    return out


def prepare_check(
    base: Any, check: CheckSpec, kind: Kind, *, items: int = 100, data: DataSpec | None = None, seed: int = 0
) -> Prepared:
    """One check: at most `items` records of its source, drawn by seed and kept in their order."""
    name = check.name or default_name(check.source)
    source = check.source
    if source.path.startswith("practice:") and source.limit is None:
        source = source.model_copy(update={"limit": items})  # made to order, and already in no order
    found = _marked(drawn(_found(source), items, seed))
    metric = choose_metric(check, base.kind, found)
    settings = (
        data.model_copy(update={"train": [check.source]})
        if data
        else DataSpec.model_validate({"train": [check.source]})
    )
    made, dropped = Rendering(base, settings).items(found, metric)
    if not made:
        told = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the source is empty"
        raise LuthierError(
            f"check '{name}' ({check.source.path}) has no record to measure on: {told}; state other records"
        )
    return Prepared(name, kind, metric, made, check.max_new_tokens, dropped)


def default_name(source: SourceSpec) -> str:
    """'translate', 'translate, shifted', 'gsm8k/test': what a reader would call the source."""
    scheme, _, rest = source.path.partition(":")
    if rest and scheme == "practice":
        return rest.replace(",", " + ") + (f", {source.split}" if source.split == "shifted" else "")
    path = PurePath(source.path)
    return "/".join(part for part in (path.parent.name, path.name.partition(".")[0]) if part)


def drawn(records: Iterator[Any], count: int, seed: int) -> list[Any]:
    """A seeded draw from the first 10,000 records, in the order of the source; those behind are never drawn."""
    seen = [record for record, _ in zip(records, range(_SEEN), strict=False)]
    if len(seen) <= count:
        return seen
    chosen = np.random.default_rng(seed).choice(len(seen), count, replace=False)
    return [seen[i] for i in sorted(chosen.tolist())]


def _found(source: SourceSpec) -> Iterator[Found]:
    for record in read(source):
        form = recognise(record.fields, record.where) if source.format == "auto" else source.format
        yield Found(record.fields, example(record, form))


def _marked(found: list[Found]) -> list[Found]:
    """Labels of 0 or 1 (or of true or false in a table) say of answers whether they are wanted, as in training, where
    every record that is measured has a prompt, a completion and such a label."""
    labels = [mark(f.example.extra.get("label")) if f.fields.get("completion") is not None else None for f in found]
    if all(label is not None for label in labels):
        for f, label in zip(found, labels, strict=True):
            f.example.wanted = bool(label)
    return found


def choose_metric(check: CheckSpec, kind: str, found: Sequence[Found]) -> Metric:
    """The metric a check names, or for `auto` the first that fits its records."""
    name = check.metric
    if name == "auto":
        name = _automatic(check, kind, found)
    known = {m.name: m for m in (LOSS, PERPLEXITY, ACCURACY)}
    if name in known:
        if check.metric_options:
            raise LuthierError(f"metric '{name}' has no options: remove {', '.join(check.metric_options)}")
        if known[name].needs == "label" and kind != "classify":
            raise LuthierError(f"metric 'accuracy' needs a base of kind classify, not {kind}: use exact for answers")
        return known[name]
    return Metric(name, "answer", verify=_verifier(name, check.metric_options), options=check.metric_options)


def _automatic(check: CheckSpec, kind: str, found: Sequence[Found]) -> str:
    if kind == "classify":
        return "accuracy"
    if check.source.path.partition(":")[0] == "practice":
        return "practice"
    if not found:
        raise LuthierError(f"{check.source.path}: no record to choose a metric by; give its source records")
    first = found[0].example
    if first.text is not None and first.answer is None:
        return "loss"
    return "number" if "####" in (expected(first) or "") else "exact"


def _verifier(name: str, options: dict[str, Any]) -> Callable[[dict[str, Any], str], Any]:
    if name == "practice" and name not in VERIFIERS:  # it stands above this room and is reached by name only
        return _practice(options)
    return get_verifier(name, options)


def _practice(options: dict[str, Any]) -> Callable[[dict[str, Any], str], Verdict]:
    if options:
        raise LuthierError(f"metric 'practice' has no options: remove {', '.join(options)}")
    verify = importlib.import_module("luthier.practice.world").verify

    def judged(record: dict[str, Any], response: str) -> Verdict:
        said = verify(record, response)
        return Verdict(said.reward, said.reason, said.decided)

    return partial(judge, judged)  # a family may be the user's own
