"""One vocabulary for models that have several: which tokens the merged model has, and whose rows each of them gets.

The rules are those of the field's merge files (`tokenizer_source`, `tokenizer: {source, tokens, pad_to_multiple_of}`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.bases.tokens import load_tokenizer
from luthier.errors import LuthierError


@dataclass(frozen=True)
class Wish:
    """What is stated of one token."""

    model: int | None = None
    """Place of the model whose row it gets."""
    row: int | None = None
    """Of that model, where it is not the token's own."""
    zero: bool = False
    force: bool = False
    """Also in models that have a row of their own."""

    @property
    def stated(self) -> bool:
        """Whether it says where the row comes from."""
        return self.zero or self.model is not None


@dataclass
class Vocabulary:
    """The result's tokens, and where they are in every model's tables."""

    tokenizer: Any
    places: list[Tensor]
    """For each model, by the result's id: the model's own id of that token, −1 where it has none. int64 [n]."""
    base: int | None
    """Place of the base among the models."""
    rows: int
    """Rows of the result's embedding and head."""
    ids: Tensor
    """Ids that stand for a token, sorted."""
    wishes: dict[int, Wish] = field(default_factory=dict)
    """By the result's id."""

    @property
    def vocab_size(self) -> int:
        """What the config says: the rows."""
        return self.rows

    def align(self, name: str, tensors: Sequence[Tensor], models: Sequence[int]) -> list[Tensor]:
        """Tables [rows of the model, …] of the models at these places -> tables [rows of the result, …], one each.

        A token that a model has keeps that model's row. One that it lacks gets a row by the first rule that holds: what
        is stated for it; the row of the only model that has it; the base's; the mean of all that have it; zero where none
        does. Rows beyond the vocabulary are the mean of all others. In the widest type of the tensors.
        """
        if len({t.shape[1:] for t in tensors}) > 1:
            told = ", ".join(" x ".join(map(str, t.shape)) for t in tensors)
            raise LuthierError(f"{name}: the tables differ in more than their rows ({told}): merge models of one width")
        dtype = tensors[0].dtype
        for t in tensors:
            dtype = torch.promote_types(dtype, t.dtype)
        tensors = [t.to(dtype) for t in tensors]
        size, at = int(self.ids.max()) + 1, torch.stack([self.places[m] for m in models])
        for t, place, m in zip(tensors, at, models, strict=True):
            if int(place.max()) >= t.shape[0]:
                raise LuthierError(
                    f"{name}: model {m + 1} has {t.shape[0]} rows and a token of number {int(place.max())}: its tokenizer is "
                    "not its own"
                )
        forced = torch.zeros(size, dtype=torch.bool)
        for i, wish in self.wishes.items():
            forced[i] = wish.force
        real = torch.zeros(size, dtype=torch.bool)
        real[self.ids] = True
        spare = self._spare(name, tensors, at, models, real & (forced | (at < 0).any(0)))
        out = []
        for t, place in zip(tensors, at, strict=True):
            table = t.new_zeros(self.rows, *t.shape[1:])
            own = ((place >= 0) & ~forced & real).nonzero()[:, 0]
            table[own] = t[place[own]]
            lacking = (((place < 0) | forced) & real).nonzero()[:, 0]
            table[lacking] = spare[lacking]
            if self.rows > size:
                table[size:] = table[:size].mean(0)
            out.append(table)
        return out

    def _spare(self, name: str, tensors: list[Tensor], at: Tensor, models: Sequence[int], needed: Tensor) -> Tensor:
        """Rows for models that have none, [n, …]; only those `needed` are filled."""
        spare = tensors[0].new_zeros(at.shape[1], *tensors[0].shape[1:])
        has = at >= 0
        free = needed.clone()
        for i, wish in self.wishes.items():
            if wish.stated:
                free[i] = False
                if needed[i] and not wish.zero:
                    spare[i] = self._stated(name, i, wish, tensors, at, models)
        count = has.sum(0)
        base = models.index(self.base) if self.base is not None and self.base in models else None
        from_base = free & (count > 1) & (has[base] if base is not None else False)
        shared = (free & (count > 1) & ~from_base).nonzero()[:, 0]
        total = spare[shared]
        for t, place, there in zip(tensors, at, has, strict=True):
            only = (free & (count == 1) & there).nonzero()[:, 0]
            spare[only] = t[place[only]]
            mine = there[shared]
            total[mine] = total[mine] + t[place[shared[mine]]]
        spare[shared] = total / count[shared].view(-1, *[1] * (spare.dim() - 1)).to(total.dtype)
        if base is not None:
            rows = from_base.nonzero()[:, 0]
            spare[rows] = tensors[base][at[base, rows]]
        return spare

    def _stated(
        self, name: str, i: int, wish: Wish, tensors: list[Tensor], at: Tensor, models: Sequence[int]
    ) -> Tensor:
        token = self.tokenizer.convert_ids_to_tokens(i)
        if wish.model is None or wish.model not in models:
            raise LuthierError(f"tokenizer.tokens: {token!r} takes its row of a model that has no {name}: name another")
        k = models.index(wish.model)
        row = int(at[k, i]) if wish.row is None else wish.row
        if row < 0:
            raise LuthierError(f"tokenizer.tokens: model {wish.model + 1} has no token {token!r}: name one that has it")
        if row >= tensors[k].shape[0]:
            raise LuthierError(
                f"tokenizer.tokens: {token!r}: model {wish.model + 1} has {tensors[k].shape[0]} rows, not {row + 1}"
            )
        return tensors[k][row]


def reconcile(
    source: str | Path,
    folders: Sequence[Path],
    base: int | None = None,
    tokens: Mapping[str, Mapping[str, Any]] | None = None,
    pad_to_multiple_of: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Vocabulary:
    """The vocabulary of a merge of the models in `folders`.

    source: 'union' (the base's tokens, then every other model's in order), 'base', or the folder whose tokenizer is taken.
    base: place of the base; default the first model stands in where a tokenizer is needed, and no row is preferred.
    tokens: token -> {source, force}; a source is a model's place, {kind: zero}, or {kind: model_token, model: place,
    token: text | token_id: number}. Tokens that are not in the result yet are added. pad_to_multiple_of: rows are rounded
    up. sizes: rows that each model's config states (vocab_size); tokens beyond are not the model's; 0 for not stated.
    A folder without a tokenizer counts as having the base's. Differs from mergekit: new tokens of a union come in the
    order of their ids.
    """
    first = base if base is not None else 0
    sizes = list(sizes) if sizes is not None else [0] * len(folders)
    words = [_read(folder) if i != first else None for i, folder in enumerate(folders)]
    words[first] = _stripped(folders[first], sizes[first])
    there = {i: w for i, w in enumerate(words) if w is not None}
    if source == "base":
        made = there[first]
    elif source == "union":
        order = {first: there[first]} | there
        made = _union(order, sizes)
    else:
        made = load_tokenizer(Path(source))
    known = set(made.get_vocab())
    for token in tokens or {}:
        if token not in known:
            made.add_tokens(token)
    table = made.get_vocab()
    ids = torch.tensor(sorted(table.values()))
    size = int(ids.max()) + 1
    places = []
    for i in range(len(folders)):
        own = there.get(i, there[first]).get_vocab()
        rows = sizes[i] or len(own)
        place = torch.full((size,), -1)
        for token, new in table.items():
            if (old := own.get(token, -1)) < rows:
                place[new] = old
        places.append(place)
    n = size
    if pad_to_multiple_of:
        n += -n % pad_to_multiple_of
    wishes = {table[t]: _wish(t, stated, there, first) for t, stated in (tokens or {}).items()}
    return Vocabulary(made, places, base, n, ids, wishes)


def _wish(token: str, stated: Mapping[str, Any], words: Mapping[int, Any], first: int) -> Wish:
    source, force = stated.get("source"), bool(stated.get("force", False))
    if source is None:
        if force:
            raise LuthierError(f"tokenizer.tokens: {token!r} is forced and no source is stated: state it")
        return Wish()
    if isinstance(source, int):
        return Wish(model=source, force=force)
    where = f"tokenizer.tokens: {token!r}"
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind == "zero":
        return Wish(zero=True, force=force)
    if kind != "model_token" or not isinstance(source.get("model"), int):
        raise LuthierError(
            f"{where}: a source is a model, {{kind: zero}} or {{kind: model_token, model, token or token_id}}"
        )
    number, text = source.get("token_id"), source.get("token")
    if (number is None) == (text is None):
        raise LuthierError(f"{where}: state either token or token_id")
    if number is None:
        number = words.get(source["model"], words[first]).get_vocab().get(text)
        if number is None:
            raise LuthierError(f"{where}: model {source['model'] + 1} has no token {text!r}")
    if number < 0:
        raise LuthierError(f"{where}: token_id must be 0 or more, got {number}")
    return Wish(model=source["model"], row=int(number), force=force)


def _read(folder: Path) -> Any:
    """The tokenizer in a folder; None where there is none."""
    if not any(
        (folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        return None
    return load_tokenizer(folder)


def _stripped(folder: Path, rows: int) -> Any:
    """The base's tokenizer without tokens that its tables have no row for."""
    words = load_tokenizer(folder)
    table = words.get_vocab()
    idle = {t for t, i in table.items() if rows and i >= rows}
    if not idle:
        return words
    backend = getattr(words, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if state["model"].get("type") != "BPE":
        raise LuthierError(
            f"{folder}: {len(idle)} tokens without a row, and its tokenizer is no fast BPE: remove them, or name another source"
        )
    from tokenizers import Tokenizer

    state["added_tokens"] = [row for row in state["added_tokens"] if row["id"] < rows]
    model: dict[str, Any] = state["model"]
    model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in idle}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [
        m for m, parts in zip(model["merges"], merges, strict=True) if not idle & {*parts, "".join(parts)}
    ]
    words._tokenizer = Tokenizer.from_str(json.dumps(state))
    return words


def _union(words: Mapping[int, Any], sizes: Sequence[int]) -> Any:
    """The first tokenizer with the tokens of all others added: plain ones in the order of their ids, then added ones."""
    first = next(iter(words.values()))
    plain: dict[str, None] = {}
    added: dict[str, Any] = {}
    for i, each in words.items():
        table, own = each.get_vocab(), each.added_tokens_decoder
        rows = sizes[i] or len(table)
        marks = {info.content for info in own.values()}
        plain |= dict.fromkeys(
            t for t, n in sorted(table.items(), key=lambda row: row[1]) if n < rows and t not in marks
        )
        for number, info in own.items():
            if number < rows:
                added.setdefault(info.content, info)
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        made = load_tokenizer(Path(folder))
    known = first.get_vocab()
    made.add_tokens([t for t in plain if t not in known and t not in added])
    made.add_tokens(list(added.values()))
    return made
