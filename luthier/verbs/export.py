"""export: a delta as a PEFT adapter folder or as a plain Hugging Face checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from luthier.delta.artefact import Delta
from luthier.delta.folder import refuse_existing
from luthier.errors import LuthierError, nearest

FORMATS = ("hf", "peft")


def export(
    delta: str | os.PathLike[str] | Delta,
    to: str,
    out: str | os.PathLike[str],
    *,
    base: Any = None,
    max_shard_size: str = "5GB",
    **fields: Any,
) -> Path:
    """Writes `delta` to the folder `out`, which must be new or empty, as 'peft' or 'hf'; gives the folder.

    base: default the one that the delta names. fields: of BaseSpec (dtype …), for the base it is folded into. A delta that
    is nothing but exact differences in one type is written in that type, or in the base's own where that is wider, unless
    another is stated.
    """
    if to not in FORMATS:
        raise LuthierError(f"export knows no format '{to}': {nearest(to, FORMATS, 'format')}")
    from luthier.bridge.hf import export_hf
    from luthier.bridge.peft import to_peft
    from luthier.bridge.proof import refuse, same_base
    from luthier.verbs.load import load_base_for

    refuse_existing(out, [delta, base])
    own = delta if isinstance(delta, Delta) else Delta.load(delta)
    name = base if base is not None else own.base.get("name")
    if name is None:
        raise LuthierError("the delta names no base: state it (--base)")
    exact = {getattr(piece.form, "dtype", None) if piece.form.at == "base" else None for piece in own.pieces}
    if len(exact) == 1 and None not in exact and isinstance(name, (str, os.PathLike)):
        fields = {"dtype": _wider(str(exact.pop()), str(own.base.get("fingerprint") or "").split(":")[-1])} | fields
    on = load_base_for(name, [own], fields, None)
    refuse(
        [c for c in same_base(own, on) if c.name in ("base", "dtype")], str(delta) if delta is not own else "the delta"
    )
    if to == "peft":
        return to_peft(own, out, base=on)
    export_hf(on, own, out, max_shard_size)
    return Path(out)


def _wider(tuned: str, base: str) -> str:
    """The type, of those two, that holds the values of both: exact differences need the base's own bits."""
    import torch

    sizes = {
        name: torch.finfo(getattr(torch, name)).bits
        for name in (tuned, base)
        if name in ("float32", "bfloat16", "float16")
    }
    return max(sizes, key=sizes.__getitem__, default=tuned)
