"""What an adapter or a delta is put on: a base as the bridge needs it, from whatever the caller has at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from luthier.attach.sites import parameter_items, site_of
from luthier.bases.fingerprint import fingerprint, fingerprint_template, fingerprint_tokenizer
from luthier.bases.roles import Roles
from luthier.delta import Site
from luthier.errors import LuthierError, nearest
from luthier.plan.schema import BaseSpec


@dataclass
class Target:
    """A model with its roles; `fresh` are parameters the checkpoint did not have (a new classifier)."""

    model: Any
    roles: Roles
    name: str
    tokenizer: Any = None
    fingerprint: str | None = None
    fresh: tuple[str, ...] = ()
    kind: str = "causal"
    new_rows: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def site(self, parameter: str) -> Site:
        """A parameter that moves, as a site; biases and other vectors too. Tied ones answer to their first name only."""
        if parameter not in self.items:
            tied = self.roles.owner.get(parameter)
            if tied is not None:
                raise LuthierError(
                    f"{parameter} is tied to {', '.join(tied.tied_with)} in this base, moving it would move both: load a "
                    "base saved with tie_word_embeddings: false"
                )
            raise LuthierError(f"the base has no parameter '{parameter}': {nearest(parameter, self.items)[:300]}")
        return self.items[parameter]

    @cached_property
    def items(self) -> dict[str, Site]:
        """Every parameter of the base by its full name; of tied ones the first."""
        return parameter_items(self.roles, self.model)

    def weight(self, module: str) -> Site:
        """The site at a module's weight."""
        return site_of(self.roles, next(p for p in self.roles.parts if p.name == module))

    def tensor(self, parameter: str) -> Tensor:
        """A parameter's values as the model holds them."""
        module, _, name = parameter.rpartition(".")
        value = self.model.get_submodule(module)._parameters[name]
        assert value is not None
        return value.detach()

    def card(self) -> dict[str, Any]:
        """What a delta says about its base."""
        mark = self.fingerprint or fingerprint(self.model, self.fresh)
        card = {"name": self.name, "fingerprint": mark, "kind": self.kind}
        if self.tokenizer is not None:
            card["tokenizer"] = fingerprint_tokenizer(self.tokenizer)
            card["template"] = fingerprint_template(self.tokenizer)
        return card | self.settings


def target(base: Any, tokenizer: Any = None) -> Target:
    """From a folder or hub name, a BaseSpec, what load_base gives, or a transformers model."""
    if isinstance(base, Target):
        return base
    if isinstance(base, (str, os.PathLike, BaseSpec)):
        from luthier.bases.load import load_base

        base = load_base(base if isinstance(base, BaseSpec) else os.fspath(base))
    if isinstance(base, nn.Module):
        name = getattr(getattr(base, "config", None), "name_or_path", "") or type(base).__name__
        return Target(base, Roles(base), name, tokenizer, kind=kind_of(base))
    settings = {k: list(v) for k in ("new_tokens", "labels") if (v := getattr(base.spec, k))}
    return Target(
        base.model,
        base.roles,
        base.name,
        tokenizer or base.tokenizer,
        base.fingerprint,
        base.new_parameters,
        base.kind,
        base.new_rows,
        settings,
    )


def kind_of(model: nn.Module) -> str:
    """causal, classify or seq2seq, from the model's class."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    return "classify" if "Classification" in type(model).__name__ else "causal"


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """A function from token ids [B, T] to logits, whatever the kind; an encoder–decoder reads the ids on both sides."""
    device = next(model.parameters()).device
    pair = bool(getattr(model.config, "is_encoder_decoder", False))

    def run(ids: Tensor) -> Tensor:
        ids = ids.to(device)
        was = model.training
        model.eval()
        try:
            extra = {"decoder_input_ids": ids} if pair else {}
            with torch.no_grad():
                return model(input_ids=ids, use_cache=False, **extra).logits if not _plain(model) else model(ids).logits
        finally:
            model.train(was)

    return run


def _plain(model: Any) -> bool:
    """Encoders take no cache argument."""
    return not hasattr(model.config, "use_cache") or kind_of(model) == "classify"
