"""Tiny bases on disk and deltas on them, for the tests of ports and assemblies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.attach import attached
from luthier.attach.sites import parameter_items, sites_for
from luthier.bases.roles import Roles
from luthier.bridge.proof import prove
from luthier.bridge.target import target
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from tests.tiny import tiny, tiny_tokenizer


def base_at(folder: Path, seed: int = 0, size: float = 0.02, words: bool = True, **settings: Any) -> Path:
    """A tiny base on disk; with a seed every weight is moved a little, as by continued training."""
    model = tiny(**settings)
    if seed:
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data.add_(size * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    if words:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def delta_of(base: Path, form: str = "lora", size: float = 0.05, seed: int = 3, **settings: Any) -> Delta:
    """A delta in this form with every trained number disturbed, proven on its base."""
    on = target(str(base))
    handle = attached(on.model)
    kind = FORMS.make(form, settings)
    piece = handle.build(form, kind, sites_for(on.roles, kind))
    handle.detach()
    g = torch.Generator().manual_seed(seed)
    for numbers in piece.p.values():
        for name, value in numbers.items():
            numbers[name] = value + size * torch.randn(value.shape, generator=g)
    return prove(Delta([piece]), on)


def full_of(base: Path, size: float = 0.05, seed: int = 3, share: float = 1.0, dtype: str = "float32") -> Delta:
    """A delta of the base's own parameters, all or a share of the entries of each, moved; proven on its base."""
    on = target(str(base))
    on.model.to(getattr(torch, dtype))
    handle = attached(on.model)
    g = torch.Generator().manual_seed(seed)
    items = parameter_items(Roles(on.model), on.model)
    chosen = {n: None if share == 1 else _some(on.tensor(n), share, g) for n in items}
    edits = handle.move("own", chosen, None)
    for edit in edits:
        with torch.no_grad():
            edit.trained.add_((size * torch.randn(edit.trained.shape, generator=g)).to(edit.trained.dtype))
    handle.after_step()
    delta = handle.delta(items)
    handle.detach()
    on.fingerprint = None  # of the model as it is held now
    return prove(delta, on)


def _some(tensor: torch.Tensor, share: float, g: torch.Generator) -> torch.Tensor:
    return torch.randperm(tensor.numel(), generator=g)[: max(1, int(share * tensor.numel()))].sort().values


def tuned(base: Path, delta: Delta) -> dict[str, torch.Tensor]:
    """Every parameter of the base with the delta folded in, and of the base alone under 'base:'."""
    on = target(str(base))
    out = {f"base:{n}": p.detach().clone() for n, p in on.model.named_parameters()}
    handle = delta.apply(on.model)
    if handle.pieces and any(p.form.at != "base" for p in handle.pieces.values()):
        handle.fold()
    out |= {n: p.detach().clone() for n, p in on.model.named_parameters() if ".luthier." not in n}
    return out
