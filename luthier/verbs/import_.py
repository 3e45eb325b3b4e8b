"""import: a PEFT adapter folder in, a delta folder with seals and probes out."""

from __future__ import annotations

import os
from typing import Any

from luthier.bridge.peft import from_peft
from luthier.bridge.peft_words import base_of
from luthier.bridge.proof import prove
from luthier.delta.artefact import Delta
from luthier.delta.folder import refuse_existing


def import_(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, base: Any = None) -> Delta:
    """The delta of an adapter folder, proven on its base and, with `out`, saved there (a folder that is new or empty).

    base: default the one that adapter_config.json names.
    """
    if out is not None:
        refuse_existing(out, [folder, base])
    on = base_of(folder, base)
    delta = prove(from_peft(folder, on), on, full=True)
    if out is not None:
        delta.save(out)
    return delta
