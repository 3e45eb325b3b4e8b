"""What can be merged, compared or moved, as named tensors that are read one at a time: a checkpoint, or a base with a delta on it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.algebra.tensors import Files, Place, read_places
from luthier.attach.weights import oriented
from luthier.bases.fingerprint import compare, fingerprint_of
from luthier.bases.locate import locate, read_json
from luthier.bridge.weights_file import read_safetensors
from luthier.delta import FORMS, Form, No, Site, State
from luthier.delta.artefact import Delta
from luthier.delta.header import read_header, site_of
from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|attention\.(masked_)?bias$|position_ids$")
"""Tensors of old checkpoints that hold constants which are computed today; they are not carried on."""


class Source:
    """Named tensors on disk and the folder of files they belong to. Reading is safe from one thread at a time."""

    name: str
    """As the plan calls it."""
    folder: Path
    """Of the checkpoint: its config, tokenizer and generation config."""
    config: dict[str, Any]

    def names(self) -> list[str]:
        """All tensors, in the order of the files."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as the checkpoint stores it."""
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        """Type that `read` gives."""
        raise NotImplementedError

    def read(self, name: str, out: Tensor | None = None, first: int = 0) -> Tensor:
        """The tensor in memory of its own. With `out` (contiguous, of its type, any shape) its entries from number
        `first` on are written there instead."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the files."""

    def __contains__(self, name: str) -> bool:
        raise NotImplementedError

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that speaks of the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        stated = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        return bool(stated) if stated is not None else False


class Checkpoint(Source):
    """A Hugging Face folder: one safetensors file or shards with an index. Pickled weights are refused, unread."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder, self.name = folder, name or str(folder)
        self.config = read_json(folder / "config.json")
        self.places = _places(folder)
        self._files = Files()

    def names(self) -> list[str]:
        files = {f: i for i, f in enumerate(sorted({p.file for p in self.places.values()}))}
        return sorted(self.places, key=lambda n: (files[self.places[n].file], self.places[n].start))

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.places[name].dtype

    def read(self, name: str, out: Tensor | None = None, first: int = 0) -> Tensor:
        place = self.places[name]
        out = torch.empty(place.shape, dtype=place.dtype) if out is None else out
        self._files.read(place, out, first)
        return out

    def close(self) -> None:
        self._files.close()


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
            rows = [(p.name, p.form, p.scale, p.sites) for p in self._memory.pieces]
        else:
            header = read_header(folder)
            self.card = header["base"]
            self._numbers = read_places(folder / "delta.safetensors")
            rows = [_piece(folder, entry) for entry in header["pieces"]]
        if self.card.get("new_tokens"):
            raise LuthierError(f"{self.name} brings new tokens, so that its embedding grows: 'luthier export' it to a "
                               "checkpoint and name that")  # fmt: skip
        self._touches: dict[str, list[_Touch]] = {}
        for piece, form, scale, sites in rows:
            if isinstance(form.dense, No):
                raise LuthierError(f"{self.name}: piece '{piece}' has no weight change: {form.dense.reason}")
            for key, site in sites.items():
                own = key if form.at == "base" else f"{site.name}.{site.parameter}"
                self._touch(_Touch(piece, form, scale, key, site), own)
        for touches in self._touches.values():
            touches.sort(key=lambda t: t.form.at != "weight")

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
        stored = self.base.read(self._origin(name))
        part = name.rpartition(".")[2]
        total: Tensor | None = None
        for touch in self._touches[name]:
            site = touch.site
            numbers, fixed = self._read_numbers(touch)
            edit: Any = getattr(touch.form, "edit", None)
            if touch.form.at == "base":
                now = stored if total is None else total
                total = edit(now, State(site, numbers, fixed, lambda now=now: now))
                continue
            chained = touch.form.at != "weight"
            w_name = f"{site.name}.{site.parameter}"

            def weight(w_name: str = w_name, site: Site = site, chained: bool = chained, now: Any = total) -> Tensor:
                if w_name == name:
                    return oriented((now if chained and now is not None else stored).float(), site)
                return oriented(self.base.read(self._origin(w_name)).float(), site)

            bias = f"{site.name}.bias"
            held = self.base.read(bias).float() if bias in self.base.places else None
            if held is not None and chained and bias == name and total is not None:
                held = total
            change = touch.form.delta(State(site, numbers, fixed, weight, held))
            if isinstance(change, No):
                raise LuthierError(f"{self.name}: piece '{touch.piece}' at {site.name}: {change.reason}")
            if "bias" in change and held is None and bool(change["bias"].any()):
                raise LuthierError(
                    f"{self.name}: piece '{touch.piece}' needs a bias at {site.name}, which the base lacks: 'luthier export' "
                    "it to a checkpoint and name that"
                )
            own = "bias" if part == "bias" and site.parameter != "bias" else "weight"
            if own not in change:
                continue
            value = (oriented(change[own], site) if own == "weight" else change[own]) * touch.scale
            if self.rounded:
                total = (stored if total is None else total) + value.reshape(stored.shape).to(stored.dtype)
            else:
                total = (stored.float() if total is None else total.float()) + value.reshape(stored.shape)
        return (stored if total is None else total).to(self.dtype(name)).contiguous()

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


def open_source(name: str, lora: str | None = None, base: str | None = None, revision: str | None = None) -> Source:
    """The source called `name`: a checkpoint folder or hub name, 'practice', a delta folder or an adapter folder of PEFT.

    lora: a delta or PEFT folder to put on the checkpoint `name`. base: what a delta folder is put on, default what it
    names itself; another base than it was made on is an error that gives both fingerprints.
    """
    folder = Path(name).expanduser()
    if lora is not None:
        on = Checkpoint(_locate(name, revision), name)
        place = Path(lora).expanduser()
        if not any((place / f).exists() for f in (ADAPTER, "delta.json")):
            place = _locate(lora, None)
        source = Tuned(on, place, f"{name}+{lora}", rounded=not (place / "delta.json").exists())
    elif is_delta(folder):
        named = base or _base_of(folder)
        if not named:
            raise LuthierError(f"{name} names no base: state it (--base)")
        source = Tuned(Checkpoint(_locate(named, None), named), folder, name)
    else:
        return Checkpoint(_locate(name, revision), name)
    if (source.path / "delta.json").exists():
        _same_base(source)
    return source


def is_delta(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a delta or an adapter of PEFT, and no checkpoint."""
    folder = Path(folder).expanduser()
    return (folder / "delta.json").exists() or (folder / ADAPTER).exists() and not (folder / "config.json").exists()


def _base_of(folder: Path) -> str | None:
    if (folder / "delta.json").exists():
        return read_header(folder)["base"].get("name")
    return read_json(folder / ADAPTER).get("base_model_name_or_path")


def _locate(name: str, revision: str | None) -> Path:
    return locate(BaseSpec.model_validate({"name": name, "revision": revision}))


def _places(folder: Path) -> dict[str, Place]:
    index = folder / INDEX
    if index.exists():
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            wanted = {name: folder / file for name, file in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise LuthierError(f"{index}: no index of shards ({e}): copy the folder again") from e
        lost = sorted({f.name for f in wanted.values() if not f.exists()})
        if lost:
            raise LuthierError(f"{folder} lacks {lost[0]} ({len(lost)} shards missing): copy it again")
    else:
        wanted = {}
    files = sorted(set(wanted.values())) or sorted(folder.glob("*.safetensors"))
    if not files:
        read_safetensors(folder / "model.safetensors")  # raises with the reason
    places: dict[str, Place] = {}
    for file in files:
        places |= read_places(file)
    if absent := sorted(set(wanted) - set(places)):
        raise LuthierError(
            f"{folder}: its index names {absent[0]}, which no shard holds ({len(absent)} such): copy it again"
        )
    return places


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
    except NotImplementedError as e:  # a form that needs the base's numbers, which are not in memory here
        raise LuthierError(f"{folder} needs its base's weights to be read: 'luthier import' it first ({e})") from e


def _same_base(source: Tuned) -> None:
    """The delta's base is this checkpoint: by the sample on disk, and where names on disk differ, by loading it."""
    stated = source.card.get("fingerprint")
    if not stated:
        raise LuthierError(f"{source.path} states no fingerprint of its base: import it again, or train it here")
    here = mark_of(source.base, stated.split(":")[-1])
    if compare(stated, here) == "different":
        from luthier.bases.load import load_base

        here = str(load_base(BaseSpec.model_validate({"name": str(source.base.folder)}), tokenizer=False).fingerprint)
    if compare(stated, here) == "different":
        raise LuthierError(
            f"{source.path} was made on another base ({stated}, {source.card.get('name')}) than {source.base.name} ({here}): "
            "name its own base, or 'luthier port' it"
        )


def mark_of(source: Checkpoint, held: str) -> str:
    """The fingerprint that `bases.fingerprint` gives of the loaded model held in type `held`, where names in memory are
    those on disk; one tensor at a time, without building the model."""
    dtype = getattr(torch, held, None)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(source.places):
            if RECOMPUTED.search(name):
                continue
            value = source.read(name)
            yield name, value.to(dtype) if dtype is not None and value.is_floating_point() else value

    return fingerprint_of(tensors())
