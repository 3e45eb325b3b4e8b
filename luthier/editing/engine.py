"""What an edit is: requests in, changed weights out, through a narrow view of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import FORMS, Site, Small
from luthier.errors import LuthierError
from luthier.parts.descent import descend, shuffled
from luthier.parts.logprobs import token_logprobs

Weights = Mapping[str, Tensor]
"""Parameter name -> [d_out, d_in] (or [n] for a vector), to stand in for the model's own."""
Hook = Callable[[Tensor], Tensor]
"""From a module's output [B, T, d] to what takes its place."""


@dataclass(frozen=True)
class Text:
    """Token ids, of which ids[start:stop] are the target: predicted at positions start − 1 to stop − 2."""

    ids: tuple[int, ...]
    start: int = 1
    stop: int | None = None
    """Where the target ends and what only closes it (end of turn) begins; None for the end."""
    subject: int = -1
    """Position of the subject's last token; −1 where none is named."""

    @property
    def end(self) -> int:
        """Where the target ends."""
        return len(self.ids) if self.stop is None else self.stop


@dataclass(frozen=True)
class Request:
    """One thing to change: an edit's prompt with its new target, or a text to forget."""

    new: Text
    where: str = ""
    """File and line, for errors."""
    prefixed: tuple[Text, ...] = ()
    """The same behind other openings, so that the edit does not hang on what stands before."""
    essence: Text | None = None
    """'SUBJECT is a': what the subject is, which an edit of one fact must not change."""
    paraphrases: tuple[Text, ...] = ()
    neighbours: tuple[Text, ...] = ()
    generic: Text | None = None
    """To forget: the text with its own terms put generally."""
    aligned: tuple[int, ...] = ()
    """Position in `generic` of what stands for each token of `new`; −1 where nothing does, or must not be learnt."""


@dataclass
class Seen:
    """What a pass over texts showed; rows are padded on the right."""

    logits: Tensor
    """[B, T, vocabulary], float32."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Module -> its input [B, T, d_in], of those asked for."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    probes: dict[str, Tensor] = field(default_factory=dict)
    """Module -> zeros added to its output, which collect the gradient there."""


class Subject:
    """The model under the knife, as far as an edit may see it. Supplied by luthier.algebra.subject."""

    layers: int
    seed: int

    def sites(self, roles: Sequence[str], layers: Sequence[int] | None = None) -> list[Site]:
        """Weights (and, for 'all', vectors too) of these roles, in model order; none is an error."""
        raise NotImplementedError

    def layer(self, number: int) -> str:
        """The module name of a layer, for `at` and `keep`."""
        raise NotImplementedError

    def weight(self, site: Site) -> Tensor:
        """The weight as it is now, float32, [d_out, d_in] or [n]."""
        raise NotImplementedError

    def run(
        self,
        texts: Sequence[Text],
        weights: Weights | None = None,
        *,
        at: Mapping[str, Hook] | None = None,
        keep: Sequence[str] = (),
        probe: Sequence[str] = (),
    ) -> Seen:
        """One forward pass in which `weights` stand in for the model's own; differentiable in them and in `at`."""
        raise NotImplementedError

    def batches(self, texts: Sequence[Text]) -> Iterator[list[int]]:
        """Positions of texts in batches of bounded memory."""
        raise NotImplementedError

    def passages(self, tokens: int) -> list[Text]:
        """General text, about this many tokens of it: every token is a target. Never what the scorecard uses."""
        raise NotImplementedError

    def near(self, texts: Sequence[Text], count: int) -> list[Text]:
        """What lies near the texts: so many prompts that begin like theirs, from somewhere on in the model's own words at
        temperature 1, with its answers; of them, what holds no target of theirs. None where no text has a prompt."""
        raise NotImplementedError

    def moment(self, site: Site) -> Tensor:
        """E[k kᵀ] [d_in, d_in] of the site's input over general text, float32."""
        raise NotImplementedError

    def generator(self, *names: object) -> torch.Generator:
        """Random numbers for one purpose, from the seed."""
        raise NotImplementedError


COUNT = {"least": 1}
"""Metadata of a setting that cannot be 0: `rank: int = field(default=4, metadata=COUNT)`."""


class Edit:
    """Base of all edits: a frozen dataclass of settings, none below 0, and one method. See docs/editing.md."""

    task: ClassVar[Literal["edit", "forget"]] = "edit"
    """Which records it takes: a prompt with a new target, or text that is to be forgotten."""
    openings: ClassVar[int] = 0
    """How many other openings it wants each request behind (`prefixed`)."""
    subjects: ClassVar[bool] = False
    """Whether each request must name its subject."""
    learns: ClassVar[bool] = False
    """Whether it is trained on records of its own first (`learn`)."""
    folds: ClassVar[bool] = False
    """Whether it works on the weights with all deltas folded in, because it takes weights away."""
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in fields(self):  # pyright: ignore[reportArgumentType]
            value, least = getattr(self, f.name), f.metadata.get("least", 0)
            if isinstance(value, (int, float)) and value < least:
                raise ValueError(f"{f.name} must be at least {least}, got {value}")

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        """Parameter -> its whole new value [d_out, d_in] (kept exactly), or a form with its numbers (added)."""
        raise NotImplementedError(f"{type(self).__name__} has no edit")

    def learn(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor]:
        """Numbers that `edit` needs, learnt on other records than are to be edited; saved beside the delta."""
        return {}

    def with_learnt(self, numbers: Mapping[str, Tensor]) -> Edit:
        """The same edit, holding what `learn` gave."""
        return self


# -- small things that several edits need


def key(site: Site) -> str:
    """Full name of a site's parameter."""
    return f"{site.name}.{site.parameter}"


def lowrank(b: Tensor, a: Tensor) -> Small:
    """ΔW = b a, as a low-rank piece: b [d_out, r], a [r, d_in]."""
    form = FORMS.make("lora", {"rank": a.shape[0], "alpha": float(a.shape[0])})
    return Small(form, {"A": a.detach().float().cpu(), "B": b.detach().float().cpu()})


def layer_at(stated: int | None, s: Subject, share: float) -> int:
    """A layer by number (negative from the end), or by default the one at this share of the depth."""
    number = int(share * (s.layers - 1) + 0.5) if stated is None else stated
    if not -s.layers <= number < s.layers:
        raise LuthierError(f"layer: no layer {stated}; the base has layers 0 to {s.layers - 1}")
    return number % s.layers


def one_site(s: Subject, role: str, layer: int) -> Site:
    """The one weight of this role in a layer; several (experts) are an error."""
    sites = s.sites([role], [layer])
    if len(sites) != 1:
        raise LuthierError(
            f"role {role} names {len(sites)} weights in layer {layer}, this edit needs one: state a role or module name"
        )
    return sites[0]


def target_nll(logits: Tensor, texts: Sequence[Text], closing: bool = False) -> Tensor:
    """[B] mean −log p over each text's target tokens; with `closing`, over what closes it too."""
    rows, targets, owner = [], [], []
    for n, text in enumerate(texts):
        end = len(text.ids) if closing else text.end
        rows.append(logits[n, text.start - 1 : end - 1])
        targets += text.ids[text.start : end]
        owner += [n] * (end - text.start)
    at = torch.tensor(owner, device=logits.device)
    lp = token_logprobs(torch.cat(rows), torch.tensor(targets, device=logits.device), keep=True)
    count = torch.zeros(len(texts), device=lp.device).index_add_(0, at, torch.ones_like(lp))
    return torch.zeros(len(texts), device=lp.device).index_add(0, at, -lp) / count


def target_kl(logits: Tensor, before: Tensor, texts: Sequence[Text]) -> Tensor:
    """[B] mean KL(before ‖ now) over the positions that predict each text's target. Both logits [B, T, V]."""
    out = []
    for n, text in enumerate(texts):
        span = slice(text.start - 1, text.end - 1)
        now, was = F.log_softmax(logits[n, span], -1), F.log_softmax(before[n, span], -1)
        out.append((was.exp() * (was - now)).sum(-1).mean())
    return torch.stack(out)


def drift(s: Subject, texts: Sequence[Text], weights: Weights) -> Tensor:
    """Mean KL(base ‖ with `weights`) over the texts' targets, differentiable in the weights."""
    with torch.no_grad():
        before = s.run(texts).logits
    return target_kl(s.run(texts, weights).logits, before, texts).mean()


def at_subject(values: Tensor, texts: Sequence[Text]) -> Tensor:
    """[B, d] of values [B, T, d] at each text's subject."""
    return torch.stack([values[n, text.subject] for n, text in enumerate(texts)])


def moving(s: Subject, sites: Iterable[Site]) -> dict[str, Tensor]:
    """Copies of these sites' weights that collect gradients."""
    return {key(site): s.weight(site).clone().requires_grad_(True) for site in sites}


@torch.no_grad()
def mean_loss(s: Subject, texts: Sequence[Text], weights: Weights | None = None, closing: bool = False) -> float:
    """Mean −log p of a token over all targets."""
    total = count = 0.0
    for at in s.batches(texts):
        part = [texts[n] for n in at]
        sizes = torch.tensor([float((len(t.ids) if closing else t.end) - t.start) for t in part])
        total += float((target_nll(s.run(part, weights).logits, part, closing).cpu() * sizes).sum())
        count += float(sizes.sum())
    return total / count if count else math.nan


@torch.no_grad()
def share_right(s: Subject, texts: Sequence[Text], weights: Weights | None = None) -> float:
    """Share of the texts whose target tokens are all the likeliest."""
    hits = 0
    for at in s.batches(texts):
        part = [texts[n] for n in at]
        best = s.run(part, weights).logits.argmax(-1).cpu()
        hits += sum(
            tuple(best[n, t.start - 1 : t.end - 1].tolist()) == t.ids[t.start : t.end] for n, t in enumerate(part)
        )
    return hits / len(texts) if texts else math.nan


# -- locating: the key and the value of a fact (Meng et al. 2022)


@torch.no_grad()
def fact_key(s: Subject, module: str, texts: Sequence[Text], weights: Weights) -> Tensor:
    """k [d_in]: the module's input at the subject, mean over the texts."""
    return at_subject(s.run(texts, weights, keep=[module]).inputs[module], texts).mean(0)


TOGETHER = 8
"""Requests whose values are sought in one pass."""


@dataclass(frozen=True)
class Reach:
    """How a fact's new value is found: δ is added to a module's output at the subject in every text, and descends."""

    steps: int = 25
    lr: float = 0.5
    kl: float = 0.0625
    decay: float = 0.05
    clamp: float = 4.0
    enough: float = 0.05
    """Loss at which the descent ends."""


def fact_values(s: Subject, module: str, requests: Sequence[Request], weights: Weights, how: Reach) -> Tensor:
    """δ [n, d]: what must be added to the module's output at each request's subject so that its new target follows.

    Minimised, for each by itself, TOGETHER in one pass: mean −log p(target) over the request and its prefixed texts, + kl · KL
    of what follows the essence, + decay · ‖δ‖² / ‖y‖²; ‖δ‖ stays within clamp · ‖y‖. δ is measured in units of y's root mean
    square, so that one learning rate serves models of any scale (our reading; the authors step on δ itself). Our reading:
    decay weighs ‖δ‖²; the authors' code has decay · ‖δ‖ / ‖y‖², which depends on the scale.
    """
    groups = [requests[n : n + TOGETHER] for n in range(0, len(requests), TOGETHER)]
    return torch.cat([_values(s, module, group, weights, how) for group in groups])


def _values(s: Subject, module: str, requests: Sequence[Request], weights: Weights, how: Reach) -> Tensor:
    asked = [(n, text) for n, q in enumerate(requests) for text in (q.new, *q.prefixed)]
    about = [(n, q.essence) for n, q in enumerate(requests) if q.essence is not None and how.kl]
    texts, essence, every = [t for _, t in asked], [t for _, t in about], [t for _, t in (*asked, *about)]
    with torch.no_grad():
        seen = s.run(every, weights, keep=[module])
        y, before = at_subject(seen.outputs[module], every).float(), seen.logits[len(texts) :]
    device, rows = y.device, torch.arange(len(every), device=y.device)
    owner = torch.tensor([n for n, _ in (*asked, *about)], device=device)
    place = torch.tensor([t.subject for t in every], device=device)

    def means(values: Tensor, at: Tensor) -> Tensor:
        """[n] mean of values over each request's rows; 0 where it has none."""
        total = torch.zeros(len(requests), device=device).index_add(0, at, values)
        return total / torch.bincount(at, minlength=len(requests)).clamp_min(1)

    first, last = owner[: len(texts)], owner[len(texts) :]
    size = means(y[: len(texts)].norm(dim=-1), first)
    unit = (size / y.shape[-1] ** 0.5)[:, None]
    u = torch.zeros(len(requests), y.shape[-1], device=device, requires_grad=True)
    held, done = u.detach().clone(), torch.zeros(len(requests), dtype=torch.bool, device=device)

    def loss(step: int) -> Tensor:
        added = (u * unit)[owner]
        out = s.run(every, weights, at={module: lambda h: h.index_put((rows, place), added.to(h.dtype), True)}).logits
        each = means(target_nll(out[: len(texts)], texts), first) + how.decay * (u * unit).square().sum(-1) / size**2
        if essence:
            each = each + how.kl * means(target_kl(out[len(texts) :], before, essence), last)
        done.logical_or_(each.detach() < how.enough)
        held.copy_(u.detach())
        return torch.where(done, 0.0, each).sum()  # below `enough` once all are

    def clamp(step: int) -> None:
        with torch.no_grad():
            u.mul_((how.clamp * size[:, None] / (u * unit).norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0))
            u[done] = held[done]  # Adam would carry on

    descend([u], loss, steps=how.steps, lr=how.lr, after=clamp, enough=how.enough)
    return (u * unit).detach()


@dataclass(frozen=True)
class Settle:
    """How values settle once they are written: ours, for models in which the closed form alone does not suffice."""

    steps: int = 30
    lr: float = 0.05
    """In units of a value's root mean square."""
    kl: float = 3.0
    """Weight of KL(before ‖ now) on general text."""
    enough: float = 0.02


def settled(
    s: Subject, pairs: Mapping[str, tuple[Tensor, Tensor, Tensor]], requests: Sequence[Request], how: Settle
) -> dict[str, Tensor]:
    """Parameter -> b after descent of all values together through W + b a, with a as it is. pairs: parameter -> (W, b, a).

    Minimised: mean −log p(target) over requests and their openings + kl · KL on general text, until each batch is below
    `enough`. With no steps, b as it was.
    """
    unit = {name: b.norm(dim=0).mean() / b.shape[0] ** 0.5 for name, (_, b, _) in pairs.items()}
    u = {name: torch.zeros_like(b).requires_grad_(True) for name, (_, b, _) in pairs.items()}
    order = shuffled(len(requests), 8, s.generator("settle"))
    general = s.passages(4000) if how.steps and how.kl else []
    passages = shuffled(len(general), 4, s.generator("settle", "general")) if general else None

    def now() -> dict[str, Tensor]:
        return {name: w + (b + u[name] * unit[name]) @ a for name, (w, b, a) in pairs.items()}

    def loss(step: int) -> Tensor:
        texts = [t for n in next(order) for t in (requests[n].new, *requests[n].prefixed)]
        rest = [general[n] for n in next(passages)] if passages else []
        asked = target_nll(s.run(texts, now()).logits, texts).mean()
        return asked + how.kl * drift(s, rest, now()) if rest else asked

    descend(list(u.values()), loss, steps=how.steps, lr=how.lr, enough=how.enough)
    return {name: (b + u[name] * unit[name]).detach() for name, (_, b, _) in pairs.items()}


def damped(moment: Tensor, share: float) -> Tensor:
    """moment + share · (its mean diagonal) · I: invertible also where few texts were seen."""
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)


@dataclass(frozen=True)
class FactEdit(Edit):
    """What edits of located facts state in common; with `Reach`, `Settle` and `damped`."""

    role: str = "ffn.down"
    steps: int = 25
    """Steps for δ."""
    lr: float = 0.5
    """Adam's rate for δ, in units of the root mean square of what it is added to."""
    kl: float = 0.0625
    """Weight of the essence."""
    decay: float = 0.1
    """Weight of ‖δ‖² over the squared norm of what it is added to."""
    clamp: float = 4.0
    """Largest ‖δ‖ over that norm."""
    ridge: float = 0.03
    """Share of C's mean diagonal added to it: directions in which C was seen little are noise."""
    settle: int = 30
    """Steps for all values together at the end (ours; 0 leaves the published form)."""

    openings: ClassVar[int] = 3
    subjects: ClassVar[bool] = True

    @property
    def reach(self) -> Reach:
        """How δ is found."""
        return Reach(self.steps, self.lr, self.kl, self.decay, self.clamp)
