"""MEND: small networks that turn the raw gradient of one example into an edit that stays local."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import EDITS, Site, Small
from luthier.editing.engine import Edit, Request, Subject, Text, key, lowrank, shuffled, step_on, target_kl, target_nll
from luthier.errors import LuthierError
from luthier.parts.gradient_nets import Net, fresh, nested, transformed

Pair = tuple[Tensor, Tensor]
Places = Sequence[tuple[Site, str, int]]


@EDITS.add("mend")
@dataclass(frozen=True)
class MEND(Edit):
    """The gradient of a linear map's weight is Σ d uᵀ over tokens. For every shape of weight a network turns (u, d) into
    (u', d'), and ΔW = −rate · Σ d' u'ᵀ. It is learnt on other records: −weight · log p(target | paraphrase, edited)
    + KL(base ‖ edited) on neighbours and general text, back through the edit into the network alone. `train_records` of the plan are
    these, or `editor` a delta folder that holds a learnt one. Many requests are one edit: their gradients add.

    Without paraphrases the request itself stands for them; the general text is ours. Source: Mitchell et al. 2022 (P057).
    """

    roles: tuple[str, ...] = ("ffn.up", "ffn.down")
    layers: tuple[int, ...] | None = None
    """Default the last three."""
    hidden: int = 128
    """Width of the low-rank blocks (1,920 in the paper)."""
    rate: float = 1.0
    """Where every layer's learnt rate starts."""
    lr: float = 1e-3
    steps: int = 300
    edits: int = 4
    """Requests in one step of learning, each an edit of its own."""
    weight: float = 0.1
    """c_edit."""
    learnt: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """What `learn` gave: "d_in×d_out/name" -> tensor."""

    learns: ClassVar[bool] = True
    paper: ClassVar[str] = "P057"

    def with_learnt(self, numbers: Mapping[str, Tensor]) -> MEND:
        return dataclasses.replace(self, learnt=dict(numbers))

    def places(self, s: Subject) -> list[tuple[Site, str, int]]:
        """The weights it edits, with their shape's name and their number among those of that shape."""
        sites = s.sites(self.roles, self.layers or range(max(0, s.layers - 3), s.layers))
        names = [f"{site.d_in}x{site.d_out}" for site in sites]
        return [(site, name, names[:n].count(name)) for n, (site, name) in enumerate(zip(sites, names, strict=True))]

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        if not self.learnt:
            raise LuthierError("mend: no network: state train_records to learn one, or editor, a delta that holds one")
        places, nets = self.places(s), nested(self.learnt, s.weight(self.places(s)[0][0]).device)
        for _, name, number in places:
            if name not in nets or number >= len(nets[name]["rate"]):
                raise LuthierError(
                    f"mend: the editor knows no weight {number} of {name}: it was learnt on another base"
                )
        parts = [self.factors(nets, places, gradients(s, places, [q.new])) for q in requests]
        out: dict[str, Tensor | Small] = {}
        for site, _, _ in places:
            b, a = zip(*(part[key(site)] for part in parts), strict=True)
            out[key(site)] = lowrank(torch.cat(b, 1), torch.cat(a, 0))
        return out

    def factors(self, nets: Mapping[str, Net], places: Places, raw: Mapping[str, Pair]) -> dict[str, Pair]:
        """Parameter -> (b [d_out, n], a [n, d_in]) of ΔW = b a, from the tokens' inputs and gradients."""
        out = {}
        for site, name, number in places:
            u, d = transformed(nets[name], number, *raw[site.name])
            out[key(site)] = (-nets[name]["rate"][number].exp() * d.t(), u)
        return out

    def learn(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor]:
        places, g = self.places(s), s.generator("editor")
        weights = {key(site): s.weight(site) for site, _, _ in places}
        raw = [gradients(s, places, [q.new]) for q in requests]
        nets: dict[str, dict[str, Tensor]] = {}
        for site, name, _ in places:
            if name not in nets:
                same = [q.name for q, other, _ in places if other == name]
                nets[name] = fresh(site.d_in, site.d_out, len(same), self.hidden, self.rate, g)
                seen = torch.cat([torch.cat(r[n], -1) for r in raw for n in same])
                std = seen.std(0)
                nets[name] |= {"mean": seen.mean(0), "std": std.clamp_min(0.1 * std.mean())}
        nets = {
            name: {k: v.to(next(iter(weights.values())).device) for k, v in net.items()} for name, net in nets.items()
        }
        trained = [
            (k, v.requires_grad_(True)) for net in nets.values() for k, v in net.items() if k not in ("mean", "std")
        ]
        optimiser = torch.optim.Adam(
            [
                {"params": [v for k, v in trained if (k == "rate") == rate], "lr": self.lr * (10 if rate else 1)}
                for rate in (0, 1)
            ]
        )
        general, order = s.passages(2000), shuffled(len(requests), self.edits, g)
        for step in range(self.steps):
            losses = []
            for n in next(order):
                q, change = requests[n], self.factors(nets, places, raw[n])
                edited = {name: w + change[name][0] @ change[name][1] for name, w in weights.items()}
                asked, apart = list(q.paraphrases or [q.new]), [*q.neighbours, general[step % len(general)]]
                with torch.no_grad():
                    before = s.run(apart).logits
                now = s.run([*asked, *apart], edited).logits
                kept = target_kl(now[len(asked) :, : before.shape[1]], before, apart).mean()
                losses.append(self.weight * target_nll(now[: len(asked)], asked, closing=True).mean() + kept)
            step_on(optimiser, torch.stack(losses).mean())
        return {f"{name}/{k}": v.detach().cpu() for name, net in nets.items() for k, v in net.items()}


def gradients(s: Subject, places: Places, texts: Sequence[Text]) -> dict[str, Pair]:
    """Module -> inputs u [n, d_in] and gradients d [n, d_out] of −log p(target), at all tokens that have a gradient."""
    names = [site.name for site, _, _ in places]
    with torch.enable_grad():
        seen = s.run(texts, keep=names, probe=names)
        loss = target_nll(seen.logits, texts, closing=True).mean()
        found = torch.autograd.grad(loss, [seen.probes[name] for name in names])
    out = {}
    for name, d in zip(names, found, strict=True):
        flat, u = d.detach().float().flatten(0, 1), seen.inputs[name].detach().float().flatten(0, 1)
        at = flat.abs().sum(-1) > 0
        out[name] = (u[at], flat[at])
    return out
