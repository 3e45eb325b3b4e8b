"""diff: two checkpoints in, the delta between them out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from luthier.algebra.diff import Diff, Extraction
from luthier.algebra.diff import diff as take
from luthier.bridge.checkpoint import Checkpoint
from luthier.delta.folder import refuse_existing
from luthier.errors import LuthierError
from luthier.verbs.probes import add_probes

__all__ = ["Diff", "diff"]


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
        found.delta.probes, notes = add_probes(out, one.name, sum(math.prod(one.shapes[n]) for n in one.names))
        found.notes += notes
    return found
