"""What of the practice world an effect's results hang on, by its text, so that they are stale when that changes."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Sequence
from hashlib import blake2b

from luthier.practice import families as _families
from luthier.practice.world import families, taught

_IMPORTS = re.compile(r"from (luthier\.practice[\w.]*) import (\([^)]*\)|.*)")
_WORLD = re.compile(r"luthier\.practice\.(world|draw|contract|words|edits|(families|oracles)\.\w+)")


def parts(texts: Sequence[str]) -> dict[str, str]:
    """Module -> its text, for what these texts take from the world and what that imports in turn. A family is taken where
    a text, or an oracle that it imports, names it in quotes, the taught ones where ``taught`` is called. How bases are
    built and measured is no part of the world."""
    held: dict[str, str] = {}
    due = [module for text in texts for module in (*_imported(text), *_named(text))]
    while due:
        module = due.pop()
        if module not in held:
            held[module] = inspect.getsource(importlib.import_module(module))
            due += _imported(held[module])
            due += _named(held[module]) if ".oracles." in module else []
    return held


def digest(texts: Sequence[str]) -> str:
    """Of all ``parts`` of these texts."""
    told = blake2b(digest_size=8)
    for _, text in sorted(parts(texts).items()):
        told.update(text.encode())
    return told.hexdigest()


def _imported(text: str) -> list[str]:
    found = [(base, name) for base, names in _IMPORTS.findall(text) for name in re.findall(r"\w+", names)]
    modules = {module for base, name in found for module in (base, f"{base}.{name}") if _WORLD.fullmatch(module)}
    return sorted(module for module in modules if importlib.util.find_spec(module))


def _named(text: str) -> list[str]:
    names = [n for n in families() if f'"{n}"' in text or f"'{n}'" in text]
    return [f"{_families.__name__}.{n}" for n in (*names, *(taught() if "taught()" in text else ()))]
