"""A base and a checkpoint merged from it: what changed, what did not, and whether it is the delta's change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.bases.load import load_base
from luthier.bases.tokens import load_tokenizer
from luthier.bridge.proof import Report, other_type
from luthier.bridge.target import Target, logits_of
from luthier.bridge.weights_file import dtype_of, index_of
from luthier.delta.artefact import Delta
from luthier.delta.probes import check_probes
from luthier.delta.seals import Broken, check_seals, merged_seals, project
from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec

ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25, torch.float64: 2.0**-54}
"""Largest relative rounding of a stored number; its root mean square is about 0.58 of that."""


def verify_merged(report: Report, on: Target, path: Path, delta: Delta | None = None) -> Report:
    """Checks a merged checkpoint against its base, and against the delta it should hold where one is given."""
    try:
        stored = dtype_of(index_of(path))
        base = load_base(BaseSpec.model_validate({"name": str(path), "kind": on.kind}), tokenizer=False)
    except LuthierError as e:
        report.add("checkpoint", False, str(e))
        return report
    merged = base.model
    report.add("checkpoint", True, f"{len(dict(merged.named_parameters()))} tensors, all there and of the right shape")
    theirs, ours = dict(_parameters(merged)), dict(_parameters(on.model))
    bad = [n for n, t in theirs.items() if not torch.isfinite(t).all()]
    report.add(
        "finite", not bad, "no NaN" if not bad else f"{len(bad)} tensors hold NaN or infinity ({bad[0]}): merge again"
    )
    _tokens(report, path, on)
    if bad or not _shapes(report, ours, theirs):
        return report
    _head(report, on, merged)
    _changed(report, on, ours, theirs, delta)
    if delta is not None:
        _is_the_delta(report, on, ours, theirs, delta, stored)
        _answers(report, on, merged, delta, stored)
    return report


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in model.named_parameters(remove_duplicate=False):
        if "luthier" not in name.split("."):
            yield name, value.detach()


def _tokens(report: Report, path: Path, on: Target) -> None:
    from luthier.bridge.foreign import compare_tokenizers

    if on.tokenizer is None:
        report.add("tokenizer", None, "not checked: the base came without a tokenizer")
    elif not any((path / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        report.add("tokenizer", False, "the checkpoint holds no tokenizer: copy the base's files into it")
    else:
        compare_tokenizers(report, load_tokenizer(path, False), on)


def _shapes(report: Report, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    lost = sorted(set(ours) - set(theirs))
    other = sorted(n for n in set(ours) & set(theirs) if ours[n].shape != theirs[n].shape)
    if lost:
        return report.add("tensors", False, f"{len(lost)} of the base's tensors are missing ({lost[0]}): merge again")
    if other:
        n = other[0]
        shapes = f"{tuple(theirs[n].shape)}, the base's is {tuple(ours[n].shape)}"
        return report.add("tensors", False, f"{n} is {shapes}: another base, or a vocabulary that was resized")
    extra = sorted(set(theirs) - set(ours))
    more = f", and {len(extra)} the base lacks ({extra[0]})" if extra else ""
    return report.add("tensors", True, f"all {len(ours)} of the base's are there{more}")


def _head(report: Report, on: Target, merged: Any) -> None:
    """A base that ties its head and a checkpoint that does not, or the other way round."""
    was, now = (bool(getattr(m.config.get_text_config(), "tie_word_embeddings", False)) for m in (on.model, merged))
    if was == now:
        report.add("tied head", True, "tied in both" if was else "apart in both")
        return
    told = (
        "the base ties its head, the checkpoint does not" if was else "the checkpoint ties its head, the base does not"
    )
    report.add("tied head", None if was else False, f"{told}{'' if was else ': the trained head is lost; merge again'}")


def _changed(
    report: Report, on: Target, ours: dict[str, Tensor], theirs: dict[str, Tensor], delta: Delta | None
) -> None:
    """Whether any value changed, and which layers did not. The sign of a zero is no value: a checkpoint that differs in
    that alone is noted, unless its delta changes more."""
    moved = {n for n, t in ours.items() if not torch.equal(t.to(theirs[n].dtype), theirs[n])}
    signs = [n for n, t in ours.items() if n not in moved and not torch.equal(t.signbit(), theirs[n].signbit())]
    if not moved and signs and (delta is None or not any(any(seal) for seal in delta.seals.values())):
        report.add("changed", None, f"zeros of {len(signs)} tensors have the other sign ({signs[0]}) and nothing else differs: no "
                   "value is another than the base's")  # fmt: skip
        return
    if not moved:
        report.add("changed", False, "every weight equals the base's: the merge lost the delta (rounded away, or never "
                   "loaded); merge in float32")  # fmt: skip
        return
    layers = {p.layer for n in moved if (p := on.roles.owner.get(n)) is not None and p.layer is not None}
    still = [i for i in range(on.roles.layer_count) if i not in layers]
    told = f"{len(moved)} of {len(ours)} tensors differ from the base"
    if still and layers:
        told += f"; layers {', '.join(map(str, still[:8]))}{' …' if len(still) > 8 else ''} are unchanged"
    report.add("changed", None if still and layers and delta is None else True, told)


def _is_the_delta(
    report: Report,
    on: Target,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    delta: Delta,
    dtype: torch.dtype,
) -> None:
    """W_merged − W_base projected at every site, against the delta's seals."""
    if not delta.seals:
        report.add("merged seals", None, "not checked: the delta carries no seals")
        return
    found: dict[str, list[float]] = {}
    wanted: dict[str, list[float]] = {}
    noise: dict[str, float] = {}
    skipped, swallowed = 0, []
    for place, seal, _ in merged_seals(delta.pieces, delta.seals):
        name = place if place in ours else f"{place}.weight"
        if seal is None or name not in ours:
            skipped += 1
            continue
        kind = type(on.model.get_submodule(name.rpartition(".")[0])).__name__
        difference = theirs[name].float() - ours[name].float()
        if kind in ("Conv1D", "Embedding") and difference.dim() == 2:
            difference = difference.t()
        bias = f"{place}.bias"
        added = theirs[bias].float() - ours[bias].float() if bias in ours and bias in theirs and name != place else None
        if added is None and bias in theirs and bias not in ours:
            added = theirs[bias].float()
        found[place], wanted[place] = project(difference, added), seal
        size = float(ours[name].float().square().mean().sqrt()) * 0.58 * ROUNDING[dtype]
        noise[place] = size
        if math.hypot(*seal) > 0 and size > 0.5 * math.hypot(*seal) / math.sqrt(len(seal)):
            swallowed.append(place)
    if not wanted:
        report.add("merged seals", None, f"not checked: none of the {skipped} sites is a weight's change")
        return
    broken = check_seals(found, wanted, dtype, noise)
    _tell(report, broken, len(wanted), skipped)
    if swallowed:
        report.add("rounding", False, f"at {len(swallowed)} of {len(wanted)} sites the change is no larger than the rounding of "
                   f"{str(dtype)[6:]} ({swallowed[0]}): merge in float32, or keep the delta unmerged")  # fmt: skip
    else:
        report.add("rounding", True, f"the change is larger than the rounding of {str(dtype)[6:]} at every site")


def _tell(report: Report, broken: list[Broken], total: int, skipped: int) -> None:
    apart = f" ({skipped} sites chain or are no weight's change: not checked)" if skipped else ""
    if not broken:
        report.add("merged seals", True, f"the change at all {total} sites is the delta's{apart}")
        return
    worst = broken[0]
    report.add("merged seals", False, f"{len(broken)} of {total} sites do not hold the delta's change: {worst.site} is "
               f"{worst.why} (off by {worst.share:.0%}){apart}: merge again from this delta and base")  # fmt: skip


def _answers(report: Report, on: Target, merged: Any, delta: Delta, stored: torch.dtype) -> None:
    """The merged model's logits against the unmerged one's."""
    if not delta.probes:
        report.add("merged = unmerged", None, "not checked: the delta carries no probes")
        return
    verdict = check_probes(delta.probes, logits_of(merged), base_fn=other_type(delta, on))
    remedy = "merge again from this delta and base" if stored == torch.float32 else "merge in float32 and verify again"
    report.add("merged = unmerged", verdict.ok, verdict.reason + (f": {remedy}" if verdict.ok is False else ""))
