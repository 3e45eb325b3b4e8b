"""A base's checkpoint with a delta on it as named tensors: each is computed when it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.algebra.checkpoints import Checkpoint, Source, mark_of
from luthier.algebra.pieces import Touch, put_on
from luthier.bridge.tensors import Files, Place, read_places
from luthier.delta import FORMS, Form, No, Site
from luthier.delta.artefact import Delta, Piece, check_files
from luthier.delta.header import read_header, site_of
from luthier.errors import LuthierError
from luthier.forms.lora import LoRA
from luthier.plan.schema import BaseSpec

ADAPTER = "adapter_config.json"
FACTOR = re.compile(r"\.lora_[AB]\.")


@dataclass(frozen=True)
class _Touch:
    """A piece of a delta at one site, its numbers still on disk."""

    piece: str
    form: Form
    scale: float
    key: str
    site: Site


class Tuned(Source):
    """A base's checkpoint with a delta on it: every tensor is the base's plus its change, computed when it is read.

    A change by a form is added in float32, one that a choice left behind gives the tuned values bit for bit. The result
    is float32 (or the choice's type) where the delta touches the tensor; with `rounded` it is of the base's own type,
    the change being rounded first, as PEFT merges.
    """

    def __init__(self, base: Checkpoint, folder: Path, name: str = "", *, rounded: bool = False) -> None:
        self.base, self.path, self.name, self.rounded = base, folder, name or str(folder), rounded
        self.folder, self.config = base.folder, dict(base.config)
        self._files = Files()
        self._memory: Delta | None = None
        self._kept: tuple[str, Tensor] = ("", torch.empty(0))
        self._numbers: dict[str, Place] = {}
        if (folder / ADAPTER).exists() and not (folder / "delta.json").exists():
            self._memory = _from_peft(folder, base)
            self.card: dict[str, Any] = dict(self._memory.base)
            self._rows = [(p.name, p.form, p.scale, p.sites) for p in self._memory.pieces]
        else:
            header = read_header(folder)
            self.card, self._lineage = header["base"], header["lineage"]
            self._numbers = read_places(folder / "delta.safetensors")
            self._files_along = check_files(folder, header)
            self._rows = [_piece(folder, entry) for entry in header["pieces"]]
        if self.card.get("new_tokens"):
            raise LuthierError(f"{self.name} brings new tokens, so that its embedding grows: 'luthier export' it to a "
                               "checkpoint and name that")  # fmt: skip
        self._touches: dict[str, list[_Touch]] = {}
        for piece, form, scale, sites in self._rows:
            if isinstance(form.dense, No):
                raise LuthierError(f"{self.name}: piece '{piece}' has no weight change: {form.dense.reason}")
            for key, site in sites.items():
                own = key if form.at == "base" else f"{site.name}.{site.parameter}"
                self._touch(_Touch(piece, form, scale, key, site), own)

    def delta(self) -> Delta:
        """The delta with the numbers of its LoRA alone: those of other forms stay on disk."""
        if self._memory is not None:
            return self._memory
        pieces = []
        for name, form, scale, sites in self._rows:
            low = type(form) is LoRA
            found = {
                k: self._read_numbers(_Touch(name, form, scale, k, s)) if low else ({}, {}) for k, s in sites.items()
            }
            p, fixed = ({k: both[i] for k, both in found.items()} for i in (0, 1))
            pieces.append(Piece(name, form, sites, p, fixed, scale))
        return Delta(pieces, dict(self.card), dict(self._lineage), files=dict(self._files_along))

    def _touch(self, touch: _Touch, parameter: str) -> None:
        tied = self.base.tied and parameter not in self.base.places
        if tied and touch.form.at == "base":
            raise LuthierError(f"{self.name}: it moves {parameter}, which the base ties to its embedding: another base")
        if parameter not in self.base.places and not tied:
            raise LuthierError(
                f"{self.name}: it changes {parameter}, and the checkpoint {self.base.name} stores no such tensor: "
                "'luthier export' it to a checkpoint and name that"
            )
        if self.base.tied and touch.form.at != "base" and (tied or touch.site.role == "embed"):
            # a change at one use of a tied matrix: the head gets a matrix of its own, as in `luthier export`
            self.config["tie_word_embeddings"] = False
            self._alone = self._head_name()
        self._touches.setdefault(parameter, []).append(touch)
        bias = f"{touch.site.name}.bias"
        if touch.form.at != "base" and touch.site.parameter != "bias" and bias in self.base.places:
            self._touches.setdefault(bias, []).append(touch)

    _alone: str = ""
    """Name of the head where it is stored although the base ties it."""

    def _head_name(self) -> str:
        return "lm_head.weight"

    def _embedding(self) -> str:
        found = [
            n for n in self.base.names() if n.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
        ]
        if not found:
            raise LuthierError(
                f"{self.base.name} ties its head to an embedding of unknown name: 'luthier export' {self.name}"
            )
        return found[0]

    def names(self) -> list[str]:
        return self.base.names() + ([self._alone] if self._alone and self._alone not in self.base.places else [])

    def touched(self) -> list[str]:
        """The tensors that the delta may change."""
        return [n for n in self.names() if n in self._touches]

    def __contains__(self, name: str) -> bool:
        return name in self.base.places or bool(self._alone) and name == self._alone

    def _origin(self, name: str) -> str:
        return name if name in self.base.places else self._embedding()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._origin(name))

    def dtype(self, name: str) -> torch.dtype:
        stored = self.base.dtype(self._origin(name))
        if self.rounded or name not in self._touches:
            return stored
        kinds = [getattr(torch, getattr(t.form, "dtype", "float32")) for t in self._touches[name]]
        for kind in kinds:
            stored = torch.promote_types(stored, kind)
        return stored

    def read(self, name: str, out: Tensor | None = None, first: int = 0) -> Tensor:
        if name not in self._touches:
            return self.base.read(self._origin(name), out, first)
        whole = self._kept[1] if self._kept[0] == name else self._tuned(name)
        if out is None:
            return whole
        out.view(-1).copy_(whole.reshape(-1)[first : first + out.numel()])
        more = first + out.numel() < whole.numel()
        self._kept = (name, whole) if more else ("", whole.new_empty(0))  # the next piece asks for the same
        return out

    def _tuned(self, name: str) -> Tensor:
        touches = [Touch(t.piece, t.form, t.scale, t.site, *self._read_numbers(t)) for t in self._touches[name]]
        stored = self.base.read(self._origin(name))
        try:
            made = put_on(name, stored, touches, self._other, self.rounded)
        except LuthierError as e:
            raise LuthierError(f"{self.name}: {e}") from e
        return made.to(self.dtype(name)).contiguous()

    def _other(self, name: str) -> Tensor | None:
        return self.base.read(self._origin(name)) if name in self else None

    def _read_numbers(self, touch: _Touch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self._memory is not None:
            piece = next(p for p in self._memory.pieces if p.name == touch.piece)
            return piece.p.get(touch.key, {}), piece.fixed.get(touch.key, {})
        found: dict[str, dict[str, Tensor]] = {"p": {}, "fixed": {}}
        for group, table in found.items():
            start = f"{touch.piece}/{touch.key}/{group}/"
            for key, place in self._numbers.items():
                if key.startswith(start):
                    table[key[len(start) :]] = torch.empty(place.shape, dtype=place.dtype)
                    self._files.read(place, table[key[len(start) :]])
        if not found["p"] and not found["fixed"]:
            raise LuthierError(f"{self.name}: piece '{touch.piece}' has no tensor for site {touch.key}: copy it again")
        p, fixed = touch.form.restored(touch.site, found["p"], found["fixed"])
        return dict(p), dict(fixed)

    def close(self) -> None:
        self.base.close()
        self._files.close()


def _piece(folder: Path, entry: Mapping[str, Any]) -> tuple[str, Form, float, dict[str, Site]]:
    name = entry["name"]
    try:
        form = FORMS.make(entry["form"], entry["settings"])
    except LuthierError as e:
        raise LuthierError(f"{folder / 'delta.json'}: piece '{name}': {e}") from e
    sites = {key: site_of(site, folder / "delta.json", name, key) for key, site in entry["sites"].items()}
    return name, form, entry.get("scale", 1.0), sites


def _from_peft(folder: Path, base: Checkpoint) -> Delta:
    from luthier.bases.load import load_base
    from luthier.bridge.peft_in import from_peft

    on = load_base(BaseSpec.model_validate({"name": str(base.folder)}), weights=False, tokenizer=False)
    on.fingerprint = mark_of(base, str(on.dtype).removeprefix("torch."))
    try:
        return from_peft(folder, on)
    except NotImplementedError:  # DoRA, modules saved whole: they need numbers of the base, of which none is in memory
        _fill(on.model, base, folder)
    try:
        return from_peft(folder, on)
    except NotImplementedError as e:  # under other names in the checkpoint than in memory
        raise LuthierError(f"{folder} needs its base's weights to be read: 'luthier import' it first ({e})") from e


def _fill(model: Any, base: Checkpoint, folder: Path) -> None:
    """Gives modules of a model made without numbers the checkpoint's: those an adapter has more of than LoRA's factors."""
    named = [k for k in read_places(folder / "adapter_model.safetensors") if not FACTOR.search(k)]
    for module_name, module in model.named_modules():
        if not any(f".{module_name}." in key for key in named):
            continue
        for name in list(module._parameters):
            if (full := f"{module_name}.{name}") in base:
                module._parameters[name] = torch.nn.Parameter(base.read(full), requires_grad=False)
