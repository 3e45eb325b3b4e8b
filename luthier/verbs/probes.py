"""Probes of a delta that was written as a stream, where its base fits in memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from luthier.algebra.room import within_limits
from luthier.bases.hardware import total_memory
from luthier.bridge.proof import prove
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.verbs.load import load_base_for

SHARE = 0.5
"""Of the memory that there is, what the models may take for probes to be recorded."""


def add_probes(folder: str | os.PathLike[str], base: Any, numbers: int) -> tuple[dict[str, Any], list[str]]:
    """Records the probes of the delta in `folder`, and rewrites the folder with them; gives them, or a note why there are none.

    base: its name, loaded for this, or a Target in memory. numbers: how many the base has, by which it is judged whether
    it fits in half of the machine's memory and of what the process's limits leave. Seals and card stay as they are.
    """
    need = 12 * numbers  # the base in float32, what is edited, and the delta
    there = min(total_memory("cpu"), *within_limits(), 1 << 62)
    if need > SHARE * there:
        return {}, [f"no probes: they need about {need / 1e9:.1f} GB of memory, there are {there / 1e9:.1f}"]
    folder = Path(folder)
    delta = Delta.load(folder)
    seals, card = delta.seals, dict(delta.base)
    try:
        prove(delta, load_base_for(base, [delta], {}, None))
    except LuthierError as e:
        return {}, [f"no probes: {e}"]
    delta.seals, delta.base = seals, card
    link = folder.with_name(f".{folder.name}-{os.getpid()}.safetensors")
    try:
        try:
            os.link(folder / "delta.safetensors", link)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / "delta.safetensors", link)
        delta.save(folder, numbers=link)
    finally:
        link.unlink(missing_ok=True)
    return delta.probes, []
