"""Merges of deltas on one base to a delta: low-rank ones by their factors where that is exact, others bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.algebra.driver import Job, by_layer, measure, run, told
from luthier.algebra.jobs import Method, make_jobs, replaced
from luthier.algebra.layout import Layout, lay_out
from luthier.algebra.maker import Maker
from luthier.algebra.sources import Source, Tuned
from luthier.algebra.stacking import lora_piece, stack, why_not
from luthier.bridge.target import Target
from luthier.delta import Merge, Site, Stack
from luthier.delta.artefact import Delta, made_of
from luthier.delta.stream import TensorStream
from luthier.errors import LuthierError
from luthier.forms.lora import LoRA
from luthier.plan.merge import MergePlan

SUMS = ("linear", "task_arithmetic")
"""Merges that are weighted sums of the changes."""


class DeltaMerge:
    """A merge of deltas on one base, made ready; `make` gives the merged delta, for any settings of the models.

    Tensors are read, merged and written one after the other: neither the base nor a delta is held whole, but for the
    factors of LoRA.
    """

    def __init__(
        self, plan: MergePlan, method: Method, sources: Sequence[Source], deltas: Sequence[Delta], on: Target
    ) -> None:
        """sources: the base and the tuned models, in the order of the plan's refs(). deltas: those of the plan's models, of
        which the numbers of LoRA pieces alone are needed. on: the base's names and shapes, with or without values."""
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
        self.layers: dict[str, dict[str, float]] = {}
        """What the merge says of each layer (Model Stock's t): name -> layer -> mean over its tensors."""

    def names(self) -> list[str]:
        """What the tensors of the result may be called, for the stream that they go to."""
        keys = dict.fromkeys(key for d in self.deltas for piece in d.pieces for key in piece.sites)
        return Maker.names([j.item.name for j in self.jobs], keys)

    def make(
        self,
        each: Mapping[str, Sequence[float]] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
        empty: bool = False,
        stream: TensorStream | None = None,
    ) -> Delta:
        """The merged delta with its seals. each: settings of the models that a search asks for. empty: whether it may be the
        base itself, a delta without pieces; else that is an error. stream: where its numbers go as they are made; then its
        pieces hold none."""
        maker, self.said = Maker(stream), []
        jobs = replaced(self.jobs, each) if each else self.jobs
        if self.method.cls.factors:
            self._factors(jobs, maker, progress)
        elif (weights := self._weights(jobs)) is not None and why_not(self.deltas) is None:
            maker.whole(stack(self.deltas, weights, rank=self.plan.rank, name="merged").pieces[0])
        elif weights is not None and self.plan.rank is not None and self._apart():
            self._trimmed(jobs, maker, weights, progress)
        elif self.plan.rank is not None:
            raise LuthierError(
                f"rank: {self._why()}, so that the result is of full rank: leave rank out, and 'luthier compress' the result"
            )
        else:
            self._exact(jobs, maker, progress)
        pieces = maker.pieces()
        if not pieces and not empty:
            raise LuthierError("the merge equals the base: its weights or densities are all 0; state others")
        lineage = made_of(self.deltas, f"merge {self.plan.method}")
        return Delta(pieces, dict(self.deltas[0].base), lineage, seals=maker.seals)

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
        self,
        jobs: Sequence[Job],
        maker: Maker,
        weights: Callable[[int, Site], float],
        progress: Callable[[int, int], None],
    ) -> None:
        """A sum whose LoRA is trimmed to the plan's rank; what the deltas hold exactly is merged as without a rank."""
        own = [Delta([p for p in d.pieces if type(p.form) is LoRA], dict(d.base)) for d in self.deltas]
        summed = stack(own, weights, rank=self.plan.rank, name="merged")
        factored = {f"{s.name}.{s.parameter}" for p in summed.pieces for s in p.sites.values()}
        maker.whole(summed.pieces[0])
        count = self._exact([j for j in jobs if j.item.name not in factored], maker, progress)
        self.said.append(
            f"rank {self.plan.rank} trims the LoRA alone; {count} tensors that are held exactly stay whole"
        )

    def _factors(self, jobs: Sequence[Job], maker: Maker, progress: Callable[[int, int], None]) -> None:
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
        maker.whole(lora_piece("merged", sites, numbers))
        if rest := [j for j in jobs if j.item.name not in factored]:
            self._exact(rest, maker, progress)

    def _exact(self, jobs: Sequence[Job], maker: Maker, progress: Callable[[int, int], None]) -> int:
        """Exact differences of the merged tensors from the base's, each as soon as it is made; gives how many there are."""
        by_name = {j.item.name: j for j in jobs}
        noted: dict[str, dict[str, float]] = {}
        parts: list[Tensor] = []
        base, made = self.sources[0], 0

        def keep(name: str, tensor: Tensor) -> None:
            nonlocal made
            job, whole = by_name[name], tensor
            if tensor.numel() < job.size:  # a piece of it, whose memory is used again
                parts.append(tensor.reshape(-1).clone())
                if sum(len(p) for p in parts) < job.size:
                    return
                whole = torch.cat(parts)
                parts.clear()
            origin = job.item.inputs[0] if job.item.sources[0] == 0 else name
            before = base.read(origin if origin in base else name)
            site = self.on.site(name)
            module = self.on.model.get_submodule(site.name)
            made += bool(maker.exact(name, site, whole.reshape(job.shape), before, module))

        run(
            jobs,
            self.sources,
            keep,
            seed=self.plan.seed,
            measured=measure(jobs, self.sources, seed=self.plan.seed),
            progress=progress,
            notes=noted,
        )
        self.said += told(noted)
        self.layers = by_layer(noted, jobs)
        return made
