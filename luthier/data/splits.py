"""Which files of a folder are a split: what its README.md states, as on the Hugging Face hub, or what their names say."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import LuthierError, nearest
from luthier.plan.schema import SourceSpec

WORDS = {
    **{"train": "train", "training": "train"},
    **{"validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"},
    **{"test": "test", "testing": "test", "eval": "test", "evaluation": "test"},
}
"""Words in the names of files and folders -> what they mean where none of them is the split asked for."""
SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
"""A part of a split as `datasets` writes it: its whole beginning is the split's name (train_sft-00000-of-00002)."""


def of_split(folder: Path, files: list[Path], source: SourceSpec) -> list[Path] | None:
    """Those of a folder's files that are the split (and subset) of the source; None where nothing names a split.

    Errors: a split or subset that is not there, a README.md that cannot be read or names files that are not there.
    """
    where = f"data source {source.path}"
    stated = _config(folder, source, where)
    if stated is None and source.subset:
        return None
    if stated and "data_files" in stated:
        patterns = _patterns(stated["data_files"], where)
        split = _chosen(source.split, patterns, where)
        named = {folder / p for pattern in patterns[split] for p in glob.glob(pattern, root_dir=folder, recursive=True)}
        if not (found := sorted(named & set(files))):
            raise LuthierError(
                f"{where}: README.md states {', '.join(patterns[split])} for the split {split!r}, and no file that can be "
                "read matches: fetch them, or correct it"
            )
        return found
    inner = stated and stated.get("data_dir")
    if inner:
        folder = folder / str(inner)
        files = [f for f in files if f.is_relative_to(folder)]
    by_name: dict[str, list[Path]] = {}
    for file in files:
        if name := split_of(file.relative_to(folder)):
            by_name.setdefault(name, []).append(file)
    if not by_name:
        if not inner and not source.subset:
            return None
        by_name = {"train": files}  # as on the hub
    return by_name[_chosen(source.split, by_name, where)]


def split_of(path: Path) -> str | None:
    """The split that a file is of by its name, else by the folder next above that names one; a name with the words of
    two splits names none.

    >>> split_of(Path("data/train-00000-of-00001.parquet")), split_of(Path("dev/a.jsonl")), split_of(Path("latest.csv"))
    ('train', 'dev', None)
    """
    for name in reversed(path.parts):
        words = [w for w in re.split(r"[-._ \d]+", name.lower()) if w in WORDS]
        if len({WORDS[w] for w in words}) == 1:
            shard = SHARD.match(name)
            return shard[1] if shard else words[0]
    return None


def _chosen(asked: str, there: Iterable[str], where: str) -> str:
    """The split by its own name, else by another word for it (valid, dev: validation)."""
    there = list(there)
    if asked in there:
        return asked
    alike = [name for name in there if name in WORDS and WORDS[name] == WORDS.get(asked)]
    if len(alike) != 1:
        raise LuthierError(
            f"{where} has no split {asked!r}; {nearest(asked, there, 'split')}; a glob reads files of any name"
        )
    return alike[0]


def _config(folder: Path, source: SourceSpec, where: str) -> dict[str, Any] | None:
    """What README.md states of the source's subset (of the default one where none is asked for); None where nothing."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    try:
        head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme.read_text(encoding="utf-8-sig"), re.DOTALL)
        stated = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, yaml.YAMLError) as e:
        reason = str(e).strip().splitlines()[0]
        raise LuthierError(f"{readme}: its head cannot be read ({reason}): mend it, or name the files") from e
    configs = stated.get("configs") if isinstance(stated, dict) else None
    if not configs:
        return None
    if not isinstance(configs, list) or not all(isinstance(c, dict) for c in configs):
        raise LuthierError(f"{readme}: 'configs' must be a list of tables with config_name and data_files: mend it")
    names = {str(c.get("config_name", "default")): c for c in configs}
    default = next((n for n, c in names.items() if c.get("default") is True), "default")
    wanted = source.subset or (default if default in names or len(names) > 1 else next(iter(names)))
    if wanted not in names:
        asked = f"has no subset {wanted!r}" if source.subset else "holds several subsets, state one"
        raise LuthierError(f"{where} {asked}; {nearest(wanted, names, 'subset')}")
    return names[wanted]


def _patterns(stated: Any, where: str) -> dict[str, list[str]]:
    """data_files of README.md: split -> patterns. Without splits all of them are train, as on the hub."""
    if isinstance(stated, dict):
        stated = [{"split": split, "path": path} for split, path in stated.items()]
    stated = stated if isinstance(stated, list) else [stated]
    out: dict[str, list[str]] = {}
    for entry in stated:
        entry: dict[str, Any] = entry if isinstance(entry, dict) else {"path": entry}
        path: Any = entry.get("path")
        paths: list[Any] = path if isinstance(path, list) else [path]
        if not paths or not all(isinstance(p, str) for p in paths):
            raise LuthierError(f"{where}: README.md's data_files must be paths, or tables of split and path: mend it")
        out.setdefault(str(entry.get("split", "train")), []).extend(paths)
    return out
