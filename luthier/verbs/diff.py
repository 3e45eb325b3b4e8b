"""diff: two checkpoints in, the delta between them out."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from luthier.algebra.diff import Diff, Extraction
from luthier.algebra.diff import diff as take
from luthier.bases.hardware import total_memory
from luthier.bridge.checkpoint import Checkpoint
from luthier.delta.folder import refuse_existing
from luthier.errors import LuthierError

__all__ = ["Diff", "diff"]
SHARE = 0.5
"""Of the machine's memory, what the models may take for probes to be recorded."""


def diff(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    sites: Sequence[str] = (),
    rest: str = "exact",
    probes: bool = True,
) -> Diff:
    """Writes the delta from the checkpoint `base` to `tuned` to the folder `out`, which must be new or empty.

    base, tuned: checkpoint folders of one architecture, hub names, or 'practice'. Without rank, energy and ratio the
    delta is exact: applied it gives the tuned values bit for bit. With any of them the linear maps (or `sites`) become a
    LoRA: at most `rank` directions a weight, as many as hold the share `energy` of the change's squared norm, none with a
    singular value below `ratio` of the largest; `rest` says what becomes of what else changed. Checkpoints are read
    tensor by tensor; probes need the base in memory and are left out, with a note, where it does not fit.
    """
    stated = any(v is not None for v in (rank, energy, ratio))
    if not stated and (sites or rest != "exact"):
        raise LuthierError("sites and rest belong to an extraction: state a rank, an energy or a ratio with them")
    how = Extraction(rank, energy, ratio, tuple(sites), rest) if stated else None
    refuse_existing(out, [base, tuned])
    one, two = Checkpoint(base), Checkpoint(tuned)
    found = take(one, two, out, how)
    if probes:
        _probe(found, one, Path(out))
    return found


def _probe(found: Diff, base: Checkpoint, out: Path) -> None:
    """Adds probes to the delta in the folder, or a note why there are none."""
    numbers = sum(math.prod(base.shapes[n]) for n in base.names)
    need, there = 12 * numbers, total_memory("cpu")  # the base in float32, what is edited, and the delta
    if need > SHARE * there:
        found.notes.append(f"no probes: they need about {need / 1e9:.0f} GB of memory, there are {there / 1e9:.0f}")
        return
    from luthier.bridge.proof import prove
    from luthier.delta.artefact import Delta
    from luthier.verbs.load import load_base_for

    delta = Delta.load(out)
    seals, card = delta.seals, dict(delta.base)
    try:
        prove(delta, load_base_for(base.name, [delta], {}, None))
    except LuthierError as e:
        found.notes.append(f"no probes: {e}")
        return
    delta.seals, delta.base = seals, card
    link = out.with_name(f".{out.name}-{os.getpid()}.safetensors")
    try:
        try:
            os.link(out / "delta.safetensors", link)
        except OSError:  # a file system without hard links
            shutil.copyfile(out / "delta.safetensors", link)
        delta.save(out, numbers=link)
    finally:
        link.unlink(missing_ok=True)
    found.delta.probes = delta.probes
