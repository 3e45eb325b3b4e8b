"""A checkpoint folder as the model that transformers would make of it, one parameter at a time, never the whole."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.attach.sites import parameter_items
from luthier.bases.fingerprint import base_tensors
from luthier.bases.load import load_base
from luthier.bases.locate import locate, read_json
from luthier.bases.tokens import start_rows
from luthier.bridge.tensors import Files, Place, places_of
from luthier.bridge.weights_file import DTYPES
from luthier.delta import Site
from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)


class Checkpoint:
    """Names, shapes and layouts in memory; values on disk until they are asked for.

    A delta speaks of parameters as the model holds them, and files may name, split and lay them out otherwise (GPT-2
    without its prefix, one matrix an expert where the model has one tensor for all). The rules are transformers' own.
    """

    def __init__(self, name: str | os.PathLike[str] | BaseSpec, kind: str | None = None) -> None:
        """name: a folder, 'practice', or a hub name; a BaseSpec with new tokens gives the base with rows for them, as it is
        when loaded. kind: causal, classify or seq2seq; default as the config says."""
        spec = name if isinstance(name, BaseSpec) else BaseSpec.model_validate({"name": os.fspath(name)})
        folder = locate(spec)
        kind = kind or kind_in(folder)
        words = spec.tokenizer is not None or has_tokenizer(folder)
        base = load_base(spec.model_copy(update={"kind": kind}), weights=False, tokenizer=words)
        self.spec, self.name, self.folder, self.kind = spec, spec.name, folder, kind
        self.model: Any = base.model
        self.roles = base.roles
        self.tokenizer: Any = base.tokenizer
        self.new_rows = base.new_rows
        self.tables = frozenset(_tables(self.model)) if self.new_rows else frozenset()
        """Names of the parameters in which the new tokens have rows."""
        self.places: dict[str, Place] = places_of(folder)
        self._files = Files()
        self._sources = _sources(self.model, list(self.places))
        self._aliases = _aliases(self.model)
        taken = {key for keys, _ in self._sources.values() for key, _ in keys}
        self.unread = sorted(set(self.places) - taken)
        """Names in the files that the model has no place for."""
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @cached_property
    def items(self) -> dict[str, Site]:
        """Every parameter by its full name in memory; of tied ones the first."""
        return parameter_items(self.roles, self.model)

    @property
    def names(self) -> list[str]:
        """Parameters and saved buffers in the order in which fingerprints take them; tied ones once."""
        return [name for name, _ in base_tensors(self.model)]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in memory, by every name that a parameter or saved buffer has."""
        return {n: tuple(t.shape) for n, t in self.model.state_dict().items()}

    def aliases(self, name: str) -> list[str]:
        """Other names that the model has for the same tensor."""
        return self._aliases.get(name, [])

    def raw(self, key: str) -> Tensor:
        """A tensor under its name in the file, in memory of its own."""
        place = self.places[key]
        out = torch.empty(place.shape, dtype=place.dtype)
        self._files.read(place, out)
        return out

    def __contains__(self, name: str) -> bool:
        return self._found(name) is not None

    def _found(self, name: str) -> str | None:
        return next((n for n in (name, *self._aliases.get(name, ())) if n in self._sources), None)

    def _owned(self, name: str) -> str:
        if (own := self._found(name)) is None:
            raise LuthierError(f"{self.folder} lacks {name}: the checkpoint is not whole; copy it again")
        return own

    def stored_as(self, name: str) -> torch.dtype:
        """The type in which a parameter lies in the file. Errors: LuthierError where the folder lacks it."""
        return self.places[self._sources[self._owned(name)][0][0][0]].dtype

    def tensor(self, name: str) -> Tensor:
        """A parameter's values in memory's layout and the file's type, with the rows of new tokens; read when it is asked
        for. Errors as of `stored`."""
        value = self.stored(name)
        if name not in self.tables:
            return value
        more = self.shapes[name][0] - value.shape[0]
        value = torch.cat([value, value.new_zeros(more, *value.shape[1:])])
        start_rows(value, self.new_rows)
        return value

    def stored(self, name: str) -> Tensor:
        """The same without rows of new tokens, as the base's fingerprint takes it.

        Raises LuthierError where the folder lacks it, its shape is not the config's, or it is not floating point.
        """
        own = self._owned(name)
        keys, converter = self._sources[own]
        if converter is None:
            value = self.raw(keys[0][0])
        else:
            first, made = self._last
            if first != keys[0][0]:
                made = self._converted(own, keys, converter)
                self._last = (keys[0][0], made)
            value = made[own]
        wanted = self.shapes[name]
        if name in self.tables and min(self.new_rows) <= value.shape[0] <= wanted[0]:
            wanted = (value.shape[0], *wanted[1:])
        if tuple(value.shape) != wanted:
            raise LuthierError(
                f"{self.folder}: {name} has shape {tuple(value.shape)}, its config says {wanted}: fetch it again"
            )
        if value.dtype not in DTYPES.values():
            raise LuthierError(
                f"{self.folder}: {name} is stored as {str(value.dtype)[6:]}: dequantise the checkpoint first"
            )
        return value

    def _converted(self, name: str, keys: list[tuple[str, str]], converter: Any) -> dict[str, Tensor]:
        one = copy.deepcopy(converter)
        target = next(n for n, (k, c) in self._sources.items() if c is converter and k == keys)
        for key, pattern in keys:
            one.add_tensor(target, key, pattern, self.raw(key))
        made = one.convert(target, model=self.model, config=self.model.config)
        out = {n: v[0] if isinstance(v, list) else v for n, v in made.items()}
        if name not in out:
            raise LuthierError(f"{self.folder}: transformers makes {', '.join(out)} of {keys[0][0]}, not {name}")
        return out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of all, in the order of `names`."""
        for name in self.names:
            yield name, self.tensor(name)

    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every value exactly."""
        found: torch.dtype | None = None
        for kind in {place.dtype for place in self.places.values()} & set(DTYPES.values()):
            found = kind if found is None else torch.promote_types(found, kind)
        return found or torch.float32


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / f).is_file() for f in TOKENIZER_FILES)


def kind_in(folder: Path) -> str:
    """causal, classify or seq2seq, by a checkpoint's config."""
    config = read_json(folder / "config.json")
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    stated = " ".join(config.get("architectures") or ())
    return "classify" if "ForSequenceClassification" in stated else "causal"


def _tables(model: Any) -> list[str]:
    """Names of the embedding's and the head's weights, tied ones too."""
    tables = [t for t in (model.get_input_embeddings(), model.get_output_embeddings()) if t is not None]
    weights = {id(t.weight) for t in tables}
    return [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in weights]


def _aliases(model: Any) -> dict[str, list[str]]:
    """Name -> the other names of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(name)
    return {n: [m for m in same if m != n] for same in groups.values() for n in same}


def _sources(model: Any, keys: list[str]) -> dict[str, tuple[list[tuple[str, str]], Any]]:
    """Name in memory -> ([(name on disk, the converter's pattern)], converter or None), by transformers' own rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    held = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, tuple[list[tuple[str, str]], Any]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, held)
        if name not in held and key in held:
            name, pattern = rename_source_key(key, [], [], prefix, held)
        if name not in held:
            continue  # constants of old checkpoints; what is missing shows when it is asked for
        if pattern is None:
            found[name] = ([(key, "")], None)
            continue
        converter = by_pattern[pattern]
        if name not in found or found[name][1] is None:
            found[name] = ([], copy.deepcopy(converter))
        found[name][0].append((key, pattern))
        for target in converter.target_patterns[1:]:
            found[name.replace(converter.target_patterns[0], target)] = found[name]
    return found
