"""Builds the bases that belong together: ``python -m luthier.practice.bases NAME``.

They stand in luthier/assets/practice/bases.yaml. A build goes on from its checkpoint when it is called again, gives the same
base however often it was interrupted (same machine, threads and torch), and ends with the base's card beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from luthier.bases.built import ASSETS, SHIPPED, entry, home, practice_folder, table
from luthier.bases.tokens import without_place
from luthier.errors import LuthierError, in_one_line
from luthier.practice import card
from luthier.practice.kept import keep, unfold
from luthier.practice.shapes import M, Size
from luthier.practice.tokenizer import MASK
from luthier.practice.train_base import Run, train

COMMAND = "python -m luthier.practice.bases"
ITEMS = 200
"""Records of each family and split in a card."""


@dataclass(frozen=True)
class Described:
    """A row of the table: what a base is, and how it comes about."""

    name: str
    about: str
    size: Size = M
    run: Run = Run()
    parent: str = ""
    """The base it starts from; without one it is freshly drawn."""
    grow: Mapping[str, int] | None = None
    """How the parent is made larger first: settings of `luthier.practice.grow.grow`."""
    tokenizer: str = "practice"
    """`practice` or `other`."""
    delta: Sequence[Mapping[str, Any]] = ()
    """Compressions in which its change from the parent may be kept, smallest first: see `luthier.practice.kept.keep`."""


def described(name: str) -> Described:
    """A base by its short name. Raises LuthierError for an unknown one."""
    row = entry(name)
    plain = {k: v for k, v in row.items() if k not in ("size", "run", "about")}
    return Described(name, row["about"], Size(**row.get("size", {})), Run(**row.get("run", {})), **plain)


def build(
    base: Described,
    folder: Path | None = None,
    minutes: float | None = None,
    tokens: int | None = None,
    items: int = ITEMS,
    stop_at: int | None = None,
) -> Path | None:
    """Trains a base into ``folder`` (default: NAME in `home()`) and gives the folder; None where the time was up, or step ``stop_at`` reached, before the end: to be called again. ``tokens`` makes the run longer or shorter; the
    stages of the text are stretched with a longer one. ``items`` of each family and split are asked for the card; 0 writes
    none. A base whose delta is in the package is made of that, unless ``tokens`` are stated.

    Raises LuthierError for sizes out of range, where the parent is not built, and where the folder holds a run or a base of
    other settings.
    """
    for what, value, least in (("tokens", tokens, 1), ("minutes", minutes, 0), ("items", items, 0)):
        if value is not None and value < least:
            raise LuthierError(f"{what} {value:g}: choose {least} at least")
    folder = folder or home() / base.name
    if (folder / "config.json").is_file():
        _as_described(base, folder, tokens)
        if items and not (folder / "card.json").is_file():
            card.write(folder, items, command=f"{card.COMMAND} --base practice/{base.name}")
        return folder
    if tokens is None and (shipped := ASSETS / "deltas" / base.name).is_dir():
        return _from_delta(base, shipped, folder)
    start, told, tokenizer = _beginning(base)
    yard = folder / "build"
    run = _lengthened(base.run, tokens, yard)
    train(yard, run, base.size, minutes, stop_at, tokenizer=tokenizer, start=start, told=told)
    if not (yard / "base" / "training.json").is_file():
        return None
    if base.delta:
        keep(yard / "base", _parent(base), base.delta, items or ITEMS)
    _settle(yard, folder)
    if items:
        card.write(folder, items, command=f"{card.COMMAND} --base practice/{base.name}")
    return folder


def _as_described(base: Described, folder: Path, tokens: int | None) -> None:
    """A finished base is the one that is asked for: made by the run that the table describes, of the length asked for, with
    its tokenizer, and from the parent that is at hand, where there is one."""
    told = json.loads((folder / "training.json").read_text())
    held = told["run"] | {"size": told["size"], "parent": told.get("parent", ""), "grown": told.get("grown")}
    held["tokenizer"] = told.get("tokenizer", base.tokenizer)
    wanted = asdict(base.run) | {"size": asdict(base.size), "parent": base.parent, "grown": base.grow}
    wanted["tokenizer"] = base.tokenizer
    free = {"stretch"} if tokens is None else {"stretch", "tokens"}
    differs = [k for k in wanted if k not in free and held.get(k) != wanted[k]]
    if tokens is not None and told["tokens_asked"] != tokens:
        differs.append("tokens")
    if not differs and base.parent and not _same_parent(base, told.get("parent_fingerprint")):
        differs.append("parent_fingerprint")
    if differs:
        raise LuthierError(
            f"practice base: {folder} holds another {base.name}, with other {', '.join(differs)}: choose another --out, or remove it"
        )


def _same_parent(base: Described, stated: str | None) -> bool:
    """Whether the parent is the one of that fingerprint; True where it is not at hand, or none is stated."""
    from luthier.bases.fingerprint import compare, fingerprint

    try:
        folder = practice_folder(_parent(base))
    except LuthierError:
        return True
    return stated is None or compare(stated, fingerprint(card.load(folder)[0])) != "different"


def _from_delta(base: Described, shipped: Path, folder: Path) -> Path:
    """The base of a delta in the package, with the record and the card that were made with it."""
    new = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    unfold(shipped, _parent(base), new)
    for name in ("training.json", "card.json", "README.md"):
        if (shipped / name).is_file():
            os.replace(new / "delta" / name, new / name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)
    return folder


def _lengthened(run: Run, tokens: int | None, yard: Path) -> Run:
    """The run at another length; its stages stretch with it. One that has begun keeps its stages, and where no length is
    stated its length."""
    begun = yard / "run.json"
    if begun.is_file():
        held = json.loads(begun.read_text())["run"]
        return replace(run, tokens=tokens or held["tokens"], stretch=held["stretch"])
    stretch = 1.0 if tokens is None or run.mixture else max(1.0, tokens / run.tokens)
    return replace(run, tokens=tokens or run.tokens, stretch=stretch)


def _beginning(base: Described) -> tuple[Callable[[], Any] | None, dict[str, Any], Any]:
    """(what makes the model to start from, what of it is put on record, the tokenizer)."""
    about: dict[str, Any] = {"base": base.name, "tokenizer": base.tokenizer}
    if not base.parent:
        words = _words(base.tokenizer)
        if base.size.kind == "bert":
            words.mask_token = MASK
        return None, about, words
    from luthier.bases.fingerprint import fingerprint

    folder = practice_folder(_parent(base))
    parent, tokenizer = card.load(folder)
    about |= {"parent": base.parent, "parent_fingerprint": fingerprint(parent)}
    about["parent_families"] = list(card.told_of(json.loads((folder / "training.json").read_text())))
    if base.grow is None:
        return partial(_itself, parent), about, tokenizer
    from luthier.practice.grow import grow

    about["grown"] = dict(base.grow)
    return partial(grow, parent, **base.grow), about, tokenizer


def _parent(base: Described) -> str:
    return "practice" if base.parent == SHIPPED else f"practice/{base.parent}"


def install(folder: Path, items: int = ITEMS) -> Path:
    """Puts a built base into the package in place of the one there, with a card of its own; gives the folder there."""
    for file in (f for f in folder.iterdir() if f.is_file() and f.name not in ("README.md", "card.json")):
        shutil.copyfile(file, card.ASSET / file.name)
    card.write(card.ASSET, items)
    return card.ASSET


def _itself(model: Any) -> Any:
    return model


def _words(which: str) -> Any:
    """The practice tokenizer, as it stands in the package or learnt now; or the other one, learnt now."""
    from transformers import AutoTokenizer

    from luthier.practice import tokenizer

    if which == "other":
        return tokenizer.train(tokenizer.OTHER_VOCABULARY, tokenizer.OTHER_PIECES)
    if (card.ASSET / "tokenizer.json").is_file():
        return without_place(AutoTokenizer.from_pretrained(card.ASSET, local_files_only=True))
    return tokenizer.train()


def _settle(yard: Path, folder: Path) -> None:
    """What the run wrote, up into the base's folder; config.json last, which says that all is there."""
    for mark in sorted(p for p in yard.iterdir() if p.name.isdigit()):
        shutil.rmtree(folder / mark.name, ignore_errors=True)
        os.replace(mark, folder / mark.name)
    for file in sorted((yard / "base").iterdir(), key=lambda p: p.name == "config.json"):
        os.replace(file, folder / file.name)
    (yard / "base").rmdir()
    (yard / "state.safetensors").unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    listed = "; ".join(f"{name}: {row['about']}" for name, row in table().items())
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, epilog=listed)
    parser.add_argument("name", help="the base to build")
    parser.add_argument(
        "--out", type=Path, help="its folder (default: $LUTHIER_PRACTICE/NAME, where practice/NAME looks)"
    )
    parser.add_argument("--minutes", type=float, help="leave after this long, to be called again (default: never)")
    parser.add_argument("--tokens", type=int, help="length of the run (default: the base's own)")
    parser.add_argument(
        "--items", type=int, default=ITEMS, help=f"records a family and split in its card (default {ITEMS})"
    )
    parser.add_argument("--install", action="store_true", help="put it into the package, as the practice base")
    told = parser.parse_args(arguments)
    try:
        items = 0 if told.install else told.items
        folder = build(described(told.name), told.out, told.minutes, told.tokens, items)
        if folder and told.install:
            folder = install(folder, told.items)
    except (LuthierError, OSError) as error:
        sys.stderr.write(f"{in_one_line(error)}\n")
        return 2
    sys.stdout.write(f"{folder}\n" if folder else f"{told.name}: not finished; call again\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
