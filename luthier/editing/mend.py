"""MEND: small networks that turn the raw gradient of one example into an edit that stays local."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import EDITS, Site, Small
from luthier.editing.engine import COUNT, Edit, Request, Subject, Text, key, lowrank, target_kl, target_nll
from luthier.errors import LuthierError
from luthier.parts.descent import shuffled, step_on
from luthier.parts.gradient_nets import Factors, Nets

Places = Sequence[tuple[Site, str, int]]


@EDITS.add("mend")
@dataclass(frozen=True)
class MEND(Edit):
    """The gradient of a linear map's weight is Σ d uᵀ over tokens. For every shape of weight a network turns (u, d) into
    (u', d'), and ΔW = −rate · Σ d' u'ᵀ. It is learnt on other records (`train_records` of the plan; or `editor` is a delta
    folder that holds a learnt one): −weight · log p(target | paraphrase, edited) + KL(base ‖ edited) on neighbours and
    general text, back through the edit into the network alone. Many requests are one edit: their gradients add. Without
    paraphrases the request itself stands for them; the general text is ours. Source: Mitchell et al. 2022 (P057).
    """

    roles: tuple[str, ...] = ("ffn.up", "ffn.down")
    layers: tuple[int, ...] | None = None
    """Default the last three."""
    hidden: int = field(default=128, metadata=COUNT)
    """Width of the low-rank blocks (1,920 in the paper)."""
    rate: float = 1.0
    """Where every layer's learnt rate starts."""
    lr: float = 1e-3
    steps: int = 300
    edits: int = field(default=4, metadata=COUNT)
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
        """The weights it edits, as `placed` has them."""
        return placed(s.sites(self.roles, self.layers or range(max(0, s.layers - 3), s.layers)))

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        if not self.learnt:
            raise LuthierError("mend: no network: state train_records to learn one, or editor, a delta that holds one")
        places = self.places(s)
        nets = known(Nets.read(self.learnt, s.weight(places[0][0]).device), places)
        parts = [changes(nets, places, gradients(s, places, [q.new])) for q in requests]
        pairs = {name: zip(*(part[name] for part in parts), strict=True) for name in parts[0]}
        return {name: lowrank(torch.cat(b, 1), torch.cat(a, 0)) for name, (b, a) in pairs.items()}

    def learn(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor]:
        places, g = self.places(s), s.generator("editor")
        weights, raw = {key(p[0]): s.weight(p[0]) for p in places}, [gradients(s, places, [q.new]) for q in requests]
        seen: dict[str, list[list[Factors]]] = {}
        for site, name, _ in places:
            seen.setdefault(name, []).append([r[site.name] for r in raw])
        nets = Nets.started(seen, self.hidden, self.rate, g)
        optimiser = nets.optimiser(self.lr)
        general, order = s.passages(2000), shuffled(len(requests), self.edits, g)
        for step in range(self.steps):
            losses = []
            for n in next(order):
                edited = {name: weights[name] + b @ a for name, (b, a) in changes(nets, places, raw[n]).items()}
                taught, kept = losses_of(s, requests[n], general[step % len(general)], edited)
                losses.append(self.weight * taught + kept)
            step_on(optimiser, torch.stack(losses).mean())
        return nets.flat()


def placed(sites: Sequence[Site]) -> list[tuple[Site, str, int]]:
    """Sites with their shape's name and their number among those of that shape."""
    names = [f"{site.d_in}x{site.d_out}" for site in sites]
    return [(site, name, names[:n].count(name)) for n, (site, name) in enumerate(zip(sites, names, strict=True))]


def known(nets: Nets, places: Places) -> Nets:
    """The networks, checked to know all places."""
    for _, name, number in places:
        if not nets.knows(name, number):
            raise LuthierError(f"mend: the editor knows no weight {number} of {name}: it was learnt on another base")
    return nets


def losses_of(s: Subject, q: Request, general: Text, edited: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """−log p(target | paraphrases, edited), and KL(base ‖ edited) on the neighbours and on `general`."""
    asked, apart = list(q.paraphrases or [q.new]), [*q.neighbours, general]
    with torch.no_grad():
        before = s.run(apart).logits
    now = s.run([*asked, *apart], edited).logits
    kept = target_kl(now[len(asked) :, : before.shape[1]], before, apart).mean()
    return target_nll(now[: len(asked)], asked, closing=True).mean(), kept


def changes(nets: Nets, places: Places, raw: Mapping[str, Factors]) -> dict[str, Factors]:
    """Parameter -> (b, a) of its change, from its tokens' inputs and gradients."""
    return {key(site): nets.change(name, number, *raw[site.name]) for site, name, number in places}


def gradients(s: Subject, places: Places, texts: Sequence[Text]) -> dict[str, Factors]:
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
