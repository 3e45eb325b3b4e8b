"""Checkpoints: everything a run needs to go on bit for bit, written whole or not at all. No pickle."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.attach import Attached
from luthier.attach.edits import assign
from luthier.attach.weights import gathered
from luthier.delta.folder import UNWRITABLE, unwritten
from luthier.delta.stream import fsync
from luthier.errors import LuthierError
from luthier.training.groups import Optimiser

NAME = re.compile(r"step-(\d{8})$")


def tensors_of(handle: Attached, optimiser: Optimiser | None, *, copy: bool = False) -> dict[str, Tensor]:
    """Trained and constant numbers, moved parameters and the optimiser's moments, gathered on the CPU.

    On a CPU they are the run's own memory unless `copy`: to be written before the next step. None leaves the moments
    out. Every process must call it.
    """
    out: dict[str, Tensor] = {}
    for piece, placed in handle.placed.items():
        for q in placed:
            for group, table in (("p", q.state.p), ("fixed", q.state.fixed)):
                for name, value in table.items():
                    out[f"{group}|{piece}|{q.state.site.name}|{name}"] = value
    for piece, table in handle.edits.items():
        for key, edit in table.items():
            if edit.index is not None and edit.values is not None:
                out[f"index|{piece}|{key}"], out[f"values|{piece}|{key}"] = edit.index, edit.values
            if edit.values is None or edit.redrawn:
                out[f"moved|{piece}|{key}"] = edit.parameter
    if optimiser is not None:
        out |= {f"optimiser|{k}": v for k, v in optimiser.state().items()}
    seen: set[int] = set()
    for name, value in out.items():
        value = gathered(value.detach()).cpu()
        at = value.untyped_storage().data_ptr()
        out[name] = value.clone() if copy or at in seen else value  # a file holds no two views of one memory
        seen.add(at)
    return out


@torch.no_grad()
def put_back(handle: Attached, tensors: Mapping[str, Tensor], *, earlier: bool = False) -> None:
    """Writes saved numbers and moved parameters into the model; every one must have its place.

    `earlier`: the tensors are of an earlier moment of this same run. Parameters that a redraw has moved since then
    return to the base, and entries drawn since then give way to those of that moment.
    """
    places: dict[str, Tensor] = {}
    for piece, placed in handle.placed.items():
        for q in placed:
            for group, table in (("p", q.state.p), ("fixed", q.state.fixed)):
                places |= {f"{group}|{piece}|{q.state.site.name}|{name}": v for name, v in table.items()}
    for piece, table in handle.edits.items():
        for key, edit in table.items():
            index, values, moved = (f"{kind}|{piece}|{key}" for kind in ("index", "values", "moved"))
            if earlier:
                assign(edit.parameter, edit.original)
                if values not in tensors and moved not in tensors:
                    continue
                edit.reindex(tensors.get(index))
            if edit.values is not None:
                places[values] = edit.values
            edit.redrawn = edit.values is not None and moved in tensors
            if edit.values is None or edit.redrawn:
                places[moved] = edit.parameter
    saved = {k: v for k, v in tensors.items() if not k.startswith(("optimiser|", "index|", "best|", "callback|"))}
    if set(saved) != set(places):
        odd = sorted(set(saved) ^ set(places))
        raise LuthierError(
            f"the checkpoint and the plan's deltas differ at {odd[0]} ({len(odd)} such): resume with the run's own plan"
        )
    for key, value in saved.items():
        assign(places[key], value)
    if not earlier:
        handle.after_step()
        return
    for piece, table in handle.edits.items():
        for key, edit in table.items():
            if f"values|{piece}|{key}" in tensors:
                edit.write()


def selections_in(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor | None]]:
    """What choices had moved: piece -> parameter -> entries (None: whole)."""
    out: dict[str, dict[str, Tensor | None]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("|")
        if kind in ("moved", "index"):
            piece, name = rest.split("|")
            entries = out.setdefault(piece, {})
            entries[name] = value if kind == "index" else entries.get(name)
    return out


def random_states() -> dict[str, Any]:
    """States of all random generators this process uses, as JSON."""
    pack = lambda t: base64.b64encode(t.numpy().tobytes()).decode()  # noqa: E731
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": pack(torch.get_rng_state()),
        "cuda": [pack(t) for t in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "numpy": [kind, base64.b64encode(np.asarray(keys).tobytes()).decode(), *rest],
        "python": random.getstate(),
    }


def set_random_states(state: Mapping[str, Any]) -> None:
    """Puts back what `random_states` gave."""
    unpack = lambda s: torch.frombuffer(bytearray(base64.b64decode(s)), dtype=torch.uint8)  # noqa: E731
    torch.set_rng_state(unpack(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([unpack(s) for s in state["cuda"][: torch.cuda.device_count()]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), dtype=np.uint32), *rest))
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Writes folder/step-NNNNNNNN: to a neighbour, synced, then renamed; older ones over `keep` go afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    final, new = folder / f"step-{step:08d}", folder / f".new-{step:08d}"
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        save_file(dict(tensors), new / "tensors.safetensors")
        (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (*new.iterdir(), new):
            fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(new, final)
    except UNWRITABLE as e:
        shutil.rmtree(new, ignore_errors=True)
        have = latest(folder)
        where = f"the one at {have} is whole" if have else "there is no earlier one"
        raise unwritten(f"checkpoint {final}", e, where) from e
    for old in all_of(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def all_of(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in folder.iterdir() if NAME.search(p.name)] if folder.is_dir() else []
    return sorted(p for p in found if (p / "state.json").exists() and (p / "tensors.safetensors").exists())


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, if any."""
    found = all_of(folder)
    return found[-1] if found else None


def finished(run: Path) -> bool:
    """Whether a run's folder holds its delta, and no checkpoint to go on from."""
    return (run / "delta.json").exists() and latest(run / "checkpoints") is None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint."""
    try:
        return load_file(path / "tensors.safetensors"), json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as e:
        raise LuthierError(f"checkpoint {path} cannot be read ({e}): remove it to resume from the one before") from e
