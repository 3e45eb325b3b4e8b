"""Whether a delta can lie between two checkpoints, and what it says of its base."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.bases.fingerprint import fingerprint_template, fingerprint_tokenizer
from luthier.bases.load import RECOMPUTED
from luthier.bridge.checkpoint import Checkpoint
from luthier.errors import LuthierError


def grown(base: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    """The base with rows for the tokens that `tuned` alone has, as tuning with base.new_tokens starts from it.

    `base` itself where there are none, or where they do not explain the difference (a table that is larger than its
    tokenizer, old tokens with other ids, a bias of the head): then `comparable` says what does not fit.
    """
    ours, theirs = base.tokenizer, tuned.tokenizer
    if ours is None or theirs is None:
        return base
    known, wanted = ours.get_vocab(), theirs.get_vocab()
    more = sorted(wanted.keys() - known.keys(), key=wanted.__getitem__)
    if not more or any(wanted.get(token) != i for token, i in known.items()):
        return base
    made = Checkpoint(base.spec.model_copy(update={"new_tokens": more}), base.kind)
    alike = all(made.shapes[n] == shape for n, shape in base.shapes.items() if n not in made.tables)
    fits = all(made.shapes[n] == tuned.shapes.get(n) for n in made.tables)
    return made if alike and fits and made.tokenizer.get_vocab() == wanted else base


def comparable(base: Checkpoint, tuned: Checkpoint) -> None:
    """One line where no delta can lie between the two."""
    was, now = (c.model.config.model_type for c in (base, tuned))
    if was != now or base.kind != tuned.kind:
        raise LuthierError(
            f"{base.name} is {was} ({base.kind}), {tuned.name} is {now} ({tuned.kind}): a delta lies between two models of "
            "one architecture"
        )
    ours, theirs = base.shapes, tuned.shapes
    if other := next((n for n in ours if n in theirs and ours[n] != theirs[n]), None):
        word = ""
        site = base.items.get(other)
        rows_alone = ours[other][1:] == theirs[other][1:]
        if site is not None and site.role in ("embed", "head") and rows_alone:
            rows = theirs[other][0]
            word = f"; a vocabulary of another size: resize_token_embeddings({rows}) of BASE, saved with TUNED's tokenizer, is "
            word += "the base to name; or tune with base.new_tokens"
        raise LuthierError(
            f"{other} is {_by(ours[other])} in {base.name} and {_by(theirs[other])} in {tuned.name}: not of one base{word}"
        )
    for one, two in ((base, tuned), (tuned, base)):
        if lost := sorted(n for n in one.names if n not in two.shapes):
            raise LuthierError(
                f"{one.name} has {lost[0]} ({len(lost)} such), {two.name} does not: give both configs the same switches"
            )
        if absent := [n for n in one.names if n not in one]:
            raise LuthierError(f"{one.folder} lacks {absent[0]}: the checkpoint is not whole; copy it again")
    more = [n for n in tuned.unread if not RECOMPUTED.search(n)]
    if other := next((n for n in more if n not in base.places or not _alike(base.raw(n), tuned.raw(n))), None):
        raise LuthierError(
            f"{tuned.name} holds {other}, which its config has no place for and {base.name} does not hold alike: a delta "
            "would lose it; give TUNED the config that reads it, or take the tensor out"
        )
    for name in base.names:  # tied in the base, two tensors in the tuned one
        for alias in base.aliases(name):
            own = tuned.aliases(name)
            if alias not in own and not torch.equal(tuned.tensor(alias), tuned.tensor(name)):
                raise LuthierError(
                    f"{alias} is tied to {name} in {base.name} and stands apart in {tuned.name}: save BASE with "
                    "tie_word_embeddings: false first"
                )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def one_vocabulary(base: Checkpoint, tuned: Checkpoint) -> None:
    """One line where both have a tokenizer and a token of the base is another one of the tuned model."""
    ours, theirs = base.tokenizer, tuned.tokenizer
    if ours is None or theirs is None or ours.get_vocab() == theirs.get_vocab():
        return
    changed = sum(theirs.get_vocab().get(t) != i for t, i in ours.get_vocab().items())
    more = len(set(theirs.get_vocab()) - set(ours.get_vocab()))
    raise LuthierError(
        f"different tokenizers: {changed} of {base.name}'s tokens mean another id in {tuned.name}, which has {more} "
        "more: the same ids must mean the same words; tune with base.new_tokens, or copy one tokenizer to both"
    )


def card_of(base: Checkpoint, tuned: Checkpoint) -> tuple[dict[str, Any], dict[str, bytes], list[str]]:
    """What the delta says about its base, the files that travel along, and notes."""
    notes = [
        f"{tuned.name} stores {alias} apart from {name}, and its config ties the two: the delta is of {name} alone; set "
        "tie_word_embeddings: false in both configs if the head counts"
        for name in tuned.names
        for alias in tuned.aliases(name)
        if {alias, name} <= set(tuned.places) and not _alike(tuned.raw(alias), tuned.raw(name))
    ]
    files: dict[str, bytes] = {}
    card: dict[str, Any] = {"name": base.name, "kind": base.kind, "fingerprint": None}
    ours, theirs = base.tokenizer, tuned.tokenizer
    if ours is not None and theirs is not None:
        card["tokenizer"] = fingerprint_tokenizer(ours)
        card["template"] = fingerprint_template(ours)
        one_vocabulary(base, tuned)
        if fingerprint_tokenizer(theirs) != card["tokenizer"]:
            notes.append("the tokenizers split or mark text differently, on one vocabulary: the base's counts")
        if base.spec.new_tokens:
            card |= {"new_tokens": list(base.spec.new_tokens), "seed": 0}
            files |= _saved(ours)
            notes.append(f"{len(base.spec.new_tokens)} new tokens, whose rows and tokenizer travel along")
        own = theirs.chat_template
        if isinstance(own, str) and own and fingerprint_template(own) != card["template"]:
            card["template"] = fingerprint_template(own)
            files["chat_template.jinja"] = own.encode()
            notes.append("the tuned model's chat template travels along")
    return card, files, notes


def _saved(tokenizer: Any) -> dict[str, bytes]:
    """A tokenizer's files by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
