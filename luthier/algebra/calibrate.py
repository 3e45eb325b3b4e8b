"""Calibration text, what goes into every matrix on it, and the tuning of scales to a tuned model's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.attach import Attached
from luthier.attach.weights import module_at
from luthier.bases.roles import Roles
from luthier.bridge.target import logits_of
from luthier.data.prepare import prepare
from luthier.delta import Site
from luthier.errors import LuthierError
from luthier.parts.logprobs import token_logprobs
from luthier.plan.schema import DataSpec, SourceSpec

LOGITS = 1 << 27
"""Most logits of the tuned model that are kept (512 MB): the first rows of the text."""
Run = Callable[[Tensor], Tensor]


@dataclass
class Text:
    """Rows of calibration text, ids and loss weights [n, length]; no padding."""

    ids: Tensor
    weights: Tensor

    def kept(self, vocabulary: int) -> Tensor:
        """The rows whose logits fit."""
        return self.ids[: max(1, LOGITS // (self.ids.shape[1] * vocabulary))]


def read_text(sources: Sequence[SourceSpec], tokenizer: Any, kind: str, tokens: int, length: int) -> Text:
    """The records rendered by the tokenizer's template, one after the other, cut into rows of one length.

    Errors: as reading a run's data; fewer than two tokens.
    """
    spec = DataSpec.model_validate(
        {
            "train": [s.model_dump() for s in sources],
            "max_length": max(2, tokens),
            **{"unsupervised": "drop", "end_of_turn": "allow-missing", "stream": False, "cache": False},
        }
    )
    data = prepare(spec, tokenizer, kind=kind)
    ids: list[int] = []
    weights: list[float] = []
    assert data.train is not None
    for i in range(len(data.train)):
        row = data.train[i]
        both = [(row.ids, row.weights), (row.second, row.second_weights)]
        for part, weight in both:
            if part is not None:
                ids += part.tolist()
                weights += ([0.0] * len(part)) if weight is None else weight.tolist()
        if len(ids) >= tokens:
            break
    length = min(length, len(ids))
    rows = min(len(ids), tokens) // length if length else 0
    if length < 2 or not rows:
        raise LuthierError(f"the calibration text holds {len(ids)} tokens: give a file with text in it")
    return Text(
        torch.tensor(ids[: rows * length]).view(rows, length), torch.tensor(weights[: rows * length]).view(rows, length)
    )


class _Done(Exception):
    """All layers have been seen."""


def walk(
    model: Any, roles: Roles, ids: Tensor, sites: Sequence[Site], visit: Callable[[Site, Tensor | None], None]
) -> None:
    """Hands every site to `visit` with what goes into it on the text, [N, d_in], layer by layer, in one forward pass.

    A layer runs as the model stands to see its inputs, its sites are visited (which may write their weights), and it
    runs again for those after it: so each site sees what the layers before it give after their visit. Sites outside
    the layers come last, without inputs. Memory: the inputs of one layer.
    """
    last = {}
    hooks = []
    layers = {name: [s for s in sites if s.name.startswith(f"{name}.")] for name in roles.layers}
    visited = {s.name for group in layers.values() for s in group}
    wanted = [name for name, group in layers.items() if group]

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if last.get("inside"):
                return
            last["inside"] = True
            seen = _inputs(module, name, layers[name], args, kwargs)
            last["inside"] = False
            for site in layers[name]:
                visit(site, seen.get(site.name))
            if name == wanted[-1]:
                raise _Done

        return hook

    try:
        for name in wanted:
            hooks.append(module_at(model, name).register_forward_pre_hook(enter(name), with_kwargs=True))
        if wanted:
            logits_of(model)(ids)
    except _Done:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    for site in sites:
        if site.name not in visited:
            visit(site, None)


def _inputs(layer: nn.Module, name: str, sites: Sequence[Site], args: Any, kwargs: Any) -> dict[str, Tensor]:
    """What goes into every site while a layer runs, [N, d_in]; nothing for those that are passed by."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for site in sites:

        def note(module: nn.Module, given: Any, name: str = site.name) -> None:
            seen.setdefault(name, []).append(given[0].detach().reshape(-1, given[0].shape[-1]))

        hooks.append(module_at(layer, site.name[len(name) + 1 :]).register_forward_pre_hook(note))
    try:
        layer(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {n: parts[0] if len(parts) == 1 else torch.cat(parts) for n, parts in seen.items()}


def logits(run: Run, ids: Tensor, batch: int = 8) -> Tensor:
    """[n, length, V] on the CPU in float32."""
    return torch.cat([run(part).float().cpu() for part in ids.split(batch)])


def apart(run: Run, ids: Tensor, wanted: Tensor, batch: int = 8) -> float:
    """Root mean square distance in logits from `wanted` [n, length, V]."""
    total = 0.0
    for part, target in zip(ids.split(batch), wanted.split(batch), strict=True):
        total += float((run(part).float().cpu() - target).square().sum())
    return (total / wanted.numel()) ** 0.5


def loss(run: Run, text: Text, batch: int = 8) -> float:
    """Mean loss a supervised token (of every token, where none is)."""
    weights = text.weights if bool(text.weights[:, 1:].any()) else torch.ones_like(text.weights)
    total = count = 0.0
    for ids, weight in zip(text.ids.split(batch), weights.split(batch), strict=True):
        found = run(ids)[:, :-1].flatten(0, 1)
        logp = token_logprobs(found, ids[:, 1:].flatten().to(found.device), keep=True).cpu()
        total -= float((logp * weight[:, 1:].flatten()).sum())
        count += float(weight[:, 1:].sum())
    return total / count


def scales(handle: Attached, pieces: Sequence[str]) -> list[nn.Parameter]:
    """The factors of packed pieces on a model."""
    return [q.state.p["scale"] for name in pieces for q in handle.placed[name] if "scale" in q.state.p]  # pyright: ignore


def trained(handle: Attached, pieces: Sequence[str]) -> list[nn.Parameter]:
    """All numbers of pieces that can be tuned."""
    return [v for name in pieces for q in handle.placed[name] for v in q.state.p.values()]  # pyright: ignore


def sweep(run: Run, numbers: Sequence[nn.Parameter], factors: Sequence[float], text: Text) -> list[dict[str, float]]:
    """Multiplies every scale by the factor of least loss on the text; gives factor and loss of each try."""
    start = [p.detach().clone() for p in numbers]
    tries = []

    def put(factor: float) -> None:
        with torch.no_grad():
            for p, s in zip(numbers, start, strict=True):
                p.copy_(s * factor)

    for factor in factors:
        put(factor)
        tries.append({"factor": factor, "loss": loss(run, text)})
    put(min(tries, key=lambda t: t["loss"])["factor"])
    return tries


def tune_scales(
    model: Any,
    numbers: Sequence[nn.Parameter],
    ids: Tensor,
    wanted: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> tuple[float, float]:
    """Tunes the scales so that the model's logits are `wanted` on the rows (mean squared error); gives the root of that error
    before and after. Where it did not fall the scales are as before.

    AdamW without decay, betas 0.9 and 0.999, each scale's rate `lr` times its own size, falling to 0 linearly.
    """
    run = logits_of(model)
    before = apart(run, ids, wanted)
    start = [p.detach().clone() for p in numbers]
    groups = [{"params": [p], "lr": lr * max(float(p.detach().abs().max()), 1e-12)} for p in numbers]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 1 - k / steps)
    g = torch.Generator().manual_seed(seed)
    pair = {"decoder_input_ids": None} if getattr(model.config, "is_encoder_decoder", False) else {}
    device = next(model.parameters()).device
    for p in numbers:
        p.requires_grad_(True)
    try:
        for _ in range(steps):
            rows = torch.randint(0, len(ids), (min(batch, len(ids)),), generator=g)
            x = ids[rows].to(device)
            out = model(input_ids=x, **dict.fromkeys(pair, x)).logits.float()
            (out - wanted[rows].to(device)).square().mean().backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
    finally:
        for p in numbers:
            p.requires_grad_(False)
    after = apart(run, ids, wanted)
    if not after < before:
        with torch.no_grad():
            for p, s in zip(numbers, start, strict=True):
                p.copy_(s)
        after = before
    return before, after


def tune_features(
    handle: Attached, numbers: Sequence[nn.Parameter], ids: Tensor, *, steps: int, batch: int, lr: float, seed: int
) -> dict[str, float]:
    """Tunes numbers on a model so that its hidden states are what they are with the handle off: mean squared error over all of
    them, plus the forms' penalties. Gives the error before and after, on the rows.

    AdamW as in `tune_scales`, each tensor's rate `lr` times the root mean square of its own entries.
    """
    model = handle.model
    device = next(model.parameters()).device
    before = _features_apart(handle, ids, batch)
    groups = [{"params": [p], "lr": lr * max(float(p.detach().square().mean().sqrt()), 1e-12)} for p in numbers]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 1 - k / steps)
    g = torch.Generator().manual_seed(seed)
    for p in numbers:
        p.requires_grad_(True)
    try:
        for _ in range(steps):
            x = ids[torch.randint(0, len(ids), (min(batch, len(ids)),), generator=g)].to(device)
            (_feature_loss(handle, x) + handle.penalty()).backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
    finally:
        for p in numbers:
            p.requires_grad_(False)
    return {"features": before, "tuned_features": _features_apart(handle, ids, batch)}


def _feature_loss(handle: Attached, ids: Tensor) -> Tensor:
    """Mean over hidden states of the mean squared distance from the base's."""
    with torch.no_grad(), handle.off():
        wanted = _hidden(handle.model, ids)
    found = _hidden(handle.model, ids)
    return torch.stack([(a.float() - b.float()).square().mean() for a, b in zip(found, wanted, strict=True)]).mean()


def _hidden(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    extra = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    out = model(input_ids=ids, output_hidden_states=True, **extra)
    return tuple(out.hidden_states) if not extra else (*out.encoder_hidden_states, *out.decoder_hidden_states)


@torch.no_grad()
def _features_apart(handle: Attached, ids: Tensor, batch: int) -> float:
    device = next(handle.model.parameters()).device
    parts = [float(_feature_loss(handle, part.to(device))) * len(part) for part in ids.split(batch)]
    return sum(parts) / len(ids)
