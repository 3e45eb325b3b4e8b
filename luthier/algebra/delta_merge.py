"""Merges of deltas on one base to a delta: low-rank ones by their factors where that is exact, others bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.algebra.driver import Job, measure, run, told
from luthier.algebra.jobs import Method, make_jobs, replaced
from luthier.algebra.layout import Layout, lay_out
from luthier.algebra.sources import Source, Tuned
from luthier.algebra.stacking import lora_piece, stack, why_not
from luthier.bridge.target import Target
from luthier.delta import FORMS, Merge, Site, Stack
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError
from luthier.forms.lora import LoRA
from luthier.parts.bits import encode
from luthier.plan.merge import MergePlan

SUMS = ("linear", "task_arithmetic")
"""Merges that are weighted sums of the changes."""


class DeltaMerge:
    """A merge of deltas on one base, made ready; `make` gives the merged delta, for any settings of the models."""

    def __init__(
        self, plan: MergePlan, method: Method, sources: Sequence[Source], deltas: Sequence[Delta], on: Target
    ) -> None:
        """sources: the base and the tuned models, in the order of the plan's refs(). on: the base in memory, float32."""
        self.plan, self.method, self.sources, self.deltas, self.on = plan, method, sources, list(deltas), on
        layout = lay_out(plan, sources, method.cls.base != "unused")
        moved = {n for s in sources if isinstance(s, Tuned) for n in s.touched()}
        kept = [i for i in layout.items if moved & set(i.inputs)]
        jobs, self.notes = make_jobs(plan, Layout(kept, layout.layers), sources, method)
        wide = [torch.promote_types(j.written, torch.float32) if plan.out_dtype is None else j.written for j in jobs]
        for job, kind in zip(jobs, wide, strict=True):
            job.written = kind
        self.jobs = jobs
        self.said: list[str] = []

    def make(
        self,
        each: Mapping[str, Sequence[float]] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
        empty: bool = False,
    ) -> Delta:
        """The merged delta, unproved. each: settings of the models that a search asks for. empty: whether it may be the
        base itself, a delta without pieces; else that is an error."""
        jobs = replaced(self.jobs, each) if each else self.jobs
        if self.method.cls.factors:
            delta = self._factors(jobs, progress)
        elif (weights := self._weights(jobs)) is not None and why_not(self.deltas) is None:
            delta = stack(self.deltas, weights, rank=self.plan.rank, name="merged")
        elif weights is not None and self.plan.rank is not None and self._apart():
            delta = self._trimmed(jobs, weights, progress)
        elif self.plan.rank is not None:
            raise LuthierError(
                f"rank: {self._why()}, so that the result is of full rank: leave rank out, and 'luthier compress' the result"
            )
        else:
            delta = Delta(self._dense(jobs, progress))
            if not delta.pieces and not empty:
                raise LuthierError("the merge equals the base: its weights or densities are all 0; state others")
        delta.base = dict(self.deltas[0].base)
        delta.lineage = {
            "made_by": f"merge {self.plan.method}",
            "parents": [d.lineage.get("id") for d in self.deltas],
        }
        return delta

    def _why(self) -> str:
        return why_not(self.deltas) or f"{self.method.name} is no weighted sum of the changes here"

    def _weights(self, jobs: Sequence[Job]) -> Callable[[int, Site], float] | None:
        """The weight of every change at every site, where the merge is their sum; None where it is not."""
        if self.method.name not in SUMS:
            return None
        table: dict[str, list[float]] = {}
        for job in jobs:
            settings: Any = job.merge
            if settings is None:
                return None
            rows = [float(w) for w in job.each["weight"]]
            total = sum(rows)
            if getattr(settings, "normalize", False) and abs(total) > 1e-8:
                rows = [w / total for w in rows]
            elif self.method.name == "linear" and abs(total - 1) > 1e-8:
                return None  # then the base is scaled as well, and no low-rank change says that
            factor = float(getattr(settings, "lambda_", 1.0))
            table[job.item.name] = [w * factor for w in rows]

        def weight(i: int, site: Site) -> float:
            return table[f"{site.name}.{site.parameter}"][i]

        return weight

    def _apart(self) -> bool:
        """Whether the deltas are LoRA and exact differences, of which no parameter has both."""
        pieces = [p for d in self.deltas for p in d.pieces]
        factored = {f"{s.name}.{s.parameter}" for p in pieces if type(p.form) is LoRA for s in p.sites.values()}
        exact = {key for p in pieces if p.form.at == "base" for key in p.sites}
        return (
            bool(factored) and all(type(p.form) is LoRA or p.form.at == "base" for p in pieces) and not factored & exact
        )

    def _trimmed(
        self, jobs: Sequence[Job], weights: Callable[[int, Site], float], progress: Callable[[int, int], None]
    ) -> Delta:
        """A sum whose LoRA is trimmed to the plan's rank; what the deltas hold exactly is merged as without a rank."""
        own = [Delta([p for p in d.pieces if type(p.form) is LoRA], dict(d.base)) for d in self.deltas]
        summed = stack(own, weights, rank=self.plan.rank, name="merged")
        factored = {f"{s.name}.{s.parameter}" for p in summed.pieces for s in p.sites.values()}
        exact = self._dense([j for j in jobs if j.item.name not in factored], progress, "kept")
        count = sum(len(p.sites) for p in exact)
        self.said.append(
            f"rank {self.plan.rank} trims the LoRA alone; {count} tensors that are held exactly stay whole"
        )
        return Delta([*summed.pieces, *exact])

    def _factors(self, jobs: Sequence[Job], progress: Callable[[int, int], None]) -> Delta:
        """A merge of factors at sites that deltas carry as LoRA, all of them; elsewhere the merge of the tensors."""
        pieces = [p for d in self.deltas for p in d.pieces]
        found = {k: s for p in pieces if type(p.form) is LoRA for k, s in p.sites.items()}
        factored = {f"{s.name}.{s.parameter}" for s in found.values()}
        mixed = factored & {
            f"{s.name}.{s.parameter}" for p in pieces if type(p.form) is not LoRA for s in p.sites.values()
        }
        if not found or mixed:
            told = f"at {min(mixed)}, " if mixed else ""
            raise LuthierError(f"{self.method.name} merges LoRA deltas: {told}{why_not(self.deltas)}")
        by_name = {j.item.name: j for j in jobs}
        sites: dict[str, Site] = {}
        numbers: dict[str, dict[str, Tensor]] = {}
        for key, site in found.items():
            pairs = []
            for delta in self.deltas:
                for piece in delta.pieces:
                    if key in piece.p:
                        form: LoRA = piece.form  # pyright: ignore[reportAssignmentType]
                        scale = piece.scale * form.at_site(site)[1]
                        pairs.append((piece.p[key]["A"].float(), piece.p[key]["B"].float() * scale))
            job = by_name[f"{site.name}.{site.parameter}"]
            ranks = sorted({a.shape[-2] for a, _ in pairs})
            if len(pairs) != len(self.deltas) or len(ranks) > 1:
                told = f"ranks {ranks}" if len(ranks) > 1 else f"{len(pairs)} of {len(self.deltas)} deltas"
                raise LuthierError(
                    f"{self.method.name} merges factors of one rank, and {site.name} has {told}: tune them alike"
                )
            assert isinstance(job.merge, Merge)
            item = job.item
            a, b = job.merge.merge_factors(
                pairs, Stack(item.name, [], None, job.each, item.role, item.layer, item.layers)
            )
            sites[key], numbers[key] = site, {"A": a.contiguous(), "B": b.contiguous()}
        rest = [j for j in jobs if j.item.name not in factored]
        dense = self._dense(rest, progress, "averaged") if rest else []
        return Delta([lora_piece("merged", sites, numbers), *dense])

    def _dense(self, jobs: Sequence[Job], progress: Callable[[int, int], None], label: str = "merged") -> list[Piece]:
        """Exact differences of the merged tensors from the base's, a piece for each type; none where there is none."""
        pieces: dict[str, list[Tensor]] = {}
        noted: list[dict[str, float]] = []

        def keep(name: str, tensor: Tensor) -> None:
            pieces.setdefault(name, []).append(tensor.reshape(-1).clone())

        run(
            jobs,
            self.sources,
            keep,
            seed=self.plan.seed,
            measured=measure(jobs, self.sources, seed=self.plan.seed),
            progress=progress,
            notes=noted,
        )
        self.said = told(noted)
        base = self.sources[0]
        made: dict[str, Piece] = {}
        for job in jobs:
            name = job.item.name
            origin = job.item.inputs[0] if job.item.sources[0] == 0 else name
            before = base.read(origin if origin in base else name)
            merged = torch.cat(pieces.pop(name)).view(job.shape)
            bits = encode(merged, before)
            if not bool(bits.any()):
                continue
            kind = str(job.written).removeprefix("torch.")
            piece = made.get(kind)
            if piece is None:
                form = FORMS.make("dense", {"dtype": kind})
                piece = made[kind] = Piece(label if not made else f"{label}-{kind}", form, {}, {}, {})
            piece.sites[name] = self.on.site(name)
            piece.p[name], piece.fixed[name] = {"bits": bits}, {}
        return list(made.values())
