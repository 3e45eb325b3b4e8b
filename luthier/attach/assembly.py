"""An assembly at work: several models that answer as one, called like a transformers model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.attach.attached import HANDLE, attached
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.moving.engine import Fusion

ROWS = 1 << 22
"""Logits of one member joined at a time."""


class Voice:
    """One member: a model as it is with some pieces on and the others off, at no cost in between.

    Several voices may share one model. Hooked pieces are switched by the handle; parameters that deltas moved exist
    once for every voice that moved them, and are put in their place by exchanging pointers, never by copying.
    """

    def __init__(self, name: str, model: Any, deltas: Sequence[Delta] = ()) -> None:
        """Attaches the deltas to the model under names of this voice's own."""
        self.name, self.model = name, model
        self.pieces: frozenset[str] = frozenset()
        self.moved: dict[str, Tensor] = {}
        self.accepts = set(inspect.signature(model.forward).parameters)
        if deltas:
            self._attach(deltas)

    def _attach(self, deltas: Sequence[Delta]) -> None:
        """Puts the deltas on, keeps the values of what they moved, and leaves the base's own in place."""
        dress(self.model, None)
        handle, names, exact = attached(self.model), [], []
        for n, delta in enumerate(deltas):
            for piece in delta.pieces:
                own = replace(piece, name=f"{self.name.replace(' ', '-')}-{n}-{piece.name}")
                handle.add(own)
                (exact if own.form.at == "base" else names).append(own.name)
        tables = [handle.edits[name] for name in exact]
        self.moved = {key: edit.parameter.detach().clone() for table in tables for key, edit in table.items()}
        for name in reversed(exact):
            handle.detach(name)
        self.pieces = frozenset(names)

    def say(self, vocabulary: int, **kwargs: Any) -> tuple[Tensor, Any]:
        """Logits [B, T, V] in float32, and the cache."""
        dress(self.model, self)
        keep = kwargs.get("logits_to_keep", 0)
        given = {k: v for k, v in kwargs.items() if k in self.accepts and v is not None}
        out = self.model(return_dict=True, **given)
        logits = out.logits if "logits_to_keep" in self.accepts else out.logits[:, -keep:]
        return logits[..., :vocabulary].float(), getattr(out, "past_key_values", None)


WORN = "_luthier_worn"


def dress(model: nn.Module, voice: Voice | None) -> None:
    """Makes a model speak as one of its voices, or (None) as the base with no piece on."""
    worn = model.__dict__.setdefault(WORN, {})
    if worn.get("voice", model) is voice:
        return
    for parameter, value in worn.pop("base", []):
        parameter.data = value
    if voice is not None and voice.moved:
        kept = []
        for name, value in voice.moved.items():
            parameter = model.get_parameter(name)
            kept.append((parameter, parameter.data))
            parameter.data = value
        worn["base"] = kept
    handle = model.__dict__.get(HANDLE)
    if handle is not None:
        handle.enabled, handle.kept = False, voice.pieces if voice is not None else frozenset()
    worn["voice"] = voice


@dataclass
class Caches:
    """Keys and values of every voice, as one cache."""

    held: list[Any]

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return int(self.held[0].get_seq_length())

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens."""
        for cache in self.held:
            cache.crop(-count)

    def __getattr__(self, name: str) -> Any:
        """Keeping some rows only, where every cache can."""
        if name != "batch_select_indices" or not all(hasattr(c, name) for c in self.__dict__.get("held", [None])):
            raise AttributeError(name)
        return lambda rows: [cache.batch_select_indices(rows) for cache in self.held]


@dataclass
class Spoken:
    """What a call gives; `logits` are log-probabilities."""

    logits: Tensor
    past_key_values: Any = None


@dataclass(frozen=True)
class Parts:
    """Which voice plays which part, by number: the large one, and (expert, base) pairs. Equal members are one voice."""

    large: int
    pairs: tuple[tuple[int, int], ...] = field(default=())


class Assembly(nn.Module):
    """Several models that answer as one: forward takes what a causal transformers model takes and gives fused
    log-probabilities, so that generation, audits and probes need to know nothing of it. `off()` is the large one alone.
    """

    def __init__(self, fusion: Fusion, voices: Sequence[Voice], parts: Parts) -> None:
        """voices: no two of a kind; all of one vocabulary (whoever builds it compares tokenizers)."""
        super().__init__()
        self.fusion, self.voices, self.parts = fusion, list(voices), parts
        models = {id(v.model): v.model for v in voices}
        self.models = nn.ModuleList(models.values())
        self.vocabulary = min(int(m.get_output_embeddings().weight.shape[0]) for m in models.values())
        large = self.large.model
        self.config, self.generation_config = _config(large, models.values()), _ending(large, models.values())
        self._alone = False
        self.requires_grad_(False)

    @property
    def large(self) -> Voice:
        """The voice that is steered."""
        return self.voices[self.parts.large]

    @property
    def device(self) -> torch.device:
        """Of the large model."""
        return self.large.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the large model."""
        return self.large.model.dtype

    def get_input_embeddings(self) -> Any:
        """The large model's."""
        return self.large.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The large model's."""
        return self.large.model.get_output_embeddings()

    @contextmanager
    def off(self) -> Iterator[Assembly]:
        """The large model alone, as log-probabilities over the shared vocabulary; a cache from inside belongs inside."""
        was, self._alone = self._alone, True
        try:
            yield self
        finally:
            self._alone = was

    def join(self, logits: Sequence[Tensor]) -> Tensor:
        """Fused log-probabilities [..., V] from the logits [..., V] of every voice, a bounded number of rows at a time."""
        flat = [x.reshape(-1, x.shape[-1]) for x in logits]
        rows = max(1, ROWS // self.vocabulary)
        out = []
        for at in range(0, len(flat[0]), rows):
            part = [x[at : at + rows] for x in flat]
            pairs = [(part[e], part[b]) for e, b in self.parts.pairs]
            out.append(self.fusion.fuse(part[self.parts.large], pairs))
        return torch.cat(out).view(logits[0].shape)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Caches | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> Spoken:
        """Ids [B, T] -> log-probabilities [B, T, V] of the next token in float32."""
        kwargs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
        }
        kwargs["logits_to_keep"] = logits_to_keep
        speaking = [self.large] if self._alone else self.voices
        held: Any = past_key_values.held if past_key_values is not None else [None] * len(speaking)
        said = []
        for voice, cache in zip(speaking, held, strict=True):
            moved = {k: v.to(voice.model.device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            ids = input_ids.to(voice.model.device)
            said.append(voice.say(self.vocabulary, input_ids=ids, past_key_values=cache, **moved))
        logits = [x.to(self.device) for x, _ in said]
        fused = logits[0].log_softmax(-1) if self._alone else self.join(logits)
        return Spoken(fused, Caches([c for _, c in said]) if use_cache else None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise LuthierError("an assembly stays where and as it was loaded: state device and dtype of its bases instead")


def _config(large: Any, models: Any) -> Any:
    """The large model's, with as many positions as all have."""
    config = copy.deepcopy(large.config)
    rooms = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in models]
    if stated := [r for r in rooms if r]:
        config.get_text_config().max_position_embeddings = min(stated)
    return config


def _ending(large: Any, models: Any) -> Any:
    """The large model's generation settings, ended by whatever ends an answer of any member: the tuned ones know."""
    config = copy.deepcopy(getattr(large, "generation_config", None))
    ends: set[int] = set()
    for model in models:
        for place in (getattr(model, "generation_config", None), model.config):
            stop = getattr(place, "eos_token_id", None)
            ends |= set(stop) if isinstance(stop, (list, tuple)) else set() if stop is None else {int(stop)}
    if config is not None and ends:
        config.eos_token_id = sorted(ends)
    return config


def switch(model: Any) -> Any:
    """Whatever can show what stands behind a tuned model: an assembly itself, or the handle of a model's deltas."""
    return model if isinstance(model, Assembly) else attached(model)
